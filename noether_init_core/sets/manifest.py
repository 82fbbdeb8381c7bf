"""The manifest of a set: the record of its files. Its presence is the commit; a second file has digests of tensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import xxhash

from noether_init_core.errors import CheckpointCorruptError, CheckpointFormatError, ConfigError
from noether_init_core.files.storage.disk import LOCAL, FileSystem, is_out_of_reach, unreachable
from noether_init_core.iteration import TrainingIteration
from noether_init_core.memory import Finding
from noether_init_core.sets.file_names import Part, check_tag, parse, stem_of

MANIFEST_NAME = "manifest.json"
#: Digests of all tensors. They are large, and selection reads every manifest, so they are in a file of their own that
#: only verification reads.
DIGESTS_NAME = "digests.json"
#: The origin of all tensors.
PROVENANCE_NAME = "provenance.json"
#: A batch and the outputs of the model. No file of weights or state can have this name.
PROBE_NAME = "probe.th"
FORMAT: Literal["noether-init-set"] = "noether-init-set"
FORMAT_VERSION: Literal[2] = 2
# Limits, so that a damaged or hostile file does not fill the memory.
MAX_MANIFEST_BYTES = 64 << 20
MAX_DIGESTS_BYTES = 256 << 20
MAX_PROVENANCE_BYTES = 256 << 20
_SEAL = re.compile(rb',\n "digest": "(xxh3_128:[0-9a-f]{32})"\n}\n')
_HEAD = f'{{\n "format": "{FORMAT}",\n "format_version": {FORMAT_VERSION},\n'.encode()
_SEAL_BYTES = len(',\n "digest": "xxh3_128:"\n}\n') + 32

Digest = Annotated[str, msgspec.Meta(pattern=r"\Axxh3_128:[0-9a-f]{32}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0)]


# msgspec ignores unknown keys, so that a later release can add keys without a new format version.


class TensorDigest(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One tensor of a file; the digest is of its contiguous little-endian bytes.

    ``values`` is the finding at the time of the save. Bytes with the same digest need not be checked again.
    """

    dtype: str
    shape: tuple[_Count, ...]
    digest: Digest
    values: Literal["finite", "infinities", "NaN"]


