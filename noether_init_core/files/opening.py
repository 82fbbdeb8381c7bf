"""Open a checkpoint file: its format is told from its content, it is screened, and it is read through one handle."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from noether_init_core.errors import CheckpointError, CheckpointFormatError
from noether_init_core.files import reading
from noether_init_core.files.checkpoint import AnyKey, BaseCheckpoint, Copy, Digests, Key, Verified
from noether_init_core.files.content import (
    Box,
    Content,
    TensorInfo,
    UnreadableError,
    children,
    is_state_dict,
    state_dict_of,
)
from noether_init_core.files.formats.safetensors import read_safetensors
from noether_init_core.files.formats.torch_zip import read_torch_zip
from noether_init_core.files.storage.handle import Handle, Storage, open_file
from noether_init_core.files.verification import Verification, digest_of_records
from noether_init_core.memory import Finding, no_garbage_collection
from noether_init_core.messages import one_line
from noether_init_core.stopwatch import Stopwatch
from noether_init_core.uris import local_path

if TYPE_CHECKING:
    import torch


def open_checkpoint(
    location: str | os.PathLike[str] | Storage,
    *,
    entry: str | None = None,
    digests: Digests | str | None = None,
    allow_globals: Collection[str] = (),
    stopwatch: Stopwatch | None = None,
) -> FileCheckpoint:
    """Open and screen a checkpoint: ``.th``, ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` of torch.save, or ``.safetensors``.

    The content of a file says what it is, not its name. Structure, header and the place of every tensor are checked;
    bytes of tensors are not read before ``verify`` or ``read``.

    Args:
        location: The file, or an object of a store.
        entry: Which tree is meant where none is named, see ``entries``; None: ``state_dict``, or the whole of a bare
            state dict; else all tensors, by their dotted paths (``state.0.exp_avg``).
        digests: What ``verify`` compares besides checksums in the file; a text is the digest of the whole file.
        allow_globals: Names like ``module.Class`` that may stand in the file besides those that torch.save needs;
            objects of them are read as inert ``ForeignObject`` records. The environment variable
            ``NOETHER_INIT_ALLOW_GLOBALS`` adds to them, separated by commas. A config never does.
        stopwatch: Takes the time of this call, and of everything that is done with the checkpoint later.

    Raises ``ConfigError`` for a URI, ``CheckpointNotFoundError``, ``CheckpointFormatError`` (``UnsafeGlobalError`` for
    names that are not allowed) or ``CheckpointCorruptError`` (checksum of the header).
    """
    stopwatch = Stopwatch() if stopwatch is None else stopwatch
    with stopwatch.phase("screen"):
        handle = open_file(local_path(location)) if isinstance(location, str | os.PathLike) else Handle(location)
        try:
            with no_garbage_collection():
                # a zip archive of stored records has zero where the header of a safetensors file has its first brace
                is_safetensors = handle.size > 8 and handle.read(1, 8) == b"{"
                content = read_safetensors(handle) if is_safetensors else read_torch_zip(handle, allow_globals)
                known = Digests(digests) if isinstance(digests, str) else digests or Digests()
                return FileCheckpoint(handle, content, entry, known, stopwatch)
        except BaseException as error:
            handle.close()
            if isinstance(error, UnreadableError):
                raise CheckpointFormatError(f"{handle.path} {error}", path=handle.path) from error
            raise


class FileCheckpoint(BaseCheckpoint):
    """An open file; ``open_checkpoint`` makes it. ``format`` is ``torch`` or ``safetensors``.

    A safetensors file has nothing but tensors and texts: ``metadata`` is its ``__metadata__``.
    """

    def __init__(
        self, handle: Handle, content: Content, entry: str | None, digests: Digests, stopwatch: Stopwatch
    ) -> None:
        self.path = handle.path
        self._handle = handle
        self._content = content
        self._stopwatch = stopwatch
        handle.advance = None if stopwatch.bar is None else stopwatch.advance
        root = content.value
        self._parts: Mapping[Any, Any] = root if type(root) is dict else {"object": root}
        self._own = state_dict_of(root, TensorInfo)
        is_below = self._own is not None and self._own is not root
        # an empty name means the whole object
        self._trees = {"": root}
        for key, child in self._parts.items() if type(root) is dict else ():
            if type(key) is str and key and (content.graph.count(child) or (is_below and child is self._own)):
                self._trees[key] = child
        usual = "state_dict" if is_below else ""
        self._entry = usual if entry is None else entry
        self._tensors, self.extra_state = self._select(self._entry)
        beside: Mapping[Any, Any] = {} if self._is_state_dict("") else self._parts
        if self._entry:
            beside = {key: child for key, child in self._parts.items() if key != self._entry}
        if self._is_state_dict(self._entry):
            self.versions = content.versions.get(id(self._trees[self._entry]), {})
        self.metadata = beside if content.metadata is None else content.metadata
        # digests speak of the keys that a file has where no tree is named
        written = self._tensors if entry is None else self._select(usual)[0]
        others, own = {**beside, **self.extra_state}, self._tensors

        # not a method: a reference back to this object would keep a large header until the garbage is collected
        def named() -> Mapping[str, TensorInfo]:
            return {**content.graph.tensors(others), **own}

        self._verification = Verification(handle, content, digests, written, named, stopwatch.count)
        self.is_verifiable = self._verification.is_possible

    @property
    def format(self) -> Literal["torch", "safetensors"]:
        """``torch`` or ``safetensors``."""
        return self._content.format

    @property
    def entries(self) -> Mapping[str, int]:
        """The trees of the file, each with its number of tensors; empty name: tensors that lie in none of them."""
        found = {name: self._content.graph.count(tree) for name, tree in self._trees.items() if name}
        outside = self._content.graph.count(self._content.value) - sum(found.values())
        return {"": outside, **found} if outside or not found else found

    def tensors(self, entry: str | None = None) -> Mapping[str, TensorInfo]:
        """Key -> tensor. A state dict's tensors have its own keys, those of another tree dotted paths in it."""
        if entry is None or entry == self._entry:
            return self._tensors
        tree = self.values(entry)
        return _tensors_in(tree) if is_state_dict(tree, TensorInfo) else self._by_paths(entry)

    def values(self, entry: str | None = None) -> Any:
        """A tree of the file, plain Python with ``TensorInfo`` as leaves. ``load`` is built from the same values."""
        name = self._entry if entry is None else entry
        if name not in self._trees:
            raise self._not_found("tree", name, self.entries)
        return self._trees[name]

    def read(self, key: Key, box: Box | None = None) -> torch.Tensor:
        """The tensor, or a box of it, on the CPU, in memory of its own, without gradient."""
        info = self._info(key) if box is None else self._info(key).part(box)
        with self._stopwatch.phase("read", info.nbytes):
            return reading.read_tensor(self._handle, info, key if isinstance(key, str) else "")

    def slices(self, key: Key) -> Iterator[torch.Tensor]:
        """The tensor in slices along one dimension, each of about a megabyte."""
        info = self._info(key)
        return (reading.read_tensor(self._handle, info.part(box)) for box in info.boxes())

    def read_all(
        self, leaves: Iterable[TensorInfo], *, verify: bool = True, look: bool = True
    ) -> dict[TensorInfo, torch.Tensor]:
        """Read into memory of their own in the pass that verifies."""
        wanted = list(self._infos(leaves))
        found, targets = reading.allocated(self._handle, self._verification.whole_records(wanted))
        if verify:
            with self._stopwatch.phase("verify", expected=self._handle.size):
                self._verification.verify(look=wanted if look else (), targets=targets)
        elif targets:
            with self._stopwatch.phase("read"):
                self._verification.examine((), wanted if look else (), targets)
        left = [info for info in wanted if info not in found]
        with self._stopwatch.phase("read", sum(info.nbytes for info in left)):
            for info in left:
                found[info] = reading.read_tensor(self._handle, info)
        return found

    def copy_into(self, copies: Iterable[Copy]) -> None:
        """Copy into existing tensors.

        The same dtype in CPU memory of the same order is read straight into it, with several threads; anything else
        goes in chunks through small buffers (pinned ones for a CUDA device), and ``Tensor.copy_`` casts them.
        """
        copies = list(copies)
        infos = self._infos(key for key, _box, _target in copies)
        sources = [
            (key if isinstance(key, str) else "", infos[key] if box is None else infos[key].part(box), target)
            for key, box, target in copies
        ]
        self._handle.check_unchanged()
        reading.copy_tensors(self._handle, sources, self._stopwatch)
        self._handle.check_unchanged()

    def mapped(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors that are the file itself, mapped privately."""
        with self._stopwatch.phase("read"):
            return reading.map_tensors(self._handle, self._infos(keys))

    def materialize(self, value: Any) -> Any:
        """``value``, taken from ``metadata``, ``extra_state`` or ``values()``, with real tensors."""
        materializer = reading.Materializer(self._read_own, self._content.versions, self.path, self._handle.size)
        with self._stopwatch.phase("read"):
            converted = materializer.convert(value)
            self._stopwatch.count(materializer.nbytes)
        self._handle.check_unchanged()
        return converted

    def verify(
        self, keys: Iterable[Key] | None = None, part: tuple[int, int] | None = None, *, look: Iterable[Key] = ()
    ) -> Verified:
        """Compare with the checksums in the file, or with the digests that were given.

        With digests of the records, header and tensors are compared with those; else, with a digest of the file, all
        its bytes. A safetensors file carries no checksums, ever: without a digest, a line in the log says so.
        """
        infos = None if keys is None else self._infos(keys).values()
        with self._stopwatch.phase("verify", expected=self._handle.size):
            return self._verification.verify(infos, part, look=self._infos(look).values())

    def nonfinite(self, keys: Iterable[AnyKey]) -> dict[AnyKey, Finding]:
        """Those of the tensors that hold ``NaN`` or ``infinities``; none is read into memory as a whole."""
        infos = self._infos(keys)
        with self._stopwatch.phase("verify"):
            found = self._verification.nonfinite(infos.values())
        return {key: found[info] for key, info in infos.items() if info in found}

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    @property
    def digest_of_records(self) -> str:
        """Digest of what the file says of its records, their checksums included; see ``Digests.records``."""
        return digest_of_records(self._content.records.values())

    def checksums(self) -> dict[str, int | None]:
        """CRC-32 of the bytes of every tensor, in the order in which they lie in the file; by path in the whole object.

        None where the file has none of the bytes of this tensor alone.
        """
        return self._verification.checksums(self._content.graph.tensors({"": self._content.value}))

    def _is_state_dict(self, name: str) -> bool:
        tree = self.values(name)
        if self._own is not None and tree is self._own:
            return True
        return bool(name) and type(tree) is dict and any(type(child) is TensorInfo for child in tree.values())

    def _select(self, name: str) -> tuple[Mapping[str, TensorInfo], Mapping[str, Any]]:
        """The tensors of a tree, and, of a state dict, what else is in it."""
        tree = self.values(name)
        if not self._is_state_dict(name):
            return MappingProxyType(self._by_paths(name)), {}
        wrong = next((key for key in tree if type(key) is not str), None)
        if wrong is not None:
            raise UnreadableError(
                f"cannot be read as a checkpoint: its state dict has the key {one_line(repr(wrong))}, which is no "
                "text. Next: write it again with torch.save(state_dict, path)"
            )
        tensors = _tensors_in(tree)
        return MappingProxyType(tensors), {key: child for key, child in tree.items() if key not in tensors}

    def _by_paths(self, name: str) -> dict[str, TensorInfo]:
        return self._content.graph.tensors(dict(children(self._trees[name])) if name else self._parts)

    def _info(self, key: Key) -> TensorInfo:
        return self._infos([key])[key]

    def _infos(self, keys: Iterable[AnyKey]) -> dict[AnyKey, TensorInfo]:
        found: dict[AnyKey, TensorInfo] = {
            key: key if isinstance(key, TensorInfo) else self._tensors.get(key) or self._tensors[self.key_of(key)]
            for key in keys
        }
        for leaf in self._verification.foreign([key for key in found if isinstance(key, TensorInfo)]):
            raise CheckpointError(
                f"{self.path} has no such tensor as {leaf}: it is one of another file", path=self.path
            )
        return found

    def _read_own(self, info: TensorInfo) -> torch.Tensor:
        return reading.read_tensor(self._handle, self._info(info))


def _tensors_in(tree: Any) -> dict[str, TensorInfo]:
    return {key: child for key, child in tree.items() if type(child) is TensorInfo} if type(tree) is dict else {}
