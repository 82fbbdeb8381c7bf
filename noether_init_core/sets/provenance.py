"""InitReport: the result of an initialization as data, saved beside every set of a run and read from there."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

import attrs

from noether_init_core.errors import CheckpointCorruptError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import logger_of, one_line
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.manifest import MAX_PROVENANCE_BYTES, PROVENANCE_NAME, digest_of
from noether_init_core.shown import Shown
from noether_init_core.stopwatch import Timing, summed

logger = logger_of(__name__)

REPORT_VERSION = 1
PROVENANCE_FORMAT = "noether-init-provenance"

#: Name of a tensor -> the files that its values came from, the latest first, and the names of the tensor in each.
History = dict[str, tuple[tuple["SourceRecord", tuple[str, ...]], ...]]

#: What happened to entries of the model, in words, in the order of reports.
_DONE: Mapping[str, str] = {
    "load": "loaded",
    "rename": "loaded by another name",
    "transform": "loaded and transformed",
    "cast": "loaded and converted",
    "keep": "kept",
    "reset": "reset",
    "changed": "changed after they were loaded",
}
#: Actions on entries of the file.
_UNUSED = ("removed", "outside", "unexpected")


@attrs.frozen
class InitializerReport:
    """The result of one initializer.

    Attributes:
        kind: The kind, as named in the config. A subclass whose kind is that of its base is named by its class.
        distribution: The distribution that provides it, with its version; empty for a kind registered in the process.
        hooks: The hooks that were called for it.
        origins: (model, description, file) of each file that weights came from.
        counts: Action of the plan -> number of tensors; ``changed`` are those that the kind changed after they were
            loaded, which no longer come from the file.
        coverage: Share of the parameters that came from the checkpoint, from 0 to 1; None without a plan.
        start: The start iteration; None for zero.
        restored: What was restored besides weights: optimizers, trainer, callbacks; also the result of the observer
            ``probe``.
        passed_over: (set, reason) of each broken set that was passed over to select a good one, newest first.
        not_restored: Parts of the checkpoint that were not restored, because this run has no object for them.
        resumed_set: The folder of the resumed set; None without a resume.
        timings: Seconds and bytes of each phase, see ``Timing``; ignored when reports are compared.
    """

    kind: str
    distribution: str = ""
    hooks: tuple[str, ...] = ()
    origins: tuple[tuple[str, str, str], ...] = ()
    counts: dict[str, int] = attrs.Factory(dict)
    coverage: float | None = None
    start: str | None = None
    restored: tuple[str, ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()
    not_restored: tuple[str, ...] = ()
    resumed_set: str | None = None
    timings: tuple[Timing, ...] = attrs.field(default=(), eq=False)


@attrs.frozen
class SourceRecord:
    """A file that values came from.

    Attributes:
        kind: The kind that read it.
        model: Path of names of the single model that it was read for.
        file: Name of the file.
        path: Path of the file when it was read.
        digest: Digest of the complete file, ``xxh3_128:...`` or ``sha256:...``; None if unknown.
        origin: The origin that the kind reported: run_id, stage_name, tag, iteration.
        continues: Whether it is a file of the same run, which was resumed; such a file is not an ancestor.
        verified: How its bytes were verified, see ``LoadedFile``; empty for files that earlier runs read.
    """

    kind: str
    model: str
    file: str
    path: str = ""
    digest: str | None = None
    origin: tuple[tuple[str, str], ...] = ()
    continues: bool = False
    verified: str = ""


@attrs.frozen
class TensorRecord:
    """The origin of one entry of a model.

    Attributes:
        model: Path of names of the single model.
        name: Name of the entry in it.
        is_parameter: False for buffers and extra state.
        source: Index of its file in ``InitReport.sources``; None: it was not loaded, and ``rule`` may give the reason.
        keys: Its names in the file; several if they were joined.
        digests: Recorded digests of the bytes of each key; None for a key without a record.
        rule: The responsible line of the config; None if both names are equal and no rule applied.
        steps: The transforms that were applied, in the form of a config.
        tied_to: The first name of the same parameter in this model, if this is a further name of it.
        is_partial: Whether some elements kept the values of the model, such as new rows of a padded embedding.
        ancestors: (index of a file, names) of earlier origins, the latest first, as far as earlier runs recorded them.
    """

    model: str
    name: str
    is_parameter: bool
    source: int | None = None
    keys: tuple[str, ...] = ()
    digests: tuple[str | None, ...] = ()
    rule: str | None = None
    steps: tuple[str, ...] = ()
    ancestors: tuple[tuple[int, tuple[str, ...]], ...] = ()
    is_partial: bool = False
    tied_to: str | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether all its elements came from a checkpoint."""
        return self.source is not None and not self.is_partial


