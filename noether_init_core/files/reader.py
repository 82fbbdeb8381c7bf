"""The reader of files that torch.save or safetensors writes: opened once, screened, verified, read without torch.load.

Nothing that a file names is imported or called, and nothing is allocated that a header merely claims. Torch is
imported when the first tensor is read, not before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    UnsafeGlobalError,
)
from noether_init_core.files.formats.inert_values import ForeignObject
from noether_init_core.files.formats.opcodes import Interpreter, OpcodeError
from noether_init_core.files.formats.safetensors_header import is_safetensors, read_safetensors_header
from noether_init_core.files.formats.zip_records import Record, read_records
from noether_init_core.files.integrity import CommittedFile, Integrity, digest_of_records, is_dense
from noether_init_core.files.module_versions import Versions, versions_in
from noether_init_core.files.nonfinite_values import Finding
from noether_init_core.files.object_graph import Survey
from noether_init_core.files.storage.file_handle import FileHandle, open_file
from noether_init_core.files.tensor_info import TensorInfo
from noether_init_core.files.tensor_names import state_dict_of
from noether_init_core.files.verifying import damaged_records
from noether_init_core.memory import no_garbage_collection
from noether_init_core.stopwatch import Stopwatch

if TYPE_CHECKING:
    import torch

__all__ = ["ALLOW_GLOBALS_VARIABLE", "CheckpointReader", "VerifyMode", "open_checkpoint"]

VerifyMode = Literal["full", "header", "none"]
Key = TypeVar("Key", bound=str | TensorInfo)

ALLOW_GLOBALS_VARIABLE = "NOETHER_INIT_ALLOW_GLOBALS"
_HEADER = "data.pkl"
_MAX_HEADER = 512 << 20
_MOST_PASTED = 200
_logger = logging.getLogger(__name__)


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    digest: str | None = None,
    allow_globals: Collection[str] = (),
    stopwatch: Stopwatch | None = None,
) -> CheckpointReader:
    """Open and screen a checkpoint: ``.th``, ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` of torch.save, or ``.safetensors``.

    What a file is, its content says and not its name.

    Its structure, its header and every tensor's place are checked; bytes of tensors are not read, see
    ``CheckpointReader.verify``. Only ``digest`` (``xxh3_128:<hex>`` or ``sha256:<hex>``) reads the whole file.

    ``allow_globals``: names like ``module.Class`` that may stand in the file besides those that torch.save needs;
    objects of them are read as inert ``ForeignObject`` records. The environment variable
    ``NOETHER_INIT_ALLOW_GLOBALS`` adds to them, separated by commas. A config never does.

    ``stopwatch``: takes the time of this call, and of everything that the reader does later.

    Raises ``CheckpointNotFoundError``, ``CheckpointFormatError`` (``UnsafeGlobalError`` for names that are not
    allowed) or ``CheckpointCorruptError`` (digest, or checksum of the header).
    """
    stopwatch = Stopwatch() if stopwatch is None else stopwatch
    with stopwatch.phase("screen"):
        handle = open_file(Path(path))
        try:
            if digest is not None:
                with stopwatch.phase("verify", handle.size):
                    handle.check_digest(digest)
            with no_garbage_collection():
                return CheckpointReader(
                    handle, allow_globals=allow_globals, is_verified=digest is not None, stopwatch=stopwatch
                )
        except BaseException:
            handle.close()
            raise


class CheckpointReader:
    """An open checkpoint file. Use it as a context manager, or ``close`` it; ``open_checkpoint`` makes it.

    Attributes:
        path: The file.
        tensors: The keys of a model file's ``state_dict``, or of a bare state dict; otherwise the dotted paths of all
            tensors (``state.0.exp_avg``).
        metadata: The object without the state dict, plain Python; a tensor stands there as ``TensorInfo``. Of an
            object that is no dict it is ``{"object": ...}``. To be read only: ``load`` is built from the same values.
        extra_state: The entries of the state dict that are no tensors, with tensors as ``TensorInfo``, too;
            ``materialize`` reads them.
        versions: What the state dict's ``_metadata`` says of the modules that it was taken from: path of a module ->
            such as ``{"version": 2}``; empty where there is none. Loading code of modules decides by it whether it
            translates; without it, torch takes a file for one of the oldest version.
        format: ``torch`` or ``safetensors``. A safetensors file has nothing but tensors and texts: ``metadata`` is its
            ``__metadata__``, ``extra_state`` is empty, ``load`` gives a dict of all tensors.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]
    extra_state: Mapping[str, Any]
    versions: Versions
    _versions: Mapping[int, Versions]
    format: Literal["torch", "safetensors"]
    _records: Mapping[str, Record]

    def __init__(
        self,
        handle: FileHandle,
        *,
        allow_globals: Collection[str] = (),
        is_verified: bool = False,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.path = handle.path
        self._handle = handle
        self._stopwatch = Stopwatch() if stopwatch is None else stopwatch
        self._is_verified = is_verified
        if is_safetensors(handle):
            self._open_safetensors()
            self._integrity = Integrity(handle, self._records)
            return
        self.format = "torch"
        self._records = read_records(handle)
        # torch.serialization.set_crc32_options(False) writes zero for all of them
        self._has_checksums = any(record.crc for record in self._records.values())
        self._integrity = Integrity(handle, self._records)
        header = self._read_header()
        self._object, self._survey = self._interpret(header, allow_globals)
        self._split()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<CheckpointReader {str(self.path)!r}: {len(self.tensors)} tensors>"

    def close(self) -> None:
        """Close the file; what was said of it stays readable. Repeating it does nothing."""
        self._handle.close()

    def verify(
        self,
        mode: VerifyMode = "full",
        *,
        digest: str | None = None,
        committed: CommittedFile | None = None,
        values: Iterable[str | TensorInfo] = (),
    ) -> None:
        """Compare bytes with the checksums in the file. A second call, or one after a digest was checked, is free.

        ``full``: every record, or with ``digest`` (as in ``open_checkpoint``) the whole file instead. ``header``: what
        was compared when the file was opened, the names, shapes and plain values. ``none``: nothing. A safetensors file
        carries no checksums, ever: without ``digest``, ``full`` is ``header`` for it, and a line in the log says so.

        Args:
            mode: What is compared.
            digest: Of the whole file.
            committed: What a manifest says of the file. With it, ``full`` compares header and records with the
                manifest, and every tensor with its digest there; ``digest`` is not needed then.
            values: Tensors whose values are looked at while their bytes are in the cache, so that ``nonfinite`` need
                not read them again.

        Raises ``CheckpointCorruptError``, which names the keys in every damaged record, and ``CheckpointFormatError``
        where ``full`` is asked of a file that was written without checksums.
        """
        if mode not in ("full", "header", "none"):
            raise CheckpointError(f"verify is {mode!r}; it can be full, header or none", path=self.path)
        if mode == "full" and not self._is_verified:
            with self._examining("verify"):
                self._verify(digest, committed, [self._info(value) for value in values], {})

    @property
    def has_checksums(self) -> bool:
        """Whether the file carries checksums; without them only a digest, or a manifest, can vouch for its bytes."""
        return self._has_checksums

    def nonfinite(self, keys: Iterable[Key]) -> dict[Key, Finding]:
        """Those of the tensors that hold ``NaN``, or else ``infinities``; every other one is all finite.

        What ``verify`` was told to look at is not read again. No tensor is read into memory as a whole.
        """
        infos = {key: self._info(key) for key in keys}
        with self._examining("verify"):
            found = self._integrity.nonfinite(infos.values())
        return {key: found[info] for key, info in infos.items() if info in found}

    def is_same(self, first: str, other: str) -> bool:
        """Whether two tensors have the same dtype, shape and bytes. They are not read into memory as a whole."""
        from noether_init_core.files.reading import are_equal

        with self._stopwatch.phase("verify"):
            return are_equal(self._handle, self._records, self._find(first), self._find(other))

    @property
    def digest_of_records(self) -> str:
        """Digest of what the file says of its records, their checksums included; see ``verify(committed=...)``."""
        return digest_of_records(self._records.values())

    def checksums(self) -> dict[str, int | None]:
        """CRC-32 of the bytes of every tensor, in the order in which they lie in the file; by path in the whole object.

        None where the file has none of the bytes of this tensor alone. Of a file of torch.save only.
        """
        found: dict[str, int | None] = {}
        for path, info in self._survey.tensors({"": self._object}).items():
            record = self._records[info.record]
            is_alone = is_dense(info) and info.span * info.itemsize == record.size
            is_alone = is_alone and not (info.is_conjugated or info.is_negated)
            found[path] = record.crc if is_alone and self._has_checksums else None
        return found

    def _verify(
        self,
        digest: str | None,
        committed: CommittedFile | None,
        values: list[TensorInfo],
        targets: Mapping[str, memoryview],
    ) -> None:
        """Compare, look at values and fill memory (record -> all of its bytes), in one pass where that can be."""
        if committed is not None:
            # manifests did not always know of records
            digest = None if committed.records is not None and self._has_checksums else committed.digest
        if digest is not None:
            try:
                with self._stopwatch.phase("verify", self._handle.size):
                    self._handle.check_digest(digest)
            except CheckpointCorruptError:
                if self._has_checksums:
                    self._compare_checksums()  # names the keys, where it is damage and not another file
                raise
            if targets or values:
                self._integrity.damaged(values, targets=targets, has_checksums=False)
        elif committed is not None:
            whole = {
                info: committed.tensors[key]
                for key, info in self.tensors.items()
                if key in committed.tensors and info.is_contiguous and info.nbytes == self._records[info.record].size
            }
            digests = {info.record: tensor.digest for info, tensor in whole.items()}
            try:
                self._integrity.check_committed(committed, self.tensors)
            except CheckpointCorruptError:
                self._compare_checksums((), digests)  # names the keys whose bytes differ
                raise
            known = {info: tensor for info, tensor in whole.items() if tensor.values is not None}
            self._compare_checksums([info for info in values if info not in known], digests, targets)
            self._integrity.learn(known)
        else:
            self._compare_checksums(values, targets=targets)
        self._handle.check_unchanged()
        self._is_verified = True

    def _compare_checksums(
        self,
        values: Iterable[TensorInfo] = (),
        digests: Mapping[str, str] | None = None,
        targets: Mapping[str, memoryview] | None = None,
    ) -> None:
        if self.format == "safetensors":
            _logger.warning(
                "%s: a safetensors file carries no checksums, so only its structure was checked. A digest would cover "
                "every byte: digest: xxh3_128:... or sha256:...",
                self.path,
            )
            if targets:
                self._integrity.damaged(values, targets=targets, has_checksums=False)
            return
        if not self._has_checksums and any(record.size for record in self._records.values()):
            raise CheckpointFormatError(
                f"{self.path} was written without checksums (torch.serialization.set_crc32_options(False)), so its "
                "bytes cannot be verified. To load it without that: verify: header",
                path=self.path,
            )
        damaged = self._integrity.damaged(values, digests=digests, targets=targets)
        if damaged:
            elsewhere = self._survey.tensors({**self.metadata, **self.extra_state})
            self._report(damaged, {**elsewhere, **self.tensors})

    def read_all(
        self,
        infos: Iterable[TensorInfo],
        mode: VerifyMode = "none",
        *,
        digest: str | None = None,
        committed: CommittedFile | None = None,
        look: bool = False,
    ) -> dict[TensorInfo, torch.Tensor]:
        """Read tensors into memory of their own, as ``read`` does, and ``verify`` the file in the same pass.

        With ``look``, ``nonfinite`` knows these tensors afterwards. What raises, raises as in ``verify``.
        """
        from noether_init_core.files.reading import allocated, read_tensor

        if mode not in ("full", "header", "none"):
            raise CheckpointError(f"verify is {mode!r}; it can be full, header or none", path=self.path)
        wanted = [self._own(info) for info in dict.fromkeys(infos)]
        found, targets = allocated(self._handle, self._records, wanted)
        values = wanted if look else []
        if mode == "full" and not self._is_verified:
            with self._examining("verify"):
                self._verify(digest, committed, values, targets)
        elif targets:
            with self._examining("read"):
                self._integrity.damaged(values, targets=targets, has_checksums=False)
        left = [info for info in wanted if info not in found]
        if left:
            with self._stopwatch.phase("read", sum(info.nbytes for info in left)):
                for info in left:
                    found[info] = read_tensor(self._handle, self._records, info)
        return found

    def mapped(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors that are the file itself, mapped privately: writing to them never changes the file.

        The other direction is not so: what changes the file later, changes tensors that were not written to, and a
        file that is cut off kills the process that touches them. Keys whose bytes cannot be used as they lie in the
        file are left out; ``read`` gives them.
        """
        from noether_init_core.files.reading import map_tensors

        with self._stopwatch.phase("read"):
            return map_tensors(self._handle, self._records, {key: self._find(key) for key in keys})

    def read(self, key_or_info: str | TensorInfo) -> torch.Tensor:
        """The tensor, on the CPU, in memory of its own, without gradient."""
        from noether_init_core.files.reading import read_tensor

        info = self._info(key_or_info)
        with self._stopwatch.phase("read", info.nbytes):
            return read_tensor(self._handle, self._records, info, key_or_info if isinstance(key_or_info, str) else "")

    def pieces(self, key: str) -> Iterator[torch.Tensor]:
        """The tensor in slices along one dimension, each of about a megabyte, so that all of it is never in memory."""
        from noether_init_core.files.reading import read_pieces

        info = self._find(key)
        return (piece for _dimension, _begin, piece in read_pieces(self._handle, self._records, info, key))

    def copy_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors into existing ones of the same shape, in place, without gradient.

        The same dtype in CPU memory of the same order is read straight into it, with several threads; anything else
        goes in chunks through small buffers (pinned ones for a CUDA device), and ``Tensor.copy_`` casts them. Unknown
        keys, other shapes, and tensors without memory are found before anything is changed.
        """
        from noether_init_core.files.reading import copy_tensors

        sources = [(key, self._find(key), target) for key, target in targets.items()]
        self._handle.check_unchanged()
        copy_tensors(self._handle, self._records, sources, self._stopwatch)
        self._handle.check_unchanged()

    def load(self) -> Any:
        """The whole object with real tensors, each with memory of its own; keys of one tensor get one tensor.

        Kinds of dict become ``dict``, ``torch.Size`` becomes ``tuple``, parameters become plain tensors. A state dict
        with ``_metadata`` is an ``OrderedDict`` that has it, as ``load_state_dict`` of modules expects.
        """
        return self.materialize(self._object)

    def materialize(self, value: Any) -> Any:
        """``value``, taken from ``metadata`` or ``extra_state``, with real tensors."""
        from noether_init_core.files.reading import Materializer

        materializer = Materializer(self._handle, self._records, self._versions)
        with self._stopwatch.phase("read"):
            converted = materializer.convert(value)
        self._stopwatch.count("read", materializer.nbytes)
        self._handle.check_unchanged()
        return converted

    @contextmanager
    def _examining(self, phase: str) -> Iterator[None]:
        before = self._integrity.examined
        try:
            with self._stopwatch.phase(phase):
                yield
        finally:  # damage is told when all was read
            self._stopwatch.count(phase, self._integrity.examined - before)

    def _open_safetensors(self) -> None:
        header = read_safetensors_header(self._handle)
        self.format = "safetensors"
        self.tensors = MappingProxyType(header.tensors)
        self.metadata, self.extra_state = header.metadata, {}
        self.versions, self._versions = {}, {}
        self._records, self._has_checksums = header.records, False
        self._object = header.tensors

    def _read_header(self) -> bytes:
        record = self._records[_HEADER]
        if record.size > _MAX_HEADER:
            self._refuse(f"its header is {record.size} bytes long, more than {_MAX_HEADER}")
        order = self._records.get("byteorder")
        if order is not None:
            said = self._handle.read(min(order.size, 16), order.offset)
            if said == b"big":
                self._refuse("it was written on a big-endian machine; save it again on a little-endian one")
            if said != b"little":
                self._refuse(f"its byte order is {said!r}, neither little nor big")
        if self._has_checksums and not self._is_verified and damaged_records(self._handle, [record]):
            self._report([record], {})
        return self._handle.read(record.size, record.offset)

    def _interpret(self, header: bytes, allow_globals: Collection[str]) -> tuple[Any, Survey]:
        from_environment = os.environ.get(ALLOW_GLOBALS_VARIABLE, "").split(",")
        allowed = {*allow_globals, *(name.strip() for name in from_environment)}
        sizes = {name: record.size for name, record in self._records.items()}
        interpreter = Interpreter(header, sizes, allowed)
        try:
            value = interpreter.run()
            survey = Survey(value, len(header))
            if interpreter.unknown:
                self._refuse_globals(interpreter.unknown, survey.foreign, _whole_module(value))
            self._versions = versions_in(interpreter.attached.values(), len(header))
        except OpcodeError as error:
            if interpreter.unknown:
                self._refuse_globals(interpreter.unknown)
            self._refuse(str(error))
        if survey.problems:
            problems = [f"{_printable(path)}: {reason}" for path, reason in survey.problems.items()]
            self._refuse(_listed(problems, "; ", 10))
        return value, survey

    def _split(self) -> None:
        """Tell the state dict from the rest."""
        value = self._object
        self.versions = {}
        state_dict = state_dict_of(value, TensorInfo)
        if state_dict is None:
            rest = value if type(value) is dict else {"object": value}
            self.tensors = MappingProxyType(self._survey.tensors(rest))
            self.metadata, self.extra_state = rest, {}
            return
        rest = {} if state_dict is value else {key: child for key, child in value.items() if key != "state_dict"}
        wrong = [key for key in state_dict if type(key) is not str]
        if wrong:
            self._refuse(f"its state dict has the key {_printable(repr(wrong[0]))}, which is no text")
        tensors = {key: child for key, child in state_dict.items() if type(child) is TensorInfo}
        self.versions = self._versions.get(id(state_dict), {})
        self.tensors = MappingProxyType(tensors)
        self.metadata = rest
        self.extra_state = {key: child for key, child in state_dict.items() if key not in tensors}

    def _find(self, key: str) -> TensorInfo:
        info = self.tensors.get(key)
        if info is None:
            import difflib

            # looking for near names among very many takes seconds
            near = difflib.get_close_matches(key, self.tensors, 3) if len(self.tensors) < 5_000 else []
            hint = f"Near: {', '.join(near)}" if near else f"It has: {_listed(list(self.tensors), ', ', 5) or 'none'}"
            raise CheckpointNotFoundError(
                f"{self.path} has no tensor {key!r}. {hint}", path=self.path, asked=key, candidates=near
            )
        return info

    def _info(self, key_or_info: str | TensorInfo) -> TensorInfo:
        return self._own(key_or_info) if isinstance(key_or_info, TensorInfo) else self._find(key_or_info)

    def _own(self, info: TensorInfo) -> TensorInfo:
        record = self._records.get(info.record)
        if record is None or (info.storage_offset + info.span) * info.itemsize > record.size:
            raise CheckpointError(
                f"{self.path} has no such tensor as {info}: it is one of another file", path=self.path
            )
        return info

    def _report(self, damaged: Iterable[Record], tensors: Mapping[str, TensorInfo]) -> NoReturn:
        keys: dict[str, list[str]] = {record.name: [] for record in damaged}
        for key, info in tensors.items():
            if info.record in keys:
                keys[info.record].append(key)
        parts = [f"{_listed(names, ', ', 10)} ({record})" if names else record for record, names in keys.items()]
        raise CheckpointCorruptError(
            f"{self.path} is damaged: the bytes of {_listed(parts, '; ', 20)} are not those that were written. "
            "Next: copy the file again from where it was written, or take an older checkpoint",
            path=self.path,
            key=", ".join(name for names in keys.values() for name in names),
        )

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointFormatError(
            f"{self.path} cannot be read as a checkpoint: {reason}. "
            "Next: write it again with torch.save(state_dict, path), with tensors and plain values only",
            path=self.path,
        )

    def _refuse_globals(
        self, unknown: Iterable[str], places: Mapping[str, str] | None = None, whole_module: str | None = None
    ) -> NoReturn:
        """``whole_module``: the expression that leads from the object to a pickled module in it, where there is one."""
        names = [_printable(name) for name in unknown]
        placed = {_printable(name): _printable(path) for name, path in (places or {}).items() if path}
        shown = [f"{name} (at {placed[name]})" if name in placed else name for name in names]
        if whole_module is not None:
            advice = (
                "It holds a whole module, not its weights. Next, in a program that you trust, if you trust the file: "
                f"torch.save(torch.load(path, weights_only=False){whole_module}.state_dict(), path)"
            )
        else:
            # what is to be pasted is never cut; nobody looks through very many whether they are harmless
            listed = ",".join(names) if len(names) <= _MOST_PASTED else "..."
            advice = (
                "If these are harmless classes, they can be read as inert records: in code, "
                f"open_checkpoint(path, allow_globals=[...]); for a config, {ALLOW_GLOBALS_VARIABLE}={listed} in the "
                "environment"
            )
        raise UnsafeGlobalError(
            f"{self.path} refers to {_listed(shown, ', ', 20)}, which tensors and plain values do not need. Nothing of "
            f"it was imported or called. {advice}",
            path=self.path,
            names=names,
        )


def _whole_module(value: Any) -> str | None:
    """The expression behind an object that leads to a pickled module: itself, or the value of a key; None for none."""
    if _is_module(value):
        return ""
    entries = value.items() if type(value) is dict else ()
    return next(
        (f"[{_printable(repr(key))}]" for key, child in entries if _is_module(child) and type(key) is str), None
    )


def _is_module(value: Any) -> bool:
    return (
        type(value) is ForeignObject and type(value.state) is dict and {"_parameters", "_modules"} <= value.state.keys()
    )


def _printable(text: str) -> str:
    return text if text.isprintable() and text.isascii() else ascii(text)


def _listed(names: list[str], separator: str, most: int) -> str:
    shown = separator.join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
