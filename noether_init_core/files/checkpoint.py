"""Checkpoint: the interface of an open checkpoint in any format, and the base class for checkpoints of other packages.

A format lists the pieces of each tensor, and a storage reads them. This interface chooses the destination: a new
tensor, a box of one, or an existing tensor. Nothing in this folder knows a model or a run.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar

import attrs

from noether_init_core.errors import CheckpointNotFoundError
from noether_init_core.files.content import Box, TensorInfo, Versions
from noether_init_core.files.graph import Unread
from noether_init_core.files.reading import Materializer, check_targets, nonfinite_in
from noether_init_core.memory import Finding
from noether_init_core.messages import listed, near
from noether_init_core.nested import equal

if TYPE_CHECKING:
    import torch

#: A key of ``tensors()``, or a leaf of ``values()``.
Key = str | TensorInfo
AnyKey = TypeVar("AnyKey", bound=str | TensorInfo)
#: What is read, the box of it (None: all), and the destination, a tensor of the same shape.
Copy = tuple[Key, Box | None, "torch.Tensor"]


class TensorDigest(Protocol):
    """The description of one tensor by its writer."""

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
    """Digests of one file from another source than the file: a manifest, a signature, a config.

    Attributes:
        file: Digest of all bytes: ``xxh3_128:<hex>`` or ``sha256:<hex>``.
        size: Number of bytes.
        records: ``digest_of_records`` of a file of torch.save. With it, ``verify`` compares the header with ``tensors``
            and each tensor with its own digest, which is faster than comparing ``file``.
        tensors: Key -> dtype, shape, digest and finding of non-finite values, as written.
    """

    file: str | None = None
    size: int | None = None
    records: str | None = None
    tensors: Mapping[str, TensorDigest] = attrs.field(factory=dict, repr=False)


@attrs.frozen
class Verified:
    """The result of ``verify``.

    Attributes:
        by: ``crc32``, ``xxh3_128`` or ``sha256``; ``unverifiable`` if there are neither checksums nor digests.
        nbytes: Number of bytes that this call read; 0 if an earlier call had compared them.
        claimed_by: Name of the class, for a class of another package: what it reports is its own claim.
    """

    by: str
    nbytes: int = 0
    claimed_by: str = ""

    def __str__(self) -> str:
        return f"{self.by}, claimed by {self.claimed_by}" if self.claimed_by else self.by


class Checkpoint(Protocol):
    """An open checkpoint: its trees and tensors, and the methods that read and verify them.

    ``BaseCheckpoint`` documents each method. Any object with all these methods may be used.
    """

    @property
    def path(self) -> Path: ...
    @property
    def format(self) -> str: ...
    @property
    def entries(self) -> Mapping[str, int]: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def extra_state(self) -> Mapping[str, Any]: ...
    @property
    def versions(self) -> Versions: ...
    @property
    def is_verifiable(self) -> bool: ...
    @property
    def unread(self) -> Mapping[str, Unread]: ...
    def tensors(self, entry: str | None = None) -> Mapping[str, TensorInfo]: ...
    def values(self, entry: str | None = None) -> Any: ...
    def read(self, key: Key, box: Box | None = None) -> torch.Tensor: ...
    def slices(self, key: Key) -> Iterator[torch.Tensor]: ...
    def read_all(
        self, leaves: Iterable[TensorInfo], *, verify: bool = True, look: bool = True
    ) -> dict[TensorInfo, torch.Tensor]: ...
    def copy_into(self, copies: Iterable[Copy]) -> None: ...
    def mapped(self, keys: Iterable[str]) -> dict[str, torch.Tensor]: ...
    def materialize(self, value: Any) -> Any: ...
    def load(self) -> Any: ...
    def verify(
        self, keys: Iterable[Key] | None = None, part: tuple[int, int] | None = None, *, look: Iterable[Key] = ()
    ) -> Verified: ...
    def nonfinite(self, keys: Iterable[AnyKey]) -> dict[AnyKey, Finding]: ...
    def is_same(self, first: Key, other: Key) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...


class BaseCheckpoint(abc.ABC):
    """Base class for a checkpoint of another format: a subclass implements ``entries``, ``tensors`` and ``read``.

    The other methods use these three and read one tensor at a time; a subclass may override them with faster ones. Use
    it as a context manager, or call ``close``. Methods are called from one thread at a time.

    Attributes:
        path: The location, for messages. The subclass sets it in its ``__init__`` or before.
        format: Name of the format, for messages and reports.
        metadata: Everything beside the selected tree, as plain Python with ``TensorInfo`` in place of tensors.
        extra_state: The entries of the selected state dict that are not tensors; ``materialize`` reads them.
        versions: The ``_metadata`` of the selected state dict: path of a module -> for example ``{"version": 2}``; may
            be empty. Loading code of modules uses the version to translate old keys. If it is missing, torch assumes
            the oldest version.
        is_verifiable: Whether checksums or digests exist that ``verify`` can compare.
    """

    path: Path = Path()
    metadata: Mapping[str, Any] = MappingProxyType({})
    extra_state: Mapping[str, Any] = MappingProxyType({})
    versions: Versions = MappingProxyType({})
    is_verifiable: bool = False

    @property
    @abc.abstractmethod
    def entries(self) -> Mapping[str, int]:
        """Name of each tree in the checkpoint -> its number of tensors; the empty name is the complete object."""

    @abc.abstractmethod
    def tensors(self, entry: str | None = None) -> Mapping[str, TensorInfo]:
        """Return key -> tensor of a tree in ``entries``; None: the selected tree. A repeated call is cheap.

        Raises ``CheckpointNotFoundError`` for an unknown tree.
        """

    @abc.abstractmethod
    def read(self, key: Key, box: Box | None = None) -> torch.Tensor:
        """Read a tensor into new CPU memory; it has the dtype of the file and requires no gradient.

        Args:
            key: A key of ``tensors()``, or a leaf of ``values()``; ``key_of`` returns the key of either.
            box: (begin, end) of each dimension; None: all of the tensor.

        Raises ``CheckpointNotFoundError`` with near names for an unknown key.
        """

    @property
    def format(self) -> str:
        """The name of the class."""
        return type(self).__name__

    @property
    def unread(self) -> Mapping[str, Unread]:
        """Place -> a part of the checkpoint that was skipped, such as an object of a foreign class."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {str(self.path)!r}: {len(self.tensors())} tensors>"

    def close(self) -> None:  # noqa: B027  # most computed checkpoints have nothing to close
        """Close the file. ``tensors``, ``values`` and ``metadata`` stay available. A repeated call does nothing."""

    def values(self, entry: str | None = None) -> Any:
        """Return the tree called ``entry``, or the selected tree for None. Its leaves are ``TensorInfo``.

        Do not modify the result. Raises ``CheckpointNotFoundError`` for an unknown tree.
        """
        return {key: attrs.evolve(info, key=key) for key, info in self.tensors(entry).items()}

    def slices(self, key: Key) -> Iterator[torch.Tensor]:
        """Yield the tensor in parts, so that a large tensor is never in memory as a whole."""
        yield self.read(key)

    def read_all(
        self, leaves: Iterable[TensorInfo], *, verify: bool = True, look: bool = True
    ) -> dict[TensorInfo, torch.Tensor]:
        """Read leaves of ``values()`` into new memory, and verify the checkpoint in the same pass.

        Args:
            leaves: Leaves of ``values()``; duplicates are read once.
            verify: Whether to verify all bytes of the checkpoint.
            look: Whether to check the values too, so that ``nonfinite`` need not read these tensors again.

        Raises the errors of ``verify``.
        """
        if verify:
            self.verify()
        return {info: self.read(info) for info in dict.fromkeys(leaves)}

    def copy_into(self, copies: Iterable[Copy]) -> None:
        """Copy tensors, or boxes of them, into existing tensors of the same shape, in place and without gradient.

        Values are cast to the dtype of the target. All keys and targets are checked before the first write.

        Raises ``CheckpointNotFoundError`` for an unknown key, ``StateMismatchError`` for another shape or a target
        without memory; both leave all targets unchanged.
        """
        import torch

        copies = tuple(copies)
        shapes = (
            self._info(key).shape if box is None else tuple(end - begin for begin, end in box)
            for key, box, _target in copies
        )
        named = zip(shapes, copies, strict=True)
        check_targets(self.path, ((str(key), shape, target) for shape, (key, _box, target) in named))
        with torch.no_grad():
            for key, box, target in copies:
                target.copy_(self.read(key, box))

    def mapped(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return tensors that are private mappings of the file: writing to them never changes the file.

        A later change of the file shows in mapped tensors that were not written to. If the file is truncated, reading
        them kills the process. Keys whose bytes cannot be mapped are left out; call ``read`` for them.
        """
        return {}

    def materialize(self, value: Any) -> Any:
        """Replace ``TensorInfo`` by tensors in a value from ``metadata``, ``extra_state`` or ``values()``."""
        return Materializer(self.read, {}, self.path, 1 << 60).convert(value)

    def load(self) -> Any:
        """Read the complete object with all tensors; tied keys get one tensor.

        Each tensor gets its own memory. Subclasses of dict become ``dict``, ``torch.Size`` becomes ``tuple``,
        parameters become plain tensors. A state dict with ``_metadata`` becomes an ``OrderedDict`` with that attribute,
        as ``load_state_dict`` of modules expects.
        """
        return self.materialize(self.values(""))

    def verify(
        self, keys: Iterable[Key] | None = None, part: tuple[int, int] | None = None, *, look: Iterable[Key] = ()
    ) -> Verified:
        """Compare bytes with checksums and digests, on the open handle. A repeated call compares only what is left.

        Args:
            keys: Compare the bytes of these tensors; None: all bytes.
            part: ``(i, n)``: compare only the i-th of n shares, counted from 0, so that n ranks share the work. If only
                a digest of the complete file is known, every rank compares all bytes.
            look: Tensors whose values are checked in the same pass, so that ``nonfinite`` need not read them again.

        Returns the algorithm and the number of bytes read. A class of another package reports its own claim.

        Raises ``CheckpointCorruptError``, which names the keys in every damaged record, and ``CheckpointFormatError``
        for a file of torch.save that was written without checksums.
        """
        return Verified("unverifiable", claimed_by=f"{type(self).__module__}.{type(self).__qualname__}")

    def nonfinite(self, keys: Iterable[AnyKey]) -> dict[AnyKey, Finding]:
        """Return the keys of tensors with ``NaN`` or, without NaN, ``infinities``; all other tensors are finite.

        Tensors that ``verify`` has checked (``look``) are not read again.
        """
        found = ((key, nonfinite_in(self.read(key))) for key in keys)
        return {key: finding for key, finding in found if finding is not None}

    def is_same(self, first: Key, other: Key) -> bool:
        """Whether two tensors have the same dtype, shape and bytes; they are compared piece by piece."""
        one, two = self._info(first), self._info(other)
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        is_one = one == two and bool(one.pieces)
        return is_one or all(equal(self.read(first, box), self.read(other, box)) for box in one.boxes())

    def key_of(self, key: Key) -> str:
        """Return the key in ``tensors()`` of an argument of ``read``: the key itself, or the key of a leaf.

        Raises ``CheckpointNotFoundError`` with near names for an unknown key.
        """
        asked = key.key if isinstance(key, TensorInfo) else key
        if asked not in self.tensors():
            raise self._not_found("tensor", asked, self.tensors())
        return asked

    def _info(self, key: Key) -> TensorInfo:
        """Return the tensor of a key, or the leaf itself. Raises ``CheckpointNotFoundError`` with near names."""
        return key if isinstance(key, TensorInfo) else self.tensors()[self.key_of(key)]

    def _not_found(self, what: str, asked: str, known: Mapping[str, object]) -> CheckpointNotFoundError:
        candidates = near(asked, known)
        hint = f"Near: {', '.join(candidates)}" if candidates else f"Found: {listed(known, none=f'no {what}')}"
        return CheckpointNotFoundError(
            f"{what} {asked!r} not found in {self.path}. {hint}", path=self.path, asked=asked, candidates=candidates
        )


def entries_beside(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the trees of a checkpoint that lie beside the selected one; counts what is in each tree."""
    names = checkpoint.tensors()
    others = (entry for entry in checkpoint.entries if entry and checkpoint.tensors(entry) is not names)
    return tuple(entry for entry in others if not any(name.startswith(f"{entry}.") for name in names))
