"""The manifest of a set: what was written. Its presence is the commit; digests of tensors lie in a file beside it."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import xxhash

from noether_init_core.errors import CheckpointCorruptError, CheckpointFormatError, ConfigError
from noether_init_core.files.storage.disk import LOCAL, FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.memory import Finding
from noether_init_core.sets.file_names import Part, check_tag, parse, stem_of

MANIFEST_NAME = "manifest.json"
#: Beside it: the digests of all tensors, read when files are verified.
DIGESTS_NAME = "digests.json"
#: Beside it: where the tensors came from.
PROVENANCE_NAME = "provenance.json"
#: Beside it: a batch, and what the model made of it. No name that a file of weights or state can have.
PROBE_NAME = "probe.th"
FORMAT: Literal["noether-init-set"] = "noether-init-set"
FORMAT_VERSION: Literal[2] = 2
MAX_MANIFEST_BYTES = 64 << 20
MAX_DIGESTS_BYTES = 256 << 20
MAX_PROVENANCE_BYTES = 256 << 20
_SEAL = re.compile(rb',\n "digest": "(xxh3_128:[0-9a-f]{32})"\n}\n')
_HEAD = f'{{\n "format": "{FORMAT}",\n "format_version": {FORMAT_VERSION},\n'.encode()
_SEAL_BYTES = len(',\n "digest": "xxh3_128:"\n}\n') + 32

Digest = Annotated[str, msgspec.Meta(pattern=r"\Axxh3_128:[0-9a-f]{32}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0)]


# Keys that a later release adds without a new format version are no error.


class TensorDigest(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One tensor of a file; the digest is that of its contiguous little-endian bytes.

    ``values`` is what was found among them when they were saved: bytes with this digest need no second look.
    """

    dtype: str
    shape: tuple[_Count, ...]
    digest: Digest
    values: Literal["finite", "infinities", "NaN"]


