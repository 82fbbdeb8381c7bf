"""Files of torch.save: a zip archive of stored records, and in one of them the opcodes that build the object.

Nothing that a file names is imported or called, and nothing is allocated that a header merely claims.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

import attrs

from noether_init_core.errors import CheckpointFormatError, UnsafeGlobalError
from noether_init_core.files.formats.content import Content
from noether_init_core.files.formats.inert_values import ForeignObject
from noether_init_core.files.formats.module_versions import versions_in
from noether_init_core.files.formats.object_graph import ObjectGraph
from noether_init_core.files.formats.opcodes import Interpreter, OpcodeError
from noether_init_core.files.formats.records import Record
from noether_init_core.files.formats.zip_records import read_records
from noether_init_core.files.storage.handle import Handle
from noether_init_core.files.verifying import check_record
from noether_init_core.messages import listed, one_line

__all__ = ["ALLOW_GLOBALS_VARIABLE", "read_torch_zip"]

ALLOW_GLOBALS_VARIABLE = "NOETHER_INIT_ALLOW_GLOBALS"
_HEADER = "data.pkl"
_MAX_HEADER = 512 << 20
_MOST_PASTED = 200


def read_torch_zip(handle: Handle, allow_globals: Collection[str] = ()) -> Content:
    """The content of an archive; its structure, its header and the place of every tensor are checked.

    Raises ``CheckpointFormatError``, ``UnsafeGlobalError`` for names that are not allowed, and
    ``CheckpointCorruptError`` for a header that does not have its checksum.
    """
    records = read_records(handle)
    if not any(record.crc for record in records.values()):
        # torch.serialization.set_crc32_options(False) writes zero for all of them
        records = {name: attrs.evolve(record, crc=None) for name, record in records.items()}
    header = _read_header(handle, records)
    from_environment = os.environ.get(ALLOW_GLOBALS_VARIABLE, "").split(",")
    interpreter = Interpreter(header, records, {*allow_globals, *(name.strip() for name in from_environment)})
    try:
        value = interpreter.run()
        graph = ObjectGraph(value, len(header))
        if interpreter.unknown:
            _refuse_globals(handle, interpreter.unknown, graph.foreign, _whole_module(value))
        versions = versions_in(interpreter.attached.values(), len(header))
    except OpcodeError as error:
        if interpreter.unknown:
            _refuse_globals(handle, interpreter.unknown)
        _refuse(handle, str(error))
    if graph.problems:
        problems = (f"{one_line(path)}: {reason}" for path, reason in graph.problems.items())
        _refuse(handle, listed(problems, 10, separator="; "))
    return Content("torch", value, graph, records, versions)


def _read_header(handle: Handle, records: Mapping[str, Record]) -> bytes:
    record = records[_HEADER]
    if record.size > _MAX_HEADER:
        _refuse(handle, f"its header is {record.size} bytes long, more than {_MAX_HEADER}")
    order = records.get("byteorder")
    if order is not None:
        said = handle.read(min(order.size, 16), order.offset)
        if said == b"big":
            _refuse(handle, "it was written on a big-endian machine; save it again on a little-endian one")
        if said != b"little":
            _refuse(handle, f"its byte order is {said!r}, neither little nor big")
    data = handle.read(record.size, record.offset)
    check_record(handle, record, data)
    return data


def _refuse(handle: Handle, reason: str) -> NoReturn:
    raise CheckpointFormatError(
        f"{handle.path} cannot be read as a checkpoint: {reason}. "
        "Next: write it again with torch.save(state_dict, path), with tensors and plain values only",
        path=handle.path,
    )


def _refuse_globals(
    handle: Handle,
    unknown: Iterable[str],
    places: Mapping[str, str] | None = None,
    whole_module: str | None = None,
) -> NoReturn:
    """``whole_module``: the expression that leads from the object to a pickled module in it, where there is one."""
    names = [one_line(name) for name in unknown]
    placed = {one_line(name): one_line(path) for name, path in (places or {}).items() if path}
    shown = [f"{name} (at {placed[name]})" if name in placed else name for name in names]
    if whole_module is not None:
        advice = (
            "It holds a whole module, not its weights. Next, in a program that you trust, if you trust the file: "
            f"torch.save(torch.load(path, weights_only=False){whole_module}.state_dict(), path)"
        )
    else:
        # what is to be pasted is never cut; nobody looks through very many whether they are harmless
        pasted = ",".join(names) if len(names) <= _MOST_PASTED else "..."
        advice = (
            "If these are harmless classes, they can be read as inert records: in code, "
            f"open_checkpoint(path, allow_globals=[...]); for a config, {ALLOW_GLOBALS_VARIABLE}={pasted} in the "
            "environment"
        )
    raise UnsafeGlobalError(
        f"{handle.path} refers to {listed(shown, 20)}, which tensors and plain values do not need. Nothing of "
        f"it was imported or called. {advice}",
        path=handle.path,
        names=names,
    )


def _whole_module(value: Any) -> str | None:
    """The expression behind an object that leads to a pickled module: itself, or the value of a key; None for none."""
    if _is_module(value):
        return ""
    entries = value.items() if type(value) is dict else ()
    return next((f"[{one_line(repr(key))}]" for key, child in entries if _is_module(child) and type(key) is str), None)


def _is_module(value: Any) -> bool:
    return (
        type(value) is ForeignObject and type(value.state) is dict and {"_parameters", "_modules"} <= value.state.keys()
    )