@attrs.frozen(repr=False)
class InitReport(Shown):
    """The result of ``InitializerStack.initialize``; frozen data that can be pickled.

    Attributes:
        start: The iteration at which training starts.
        initializers: One report for each initializer, in the order of the config.
        auto_resume: The decision of ``auto_resume`` and its reason; empty without ``auto_resume``.
        sources: The files that values came from: first those that were read now, then those of earlier runs.
        tensors: The origin of every entry of the model.
        training: The id for a new training. It is used if nothing was resumed, or if the resumed set belongs to another
            run or stage.
    """

    start: TrainingIteration
    initializers: tuple[InitializerReport, ...] = ()
    auto_resume: str = ""
    sources: tuple[SourceRecord, ...] = ()
    tensors: tuple[TensorRecord, ...] = ()
    training: str = attrs.field(factory=lambda: uuid.uuid4().hex, eq=False)

    @property
    def timings(self) -> tuple[Timing, ...]:
        """Seconds and bytes of each phase, summed over all initializers; see ``Timing``. They are not saved with
        sets."""
        return summed(one for report in self.initializers for one in report.timings)

    def lineage(self) -> list[dict[str, Any]]:
        """Return the origin of the weights as plain data for the manifests of this run.

        The entry of a resume also has the folder of the set (``set``) and the names of the sets passed over.
        """
        return [
            {"kind": report.kind, "model": model, "origin": origin, "file": file, **_resumed(report)}
            for report in self.initializers
            for model, origin, file in report.origins
        ]

    def loaded_parameters(self, model: str | None = None) -> tuple[str, ...]:
        """Return the names of parameters that came from a checkpoint, such as for optimizer groups or freezing.

        Args:
            model: Path of one single model, such as ``autoenc.encoder``. None: all models; in a composite, the names
                start with the path below it, as in ``encoder.norm.weight``.
        """
        return self._names(model, loaded=True)

    def fresh_parameters(self, model: str | None = None) -> tuple[str, ...]:
        """Return the names of parameters that came from no checkpoint, or only partly; see ``loaded_parameters``."""
        return self._names(model, loaded=False)

    def _names(self, model: str | None, *, loaded: bool) -> tuple[str, ...]:
        chosen = [
            record
            for record in self.tensors
            if record.is_parameter
            and record.tied_to is None
            and record.is_loaded is loaded
            and model in (None, record.model)
        ]
        if model is not None:
            return tuple(record.name for record in chosen)
        below = {record.model: record.model.partition(".")[2] for record in chosen}
        return tuple(f"{below[record.model]}.{record.name}".lstrip(".") for record in chosen)

    def provenance(self) -> dict[str, Any]:
        """Return the origin of all tensors of this run as plain data; ``CheckpointWriter`` saves it beside every set.

        A run that was interrupted and resumed keeps the origin that it had before.
        """
        records = []
        for record in self.tensors:
            # A resume reads a file of the run itself, whose record has the real origin as its first ancestor.
            while record.source is not None and self.sources[record.source].continues:
                source, keys = record.ancestors[0] if record.ancestors else (None, ())
                record = attrs.evolve(
                    record, source=source, keys=keys, digests=(), rule=None, steps=(), ancestors=record.ancestors[1:]
                )
            records.append(attrs.asdict(record))
        return {"format": PROVENANCE_FORMAT, "version": REPORT_VERSION, "sources": self._sources(), "tensors": records}

    def _sources(self) -> list[dict[str, Any]]:
        return [{**attrs.asdict(source), "origin": dict(source.origin)} for source in self.sources]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data; ``version`` changes when a field changes its meaning."""
        data = attrs.asdict(self, filter=lambda attribute, _value: attribute.name not in ("sources", "tensors"))
        data["start"] = self.start.to_mapping()
        tensors = [attrs.asdict(record) for record in self.tensors]
        return {
            "format": "noether-init-report",
            "version": REPORT_VERSION,
            **data,
            "timings": [attrs.asdict(one) for one in self.timings],
            "sources": self._sources(),
            "tensors": tensors,
        }

    def to_json(self) -> str:
        """Return ``to_dict()`` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        lines = [f"start {self.start}" + (f"  ({self.auto_resume})" if self.auto_resume else "")]
        for report in self.initializers:
            counts = counts_in_words(report.counts)
            sources = "; ".join(f"{model} <- {origin}" for model, origin, _file in report.origins)
            done = "; ".join(filter(None, (counts, *report.restored)))
            lines.append(f"{report.kind}: {sources or 'no files'}" + (f" ({done})" if done else ""))
            lines.extend(f"  passed over {name}: {reason}" for name, reason in report.passed_over)
            lines.extend(f"  not restored: {what}" for what in report.not_restored)
        return "\n".join(map(one_line, lines))