class FileDigests(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The tensors of one file; ``buffers`` names those of weights that are no parameters, None in other files."""

    tensors: dict[str, TensorDigest]
    buffers: tuple[str, ...] | None = None


class ManifestFile(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One file of the set.

    Attributes:
        digest: That of all its bytes.
        records: The digest of the list of its records with their checksums.
        refused: Tensors with values that a resume refuses, and what was found among them.
    """

    name: str
    model: str
    info: str | None = None
    part: Part
    size: _Count
    digest: Digest
    records: Digest
    refused: dict[str, Finding] = {}


@functools.lru_cache(1024)  # the same files come with every set
def _stem(model: str, info: str | None, part: Part) -> str | None:
    """What stands before the tag in the name of a file; None for a model or an info that no file can be of."""
    stem = stem_of(model, info)
    parsed = parse(f"{stem}_cp=E0_{part}.th")
    return stem if parsed is not None and (parsed.model, parsed.info) == (model, info) else None


class Manifest(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The content of ``manifest.json``: small, and sealed.

    Attributes:
        frozen: Models whose optimizer was left out since they were frozen.
        training: Sets with the same id are of one training, however often it was interrupted.
        started_from: Name of the set in this folder that the process resumed from.
        passed_over: Names of sets in this folder that this training found to be no use, and went back behind.
        digests: Digest of ``digests.json`` beside it, which has ``digests_size`` bytes.
        seen: Model and part of each plain file that this set, or one before it in this folder, has.
        provenance: Digest of ``provenance.json`` beside it.
        probe: Digest of ``probe.th`` beside it.
    """

    format: Literal["noether-init-set"] = FORMAT
    format_version: Literal[2] = FORMAT_VERSION
    sequence: _Count
    iteration: dict[str, int]
    tags: tuple[str, ...]
    run_id: str
    stage_name: str | None = None
    created: str
    metrics: dict[str, float | None] = {}
    frozen: tuple[str, ...] = ()
    training: str | None = None
    started_from: str | None = None
    passed_over: tuple[str, ...] = ()
    seen: tuple[tuple[str, Part], ...]
    files: tuple[ManifestFile, ...]
    digests: Digest
    digests_size: _Count
    lineage: tuple[dict[str, Any], ...] = ()
    provenance: Digest | None = None
    probe: Digest | None = None
    versions: dict[str, str] = {}

    def __post_init__(self) -> None:
        if self.iteration.keys() != {"epoch", "update", "sample"} or min(self.iteration.values()) < 0:
            raise ConfigError("iteration must say epoch, update and sample, none below zero")
        own = self.own_tag
        for tag in self.tags:
            if tag != own:
                check_tag(tag)
        if own not in self.tags:
            raise ConfigError(f"tags must hold {own}")
        names = [file.name for file in self.files]
        for number, file in enumerate(self.files):
            stem = _stem(file.model, file.info, file.part)
            if stem is None or file.name != f"{stem}_cp={own}_{file.part}.th":
                raise ConfigError(
                    f"files.{number}: {file.name!r} is not the name of {file.model}, {file.info}, {file.part} at {own}"
                )
        if len(set(names)) != len(names):
            raise ConfigError("a file is listed twice")
        parts = {file.part for file in self.files}
        if not parts >= {"model", "trainer"}:
            raise ConfigError("files must list weights and a trainer file, which every set has")

    @property
    def training_iteration(self) -> TrainingIteration:
        """The iteration of the set, all three fields said."""
        return TrainingIteration.from_mapping(self.iteration)

    @property
    def own_tag(self) -> str:
        """The tag of its iteration, which stands in the names of its files."""
        return f"E{self.iteration['epoch']}_U{self.iteration['update']}_S{self.iteration['sample']}"

    @property
    def folder_name(self) -> str:
        """The name of the set's folder."""
        return f"{self.sequence:08d}_{self.own_tag}"

    def to_bytes(self) -> bytes:
        """The JSON text, readable by people; its last key is the digest of everything before it."""
        return sealed(msgspec.json.format(_encoded(self), indent=1))


def sealed(text: bytes) -> bytes:
    """A JSON object with one more key at its end: the digest of what stands before that key.

    Without it a damaged tag would be another tag, and an older set would silently be the latest.
    """
    content = text.rstrip().removesuffix(b"}").rstrip()
    return content + f',\n "digest": "{digest_of(content)}"\n}}\n'.encode()


def digest_of(content: bytes) -> str:
    """The digest of some bytes, as manifests write it."""
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"


def read_manifest(path: Path, storage: FileSystem = LOCAL) -> Manifest:
    """Read and check a manifest.

    Raises ``CheckpointFormatError`` for another version, ``CheckpointCorruptError`` for a file that cannot be read as
    a manifest at all: too large, no regular file, no JSON, bytes that differ from what was written, a wrong field, or
    an entry that is not a plain file name.
    """
    try:
        text = storage.read_bytes(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read as a manifest: {error.strerror}", path=path) from error
    seal = _SEAL.fullmatch(text[-_SEAL_BYTES:])
    is_sealed = seal is not None and seal[1].decode() == digest_of(text[:-_SEAL_BYTES])
    if not (is_sealed and text.startswith(_HEAD)):
        _check_form(text, path, is_sealed)
    try:
        return _MANIFEST.decode(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} is no valid manifest: {error}", path=path) from error


def _check_form(text: bytes, path: Path, is_sealed: bool) -> None:
    """Raise what ``read_manifest`` raises for a file that is no manifest of this release, as it was written."""
    try:
        values = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} cannot be read as a manifest: {error}", path=path) from error
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointCorruptError(f"{path} is no manifest of a checkpoint set", path=path)
    version = values.get("format_version")
    if isinstance(version, int) and version != FORMAT_VERSION:
        next_step = "pip install --upgrade noether-init-core"
        if version < FORMAT_VERSION:
            next_step = "kind: file reads one of its files; or resume it with the release that wrote it"
        raise CheckpointFormatError(
            f"{path} has format version {version}, this release reads version {FORMAT_VERSION} only. Next: {next_step}",
            path=path,
        )
    if not is_sealed:
        raise CheckpointCorruptError(
            f"{path} is not as it was written: its digest is not that of its content. It is damaged, or was edited. "
            "Next: take an older checkpoint",
            path=path,
        )


class _Digests(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    format: Literal["noether-init-digests"] = "noether-init-digests"
    files: dict[str, FileDigests]


def digests_to_bytes(files: Mapping[str, FileDigests]) -> bytes:
    """The content of ``digests.json``: name of a file -> its tensors."""
    return _encoded(_Digests(files=dict(files)))


def read_digests(folder: Path, manifest: Manifest, storage: FileSystem = LOCAL) -> dict[str, FileDigests]:
    """Read the digests beside a manifest, which vouches for them: name of a file -> its tensors.

    Raises ``CheckpointCorruptError`` if the file is gone, or is not as it was written.
    """
    path = folder / DIGESTS_NAME
    try:
        text = storage.read_bytes(path, MAX_DIGESTS_BYTES)
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error.strerror}", path=path) from error
    if digest_of(text) != manifest.digests:
        raise CheckpointCorruptError(
            f"{path} is not as it was written: its digest is not the one in the manifest. Next: take an older "
            "checkpoint",
            path=path,
        )
    try:
        return _DIGESTS.decode(text).files
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} is no valid list of digests: {error}", path=path) from error


_MANIFEST = msgspec.json.Decoder(Manifest)
_DIGESTS = msgspec.json.Decoder(_Digests)
_S = TypeVar("_S", Manifest, _Digests)


def _encoded(value: _S) -> bytes:
    """The JSON text. Raises ``ConfigError`` for what could not be read again."""
    try:
        text = msgspec.json.encode(value)
        (_MANIFEST if isinstance(value, Manifest) else _DIGESTS).decode(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"the manifest of a set cannot say that: {error}. Nothing was committed") from error
    return text


# Which values that are not finite a resume refuses: NaN in weights, buffers and optimizer state, infinities in
# parameters and optimizer state. Buffers may hold infinities (masks do). Averages and the trainer's file are not asked:
# a resume restores the plain weights.


def worth_a_look(part: Part, keys: Iterable[str]) -> list[str]:
    """The tensors of a file whose values count. Extra state of a module is handed over as it is, whatever it holds."""
    if part == "optim":
        return [key for key in keys if key.startswith("state.")]
    return [key for key in keys if part == "model" and key.rpartition(".")[2] != "_extra_state"]


def refused(part: Part, found: Mapping[str, Finding], buffers: Collection[str] | None) -> dict[str, Finding]:
    """What a resume refuses of the values that were found; without ``buffers``, no infinities in weights."""
    return {
        key: found[key]
        for key in worth_a_look(part, found)
        if part == "optim" or found[key] == "NaN" or (buffers is not None and key not in buffers)
    }


def refused_by_resume(manifest: Manifest) -> tuple[str, ...]:
    """``weight of mlp holds NaN`` for each tensor of a set that a resume refuses."""
    return tuple(
        text for file in manifest.files if file.info is None for text in in_words(file.model, file.part, file.refused)
    )


def in_words(model: str, part: Part, values: Mapping[str, Finding]) -> tuple[str, ...]:
    """``weight of mlp holds NaN`` for each of the values that were found in a file."""
    place = f"the optimizer of {model}" if part == "optim" else model
    return tuple(f"{key} of {place} holds {what}" for key, what in values.items())
