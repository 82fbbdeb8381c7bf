"""Read files of torch.save: a zip archive of stored records, one of which holds the pickle opcodes of the object.

The complete structure of the archive is checked before any field is used. Nothing that a file names is imported or
called, and no memory is allocated for sizes that only a header states.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from noether_init_core.errors import CheckpointFormatError
from noether_init_core.files.content import (
    METADATA,
    LimitError,
    OpcodeError,
    Record,
    UnreadableError,
    Versions,
    children,
)
from noether_init_core.files.formats.opcodes import Interpreter
from noether_init_core.files.formats.others import NEXT_COPY, NEXT_SAVE, check_kind, unreadable, zip_kind
from noether_init_core.files.graph import Content, ObjectGraph
from noether_init_core.files.handed import Handed
from noether_init_core.files.refusals import ALLOW_GLOBALS_VARIABLE, NEXT_PLAIN, NEXT_SMALLER, unsafe
from noether_init_core.files.storage.handle import Handle
from noether_init_core.messages import quoted

_HEADER = "data.pkl"
#: Where torch looks for the version of the format, and the versions that it reads.
_VERSIONS = (".data/version", "version")
_KNOWN_VERSIONS = frozenset(f"{number}{end}".encode() for number in range(1, 11) for end in ("", "\n"))
#: Names that torch looks up without regard to upper and lower case.
_LOOKED_UP = frozenset({_HEADER, "byteorder", "constants.pkl", *_VERSIONS})
_MAX_HEADER = 512 << 20
_END = struct.Struct("<4s4H2LH")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x2041  # flag bits: traditional encryption, strong encryption, masked headers
_DESCRIPTOR_FOLLOWS = 0x8
_MAX_CENTRAL = 1 << 30
# torch pads the extra field of a local header so that data is aligned to 64 bytes; this covers header and name as well.
_LOCAL_GUESS = 512
_AT_ONCE = 256
#: Number of names of a foreign archive that a message looks at.
_MOST_NAMES = 1000
_SCALARS = frozenset({bool, int, float, complex, str, bytes, type(None)})


def read_torch_zip(handle: Handle, allow_globals: Collection[str] = ()) -> Content:
    """Return the content of an archive; structure, header and the location of every tensor are checked.

    Names that are not allowed become inert records; the caller refuses those that it is asked for. Raises
    ``CheckpointFormatError``; ``UnreadableError``; ``UnsafeGlobalError`` for such names in a damaged header;
    ``CheckpointCorruptError`` for a header that does not match its checksum.
    """
    records = read_records(handle)
    if not any(record.crc for record in records.values()):
        # With torch.serialization.set_crc32_options(False), torch writes 0 as every checksum.
        records = {name: msgspec.structs.replace(record, crc=None) for name, record in records.items()}
    header = _read_header(handle, records)
    from_environment = os.environ.get(ALLOW_GLOBALS_VARIABLE, "").split(",")
    interpreter = Interpreter(header, records, {*allow_globals, *(name.strip() for name in from_environment)})
    names = interpreter.unknown
    try:
        value = interpreter.run()
        versions, marred = _versions_in(interpreter.attached, len(header), names)
        handed = Handed(interpreter.calls, interpreter.made, records)
        keyed = interpreter.foreign_keyed
        graph = ObjectGraph(value, len(header), names, interpreter.attached, marred, keyed, handed)
    except LimitError as error:
        raise unreadable(str(error), NEXT_SMALLER) from error
    except OpcodeError as error:
        if names:
            raise unsafe(handle.path, names) from error
        raise unreadable(str(error), NEXT_PLAIN) from error
    return Content("torch", value, graph, records, versions)


def _versions_in(
    attached: Sequence[tuple[dict[Any, Any], Any]], size: int, names: Collection[str]
) -> tuple[dict[int, Versions], dict[int, str]]:
    """Return id of a dict -> the versions that were attached to it, and id of a dict -> why its versions are wrong.

    ``size`` is the number of bytes of the pickle. A file may attach one object to many dicts, so each object is checked
    once. Wrong is a ``_metadata`` that is not a dict of dicts of plain values; torch could not use it either.
    """
    versioned = [(owner, state[METADATA]) for owner, state in attached if type(state) is dict and METADATA in state]
    graph = ObjectGraph([metadata for _owner, metadata in versioned], size, names)
    screened: dict[int, Versions | str] = {}
    plain: set[int] = set()
    for _owner, metadata in versioned:
        if id(metadata) not in screened:
            wrong = "all modules" if graph.is_spoiled(metadata) else not_plain(metadata, plain)
            screened[id(metadata)] = MappingProxyType(metadata) if wrong is None else wrong
    versions: dict[int, Versions] = {}
    marred: dict[int, str] = {}
    for owner, metadata in versioned:
        found = screened[id(metadata)]
        if isinstance(found, str):
            marred[id(owner)] = f"the _metadata of a state dict has something else than plain values for {found:.80}"
        else:
            versions[id(owner)] = found
    return versions, marred


def not_plain(metadata: Any, known: set[int]) -> str | None:
    """Return the first module whose entry in ``_metadata`` is not a dict of plain values; None if all are.

    ``known``: ids of containers that were found plain before; ids are added.
    """
    if not isinstance(metadata, dict):
        return "all modules"
    for path, version in metadata.items():
        if type(path) is not str or not isinstance(version, dict) or not _is_plain(version, known):
            return repr(path)
    return None


def _is_plain(value: Any, known: set[int]) -> bool:
    """Whether ``value`` consists of dicts, lists, tuples and scalars; ``known``: ids of containers already checked."""
    if type(value) in _SCALARS:
        return True
    if not isinstance(value, dict | list | tuple):
        return False
    if id(value) not in known:
        if isinstance(value, dict) and not all(type(key) in _SCALARS for key in value):
            return False
        if not all(_is_plain(child, known) for _key, child in children(value)):
            return False
        known.add(id(value))
    return True


def _read_header(handle: Handle, records: Mapping[str, Record]) -> bytes:
    record, order = records[_HEADER], records.get("byteorder")
    version = next((records[name] for name in _VERSIONS if name in records), None)
    if record.size > _MAX_HEADER:
        raise unreadable(f"its header is {record.size} bytes long, more than {_MAX_HEADER}", NEXT_PLAIN)
    if version is None:
        raise unreadable("it has no record named version, so torch does not read it")
    small = [version] if order is None else [version, order]
    places = [(one.offset, min(one.size, 16)) for one in small]
    data, found, *byte_order = handle.read_many([(record.offset, record.size), *places])
    if found not in _KNOWN_VERSIONS:
        raise unreadable(f"the version of its format is {found!r}, and torch reads 1 to 10")
    if byte_order == [b"big"]:
        reason = "it was written on a big-endian machine; save it again on a little-endian one"
        raise unreadable(reason, NEXT_PLAIN)
    if byte_order and byte_order != [b"little"]:
        raise unreadable(f"its byte order is {byte_order[0]!r}, neither little nor big", NEXT_PLAIN)
    handle.check_record(record, data)
    return data


def read_records(handle: Handle) -> dict[str, Record]:
    """Return all records by name, in the order of their bytes; the bytes of records are not read.

    Raises ``CheckpointFormatError`` and ``UnreadableError``.
    """
    start, count, end = _read_end(handle)
    try:
        records = _records(handle, start, _read_central(handle, start, count, end))
    except UnreadableError as error:
        raise zip_kind(handle.path, _names(handle, start, count, end)) or error from None
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise zip_kind(handle.path, [f"archive/{name}" for name in records]) or unreadable("it holds code")
    return records


def _names(handle: Handle, start: int, count: int, end: int) -> list[str]:
    """Return the first names in an archive, for a message; nothing else of it is checked."""
    data, at, names = handle.read(end - start, start), 0, []
    for _ in range(min(count, _MOST_NAMES)):
        if at + _CENTRAL.size > len(data):
            break
        lengths = _CENTRAL.unpack_from(data, at)[10:13]
        first = at + _CENTRAL.size
        names.append(data[first : first + lengths[0]].decode("utf-8", "replace"))
        at = first + sum(lengths)
    return names


def _records(handle: Handle, start: int, entries: list[_Entry]) -> dict[str, Record]:
    entries.sort(key=lambda entry: entry.position)
    records: dict[str, Record] = {}
    folded: set[str] = set()
    folder = entries[0].name.partition("/")[0] + "/"
    limits = [*(entry.position for entry in entries[1:]), start]
    for entry, limit, header in zip(entries, limits, _headers(handle, entries), strict=True):
        if not entry.name.startswith(folder):
            raise unreadable(f"its records lie in more than one folder ({folder}, {quoted(entry.name)})")
        name = entry.name[len(folder) :]
        # torch looks names up without regard to case, and would find either of two.
        plain = name.casefold()
        if plain in folded:
            raise unreadable(f"it has two records named {quoted(name)}, in upper or lower case")
        if plain in _LOOKED_UP and plain != name:
            raise unreadable(f"its record {plain} is named {quoted(name)}, which torch.save never writes")
        folded.add(plain)
        records[name] = Record(name, _data_offset(handle, entry, header, limit), entry.size, entry.crc)
    if entries[0].position != 0:
        raise unreadable(f"its first record begins at byte {entries[0].position} instead of 0")
    if _HEADER not in records:
        known = ", ".join(quoted(name) for name in itertools.islice(records, 5))
        raise unreadable(f"it is a zip archive without {_HEADER} (found: {known}), so torch.save did not write it")
    return records


class _Entry(msgspec.Struct, frozen=True, gc=False):
    name: str
    raw_name: bytes
    flags: int
    crc: int
    size: int
    position: int


def _read_end(handle: Handle) -> tuple[int, int, int]:
    """Return start, number of entries, and end of the central directory, from one read of the end of the file."""
    if handle.size == 0:
        raise CheckpointFormatError(f"{handle.path} is empty (0 bytes). {NEXT_COPY}", path=handle.path)
    most = _END_64.size + _END_64_LOCATOR.size + _END.size
    head, tail = handle.read_many([(0, min(handle.size, 64)), (max(0, handle.size - most), min(handle.size, most))])
    check_kind(handle, head)
    if handle.size < _END.size:
        raise unreadable("it is truncated: a zip archive has at least 22 bytes", NEXT_COPY)
    end = handle.size - _END.size
    signature, disk, first_disk, here, count, length, start, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\x05\x06" or comment != 0:
        raise unreadable("its end is not the end of a zip archive; it is truncated, or data was appended", NEXT_COPY)
    large = _read_end_64(tail, end - _END_64_LOCATOR.size) if len(tail) == most else None
    if large is not None:
        stated = (disk, first_disk, here, count, length, start)
        small_limits = (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        values, end = large
        if any(a not in (b, limit) for a, b, limit in zip(stated, values, small_limits, strict=True)):
            raise unreadable("its two end records differ", NEXT_COPY)
        disk, first_disk, here, count, length, start = values
    if disk or first_disk or here != count:
        raise unreadable("it is one part of a zip archive in several files")
    if count == 0 or start + length != end or count * _CENTRAL.size > length or length > _MAX_CENTRAL:
        raise unreadable("its list of records is not where its end record states", NEXT_COPY)
    return start, count, end


def _read_end_64(tail: bytes, position: int) -> tuple[tuple[int, int, int, int, int, int], int] | None:
    """Return the fields of the zip64 end record at the start of ``tail``, and its position; None if it is absent."""
    signature, disk, where, disks = _END_64_LOCATOR.unpack_from(tail, _END_64.size)
    if signature != b"PK\x06\x07":
        return None
    if disk or disks != 1 or where + _END_64.size != position:
        raise unreadable("its zip64 end record is not at the stated position", NEXT_COPY)
    signature, size, _, _, disk, first_disk, here, count, length, start = _END_64.unpack_from(tail)
    if signature != b"PK\x06\x06" or size != _END_64.size - 12:
        raise unreadable("its zip64 end record is damaged", NEXT_COPY)
    return (disk, first_disk, here, count, length, start), where


def _read_central(handle: Handle, start: int, count: int, end: int) -> list[_Entry]:
    data = handle.read(end - start, start)
    unpack, fixed = _CENTRAL.unpack_from, _CENTRAL.size
    entries = []
    at, stop = 0, len(data)
    for _ in range(count):
        if at + fixed > stop:
            raise unreadable("its list of records is truncated", NEXT_COPY)
        fields = unpack(data, at)
        signature, _, _, flags, method, _, _, crc, stored, size = fields[:10]
        name_length, extra_length, comment_length, disk, _, _, position = fields[10:]
        name_at = at + fixed
        extra_at = name_at + name_length
        at = extra_at + extra_length + comment_length
        if signature != b"PK\x01\x02" or at > stop:
            raise unreadable("its list of records is damaged", NEXT_COPY)
        raw_name = data[name_at:extra_at]
        name = _check_name(raw_name)
        if extra_length and 0xFFFFFFFF in (size, stored, position):
            size, stored, position = _large(name, data[extra_at : extra_at + extra_length], size, stored, position)
        if flags & _ENCRYPTED:
            raise unreadable(f"its record {quoted(name)} is encrypted", NEXT_SAVE)
        if method != 0 or stored != size:
            raise unreadable(f"its record {quoted(name)} is compressed; torch.save never compresses", NEXT_SAVE)
        if disk or position + _LOCAL.size + name_length + size > start:
            raise unreadable(f"its record {quoted(name)} of {size} bytes does not fit into the file", NEXT_COPY)
        entries.append(_Entry(name, raw_name, flags, crc, size, position))
    if at != stop:
        raise unreadable("its list of records is longer than the stated number of records", NEXT_COPY)
    return entries


def _large(name: str, extra: bytes, size: int, stored: int, position: int) -> tuple[int, int, int]:
    """Return size, stored size and position, with the 64-bit values of the zip64 extra field.

    The field has a value only for numbers that do not fit into 32 bits, in this order.
    """
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind != 1:
            continue
        numbers = [int.from_bytes(field[i : i + 8], "little") for i in range(0, len(field) - 7, 8)]
        wanted = [value == 0xFFFFFFFF for value in (size, stored, position)]
        if sum(wanted) > len(numbers):
            break
        following = iter(numbers)
        size, stored, position = (
            next(following) if is_wanted else value
            for value, is_wanted in zip((size, stored, position), wanted, strict=True)
        )
        return size, stored, position
    raise unreadable(f"the sizes of its record {quoted(name)} are missing", NEXT_COPY)


def _check_name(raw_name: bytes) -> str:
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        raise unreadable(f"the name of a record is not UTF-8: {raw_name[:40]!r}") from None
    parts = name.split("/")
    if len(parts) < 2 or "" in parts or ".." in parts or "." in parts or "\\" in name or "\0" in name:
        raise unreadable(f"a record is named {quoted(name)}, which torch.save never writes")
    return name


def _headers(handle: Handle, entries: Sequence[_Entry]) -> Iterator[bytes]:
    """Yield the first bytes of every record; one call of the storage reads many of them."""
    for start in range(0, len(entries), _AT_ONCE):
        positions = [entry.position for entry in entries[start : start + _AT_ONCE]]
        yield from handle.read_many([(at, min(_LOCAL_GUESS, handle.size - at)) for at in positions])


def _data_offset(handle: Handle, entry: _Entry, header: bytes, limit: int) -> int:
    """Return the position of the bytes of a record, after checking its local header against the list of records."""
    signature, _, flags, method, _, _, crc, stored, size, name_length, extra_length = _LOCAL.unpack_from(header)
    name = header[_LOCAL.size : _LOCAL.size + name_length]
    if _LOCAL.size + name_length > len(header):
        name = handle.read(min(name_length, limit - entry.position), entry.position + _LOCAL.size)
    offset = int(entry.position + _LOCAL.size + name_length + extra_length)
    if signature != b"PK\x03\x04" or name != entry.raw_name or method != 0 or flags != entry.flags:
        raise unreadable(f"the header of its record {quoted(entry.name)} differs from the list of records", NEXT_COPY)
    deferred = bool(flags & _DESCRIPTOR_FOLLOWS)
    for value, expected in ((stored, entry.size), (size, entry.size), (crc, entry.crc)):
        # torch writes sizes and checksum after the bytes and leaves 0 here. Sizes of 4 GiB and more are in the zip64
        # extra field, and 0xFFFFFFFF here.
        if value != expected and not (deferred and value == 0) and not (expected >= 0xFFFFFFFF and value == 0xFFFFFFFF):
            raise unreadable(f"the header of its record {quoted(entry.name)} has another size or checksum", NEXT_COPY)
    if offset + entry.size > limit:
        raise unreadable(f"its record {quoted(entry.name)} of {entry.size} bytes overlaps the next one")
    return offset
