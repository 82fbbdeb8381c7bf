"""Damage to files, of kinds that are hard to find."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

__all__ = ["flip_tensor_bit", "rewrite"]


def rewrite(path: Path, content: bytes) -> None:
    """Write onto a file, also a read-only one."""
    path.chmod(0o644)
    path.write_bytes(content)


def flip_tensor_bit(path: Path) -> None:
    """Flip one bit in the bytes of the first tensor of a file that ``torch.save`` wrote."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (entry,) = [one for one in archive.infolist() if one.filename.endswith("/data/0")]
    name_bytes, extra_bytes = struct.unpack_from("<HH", content, entry.header_offset + 26)
    content[entry.header_offset + 30 + name_bytes + extra_bytes] ^= 4
    rewrite(path, bytes(content))
