"""Weights in one initialization: located, opened, planned, verified, written.

A session of a kind that reads files has stages::

    selected -> opened -> planned -> verified -> applied

``plan``, ``checked`` and ``apply`` go to a stage from any earlier one. ``LoadSession`` adds the optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.applying.learning import (
    learned,
    mixed_versions,
    rehearsal_problems,
    tied_loading_code,
    value_problems,
)
from noether_init_core.applying.own_loading import loaded_by_code
from noether_init_core.applying.targets import ModelTargets, device_for, model_targets, separated
from noether_init_core.applying.weights import (
    apply_rows,
    differing_ties,
    fill_hidden,
    lacking_memory,
    nonfinite_values,
    unfit_casts,
)
from noether_init_core.config.source import SourceInitializerConfig
from noether_init_core.errors import CheckpointNotFoundError, PartlyInitializedError, text_of
from noether_init_core.files.checkpoint import Checkpoint, Digests, Verified, entries_beside
from noether_init_core.files.opening import FileCheckpoint
from noether_init_core.initializers.base import LoadedFile, LocateQuery, Session, Source
from noether_init_core.messages import listed, one_line
from noether_init_core.models import BoundModel, Leaf, modules_of
from noether_init_core.sets.file_names import Part
from noether_init_core.suggest.rules import Suggestion, transforms_of
from noether_init_core.suggest.suggest import suggest_together
from noether_init_core.surgery.advice import Advice
from noether_init_core.surgery.fit import PlanPart, TargetSpec, TensorSpec
from noether_init_core.surgery.name_rules import NoetherSurgery
from noether_init_core.surgery.plan import LoadPlan, Problem
from noether_init_core.surgery.planner import NOT_A_TENSOR, plan_load

_FIELDS = ("keys_to_remove", "patterns_to_remove", "patterns_to_rename", "patterns_to_instantiate")
#: Extra state of a module in a file.
_EXTRA = TargetSpec((), "object", 0)


@attrs.frozen(eq=False)
class OpenFile:
    """A file that a kind located, and the open checkpoint."""

    source: Source
    reader: Checkpoint


@attrs.frozen(eq=False)
class Opened:
    """The open files with the weights of every single model below ``model``, which belong together."""

    model: Any
    modules: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    weights: Mapping[str, OpenFile]

    @property
    def metadata(self) -> dict[Path, Mapping[str, Any]]:
        """File -> content of its header besides tensors."""
        return {file.source.location: file.reader.metadata for file in self.weights.values()}


@attrs.frozen(eq=False)
class Planned:
    """The plan for the tensors in ``signature``."""

    opened: Opened
    plan: LoadPlan
    targets: Mapping[str, ModelTargets]
    signature: tuple[Any, ...]


class WeightsSession(Session):
    """A session of a kind that reads weights from files that it locates.

    Attributes:
        kind: The initializer, a ``SourceInitializer``.
        config: Its config.
        selection: The selection of the kind, in its own type; set once.
        opened: The open files with the weights, or None.
        planned: The last plan, or None.
        is_verified: Whether everything that ``planned`` reads was verified.
        verified: Path of a single model -> the digest that verified its file, if verification was on.
        files: Path of a single model -> the file that its weights came from; None before they were written.
    """

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.config: SourceInitializerConfig = kind.config
        self.selection: Any = None
        self.opened: Opened | None = None
        self.planned: Planned | None = None
        self.is_verified = False
        self.verified: dict[str, str] = {}
        self.files: Mapping[str, LoadedFile] | None = None

    def close_files(self) -> None:
        files = () if self.opened is None else self.opened.weights.values()
        self.opened = self.planned = self.files = None
        self.is_verified, self.verified = False, {}
        close_all(file.reader for file in files)

    def warn(self, message: str) -> None:
        """Log a warning under the name of the kind."""
        self.kind.logger.warning("%s: %s", self.config.kind, message)

    # Weights.

    def located(self, model: Any) -> list[tuple[Leaf, Source | None]]:
        """The single models, each with the located file of its weights."""
        with self.stopwatch.phase("find"):
            leaves = self.kind.leaves(model)
            self.kind.select(leaves)
            return [(leaf, self.source(leaf, "model")) for leaf in leaves]

    def source(self, leaf: Leaf, part: Part) -> Source | None:
        """The located file, by the first name of the model that the kind knows."""
        queries = (LocateQuery(name, leaf.path, part, leaf.model) for name in leaf.file_names)
        return next((found for query in queries if (found := self.kind.locate(query)) is not None), None)

    def open(self, model: Any) -> Opened:
        """The open files of this model; reads only headers."""
        modules = modules_of(model)
        if self.opened is not None:
            # user code may have replaced a submodel since they were opened
            if self.opened.model is model and self.opened.modules == modules:
                return self.opened
            self.close_files()
        located = self.located(model)
        weights: dict[str, OpenFile] = {}
        try:
            for leaf, source in located:
                if source is None:
                    raise CheckpointNotFoundError(
                        f"{self.config.kind}: no weights were found for {leaf.path}", asked=leaf.path
                    )
                weights[leaf.path] = OpenFile(source, self.kind.open(source))
            opened = Opened(model, modules, tuple(leaf for leaf, _source in located), weights)
            self.kind.check_together(opened.metadata)
        except BaseException:
            close_all(file.reader for file in weights.values())
            raise
        self.opened = opened
        return opened

    def plan(self, model: Any) -> Planned:
        """The plan of the weights; the last one if it is for this model. Reads only headers."""
        opened = self.open(model)
        if self.planned is None:
            self.planned = self._plan(opened)
        return self.planned

    def checked(self, model: Any) -> Planned:
        """The plan, after everything that could fail was checked: its problems, bytes, values. Changes nothing.

        The result of the verification holds as long as the model has the same tensors; otherwise it is planned again.
        """
        if self.files is not None:  # they are closed
            self.close_files()
        planned, was_verified = self.plan(model), self.is_verified
        if planned.signature != self._signature(planned.opened.leaves):
            self.is_verified = False
            planned = self.planned = self._plan(planned.opened)
        elif was_verified:
            return planned
        for warning in () if was_verified else planned.plan.warnings:
            self.warn(f"{warning.model}: {warning.message}")
        self._verify(planned)
        self.is_verified = True
        return planned

    def parts(self, opened: Opened) -> Iterator[tuple[PlanPart, ModelTargets]]:
        """For each single model, the entries of the file and of the model."""
        for leaf in opened.leaves:
            file, targets = opened.weights[leaf.path], model_targets(leaf.model)
            sources: dict[str, TensorSpec] = {**file.reader.tensors(), **dict.fromkeys(file.reader.extra_state, _EXTRA)}
            # modules may keep their extra state in a tensor
            sources.update((name, _EXTRA) for name in targets.extra_state if name in sources)
            part = PlanPart(
                leaf.path,
                file.source.describe(),
                (file.source.location.name,),
                sources,
                targets.specs,
                targets.hidden,
                frozenset(name for name, tensor in targets.tensors.items() if id(tensor) in self.loaded_before),
                frozenset(targets.resettable),
                targets.unlisted,
                beside=entries_beside(file.reader) if self.config.source_root else (),
            )
            yield part, targets

    def _plan(self, opened: Opened) -> Planned:
        config, rules = self.config, self.kind.rules

        def planned() -> LoadPlan:
            parts = [part for part, _targets in found]
            return plan_load(config.kind, parts, rules, policies=config.policies, advice=self.advice)

        found = separated(tuple(self.parts(opened)))
        readers = {path: file.reader for path, file in opened.weights.items()}
        plan = planned()
        if any(targets.code.is_any for _part, targets in found):
            found = [learned(part, own, plan, rules, readers[part.model]) for part, own in found]
            plan = planned()
            problems = [
                Problem("loading-code", message, part.model)
                for part, own in (found if plan.is_fine else ())
                for message in rehearsal_problems(plan, own, readers[part.model], part.model)
            ]
            plan = attrs.evolve(plan, problems=(*plan.problems, *problems))
        if plan.is_fine:
            plan = attrs.evolve(plan, problems=tuple(self._beyond_names(plan, opened, found)))
        _refuse_unread(plan, opened)
        left_out = [
            Problem("not-a-tensor", f"{listed(own.left_out)} of state_dict(): {NOT_A_TENSOR}, left out", part.model)
            for part, own in found
            if own.left_out
        ]
        plan = attrs.evolve(plan, warnings=(*plan.warnings, *left_out))
        return Planned(opened, plan, {part.model: own for part, own in found}, self._signature(opened.leaves))

    def _beyond_names(
        self, plan: LoadPlan, opened: Opened, found: Sequence[tuple[PlanPart, ModelTargets]]
    ) -> Iterator[Problem]:
        """Problems of a plan that fits: of entries that are one tensor, of versions, and of memory."""
        readers = {path: file.reader for path, file in opened.weights.items()}
        targets = {part.model: own for part, own in found}
        names, resets = ", ".join(targets), self.config.policies.on_missing == "reset"
        for message in (*tied_loading_code(plan, targets), *differing_ties(plan, readers)):
            yield Problem("tied", message, names)
        for leaf in opened.leaves:
            path, rows = leaf.path, plan.rows_of(leaf.path)
            for message in mixed_versions(rows, readers[path].versions, targets[path]):
                yield Problem("versions", message, path)
            for message in lacking_memory(path, leaf.model, rows, targets[path], resets=resets):
                yield Problem("memory", message, path)

    @property
    def advice(self) -> Advice:
        """How the config of the kind writes lines that put a plan right, and where they go."""
        config, rules = self.config, self.kind.rules
        fields: dict[str, Sequence[Any]] = {}
        if isinstance(rules, NoetherSurgery):
            fields = {name: value for name in _FIELDS if (value := getattr(self.kind, name, None))}
        has_fields = isinstance(rules, NoetherSurgery) and hasattr(config, _FIELDS[0])
        return Advice(
            self.place,
            "rules" if config.transforms else "fields" if has_fields else "transforms",
            "" if config.transforms else self.key,
            fields,
            self.is_followed,
            self.kind.continues,
        )

    def suggested(self, model: Any) -> dict[str, Suggestion]:
        """Path of a single model -> suggested rules; their plan has the problems that stay with all of them."""
        config = self.config
        roots = config.source_root or "", config.target_root or ""
        opened = self.open(model)
        made = tuple(self.parts(opened))
        parts = [part for part, _targets in made]
        found = suggest_together(parts, config.policies, roots, is_followed=self.is_followed)
        roots = next((one.source_root for one in found.values() if one.source_root), roots[0]), roots[1]
        keeps = any(one.on_missing for one in found.values())
        policies = attrs.evolve(config.policies, on_missing="keep") if keeps else config.policies
        # the rules of all models are in one list, and the optimizers follow them
        rules = {one.to_yaml(): one for each in found.values() for one in each.rules}
        plan = plan_load(config.kind, parts, transforms_of(tuple(rules.values()), *roots), policies=policies)
        known = {problem.message for one in found.values() for problem in one.plan.problems}
        planned = Planned(opened, plan, {part.model: own for part, own in made}, self._signature(opened.leaves))
        others = [one for one in (*plan.problems, *self._problems_beside(planned)) if one.message not in known]
        for path, one in found.items():
            here = tuple(problem for problem in others if path in problem.model.split(", "))
            together = attrs.evolve(one.plan, problems=(*one.plan.problems, *here))
            found[path] = attrs.evolve(one, plan=together, place=self.place)
        return found

    def _problems_beside(self, planned: Planned) -> list[Problem]:
        """Problems that are known before a change and concern no weights."""
        return []

    def _signature(self, leaves: Sequence[Leaf]) -> tuple[Any, ...]:
        rules = self.kind.rules
        # a subclass may change the lists of Noether in init_weights; transforms are fixed by the config
        return (rules if isinstance(rules, NoetherSurgery) else None, *_signature(leaves))

    def _verify(self, planned: Planned) -> None:
        config, plan, opened, nonfinite = self.config, planned.plan, planned.opened, self.config.nonfinite
        plan.raise_for_problems()
        readers = {path: file.reader for path, file in opened.weights.items()}
        for leaf in opened.leaves:
            path, rows, reader = leaf.path, plan.rows_of(leaf.path), readers[leaf.path]
            examined = [source for row in rows if row.writes and row.dtype != "object" for source in row.sources]
            if config.verify == "full":
                found = reader.verify(look=examined if nonfinite != "ignore" else ())
                self.verified[path] = str(_claimed(reader, found))
            with self.stopwatch.phase("verify"):
                findings = nonfinite_values(rows, reader) if nonfinite != "ignore" else []
                if nonfinite == "error" and findings:
                    hint = "To load it all the same: on_nonfinite: warn"
                    plan.refuse([*findings, *differing_ties(plan, readers)], model=path, hint=hint)
                for finding in findings:
                    self.warn(f"{path}: {finding}")
                plan.refuse(unfit_casts(rows, reader), model=path)
                plan.refuse(value_problems(plan, planned.targets[path], reader, path), model=path)
        with self.stopwatch.phase("verify"):
            plan.refuse(differing_ties(plan, readers))

    def apply(self, model: Any) -> None:
        """Write the weights in place and close their files; verify them first, unless that was done."""
        planned = self.checked(model)
        plan, opened = planned.plan, planned.opened
        done: list[str] = []
        written: list[str] = []
        by_code = frozenset(
            identity
            for path, targets in planned.targets.items()
            for identity in loaded_by_code(plan.rows_of(path), targets)
        )
        for leaf in opened.leaves:
            file, rows, own = opened.weights[leaf.path], plan.rows_of(leaf.path), planned.targets[leaf.path]
            before, total = len(written), len(written) + sum(row.writes for row in rows)
            what = f"writing the weights of {leaf.path} failed after verification"
            with self.writing(what, opened.leaves, done, partial(_counted, written, total)):
                if self.config.policies.on_missing == "reset":
                    fill_hidden(leaf.model, rows, own, device_for(leaf.model))
                apply_rows(
                    rows,
                    file.reader,
                    own,
                    by_code=by_code,
                    device=device_for(leaf.model),
                    may_map=self.config.verify == "none",
                    stopwatch=self.stopwatch,
                    written=written,
                )
            done.append(leaf.path)
            message = "%s: %d tensors of %s from %s"
            self.kind.logger.info(message, self.config.kind, len(written) - before, leaf.path, file.source.location)
        files = {}
        for path, file in opened.weights.items():
            source = file.source
            tensors = source.digests.tensors if isinstance(source.digests, Digests) else {}
            files[path] = LoadedFile(
                source.location,
                source.digest,
                source.origin,
                {key: tensor.digest for key, tensor in tensors.items()},
                self.kind.history_of(source),
                self.verified.get(path, ""),
            )
            if file.reader.unread:
                parts = (f"{place} ({part})" for place, part in file.reader.unread.items())
                self.not_restored.append(f"{source.location.name}: unread: {one_line(listed(parts, 5))}")
            file.reader.close()
        self.files = files
        if self.on_written is not None:
            for leaf in opened.leaves:
                self.on_written(leaf.model, [row.key for row in plan.rows_of(leaf.path) if row.writes])

    @contextmanager
    def writing(
        self, what: str, leaves: Sequence[Leaf], done: Sequence[str], counted: Callable[[], str] | None = None
    ) -> Iterator[None]:
        """Raise an error during writing as ``PartlyInitializedError``, with what was written before."""
        try:
            yield
        except Exception as error:
            paths = [leaf.path for leaf in leaves]
            before = listed(done, none="none") if counted is None else counted()
            raise PartlyInitializedError(
                f"{self.config.kind}: {what}: {text_of(error)}. Written before: {before}. "
                "Build the model anew before trying again",
                done=tuple(done),
                failed=paths[len(done)],
                pending=paths[len(done) + 1 :],
            ) from error


def _refuse_unread(plan: LoadPlan, opened: Opened) -> None:
    """Raise the reader's error if weights are missing, and the file holds tensors in parts that were not read.

    Such a part is a pickled module, or a state dict of a foreign class.
    """
    is_empty = any(problem.code == "nothing-loaded" for problem in plan.problems)
    for path, file in opened.weights.items():
        is_missing = is_empty or any(row.action == "missing" for row in plan.rows_of(path))
        if plan.problems and is_missing and any(part.tensors for part in file.reader.unread.values()):
            file.reader.values("")


def _counted(written: Sequence[str], total: int) -> str:
    """How many tensors were written before an error, in words; ``total`` as many as the model would have by then."""
    left = total - len(written)
    return f"{len(written)} tensors" + (f", and maybe some of {left} others" if left else "")


def _claimed(reader: Checkpoint, found: Verified) -> Verified:
    """The result of a verification; that of a class outside this package is marked as its own claim."""
    cls = type(reader)
    if cls is FileCheckpoint:
        return found
    return attrs.evolve(found, claimed_by=found.claimed_by or f"{cls.__module__}.{cls.__qualname__}")


def close_all(readers: Iterable[Checkpoint]) -> None:
    """Close every reader, the last one first; a reader that raises does not keep others open."""
    with ExitStack() as closing:
        for reader in readers:
            closing.callback(reader.close)


def _signature(leaves: Sequence[Leaf]) -> tuple[Any, ...]:
    """The properties of models on which a plan depends: modules and tensors, with shapes and dtypes."""
    found: list[Any] = []
    for leaf in leaves:
        module = leaf.model.module if isinstance(leaf.model, BoundModel) else leaf.model
        found += map(id, getattr(module, "modules", tuple)())
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                shape = None if tensor.is_nested else tensor.shape
                found.append((leaf.path, name, id(tensor), shape, tensor.dtype, tensor.device))
    return tuple(found)
