"""InitReport: what an initialization did, as data that is kept beside every set of a run, and read again from there."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping
from typing import Any

import attrs

from noether_init_core.errors import CheckpointCorruptError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import one_line
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.manifest import MAX_PROVENANCE_BYTES, PROVENANCE_NAME, digest_of
from noether_init_core.shown import Shown
from noether_init_core.stopwatch import Timing, summed

logger = logging.getLogger(__name__)

REPORT_VERSION = 1
PROVENANCE_FORMAT = "noether-init-provenance"

#: Name of a tensor -> the files that its values came from, the latest first, and its names there.
History = dict[str, tuple[tuple["SourceRecord", tuple[str, ...]], ...]]

#: What was done to entries of the model, in the order in which it is told.
_DONE: Mapping[str, str] = {
    "load": "loaded",
    "rename": "loaded by another name",
    "transform": "loaded and transformed",
    "cast": "loaded and converted",
    "keep": "kept",
    "reset": "reset",
}
#: Actions that are about entries of the file.
_UNUSED = ("removed", "outside", "unexpected")


@attrs.frozen
class InitializerReport:
    """What one initializer did.

    Attributes:
        kind: The kind, as the config names it.
        distribution: The distribution that offers it, with its version; empty for one registered in the process.
        hooks: The hooks that were called for it.
        origins: (model, origin in words, file) of each file that weights came from.
        counts: Number of tensors by action of the plan.
        coverage: Share of the parameters that came from the checkpoint, from 0 to 1; None without a plan.
        start: The iteration that it starts at; None for zero.
        restored: What was restored besides weights: optimizers, trainer, callbacks; and what the observer ``probe``
            found.
        passed_over: (set, why) of each broken set that was passed over on the way back to a good one, newest first.
        not_restored: What the checkpoint has and nobody was there to take, in words.
        resumed_set: The folder of the set that it goes on from; None where it resumes nothing.
        timings: Seconds and bytes of each phase, as ``Timing`` describes them; two reports are equal whatever they are.
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
        file: Its name.
        path: Where it was read.
        digest: Of the whole file, where it is known: ``xxh3_128:...`` or ``sha256:...``.
        origin: What the kind said of it: run_id, stage_name, tag, iteration.
        continues: Whether it belongs to the run itself, which went on from there; such a step is no ancestor.
        verified: By what its bytes were verified before they were used, as ``LoadedFile`` says it; not known of files
            that earlier runs read.
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
    """Where one entry of a model got its value.

    Attributes:
        model: Path of names of the single model.
        name: Its name there.
        is_parameter: False for buffers and extra state.
        source: Number of its file in ``InitReport.sources``; None: it is fresh, and ``rule`` may say why.
        keys: Its names in the file, several where they were put together.
        digests: Of the bytes of each of them, where a manifest says so.
        rule: The config line responsible; None where the name is the same on both sides.
        steps: What was done on the way, as a config writes it.
        tied_to: The first name of the same parameter in this model, where this is another name of it.
        is_partial: Whether some of its elements stayed the model's own, as new rows of a padded embedding do.
        ancestors: Where its values came from before, the latest first, as far as the runs kept record: (file, names).
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
        """Whether its value, and all of it, came from a checkpoint."""
        return self.source is not None and not self.is_partial


@attrs.frozen(repr=False)
class InitReport(Shown):
    """What ``InitializerStack.initialize`` did.

    Attributes:
        start: The iteration at which training starts.
        initializers: One report each, in the order of the config.
        auto_resume: What ``auto_resume`` decided and why; empty where it was not asked for.
        sources: The files that values came from, those of earlier runs behind the ones that were read now.
        tensors: Every entry of the model, and where its value came from.
        training: The id that the training gets if it is a new one: if the set that it goes on from is of another run
            or stage, or if there is none.
    """

    start: TrainingIteration
    initializers: tuple[InitializerReport, ...] = ()
    auto_resume: str = ""
    sources: tuple[SourceRecord, ...] = ()
    tensors: tuple[TensorRecord, ...] = ()
    training: str = attrs.field(factory=lambda: uuid.uuid4().hex, eq=False)

    @property
    def timings(self) -> tuple[Timing, ...]:
        """Seconds and bytes of each phase, over all initializers; see ``Timing``. They are not kept beside sets."""
        return summed(one for report in self.initializers for one in report.timings)

    def lineage(self) -> list[dict[str, Any]]:
        """Where the weights came from, as plain data for the manifests of this run.

        What was resumed also says the set's folder, ``set``, and the names of the sets that were passed over.
        """
        return [
            {"kind": report.kind, "model": model, "origin": origin, "file": file, **_resumed(report)}
            for report in self.initializers
            for model, origin, file in report.origins
        ]

    def loaded_parameters(self, model: str | None = None) -> tuple[str, ...]:
        """Names of the parameters that came from a checkpoint, for groups of an optimizer and for freezing.

        Args:
            model: Path of one single model, such as ``autoenc.encoder``: its names. None: of all; those of a composite
                with the path below it in front, as in ``encoder.norm.weight``.
        """
        return self._names(model, loaded=True)

    def fresh_parameters(self, model: str | None = None) -> tuple[str, ...]:
        """Names of the parameters that came not, or not as a whole, from a checkpoint; see ``loaded_parameters``."""
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
        """Where the tensors of this run came from, as plain data; ``CheckpointWriter`` keeps it beside every set.

        A run that was killed and went on has the origin that it had before.
        """
        records = []
        for record in self.tensors:
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
        """The report as plain data; ``version`` changes when a field changes its meaning."""
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
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        lines = [f"start {self.start}" + (f"  ({self.auto_resume})" if self.auto_resume else "")]
        for report in self.initializers:
            counts = counts_in_words(report.counts)
            sources = "; ".join(f"{model} <- {origin}" for model, origin, _file in report.origins)
            said = "; ".join(filter(None, (counts, *report.restored)))
            lines.append(f"{report.kind}: {sources or 'no files'}" + (f" ({said})" if said else ""))
            lines.extend(f"  passed over {name}: {reason}" for name, reason in report.passed_over)
            lines.extend(f"  not restored: {what}" for what in report.not_restored)
        return "\n".join(map(one_line, lines))


def _resumed(report: InitializerReport) -> dict[str, Any]:
    if report.resumed_set is None:
        return {}
    return {"set": report.resumed_set, "passed_over": [name for name, _reason in report.passed_over]}


def histories(values: Mapping[str, Any]) -> dict[str, History]:
    """Path of a single model -> name -> where its values came from, out of ``InitReport.provenance`` as it was kept.

    Raises ``ValueError`` or one of its kin (``KeyError``, ``TypeError``) for values that are none.
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
        raise TypeError("a digest is no text")
    found: dict[str, History] = {}
    for record in values["tensors"]:
        steps = [] if record["source"] is None else [(record["source"], record["keys"]), *record["ancestors"]]
        chain = tuple((sources[number], tuple(map(str, keys))) for number, keys in steps)
        found.setdefault(str(record["model"]), {})[str(record["name"])] = chain
    return found


def load_histories(found: CheckpointSet) -> dict[str, History]:
    """Path of a single model -> name -> where its values came from; nothing where the set keeps no record.

    Raises ``CheckpointCorruptError`` for a record that is gone, damaged, or none.
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
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"{path} tells nothing of where the weights came from: {error}", path=path
        ) from error


def read_histories(found: CheckpointSet) -> dict[str, History]:
    """The same; a record that cannot be read is logged, and no reason not to load: weights are verified themselves."""
    try:
        return load_histories(found)
    except CheckpointCorruptError as error:
        logger.warning("%s", error)
        return {}


def counts_in_words(counts: Mapping[str, int]) -> str:
    """Numbers of rows by action, of a plan that was carried out: ``4 loaded, 2 kept; 2 of the file unused``."""
    done = [f"{counts[action]:,} {word}" for action, word in _DONE.items() if counts.get(action)]
    unused = sum(counts.get(action, 0) for action in _UNUSED)
    others = [f"{count:,} {action}" for action, count in counts.items() if count and action not in (*_DONE, *_UNUSED)]
    said = ", ".join([*done, *others])
    if not unused:
        return said
    return f"{said}; {unused:,} of the file unused" if said else f"{unused:,} of the file unused"