def _resumed(report: InitializerReport) -> dict[str, Any]:
    if report.resumed_set is None:
        return {}
    return {"set": report.resumed_set, "passed_over": [name for name, _reason in report.passed_over]}


def histories(values: Mapping[str, Any]) -> dict[str, History]:
    """Parse saved data of ``InitReport.provenance``: path of a single model -> name -> origins of its values.

    Raises ``ValueError``, ``KeyError``, ``TypeError``, ``IndexError`` or ``AttributeError`` for malformed data.
    """
    if values["format"] != PROVENANCE_FORMAT or values["version"] > REPORT_VERSION:
        raise ValueError(f"format {values['format']!r}, version {values['version']!r} cannot be read")
    sources = [
        SourceRecord(
            str(one["kind"]),
            str(one["model"]),
            str(one["file"]),
            str(one["path"]),
            one["digest"],
            tuple(sorted((str(key), str(value)) for key, value in one["origin"].items())),
        )
        for one in values["sources"]
    ]
    if not all(isinstance(source.digest, str | None) for source in sources):
        raise TypeError("a digest is not a string")
    found: dict[str, History] = {}
    for record in values["tensors"]:
        steps = [] if record["source"] is None else [(record["source"], record["keys"]), *record["ancestors"]]
        chain = tuple((sources[number], tuple(map(str, keys))) for number, keys in steps)
        found.setdefault(str(record["model"]), {})[str(record["name"])] = chain
    return found


def load_histories(found: CheckpointSet) -> dict[str, History]:
    """Read path of a single model -> name -> origins of its values; empty for a set without a record.

    Raises ``CheckpointCorruptError`` for a missing or damaged record.
    """
    expected = None if found.manifest is None else found.manifest.provenance
    if expected is None:
        return {}
    path = found.folder / PROVENANCE_NAME
    try:
        content = found.storage.read_bytes(path, MAX_PROVENANCE_BYTES)
        if digest_of(content) != expected:
            raise ValueError("its digest is not the one in the manifest")
        return histories(json.loads(content))
    # The content may be damaged in any way, so parsing can fail with any of these.
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path}: the origin of the weights cannot be read: {error}", path=path) from error


def read_histories(found: CheckpointSet) -> dict[str, History]:
    """Read the same, but log an error and return nothing: loading goes on, because weights are verified separately."""
    try:
        return load_histories(found)
    except CheckpointCorruptError as error:
        logger.warning("%s", error)
        return {}


def counts_in_words(counts: Mapping[str, int]) -> str:
    """Return the counts of an applied plan in words: ``4 loaded, 2 kept; 2 of the file unused``."""
    done = [f"{counts[action]:,} {word}" for action, word in _DONE.items() if counts.get(action)]
    unused = sum(counts.get(action, 0) for action in _UNUSED)
    others = [f"{count:,} {action}" for action, count in counts.items() if count and action not in (*_DONE, *_UNUSED)]
    words = ", ".join([*done, *others])
    if not unused:
        return words
    return f"{words}; {unused:,} of the file unused" if words else f"{unused:,} of the file unused"
