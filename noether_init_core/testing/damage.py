"""Damage to the files of a case: flipped bits, cut and lacking files, each put back afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import attrs
import torch

from noether_init_core.messages import listed
from noether_init_core.testing.cases import SavedRun

#: Where one bit is flipped in a file in which no tensor is found, as shares of its length.
_PLACES = (0.3, 0.6)
#: Fewer bytes than this are not searched for, because they could occur by chance.
_FEW = 8


@attrs.frozen
class Damage:
    """New contents of files; None for a file that is removed.

    Attributes:
        what: What is wrong, in words.
        contents: File -> its new content.
    """

    what: str
    contents: Mapping[Path, bytes | None]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Replace and remove the files, as another program would, and put them back at the end of the block."""
        with contextlib.ExitStack() as undoing:
            for path, content in self.contents.items():
                status, old = path.stat(), path.read_bytes()
                undoing.callback(os.utime, path, ns=(status.st_atime_ns, status.st_mtime_ns))
                undoing.callback(_replace, path, old, status.st_mode)
                if content is None:
                    path.unlink()
                else:
                    _replace(path, content, status.st_mode)
            yield


def files_below(*folders: Path) -> list[Path]:
    """Every file with content below the folders, in order."""
    found = (path for folder in folders for path in sorted(folder.rglob("*")))
    return [path for path in found if path.is_file() and not path.is_symlink() and path.stat().st_size]


def bit_flips(files: Iterable[Path], source: SavedRun) -> Iterator[Damage]:
    """One flipped bit: in each tensor of the source, wherever files have its bytes; in other files at two places."""
    contents = {path: path.read_bytes() for path in files}
    have_tensors: set[Path] = set()
    for model, state in source.state.items():
        for name, tensor in state.items():
            needle = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            if len(needle) < _FEW:
                continue
            places = {path: content.find(needle) for path, content in contents.items()}
            flipped = {path: _flipped(contents[path], at + len(needle) // 2) for path, at in places.items() if at >= 0}
            have_tensors |= flipped.keys()
            if flipped:
                yield Damage(f"one bit of {name} of {model} was flipped in {_names(flipped)}", flipped)
    for path in [path for path in contents if path not in have_tensors]:
        for share in _PLACES:
            at = int(len(contents[path]) * share)
            yield Damage(f"one bit of byte {at} was flipped in {path.name}", {path: _flipped(contents[path], at)})


def cuts(files: Iterable[Path]) -> Iterator[Damage]:
    """The end of every file is missing, half of it, or everything."""
    contents = {path: path.read_bytes() for path in files}
    last = {path: content[: max(len(content) - 100, len(content) // 2)] for path, content in contents.items()}
    half = {path: content[: len(content) // 2] for path, content in contents.items()}
    yield Damage(f"{_names(contents)} without their last 100 bytes", last)
    yield Damage(f"{_names(contents)} without their second half", half)
    yield Damage(f"{_names(contents)} were emptied", dict.fromkeys(contents, b""))


def absences(files: Iterable[Path]) -> Iterator[Damage]:
    """Each file is missing in turn; of the sets of a run, the files of one name in every set.

    Manifests and what lies beside them stay: a set without one was never finished, so that the set before it is right.
    """
    groups: dict[Path | str, list[Path]] = {}
    for path in files:
        is_in_set = path.parent.parent.name == "sets"
        if not is_in_set or path.suffix == ".th":
            groups.setdefault(path.name if is_in_set else path, []).append(path)
    for paths in groups.values():
        yield Damage(f"{_names(paths)} was removed", dict.fromkeys(paths))


def _names(paths: Iterable[Path]) -> str:
    return listed(dict.fromkeys(path.name for path in paths), 3)


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def _replace(path: Path, content: bytes, mode: int) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.chmod(mode)
    new.replace(path)
