"""What one file holds, from its header; for a file of a committed set also from the manifest beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from noether_init_core.errors import CheckpointError
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.tensor_info import TensorInfo
from noether_init_core.inspection.findings import Content, FoundFile, FoundKey
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, said_by
from noether_init_core.sets.manifest import MANIFEST_NAME, Manifest, read_digests, read_manifest

__all__ = ["content_of", "look_at_file"]

_LONGEST = 2_000
_MOST_ITEMS = 100
_DEEPEST = 6
_LONGEST_FACT = 200


def look_at_file(path: Path) -> FoundFile:
    """Read the header of a file, and the manifest where the file lies in a set. No bytes of tensors are read.

    Raises errors of ``open_checkpoint``.
    """
    manifest, problems = _manifest_beside(path)
    entry = None if manifest is None else next((one for one in manifest.files if one.name == path.name), None)
    buffers = None
    if manifest is not None and entry is not None:
        try:
            buffers = read_digests(path.resolve().parent, manifest)[path.name].buffers
        except (CheckpointError, KeyError) as error:
            problems.append(str(error))
    with open_checkpoint(path) as reader:
        metadata, tensors = reader.metadata, reader.tensors()
        run_id, iteration = None, None
        try:
            iteration, run_id = said_by(metadata, path)
        except CheckpointError as error:
            problems.append(str(error))
        return FoundFile(
            path,
            path.stat().st_size,
            reader.format,
            content_of(tensors, buffers),
            tuple(FoundKey(str(key), info.dtype, info.shape, info.nbytes) for key, info in tensors.items()),
            tuple(_tied(tensors)),
            reader.is_verifiable,
            run_id,
            None if iteration is None else str(iteration),
            entry is not None,
            () if manifest is None or entry is None else manifest.tags,
            {str(key): _plain(value) for key, value in metadata.items()},
            tuple(_facts(reader)),
            tuple(problems),
        )


def content_of(tensors: Mapping[str, TensorInfo], buffers: Collection[str] | None = None) -> Content:
    """The tensors in numbers; ``buffers`` are those that are no parameters, None where that is not known."""
    once = {(info.shape, info.pieces): (key, info) for key, info in reversed(list(tensors.items()))}
    elements = sum(prod(info.shape) for _key, info in once.values())
    parameters = None
    if buffers is not None:
        parameters = sum(prod(info.shape) for key, info in once.values() if key not in buffers)
    return Content(
        len(tensors),
        elements,
        parameters,
        sum(info.nbytes for _key, info in once.values()),
        dict(Counter(info.dtype for info in tensors.values()).most_common()),
    )


def _tied(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, ...]]:
    groups: dict[object, list[str]] = {}
    for key, info in tensors.items():
        if info.nbytes:
            groups.setdefault((info.shape, info.pieces), []).append(str(key))
    return (tuple(keys) for keys in groups.values() if len(keys) > 1)


def _manifest_beside(path: Path) -> tuple[Manifest | None, list[str]]:
    folder = path.resolve().parent
    if folder.parent.name != SETS_FOLDER or not (folder / MANIFEST_NAME).is_file():
        return None, []
    try:
        return read_manifest(folder / MANIFEST_NAME), []
    except CheckpointError as error:
        return None, [str(error)]


def _plain(value: Any, depth: int = 0) -> Any:
    """As JSON can have it. Files may be anybody's: what is long or deep is cut."""
    if value is None or isinstance(value, bool | int):
        # JSON readers lose digits beyond 2**53, and Python refuses to print thousands of them
        return value if value is None or abs(value) < 1 << 53 else "a large number"
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, TensorInfo):
        return {"dtype": value.dtype, "shape": list(value.shape)}
    if depth < _DEEPEST and isinstance(value, Mapping):
        return {_cut(str(key)): _plain(one, depth + 1) for key, one in _first(value.items(), value)}
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_plain(one, depth + 1) for one in _first(value, value)]
    return f"<{type(value).__name__}>"


def _first(items: Iterable[Any], sized: Collection[Any]) -> Iterable[Any]:
    return items if len(sized) <= _MOST_ITEMS else [one for one, _ in zip(items, range(_MOST_ITEMS), strict=False)]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def _facts(reader: Checkpoint) -> Iterator[tuple[str, str]]:
    """What a file says besides tensors: run, iteration, and of a loop seed, names, place in the data.

    The file may be anybody's, so nothing is taken for granted.
    """
    metadata = reader.metadata
    if reader.format == "safetensors":
        for key, text in _first(metadata.items(), metadata):
            yield f"metadata {key}", _short(text)
        return
    state = _mapping(metadata, "trainer_state")
    loader = _mapping(state, "loader")
    said = {
        "run": metadata.get("run_id"),
        "iteration": ", ".join(f"{name} {count}" for name, count in _mapping(metadata, "training_iteration").items()),
        "seed": state.get("seed"),
        "with state": ", ".join(map(str, _mapping(state, "stateful"))),
        "callbacks": ", ".join(map(str, _mapping(metadata, "callback_state_dicts"))),
        "data": f"{loader['batch']} batches of this epoch are consumed" if "batch" in loader else None,
    }
    known = {"run_id", "training_iteration", "checkpoint_tag", "trainer_state", "callback_state_dicts"}
    others = [str(key) for key in metadata if key not in known]
    said["also in it"] = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if others[8:] else "")
    for name, value in said.items():
        if value not in (None, ""):
            yield name, _short(str(value))


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_FACT else f"{text[: _LONGEST_FACT - 3]}..."
