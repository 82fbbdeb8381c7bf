"""Manifests: what is written can be read again, and a small file is read in little memory."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from noether_init_core.errors import CheckpointCorruptError, CheckpointFormatError, ConfigError
from noether_init_core.sets.manifest import (
    Manifest,
    ManifestFile,
    digest_of,
    digests_to_bytes,
    read_digests,
    read_manifest,
    sealed,
)

DIGEST = f"xxh3_128:{0:032x}"


def manifest(**fields: Any) -> Manifest:
    """Of a set of one model at E1_U2_S3; ``fields`` replace or complete it."""
    files = tuple(
        ManifestFile(name=f"mlp_cp=E1_U2_S3_{part}.th", model="mlp", part=part, size=1, digest=DIGEST, records=DIGEST)
        for part in ("model", "trainer")
    )
    known = {
        "sequence": 1,
        "iteration": {"epoch": 1, "update": 2, "sample": 3},
        "tags": ("E1_U2_S3", "latest"),
        "run_id": "run",
        "created": "now",
        "seen": (("mlp", "model"),),
        "files": files,
        "digests": DIGEST,
        "digests_size": 7,
    }
    return Manifest(**{**known, **fields})


@settings(max_examples=50, deadline=None)
@given(
    metrics=st.dictionaries(st.text(max_size=5), st.none() | st.floats(allow_nan=False, allow_infinity=False)),
    lineage=st.lists(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text() | st.booleans())),
    run_id=st.text(max_size=9),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, metrics: Any, lineage: Any, run_id: str
) -> None:
    """Whatever names, numbers and texts are in it."""
    written = manifest(metrics=metrics, lineage=tuple(lineage), run_id=run_id)
    path = tmp_path_factory.mktemp("set") / "manifest.json"
    path.write_bytes(written.to_bytes())
    assert read_manifest(path) == written


@pytest.mark.parametrize(
    "fields",
    [{"digests": "sha256:0"}, {"sequence": -1}, {"run_id": 7}, {"lineage": ("text",)}, {"lineage": ({"a": object()},)}],
)
def test_what_could_not_be_read_is_not_written(fields: Any) -> None:
    """A manifest is the commit: one that no start can read would hide the set."""
    with pytest.raises(ConfigError, match="Nothing was committed"):
        manifest(**fields).to_bytes()


def file(name: str, **fields: Any) -> ManifestFile:
    known = {"model": "mlp", "part": "model", "size": 1, "digest": DIGEST, "records": DIGEST}
    return ManifestFile(name=name, **{**known, **fields})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((file("mlp_cp=E1_U2_S3_optim.th"),), "is not the name of mlp, None, model at E1_U2_S3"),
        ((file("other_cp=E1_U2_S3_model.th"),), "is not the name of mlp, None, model at E1_U2_S3"),
        ((file("mlp_cp=E1_U2_S4_model.th"),), "is not the name of mlp, None, model at E1_U2_S3"),
        ((file("mlp_cp=E1_U2_S3_model.th", info="ema=0.9"),), "is not the name of mlp, ema=0.9, model"),
        ((file("mlp_cp=E1_U2_S3_model.th"),) * 2, "a file is listed twice"),
        ((file("mlp_cp=E1_U2_S3_model.th"),), "must contain weights and a trainer file"),
    ],
)
def test_a_file_is_listed_once_and_under_its_own_name(files: Any, said: str) -> None:
    """The name says model, info, part and iteration, and so do the fields: which of them is true nobody could tell."""
    with pytest.raises(ConfigError, match=said):
        manifest(files=files)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"iteration": {"epoch": -1, "update": 2, "sample": 3}}, "each at least 0"),
        ({"iteration": {"epoch": 1, "update": 2}}, "must have epoch, update and sample"),
        ({"tags": ("latest",)}, "tags must hold E1_U2_S3"),
    ],
)
def test_the_iteration_is_whole_and_a_tag(fields: Any, said: str) -> None:
    """Its files are named after it, and every set can be asked for by it."""
    with pytest.raises(ConfigError, match=said):
        manifest(**fields)


def test_a_sealed_manifest_of_another_version_is_not_damaged(tmp_path: Path) -> None:
    """The release that reads it is another one."""
    path = tmp_path / "manifest.json"
    content = manifest().to_bytes().rpartition(b',\n "digest"')[0]
    path.write_bytes(sealed(content.replace(b'"format_version": 2', b'"format_version": 3') + b"}"))
    with pytest.raises(CheckpointFormatError, match="has format version 3; this release reads version 2 only"):
        read_manifest(path)


def test_digests_are_those_that_the_manifest_vouches_for(tmp_path: Path) -> None:
    """Another list of digests would verify other bytes."""
    written = digests_to_bytes({})
    (tmp_path / "digests.json").write_bytes(written)
    assert read_digests(tmp_path, manifest(digests=digest_of(written))) == {}
    with pytest.raises(CheckpointCorruptError, match="its digest does not match the manifest"):
        read_digests(tmp_path, manifest())


def test_nan_in_the_lineage_is_no_number(tmp_path: Path) -> None:
    """It is written as null, as JSON has no NaN; where it stands in a manifest, the manifest was not ours."""
    path = tmp_path / "manifest.json"
    text = manifest(lineage=({"value": math.nan},)).to_bytes()
    path.write_bytes(text)
    assert read_manifest(path).lineage == ({"value": None},)
    content = text.rpartition(b',\n "digest"')[0]
    path.write_bytes(sealed(content.replace(b"null\n  }", b"NaN\n  }") + b"}"))
    with pytest.raises(CheckpointCorruptError, match="is not a valid manifest"):
        read_manifest(path)


def test_a_small_manifest_takes_little_memory(tmp_path: Path) -> None:
    """A run may have thousands: room for the largest that is allowed would be made for each."""
    path = tmp_path / "manifest.json"
    path.write_bytes(manifest().to_bytes())
    read_manifest(path)
    tracemalloc.start()
    read_manifest(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
