"""Checkpoint: what everything else needs of a checkpoint, whatever it is stored as, and the base class for others' own.

Formats say which pieces there are, a storage reads them, and what they are read into is asked for here: a new tensor, a
box of one, an existing tensor. Nothing in this room knows a model or a run.
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
from noether_init_core.files.reading import Materializer, check_targets, nonfinite_in
from noether_init_core.memory import Finding
from noether_init_core.messages import listed, near
from noether_init_core.nested import equal

if TYPE_CHECKING:
    import torch

#: A key of ``tensors()``, or a leaf of ``values()``.
Key = str | TensorInfo
AnyKey = TypeVar("AnyKey", bound=str | TensorInfo)
#: What is read, the box of it (None: all), and the tensor of the same shape that it goes into.
Copy = tuple[Key, Box | None, "torch.Tensor"]


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

    def __str__(self) -> str:
        return f"{self.by}, claimed by {self.claimed_by}" if self.claimed_by else self.by


class Checkpoint(Protocol):
    """An open checkpoint: its trees, its tensors, what their bytes are, and how to read and verify them.

    ``BaseCheckpoint`` says what each method does. Whatever has them all may be handed over.
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
    """A checkpoint of another kind: a subclass gives ``entries``, ``tensors`` and ``read``, the rest follows from them.

    What follows reads tensor by tensor; a subclass overrides what it can do better. Use it as a context manager, or
    ``close`` it.

    Attributes:
        path: Where it is, for messages. The subclass sets it, before or in its ``__init__``.
        format: What it is, for messages and reports.
        metadata: What it holds besides the selected tree, plain Python; a tensor stands there as a leaf.
        extra_state: The entries of the selected state dict that are no tensors; ``materialize`` reads them.
        versions: What the state dict's ``_metadata`` says of the modules that it was taken from: path of a module ->
            such as ``{"version": 2}``; empty where there is none. Loading code of modules decides by it whether it
            translates; without it, torch takes a state dict for one of the oldest version.
        is_verifiable: Whether ``verify`` has anything to compare the bytes with.
    """

    path: Path = Path()
    metadata: Mapping[str, Any] = MappingProxyType({})
    extra_state: Mapping[str, Any] = MappingProxyType({})
    versions: Versions = MappingProxyType({})
    is_verifiable: bool = False

    @property
    @abc.abstractmethod
    def entries(self) -> Mapping[str, int]:
        """The trees in the checkpoint, each with its number of tensors; empty name: the whole."""

    @abc.abstractmethod
    def tensors(self, entry: str | None = None) -> Mapping[str, TensorInfo]:
        """Key -> tensor, of a tree in ``entries``; None: the one that was selected. Repeating it is cheap.

        Raises ``CheckpointNotFoundError`` for another name.
        """

    @abc.abstractmethod
    def read(self, key: Key, box: Box | None = None) -> torch.Tensor:
        """The tensor, or a box of it, on the CPU, in memory of its own, without gradient.

        ``key`` may be a leaf of ``values()``; ``key_of`` gives the key of either.

        Raises ``CheckpointNotFoundError`` with near names for a key that does not exist.
        """

    @property
    def format(self) -> str:
        """The name of the class."""
        return type(self).__name__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {str(self.path)!r}: {len(self.tensors())} tensors>"

    def close(self) -> None:  # noqa: B027  # most computed checkpoints have nothing to close
        """Close what is open; what was said of it stays readable. Repeating it does nothing."""

    def values(self, entry: str | None = None) -> Any:
        """A tree of ``entries`` with ``TensorInfo`` as leaves, to be read only; None: the selected one."""
        return {key: attrs.evolve(info, key=key) for key, info in self.tensors(entry).items()}

    def slices(self, key: Key) -> Iterator[torch.Tensor]:
        """The tensor in parts that together are all of it, so that a large one need not be in memory as a whole."""
        yield self.read(key)

    def read_all(
        self, leaves: Iterable[TensorInfo], *, verify: bool = True, look: bool = True
    ) -> dict[TensorInfo, torch.Tensor]:
        """Read leaves of ``values()`` into memory of their own, and ``verify`` the checkpoint in the same pass.

        With ``look``, ``nonfinite`` knows these tensors afterwards. What raises, raises as in ``verify``.
        """
        if verify:
            self.verify()
        return {info: self.read(info) for info in dict.fromkeys(leaves)}

    def copy_into(self, copies: Iterable[Copy]) -> None:
        """Copy tensors, or boxes of them, into existing ones of the same shape, in place, without gradient.

        Unknown keys, other shapes, and tensors without memory are found before anything is changed.
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
        """Tensors that are the file itself, mapped privately: writing to them never changes the file.

        The other direction is not so: what changes the file later, changes tensors that were not written to, and a
        file that is cut off kills the process that touches them. Keys whose bytes cannot be used as they lie in the
        file are left out; ``read`` gives them.
        """
        return {}

    def materialize(self, value: Any) -> Any:
        """``value``, taken from ``metadata``, ``extra_state`` or ``values()``, with real tensors."""
        return Materializer(self.read, {}, self.path, 1 << 60).convert(value)

    def load(self) -> Any:
        """The whole object with real tensors, each with memory of its own; keys of one tensor get one tensor.

        Kinds of dict become ``dict``, ``torch.Size`` becomes ``tuple``, parameters become plain tensors. A state dict
        with ``_metadata`` is an ``OrderedDict`` that has it, as ``load_state_dict`` of modules expects.
        """
        return self.materialize(self.values(""))

    def verify(
        self, keys: Iterable[Key] | None = None, part: tuple[int, int] | None = None, *, look: Iterable[Key] = ()
    ) -> Verified:
        """Compare bytes with checksums and digests, on the handle that is read. What was compared is not read again.

        Args:
            keys: Compare the bytes of these tensors; None: all bytes.
            part: ``(i, n)``: compare the i-th of n shares only, counted from 0, so that n ranks share the work. Where
                only a digest of the whole file is known, every rank compares all.
            look: Tensors whose values are looked at in the same pass, so that ``nonfinite`` need not read them again.

        Returns what was compared, and by what; a class that is none of this package says itself what it has compared.

        Raises ``CheckpointCorruptError``, which names the keys in every damaged record, and ``CheckpointFormatError``
        for a file of torch.save that was written without checksums.
        """
        return Verified("unverifiable", claimed_by=f"{type(self).__module__}.{type(self).__qualname__}")

    def nonfinite(self, keys: Iterable[AnyKey]) -> dict[AnyKey, Finding]:
        """Those of the tensors that hold ``NaN``, or else ``infinities``; every other one is all finite.

        What ``verify`` has looked at is not read again.
        """
        found = ((key, nonfinite_in(self.read(key))) for key in keys)
        return {key: finding for key, finding in found if finding is not None}

    def is_same(self, first: Key, other: Key) -> bool:
        """Whether two tensors have the same dtype, shape and bytes; they are not in memory as a whole."""
        one, two = self._info(first), self._info(other)
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        is_one = one == two and bool(one.pieces)
        return is_one or all(equal(self.read(first, box), self.read(other, box)) for box in one.boxes())

    def key_of(self, key: Key) -> str:
        """The key of ``tensors()`` behind what ``read`` is called with: itself, or that of a leaf.

        Raises ``CheckpointNotFoundError`` with near names for one that does not exist.
        """
        asked = key.key if isinstance(key, TensorInfo) else key
        if asked not in self.tensors():
            raise self._not_found("tensor", asked, self.tensors())
        return asked

    def _info(self, key: Key) -> TensorInfo:
        """The tensor of a key, or the leaf itself. Raises ``CheckpointNotFoundError`` with near names."""
        return key if isinstance(key, TensorInfo) else self.tensors()[self.key_of(key)]

    def _not_found(self, what: str, asked: str, known: Mapping[str, object]) -> CheckpointNotFoundError:
        candidates = near(asked, known)
        hint = f"Near: {', '.join(candidates)}" if candidates else f"It has: {listed(known, none='none')}"
        return CheckpointNotFoundError(
            f"{self.path} has no {what} {asked!r}. {hint}", path=self.path, asked=asked, candidates=candidates
        )
