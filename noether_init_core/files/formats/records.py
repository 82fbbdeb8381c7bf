"""Records: bytes of a file that are verified together."""

from __future__ import annotations

import attrs

__all__ = ["Record"]


@attrs.frozen
class Record:
    """One stretch of bytes: its name in the file, its place, and its CRC-32 if it has one."""

    name: str
    offset: int
    size: int
    crc: int | None