class FileDigests(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The tensors of one file. ``buffers``: names of weights that are not parameters; None in other files."""

    tensors: dict[str, TensorDigest]
    buffers: tuple[str, ...] | None = None


class ManifestFile(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One file of the set.

    Attributes:
        digest: Digest of all its bytes.
        records: Digest of the list of its records with their checksums.
        refused: Tensor with values that a resume refuses -> finding.
    """

    name: str
    model: str
    info: str | None = None
    part: Part
    size: _Count
    digest: Digest
    records: Digest
    refused: dict[str, Finding] = {}


@functools.lru_cache(1024)  # every set repeats the same files
def _stem(model: str, info: str | None, part: Part) -> str | None:
    """Return the part of a file name before the tag; None if model and info would not parse back."""
    stem = stem_of(model, info)
    parsed = parse(f"{stem}_cp=E0_{part}.th")
    return stem if parsed is not None and (parsed.model, parsed.info) == (model, info) else None


class Manifest(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The content of ``manifest.json``, which ends with a digest of itself.

    Attributes:
        frozen: Models whose optimizer was not saved because they were frozen.
        training: Id of the training; it stays the same when a training is interrupted and resumed.
        started_from: Name of the set in this folder that the process resumed.
        passed_over: Names of sets in this folder that a resume of this training passed over to use an older set.
        digests: Digest of ``digests.json``, which has ``digests_size`` bytes.
        seen: Model and part of each plain file of this set and of earlier sets in this folder.
        provenance: Digest of ``provenance.json``.
        probe: Digest of ``probe.th``.
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
            raise ConfigError("iteration must have epoch, update and sample, each at least 0")
        own = self.own_tag
        for tag in self.tags:
            if tag != own:
                check_tag(tag)
        if own not in self.tags:
            raise ConfigError(f"tags must hold {own}")
        names = [file.name for file in self.files]
        for number, file in enumerate(self.files):
            stem = _stem(file.model, file.info, file.part)
            # Readers join these names with the folder, so a name such as ../x must never pass.
            if stem is None or file.name != f"{stem}_cp={own}_{file.part}.th":
                raise ConfigError(
                    f"files.{number}: {file.name!r} is not the name of {file.model}, {file.info}, {file.part} at {own}"
                )
        if len(set(names)) != len(names):
            raise ConfigError("a file is listed twice")
        parts = {file.part for file in self.files}
        if not parts >= {"model", "trainer"}:
            raise ConfigError("files must contain weights and a trainer file, because every set has both")

    @property
    def training_iteration(self) -> TrainingIteration:
        """The iteration of the set, with all three fields."""
        return TrainingIteration.from_mapping(self.iteration)

    @property
    def own_tag(self) -> str:
        """The tag of its iteration, which is part of the names of its files."""
        return f"E{self.iteration['epoch']}_U{self.iteration['update']}_S{self.iteration['sample']}"

    @property
    def folder_name(self) -> str:
        """The name of the folder of the set."""
        return f"{self.sequence:08d}_{self.own_tag}"

    def to_bytes(self) -> bytes:
        """Return indented JSON text; its last key is the digest of everything before it."""
        return sealed(msgspec.json.format(_encoded(self), indent=1))


def sealed(text: bytes) -> bytes:
    """Add a last key to a JSON object: the digest of everything before that key.

    Without it, damage could turn a tag into another valid tag, and ``latest`` would silently select an older set.
    """
    content = text.rstrip().removesuffix(b"}").rstrip()
    return content + f',\n "digest": "{digest_of(content)}"\n}}\n'.encode()


def digest_of(content: bytes) -> str:
    """Return the digest of bytes in the form of manifests."""
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"


def read_manifest(path: Path, storage: FileSystem = LOCAL) -> Manifest:
    """Read and check a manifest.

    Raises ``CheckpointFormatError`` for another format version. Raises ``CheckpointCorruptError`` for a file that is
    missing, too large, not a regular file, not JSON, changed, or invalid in any field.
    """
    try:
        text = storage.read_bytes(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        if is_out_of_reach(error):
            raise unreachable(error, path) from error
        raise CheckpointCorruptError(f"{path} cannot be read as a manifest: {error.strerror}", path=path) from error
    seal = _SEAL.fullmatch(text[-_SEAL_BYTES:])
    is_sealed = seal is not None and seal[1].decode() == digest_of(text[:-_SEAL_BYTES])
    # With head and seal, the text is as this release wrote it. Others are decoded once more, for a precise error.
    if not (is_sealed and text.startswith(_HEAD)):
        _check_form(text, path, is_sealed)
    try:
        return _MANIFEST.decode(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} is not a valid manifest: {error}", path=path) from error


def _check_form(text: bytes, path: Path, is_sealed: bool) -> None:
    """Raise the error for a file without the head and seal of this release."""
    try:
        values = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} cannot be read as a manifest: {error}", path=path) from error
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointCorruptError(f"{path} is not a manifest of a checkpoint set", path=path)
    version = values.get("format_version")
    if isinstance(version, int) and version != FORMAT_VERSION:
        next_step = "pip install --upgrade noether-init-core"
        if version < FORMAT_VERSION:
            next_step = "resume it with the release that wrote it, or read one of its files with kind: file"
        raise CheckpointFormatError(
            f"{path} has format version {version}; this release reads version {FORMAT_VERSION} only. Next: {next_step}",
            path=path,
        )
    if not is_sealed:
        raise CheckpointCorruptError(
            f"{path} was changed: its digest does not match its content. It is damaged, or was edited. "
            "Next: take an older checkpoint",
            path=path,
        )


class _Digests(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    format: Literal["noether-init-digests"] = "noether-init-digests"
    files: dict[str, FileDigests]


def digests_to_bytes(files: Mapping[str, FileDigests]) -> bytes:
    """Return the content of ``digests.json``: name of a file -> its tensors."""
    return _encoded(_Digests(files=dict(files)))


def read_digests(folder: Path, manifest: Manifest, storage: FileSystem = LOCAL) -> dict[str, FileDigests]:
    """Read the digests beside a manifest: name of a file -> its tensors.

    Raises ``CheckpointCorruptError`` if the file is missing or does not match its digest in the manifest.
    """
    path = folder / DIGESTS_NAME
    try:
        text = storage.read_bytes(path, MAX_DIGESTS_BYTES)
    except OSError as error:
        if is_out_of_reach(error):
            raise unreachable(error, path) from error
        raise CheckpointCorruptError(f"{path} cannot be read: {error.strerror}", path=path) from error
    if digest_of(text) != manifest.digests:
        raise CheckpointCorruptError(
            f"{path} was changed: its digest does not match the manifest. Next: take an older checkpoint",
            path=path,
        )
    try:
        return _DIGESTS.decode(text).files
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} is not a valid list of digests: {error}", path=path) from error


_MANIFEST = msgspec.json.Decoder(Manifest)
_DIGESTS = msgspec.json.Decoder(_Digests)
_S = TypeVar("_S", Manifest, _Digests)


def _encoded(value: _S) -> bytes:
    """Return JSON text. Raises ``ConfigError`` for values that could not be read again."""
    try:
        text = msgspec.json.encode(value)
        (_MANIFEST if isinstance(value, Manifest) else _DIGESTS).decode(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"the manifest of a set cannot hold a value: {error}. Nothing was committed") from error
    return text


# A resume refuses NaN in weights, buffers and optimizer state, and infinities in parameters and optimizer state.
# Infinities in buffers are accepted, because masks have them. Averages and trainer files are not checked: a resume does
# not restore the former into the model.


def worth_a_look(part: Part, keys: Iterable[str]) -> list[str]:
    """Return the tensors of a file whose values are checked; extra state of modules is not."""
    if part == "optim":
        return [key for key in keys if key.startswith("state.")]
    return [key for key in keys if part == "model" and key.rpartition(".")[2] != "_extra_state"]


def refused(part: Part, found: Mapping[str, Finding], buffers: Collection[str] | None) -> dict[str, Finding]:
    """Return the findings that a resume refuses; without ``buffers``, infinities in weights are accepted."""
    return {
        key: found[key]
        for key in worth_a_look(part, found)
        if part == "optim" or found[key] == "NaN" or (buffers is not None and key not in buffers)
    }


def refused_by_resume(manifest: Manifest) -> tuple[str, ...]:
    """Return ``weight of mlp holds NaN`` for each tensor of a set that a resume refuses."""
    return tuple(
        text for file in manifest.files if file.info is None for text in in_words(file.model, file.part, file.refused)
    )


def in_words(model: str, part: Part, values: Mapping[str, Finding]) -> tuple[str, ...]:
    """Return ``weight of mlp holds NaN`` for each finding in a file."""
    place = f"the optimizer of {model}" if part == "optim" else model
    return tuple(f"{key} of {place} holds {what}" for key, what in values.items())
