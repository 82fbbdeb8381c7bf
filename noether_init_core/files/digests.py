"""What is known of a file from elsewhere: digests that its bytes are compared with, and what a comparison has shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

import attrs
import xxhash

from noether_init_core.files.formats.records import Record

__all__ = ["Digests", "TensorDigest", "Verified", "digest_of_records"]


class TensorDigest(Protocol):
    """One tensor as its writer describes it."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def digest(self) -> str: ...
    @property
    def values(self) -> Literal["finite", "infinities", "NaN"] | None: ...


@attrs.frozen
class Digests:
    """What a manifest, a signature or a person says of one file.

    Attributes:
        file: Digest of all bytes: ``xxh3_128:<hex>`` or ``sha256:<hex>``.
        size: Number of bytes.
        records: ``digest_of_records`` of a file of torch.save. With it, the header is compared with ``tensors`` and
            each tensor with its own digest, which is faster than to compare ``file``.
        tensors: Key -> what was written, and whether its values were finite.
    """

    file: str | None = None
    size: int | None = None
    records: str | None = None
    tensors: Mapping[str, TensorDigest] = attrs.field(factory=dict, repr=False)


@attrs.frozen
class Verified:
    """What ``verify`` has compared.

    Attributes:
        by: ``crc32``, ``xxh3_128`` or ``sha256``; ``unverifiable`` where there is nothing to compare the bytes with.
        nbytes: Bytes that were read for it; 0 where an earlier call had compared them.
        claimed_by: Name of the class that says so, where it is none of this package.
    """

    by: str
    nbytes: int = 0
    claimed_by: str = ""


def digest_of_records(records: Iterable[Record]) -> str:
    """``xxh3_128:...`` of the names, places, sizes and CRC-32 of all records; it stands for every byte in them."""
    lines = [f"{record.name}\0{record.offset}\0{record.size}\0{record.crc}\n" for record in records]
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(''.join(lines).encode())}"
