"""Open a checkpoint file: detect the format from the content, screen the file, and read it through one handle."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import attrs
import xxhash

from noether_init_core.errors import CheckpointCorruptError, CheckpointError, CheckpointFormatError
from noether_init_core.files import reading
from noether_init_core.files.checkpoint import AnyKey, BaseCheckpoint, Copy, Digests, Key, Verified
from noether_init_core.files.content import (
    METADATA,
    Box,
    ForeignName,
    ForeignObject,
    TensorInfo,
    UnreadableError,
    children,
    is_state_dict,
    place_of,
    state_dict_of,
)
from noether_init_core.files.formats.others import NEXT_SAVE, folder_kind
from noether_init_core.files.formats.safetensors import read_safetensors
from noether_init_core.files.formats.torch_zip import read_torch_zip
from noether_init_core.files.graph import Content, Unread
from noether_init_core.files.refusals import Guarded, called_on, refusal
from noether_init_core.files.storage.handle import Handle, Storage, open_file
from noether_init_core.files.verification import Verification, digest_of_records
from noether_init_core.memory import Finding, no_garbage_collection
from noether_init_core.messages import one_line
from noether_init_core.stopwatch import Stopwatch
from noether_init_core.uris import local_path

if TYPE_CHECKING:
    import torch

#: Bytes of each record that ``identity`` reads where a file has no checksums.
_SAMPLE_BYTES = 4096


#: Number of unread parts that are listed, and of letters of their places; the others are counted.
_MOST_UNREAD = 10_000
_MOST_LETTERS = 1 << 20


def open_checkpoint(
    location: str | os.PathLike[str] | Storage,
    *,
    entry: str | None = None,
    digests: Digests | str | None = None,
    allow_globals: Collection[str] = (),
    stopwatch: Stopwatch | None = None,
) -> FileCheckpoint:
    """Open and screen a checkpoint: ``.th``, ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` of torch.save, or ``.safetensors``.

    The content decides the format, not the name. Structure, header and the location of every tensor are checked. Bytes
    of tensors are read only by ``verify`` and ``read``. Each call opens a handle of its own, on any rank or thread;
    close it, or use it as a context manager.

    Args:
        location: The file, or an object with the protocol ``Storage``.
        entry: The tree that methods use by default, see ``entries``. None: ``state_dict``, or the complete object if it
            is a state dict; else all tensors by their dotted paths (``state.0.exp_avg``).
        digests: Digests for ``verify``, besides checksums in the file; a string is the digest of the complete file.
        allow_globals: Names such as ``module.Class`` whose objects may be read, as inert ``ForeignObject`` records. The
            environment variable ``NOETHER_INIT_ALLOW_GLOBALS`` adds names, separated by commas; a config cannot. For
            weights nothing has to be allowed: other objects of foreign classes beside them are skipped, see ``unread``.
        stopwatch: Measures this call and all later operations on the checkpoint.

    Raises ``ConfigError`` for a URI; ``CheckpointNotFoundError``; ``CheckpointFormatError`` for an unknown format;
    ``CheckpointCorruptError`` if the header does not match its checksum. Raises ``UnsafeGlobalError``, which is a
    ``CheckpointFormatError``, for weights in objects of classes that are not allowed.
    """
    stopwatch = Stopwatch() if stopwatch is None else stopwatch
    with stopwatch.phase("screen"):
        handle = _opened(local_path(location)) if isinstance(location, str | os.PathLike) else Handle(location)
        try:
            with no_garbage_collection():
                # Byte 8 of a safetensors file is the first brace of its header. In a zip archive of stored records it
                # is the compression method, 0. The length before it is never text, as in a file of JSON.
                first = handle.read(min(handle.size, 9), 0)
                is_safetensors = (first[8:] == b"{" and not first.isascii()) or first[6:] == b"\0\0{"
                content = read_safetensors(handle) if is_safetensors else read_torch_zip(handle, allow_globals)
                known = Digests(digests) if isinstance(digests, str) else digests or Digests()
                found = FileCheckpoint(handle, content, entry, known, stopwatch)
                # a relative path would be another one in a process with another working folder
                where = os.path.abspath(location) if isinstance(location, str | os.PathLike) else location
                allowed = tuple(allow_globals)
                found.again = partial(open_checkpoint, where, entry=entry, digests=digests, allow_globals=allowed)
                return found
        except BaseException as error:
            handle.close()
            if isinstance(error, UnreadableError):
                raise CheckpointFormatError(f"{handle.path} {error}", path=handle.path) from error
            raise


def _opened(path: Path) -> Handle:
    """Open a file; the error for a folder says what the folder is, if it is known."""
    try:
        return open_file(path)
    except CheckpointFormatError as error:
        kind = folder_kind(path) if path.is_dir() else None
        if kind is None:
            raise
        raise CheckpointFormatError(f"{path} {kind}", path=path) from error


class FileCheckpoint(BaseCheckpoint):
    """An open file, created by ``open_checkpoint``. ``format`` is ``torch`` or ``safetensors``.

    A safetensors file holds only tensors and strings: ``metadata`` is its ``__metadata__``.

    A copy, also in another process, opens the file again with a handle of its own. Raises ``CheckpointCorruptError`` if
    the file has changed meanwhile.
    """

    #: Opens the same file again.
    again: Callable[[], FileCheckpoint]

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
        # A file whose state dict is unread has no other tree that could be meant.
        is_below = type(root) is dict and (
            (self._own is not None and self._own is not root) or content.graph.is_unread(root.get("state_dict"))
        )
        # The empty name is the complete object.
        self._trees = {"": root}
        asked = {entry, "state_dict"} if is_below else {entry}
        for key, child in self._parts.items() if type(root) is dict else ():
            if type(key) is str and key and (content.graph.count(child) or key in asked):
                self._trees[key] = child
        usual = "state_dict" if is_below else ""
        self._entry = usual if entry is None else entry
        self._check_tree(self._entry)
        self._tensors, self.extra_state = self._select(self._entry)
        beside: Mapping[Any, Any] = {} if self._is_state_dict("") else self._parts
        if self._entry:
            beside = {key: child for key, child in self._parts.items() if key != self._entry}
        if self._is_state_dict(self._entry):
            self.versions = content.versions.get(id(self._trees[self._entry]), {})
        self.metadata = self._guarded(beside) if content.metadata is None else content.metadata
        # A manifest lists the keys of the default tree, whichever tree this call selected.
        written = self._tensors if entry is None else self._select(usual)[0]
        others, own = {**beside, **self.extra_state}, self._tensors

        # Not a method: a reference to this object would form a cycle, which keeps a large header in memory until the
        # garbage collector runs.
        def named() -> Mapping[str, TensorInfo]:
            return {**content.graph.tensors(others), **own}

        self._verification = Verification(handle, content, digests, written, named, stopwatch.count)
        self.is_verifiable = self._verification.is_possible

    def __reduce__(self) -> tuple[Any, ...]:
        self._handle.check_unchanged()
        version = self._handle.storage.version  # raises if the file is closed
        return _opened_again, (self.again, ("" if self._has_checksums else version, self.identity()))

    @property
    def format(self) -> Literal["torch", "safetensors"]:
        """``torch`` or ``safetensors``."""
        return self._content.format

    @property
    def entries(self) -> Mapping[str, int]:
        """Name of each tree of the file -> its number of tensors; the empty name counts tensors outside all trees."""
        found = {name: self._content.graph.count(tree) for name, tree in self._trees.items() if name}
        outside = self._content.graph.count(self._content.value) - sum(found.values())
        return {"": outside, **found} if outside or not found else found

    def tensors(self, entry: str | None = None) -> Mapping[str, TensorInfo]:
        """Return key -> tensor. Keys of a state dict are its own; in another tree they are dotted paths."""
        if entry is None or entry == self._entry:
            return self._tensors
        self._check_tree(entry)
        tree = self._tree(entry)
        return _tensors_in(tree) if is_state_dict(tree, TensorInfo) else self._by_paths(entry)

    def values(self, entry: str | None = None) -> Any:
        """Return a tree of the file as plain Python with ``TensorInfo`` as leaves; ``load`` uses the same values.

        Raises ``UnsafeGlobalError`` for a tree with an object of a foreign class that was not allowed,
        ``CheckpointFormatError`` for one with another part that was not read.
        """
        name = self._entry if entry is None else entry
        tree = self._tree(name)
        error = refusal(self.path, self._content.graph, tree, (name,) if name else ())
        if error is not None:
            raise error
        return tree

    @functools.cached_property
    def unread(self) -> Mapping[str, Unread]:
        """Place -> the part of the file that was skipped there; nothing of it was imported, called or converted."""
        graph = self._content.graph
        met: set[int] = set()
        found: dict[str, Unread] = {}
        names = dict.fromkeys(graph.names())
        letters = more = tensors = 0
        for at, part, unread in graph.unread(self._content.value):
            inside = 0
            for one in graph.walk(part, met):
                inside += type(one) is TensorInfo
                if type(one) in (ForeignObject, ForeignName):
                    names.pop(one.name, None)
            if len(found) < _MOST_UNREAD and letters < _MOST_LETTERS:
                place = place_of(at)
                letters += len(place)
                found.setdefault(place, attrs.evolve(unread, tensors=inside))
            else:
                more, tensors = more + 1, tensors + inside
        for name in itertools.islice(names, _MOST_UNREAD):
            found[f"<dropped>.{name}"] = Unread(name, f"it is {name}, which the file makes and drops")
        if more:
            found["<more>"] = Unread("", f"{more} more parts", tensors)
        return MappingProxyType(found)

    def read(self, key: Key, box: Box | None = None) -> torch.Tensor:
        """Read a tensor, or a box of it, into new CPU memory, without gradient."""
        info = self._info(key) if box is None else self._info(key).part(box)
        with self._stopwatch.phase("read", info.nbytes):
            return reading.read_tensor(self._handle, info, key if isinstance(key, str) else "")

    def slices(self, key: Key) -> Iterator[torch.Tensor]:
        """Yield the tensor in slices along one dimension, each of about 1 MiB."""
        info = self._info(key)
        return (reading.read_tensor(self._handle, info.part(box)) for box in info.boxes())

    def read_all(
        self, leaves: Iterable[TensorInfo], *, verify: bool = True, look: bool = True
    ) -> dict[TensorInfo, torch.Tensor]:
        """Read tensors into new memory in the pass that verifies."""
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

        A CPU target of the same dtype and memory order is filled directly by several threads. For other targets, the
        bytes go in chunks through small buffers (pinned for a CUDA device), and ``Tensor.copy_`` casts them.
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
        """Return tensors that are private mappings of the file."""
        with self._stopwatch.phase("read"):
            return reading.map_tensors(self._handle, self._infos(keys))

    def materialize(self, value: Any) -> Any:
        """Replace ``TensorInfo`` by tensors in a value from ``metadata``, ``extra_state`` or ``values()``."""
        materializer = reading.Materializer(self._read_own, self._content.versions, self.path, self._handle.size)
        with self._stopwatch.phase("read"):
            converted = materializer.convert(value)
            self._stopwatch.count(materializer.nbytes)
        self._handle.check_unchanged()
        return converted

    def verify(
        self, keys: Iterable[Key] | None = None, part: tuple[int, int] | None = None, *, look: Iterable[Key] = ()
    ) -> Verified:
        """Compare bytes with the checksums in the file, or with the given digests.

        If ``Digests.records`` is given, header and tensors are compared one by one. Otherwise, if ``Digests.file`` is
        given, all bytes are. The safetensors format has no checksums: without a digest, a warning in the log says so.
        """
        infos = None if keys is None else self._infos(keys).values()
        with self._stopwatch.phase("verify", expected=self._handle.size):
            return self._verification.verify(infos, part, look=self._infos(look).values())

    def nonfinite(self, keys: Iterable[AnyKey]) -> dict[AnyKey, Finding]:
        """Return the keys of tensors with ``NaN`` or ``infinities``; no tensor is read into memory as a whole."""
        infos = self._infos(keys)
        with self._stopwatch.phase("verify"):
            found = self._verification.nonfinite(infos.values())
        return {key: found[info] for key, info in infos.items() if info in found}

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    @property
    def digest_of_records(self) -> str:
        """Digest of the list of records with their checksums; see ``Digests.records``."""
        return digest_of_records(self._content.records.values())

    @property
    def _has_checksums(self) -> bool:
        return all(record.crc is not None for record in self._content.records.values())

    def identity(self) -> str:
        """Digest of size and records with their checksums; without checksums, also of the first bytes of each record.

        Equal for copies of a file, wherever they lie. Only checksums make another identity certain for other bytes.
        """
        found = xxhash.xxh3_128(f"{self._handle.size} {self.digest_of_records}".encode())
        for record in () if self._has_checksums else self._content.records.values():
            found.update(self._handle.read(min(record.size, _SAMPLE_BYTES), record.offset))
        return f"xxh3_128:{found.hexdigest()}"

    def checksums(self) -> dict[str, int | None]:
        """Return path in the complete object -> CRC-32 of the bytes of the tensor, in the memory order of the file.

        None for a tensor without a checksum of exactly its bytes, such as a view of a larger storage.
        """
        return self._verification.checksums(self._content.graph.tensors({"": self._content.value}))

    def _tree(self, name: str) -> Any:
        if name not in self._trees:
            raise self._not_found("tree", name, self.entries)
        return self._trees[name]

    def _check_tree(self, name: str) -> None:
        """Refuse a tree whose tensors are asked for and could be others than those that are listed.

        A state dict is asked for as a whole, apart from a ``_metadata`` in it, which modules do not load. Of any other
        tree only the tensors are asked for; without tensors in it, the weights may be in an unread part.
        """
        tree, graph = self._tree(name), self._content.graph
        place = (name,) if name else ()
        error = None
        if not graph.count(tree):
            error = refusal(self.path, graph, tree, place) or refusal(self.path, graph, self._content.value)
        elif self._is_state_dict(name):
            error = refusal(self.path, graph, tree, place, without=METADATA)
        if error is None:
            error = called_on(self.path, graph.calls_on(tree, is_whole=self._is_state_dict(name)), tree, place)
        if error is not None:
            raise error

    def _guarded(self, values: Mapping[Any, Any]) -> Mapping[Any, Any]:
        path, graph = self.path, self._content.graph
        if not any(graph.is_spoiled(one) or graph.calls_on(one, are_weights=False) for one in values.values()):
            return values
        return Guarded(values, lambda value, key: refusal(path, graph, value, (key,)))

    def _is_state_dict(self, name: str) -> bool:
        tree = self._tree(name)
        if self._own is not None and tree is self._own:
            return True
        return bool(name) and type(tree) is dict and any(type(child) is TensorInfo for child in tree.values())

    def _select(self, name: str) -> tuple[Mapping[str, TensorInfo], Mapping[str, Any]]:
        """Return the tensors of a tree, and the other entries if the tree is a state dict."""
        tree = self._tree(name)
        if not self._is_state_dict(name):
            return MappingProxyType(self._by_paths(name)), {}
        wrong = next((key for key in tree if type(key) is not str), None)
        if wrong is not None:
            raise UnreadableError(
                f"cannot be read as a checkpoint: its state dict has the key {one_line(repr(wrong))}, which is not a "
                f"string. {NEXT_SAVE}"
            )
        tensors = _tensors_in(tree)
        left = {key: child for key, child in tree.items() if key not in tensors}
        if METADATA in left and self._content.graph.is_spoiled(left[METADATA]):
            del left[METADATA]
        return MappingProxyType(tensors), left

    def _by_paths(self, name: str) -> dict[str, TensorInfo]:
        if self._content.graph.is_unread(self._trees[name]):
            return {}
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
                f"{leaf} is not a tensor of {self.path}. Next: pass a leaf of values() of this checkpoint",
                path=self.path,
            )
        return found

    def _read_own(self, info: TensorInfo) -> torch.Tensor:
        return reading.read_tensor(self._handle, self._info(info))


def _opened_again(again: Callable[[], FileCheckpoint], identity: tuple[str, str]) -> FileCheckpoint:
    """The copy of a checkpoint. Checksums prove its bytes, on any node; without them the version must be the same."""
    found = again()
    if identity != ("" if found._has_checksums else found._handle.storage.version, found.identity()):
        found.close()
        raise CheckpointCorruptError(
            f"{found.path} is not the file that was opened: it was written again since. Next: open_checkpoint again",
            path=found.path,
        )
    return found


def _tensors_in(tree: Any) -> dict[str, TensorInfo]:
    return {key: child for key, child in tree.items() if type(child) is TensorInfo} if type(tree) is dict else {}
