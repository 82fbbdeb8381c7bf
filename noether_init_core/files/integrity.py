"""What is known of an open file: whether its bytes are those that were written, and which values are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

import xxhash

from noether_init_core.errors import CheckpointCorruptError
from noether_init_core.files.formats.zip_records import Record
from noether_init_core.files.nonfinite_values import Finding, can_be_nonfinite
from noether_init_core.files.storage.file_handle import FileHandle
from noether_init_core.files.tensor_info import TensorInfo
from noether_init_core.files.verifying import Stretch, Values, examine

__all__ = ["CommittedFile", "CommittedTensor", "Integrity", "digest_of_records", "is_dense"]


class CommittedTensor(Protocol):
    """One tensor as a manifest describes it."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def digest(self) -> str: ...
    @property
    def values(self) -> Literal["finite", "infinities", "NaN"] | None: ...


class CommittedFile(Protocol):
    """One file as a manifest describes it: ``ManifestFile``."""

    @property
    def size(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def records(self) -> str | None: ...
    @property
    def tensors(self) -> Mapping[str, CommittedTensor]: ...


def digest_of_records(records: Iterable[Record]) -> str:
    """``xxh3_128:...`` of the names, places, sizes and CRC-32 of all records; it stands for every byte in them."""
    lines = [f"{record.name}\0{record.offset}\0{record.size}\0{record.crc}\n" for record in records]
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(''.join(lines).encode())}"


class Integrity:
    """The comparisons of one open file; the reader turns damaged records into an error that names their keys."""

    def __init__(self, handle: FileHandle, records: Mapping[str, Record]) -> None:
        self._handle = handle
        self._records = records
        self._known: dict[TensorInfo, Finding | None] = {}
        #: Bytes that have been read to be compared, or looked at.
        self.examined = 0

    def check_committed(self, committed: CommittedFile, tensors: Mapping[str, TensorInfo]) -> None:
        """Compare all that the header says with the manifest. Raises ``CheckpointCorruptError``."""
        path = self._handle.path
        if self._handle.size != committed.size:
            raise CheckpointCorruptError(
                f"{path} has {self._handle.size} bytes; {committed.size} were written", path=path
            )
        expected = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in committed.tensors.items()}
        found = {key: (info.dtype, info.shape) for key, info in tensors.items()}
        different = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        if different:
            raise CheckpointCorruptError(
                f"{path} is not the file that was committed: {', '.join(different[:5])} differ from the manifest. "
                "It was written over. Next: take an older checkpoint",
                path=path,
                key=", ".join(different),
            )
        if digest_of_records(self._records.values()) != committed.records:
            raise CheckpointCorruptError(
                f"{path} is not the file that was committed: its records have other checksums than the manifest says. "
                "It was written over. Next: take an older checkpoint",
                path=path,
            )

    def learn(self, infos: Mapping[TensorInfo, CommittedTensor]) -> None:
        """Take over what the writer found in tensors whose bytes were compared with their digests."""
        for info, tensor in infos.items():
            if tensor.values is not None:
                self._known[info] = None if tensor.values == "finite" else tensor.values

    def damaged(
        self,
        values: Iterable[TensorInfo] = (),
        *,
        digests: Mapping[str, str] | None = None,
        targets: Mapping[str, memoryview] | None = None,
        has_checksums: bool = True,
    ) -> list[Record]:
        """Read every record once and return those whose bytes differ from what was written.

        Args:
            values: Tensors whose values are looked at in the same pass; ``nonfinite`` knows the result.
            digests: Record -> digest of its bytes, compared instead of its CRC-32.
            targets: Record -> memory for all of its bytes, which is filled in the same pass.
            has_checksums: Whether the records have CRC-32 at all.
        """
        digests, targets = digests or {}, targets or {}
        looked_at = _ranges(values)
        stretches = [
            Stretch(
                name,
                record.offset,
                record.size,
                record.crc if has_checksums else None,
                digests.get(name),
                tuple(looked_at.get(name, ())),
                targets.get(name),
            )
            for name, record in self._records.items()
        ]
        return self._examine(stretches, looked_at)

    def nonfinite(self, infos: Iterable[TensorInfo]) -> dict[TensorInfo, Finding]:
        """Those tensors that hold NaN or infinities, and which. What a pass has looked at is not read again."""
        infos = tuple(infos)
        looked_at = _ranges(info for info in infos if info not in self._known)
        stretches = [
            Stretch(name, self._records[name].offset, self._records[name].size, values=tuple(ranges))
            for name, ranges in looked_at.items()
        ]
        self._examine(stretches, looked_at)
        return {info: finding for info in infos if (finding := self._known.get(info)) is not None}

    def _examine(
        self, stretches: list[Stretch], looked_at: Mapping[str, Mapping[Values, list[TensorInfo]]]
    ) -> list[Record]:
        findings = examine(self._handle, stretches)
        self.examined += sum(stretch.size for stretch in stretches if stretch.is_read)
        if not findings.damaged:
            for index, stretch in enumerate(stretches):
                for number, infos in enumerate(looked_at.get(stretch.name, {}).values()):
                    finding = findings.nonfinite.get((index, number))
                    for info in infos:
                        self._known[info] = finding if finding is None or is_dense(info) else self._look_again(info)
        return [self._records[stretch.name] for stretch in findings.damaged]

    def _look_again(self, info: TensorInfo) -> Finding | None:
        """A view has gaps, and what was found may lie in one of them."""
        import torch

        from noether_init_core.files.reading import read_tensor

        tensor = read_tensor(self._handle, self._records, info)
        if tensor.element_size() == 1:
            tensor = tensor.float()
        if bool(torch.isnan(tensor).any()):
            return "NaN"
        return "infinities" if bool(torch.isinf(tensor).any()) else None


def _ranges(infos: Iterable[TensorInfo]) -> dict[str, dict[Values, list[TensorInfo]]]:
    """Record -> what to look at in it, each with the tensors that it tells of."""
    found: dict[str, dict[Values, list[TensorInfo]]] = {}
    for info in infos:
        if info.nbytes and can_be_nonfinite(info.dtype):
            begin = info.storage_offset * info.itemsize
            values = Values(begin, begin + info.span * info.itemsize, info.dtype)
            found.setdefault(info.record, {}).setdefault(values, []).append(info)
    return found


def is_dense(info: TensorInfo) -> bool:
    """Whether every element from the first to the last one belongs to the tensor."""
    if info.is_contiguous:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(info.shape, info.stride, strict=True)):
        if size > 1 and stride != 0:
            if stride != expected:
                return False
            expected *= size
    return expected == info.span
