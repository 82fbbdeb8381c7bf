"""What is found in files: how little is read for it, and what of a stranger's file is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.handmade import write_safetensors

from noether_init_core.inspection.reading import look_at_file

IO = Path("/proc/self/io")


def _read_so_far() -> int:
    """Bytes that this process has asked the system for, of whatever file."""
    return int(IO.read_text().split()[1])


@pytest.mark.skipif(not IO.exists(), reason="only Linux counts what a process reads")
@pytest.mark.parametrize("suffix", [".th", ".safetensors"])
def test_less_than_two_megabytes_of_a_large_file_are_read(tmp_path: Path, suffix: str) -> None:
    """300 tensors; their bytes, 150 times as many, are left alone."""
    path = tmp_path / f"large{suffix}"
    if suffix == ".th":
        torch.save({f"layers.{number}.weight": torch.zeros(256, 1024) for number in range(300)}, path)
    else:
        nbytes = 4 << 20
        header = {
            f"layers.{number}.weight": {
                "dtype": "F32",
                "shape": [1024, 1024],
                "data_offsets": [number * nbytes, (number + 1) * nbytes],
            }
            for number in range(300)
        }
        write_safetensors(path, header, b"")
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + 300 * nbytes)
    look_at_file(path)  # whatever is imported on the way
    before = _read_so_far()
    found = look_at_file(path)
    read = _read_so_far() - before
    assert (found.content.tensors, found.bytes > 300 << 20) == (300, True)
    assert 0 < read < 2_000_000


def test_metadata_of_a_stranger_becomes_plain_and_short(tmp_path: Path) -> None:
    """Tensors are told by dtype and shape; long texts and lists are cut; NaN and huge numbers are texts."""
    path = tmp_path / "a.pt"
    deep: list[object] = []
    for _ in range(20):
        deep = [deep]
    torch.save(
        {
            "state_dict": {"w": torch.zeros(2)},
            "rng": torch.zeros(3, dtype=torch.uint8),
            "text": "a" * 100_000,
            "list": list(range(1000)),
            "loss": float("nan"),
            "huge": 10**300,
            "deep": deep,
            3: True,
        },
        path,
    )
    found = look_at_file(path).metadata
    assert found["rng"] == {"dtype": "uint8", "shape": [3]}
    assert (len(found["text"]), len(found["list"])) == (2000, 100)
    assert (found["loss"], found["huge"], found["3"]) == ("nan", "a large number", True)
    assert "<list>" in str(found["deep"])


def test_a_file_beside_a_damaged_manifest_is_shown_with_the_problem(tmp_path: Path) -> None:
    """The file is all there; what would vouch for it is not."""
    folder = tmp_path / "sets" / "00000001_E1_U2_S3"
    folder.mkdir(parents=True)
    torch.save({"w": torch.zeros(2)}, folder / "m_cp=E1_U2_S3_model.th")
    (folder / "manifest.json").write_text("{}")
    found = look_at_file(folder / "m_cp=E1_U2_S3_model.th")
    assert (found.content.tensors, found.committed) == (1, False)
    assert [problem.endswith("is not a manifest of a checkpoint set") for problem in found.problems] == [True]
