"""LoadSession: what one initializer knows during one initialization; it ends with it.

A session of a kind that reads files goes through stages::

    selected -> opened -> planned -> verified -> applied

``plan``, ``verify`` and ``apply`` of ``LoadSession`` lead to a stage from whichever one was reached.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import attrs

from noether_init_core.applying.agreement import check_across, check_casts, check_loading_code
from noether_init_core.applying.targets import (
    ModelTargets,
    device_for,
    left_without_memory,
    loaded_by_code,
    model_targets,
    on_meta,
)
from noether_init_core.applying.weights import apply_rows, check_values, check_versions
from noether_init_core.errors import (
    CheckpointNotFoundError,
    ConfigError,
    PartlyInitializedError,
    PlanError,
    StateMismatchError,
    TornSetError,
)
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.verification import Digests
from noether_init_core.initializers.base import LoadedFile, Session, dotted
from noether_init_core.initializers.location import (
    LocateQuery,
    OptimizerStateConfig,
    Part,
    Source,
    SourceInitializerConfig,
    modules_of,
    signature,
)
from noether_init_core.initializers.optimizer import OptimizerStep, by_optimizer, decided, is_asked_for
from noether_init_core.messages import listed
from noether_init_core.models import Leaf
from noether_init_core.sets.provenance import History
from noether_init_core.surgery.fit import KEEP_MODEL_HINT, PlanPart, TargetSpec, TensorSpec
from noether_init_core.surgery.name_rules import NameRules
from noether_init_core.surgery.plan import LoadPlan, Problem
from noether_init_core.surgery.planner import plan_load

#: A plan names so many problems of one optimizer; what is wrong with one parameter is wrong with many.
_MOST_PROBLEMS = 5
#: Extra state of a module in a file.
_EXTRA = TargetSpec((), "object", 0)


class Loading(Protocol):
    """What a session asks of its initializer, a ``SourceInitializer``."""

    config: Any
    logger: logging.Logger

    @property
    def fresh_hint(self) -> str: ...
    @property
    def continues(self) -> bool: ...
    @property
    def rules(self) -> NameRules: ...
    def leaves(self, model: Any) -> tuple[Leaf, ...]: ...
    def select(self, leaves: Sequence[Leaf] = (), part: Part = "model") -> None: ...
    def locate(self, query: LocateQuery) -> Source | None: ...
    def open(self, source: Source) -> Checkpoint: ...
    def check_together(self, metadata: Mapping[Path, Mapping[str, Any]]) -> None: ...
    def history_of(self, source: Source) -> History: ...


@attrs.frozen(eq=False)
class OpenFile:
    """A file that a kind located, and the open checkpoint."""

    source: Source
    reader: Checkpoint


@attrs.frozen(eq=False)
class Opened:
    """The files with the weights of every single model below ``model`` are open; they belong together."""

    model: Any
    modules: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    weights: Mapping[str, OpenFile]

    @property
    def metadata(self) -> dict[Path, Mapping[str, Any]]:
        """What the header of each file holds besides tensors."""
        return {file.source.location: file.reader.metadata for file in self.weights.values()}


@attrs.frozen(eq=False)
class Planned:
    """What will be done to the tensors, which are those of ``signature``."""

    opened: Opened
    plan: LoadPlan
    targets: Mapping[str, ModelTargets]
    signature: tuple[Any, ...]


class LoadSession(Session):
    """A session of a kind that reads weights, and optimizer state, from files that it locates.

    Attributes:
        config: The config of the kind.
        selection: What the kind selected, in its own terms; the first question decides it.
        opened: The open files with the weights; None before.
        planned: The plan that was made last; None before.
        is_verified: Whether everything that ``planned`` reads was verified.
        files: Path of a single model -> the file that its weights came from; None before they were written.
    """

    def __init__(self, initializer: Loading, *, where: Callable[..., str] = dotted) -> None:
        super().__init__(where=where)
        self._kind = initializer
        self.config: SourceInitializerConfig = initializer.config
        has_state = isinstance(self.config, OptimizerStateConfig) and self.config.load_optim
        self._state_config: OptimizerStateConfig | None = initializer.config if has_state else None
        self.selection: Any = None
        self.opened: Opened | None = None
        self.planned: Planned | None = None
        self.is_verified = False
        self.files: Mapping[str, LoadedFile] | None = None
        self._steps: dict[str, OptimizerStep] = {}

    def close_files(self) -> None:
        readers = [] if self.opened is None else [file.reader for file in self.opened.weights.values()]
        readers += [step.reader for step in self._steps.values()]
        self._steps.clear()
        self.opened = self.planned = self.files = None
        self.is_verified = False
        with ExitStack() as closing:  # one that cannot be closed keeps no other open
            for reader in reversed(readers):
                closing.callback(reader.close)

    # Weights.

    def plan(self, model: Any) -> Planned:
        """The plan of the weights; the last one where there is one for this model. Only headers are read."""
        opened = self.open(model)
        if self.planned is None:
            self.planned = self._plan(opened)
        return self.planned

    def verify(self, model: Any) -> Planned:
        """Find out everything that could fail: problems of the plan, bytes, values. Nothing is changed.

        What was verified holds as long as the model has the same tensors; otherwise it is planned anew.
        """
        if self.files is not None:  # they are closed
            self.close_files()
        planned, was_verified = self.plan(model), self.is_verified
        if planned.signature != signature(planned.opened.leaves):
            self.is_verified = False
            planned = self.planned = self._plan(planned.opened)
        elif was_verified:
            return planned
        for warning in () if was_verified else planned.plan.warnings:
            self.warn(f"{warning.model}: {warning.message}")
        self._verify(planned)
        self.is_verified = True
        return planned

    def apply(self, model: Any) -> None:
        """Write the weights in place and close their files; they are verified before, unless they were."""
        self.files = self._apply(self.verify(model))

    def open(self, model: Any) -> Opened:
        """The open files of this model; nothing but their headers is read."""
        modules = modules_of(model)
        if self.opened is not None:
            # user code may have replaced a submodel since
            if self.opened.model is model and self.opened.modules == modules:
                return self.opened
            self.close_files()
        with self.stopwatch.phase("find"):
            leaves = self._kind.leaves(model)
            self._kind.select(leaves)
        found: dict[str, OpenFile] = {}
        try:
            for leaf in leaves:
                file = self._file(leaf, "model")
                if file is None:
                    raise CheckpointNotFoundError(
                        f"{self.config.kind}: no weights were found for {leaf.path}", asked=leaf.path
                    )
                found[leaf.path] = file
            opened = Opened(model, modules, leaves, found)
            self._kind.check_together(opened.metadata)
        except BaseException:
            for file in found.values():
                file.reader.close()
            raise
        self.opened = opened
        return opened

    def _file(self, leaf: Leaf, part: Part) -> OpenFile | None:
        source = self.source(leaf, part)
        return None if source is None else OpenFile(source, self._kind.open(source))

    def source(self, leaf: Leaf, part: Part) -> Source | None:
        """What the kind locates, by the first name of the model that it knows."""
        with self.stopwatch.phase("find"):
            queries = (LocateQuery(name, leaf.path, part, leaf.model) for name in leaf.file_names)
            return next((found for query in queries if (found := self._kind.locate(query)) is not None), None)

    def parts(self, opened: Opened) -> Iterator[tuple[PlanPart, ModelTargets]]:
        """For each single model, what the file and the model have."""
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
            )
            yield part, targets

    def _plan(self, opened: Opened) -> Planned:
        config, hint = self.config, self._kind.fresh_hint
        if not hint or config.transforms:
            hint = KEEP_MODEL_HINT if config.transforms else f"{KEEP_MODEL_HINT} (under transforms:)"
        found = tuple(self.parts(opened))
        parts = [part for part, _targets in found]
        plan = plan_load(config.kind, parts, self._kind.rules, policies=config.policies, fresh_hint=hint)
        return Planned(opened, plan, {part.model: own for part, own in found}, signature(opened.leaves))

    def _verify(self, planned: Planned) -> None:
        config, plan, opened = self.config, planned.plan, planned.opened
        plan.raise_for_problems()
        check_loading_code(plan, planned.targets)
        for leaf in opened.leaves:
            rows, file = plan.rows_of(leaf.path), opened.weights[leaf.path]
            _check_memory(leaf, planned)
            check_versions(leaf.path, rows, file.reader.versions, planned.targets[leaf.path])
            examined = [source for row in rows if row.writes and row.dtype != "object" for source in row.sources]
            if config.verify == "full":
                file.reader.verify(look=examined if config.nonfinite != "ignore" else ())
            with self.stopwatch.phase("verify"):
                for finding in check_values(plan, leaf.path, file.reader, config.nonfinite):
                    self.warn(f"{leaf.path}: {finding}")
                check_casts(plan, leaf.path, file.reader)
        with self.stopwatch.phase("verify"):
            check_across(plan, {path: file.reader for path, file in opened.weights.items()})

    def _apply(self, planned: Planned) -> dict[str, LoadedFile]:
        plan, opened = planned.plan, planned.opened
        done: list[str] = []
        by_code = frozenset(
            identity
            for path, targets in planned.targets.items()
            for identity in loaded_by_code(plan.rows_of(path), targets)
        )
        for leaf in opened.leaves:
            file = opened.weights[leaf.path]
            with self._writing(f"writing the weights of {leaf.path} failed after verification", opened.leaves, done):
                written = apply_rows(
                    plan.rows_of(leaf.path),
                    file.reader,
                    planned.targets[leaf.path],
                    by_code=by_code,
                    device=device_for(leaf.model),
                    may_map=self.config.verify == "none",
                    stopwatch=self.stopwatch,
                )
            done.append(leaf.path)
            message = "%s: %d tensors of %s from %s"
            self._kind.logger.info(message, self.config.kind, len(written), leaf.path, file.source.location)
        files = {}
        for path, file in opened.weights.items():
            source = file.source
            tensors = source.digests.tensors if isinstance(source.digests, Digests) else {}
            files[path] = LoadedFile(
                source.location,
                source.digest,
                source.origin,
                {key: tensor.digest for key, tensor in tensors.items()},
                self._kind.history_of(source),
            )
            file.reader.close()
        return files

    # Optimizers.

    def findings(self, model: Any) -> tuple[list[Problem], list[Problem]]:
        """What is known beforehand of the optimizers: problems, and warnings. Only headers are read."""
        if self._state_config is None:
            return [], []
        chosen, without, _frozen = by_optimizer(self.plan(model).opened.leaves)
        problems: list[Problem] = []
        warnings: list[Problem] = []
        if not chosen and is_asked_for(self._state_config):
            message = "optimizer state: not planned, the model has no optimizer"
            warnings += [Problem("optimizer", message, path) for path in without]
        for leaf in chosen:
            try:
                self._kind.select([leaf], "optim")
                step = self._step(leaf, model)
            except (StateMismatchError, CheckpointNotFoundError, TornSetError) as error:
                messages = list(getattr(error, "problems", ())) or [str(error)]
                shown = messages[:_MOST_PROBLEMS]
                if len(messages) > len(shown):
                    shown.append(f"and {len(messages) - len(shown)} more")
                problems += [Problem("optimizer", f"optimizer state: {message}", leaf.path) for message in shown]
            else:
                # state follows the weights: what a plan with problems makes of it helps nobody
                if self.plan(model).plan.is_fine:
                    warnings += [Problem("optimizer", message, leaf.path) for message in step.plan.warnings]
        return problems, warnings

    def verify_optimizers(self, model: Any) -> tuple[OptimizerStep, ...]:
        """What each optimizer will get, decided, read and verified. Nothing is changed."""
        config = self._state_config
        if config is None:
            return ()
        chosen, without, frozen = by_optimizer(self.plan(model).opened.leaves)
        for path in frozen:
            self._kind.logger.info("%s: %s is frozen, its optimizer is left", config.kind, path)
        for path in without:
            self._kind.logger.info("%s: %s has no optimizer", config.kind, path)
        if without and not chosen and is_asked_for(config):
            raise ConfigError(
                f"load_optim: true, but {', '.join(without)} has no optimizer to load into. "
                "Next: bind(module, optimizer=...), or load_optim: false"
            )
        if chosen:
            with self.stopwatch.phase("find"):
                self._kind.select(chosen, "optim")
        steps = [self._step(leaf, model) for leaf in chosen]
        for number, step in enumerate(steps):
            if step.is_read:
                continue
            for warning in step.plan.warnings:
                self.warn(f"{step.leaf.path}: {warning}")
            steps[number], warnings = step.read(config)
            for warning in warnings:
                self.warn(warning)
        self._steps.update((step.leaf.path, step) for step in steps)
        return tuple(steps)

    def apply_optimizers(self, model: Any) -> None:
        """Hand every optimizer its state. Everything is verified before the first one changes."""
        steps = self.verify_optimizers(model)
        for step in steps:
            step.check_memory()
        done: list[str] = []
        leaves = [step.leaf for step in steps]
        for step in steps:
            restored = step.restored(continues=self._kind.continues)
            path = step.leaf.path
            with (
                self._writing(f"the optimizer of {path} failed while it took its state", leaves, done),
                self.stopwatch.phase("copy"),
            ):
                step.apply()
            done.append(path)
            if restored:
                self.restored.append(restored)
            self._kind.logger.info("%s: %s", self.config.kind, restored or f"no state for the optimizer of {path}")
        for step in steps:
            step.reader.close()
        self._steps.clear()

    def _step(self, leaf: Leaf, model: Any) -> OptimizerStep:
        """What an optimizer will get, by the header of its file, which goes with the weights."""
        planned, known = self.plan(model), self._steps.get(leaf.path)
        config = self._state_config
        assert config is not None
        if known is not None and known.fits():
            return known
        file = self._file(leaf, "optim") if known is None else OpenFile(known.source, known.reader)
        if file is None:
            raise StateMismatchError(f"no optimizer file was found for {leaf.path}")
        try:
            self._kind.check_together({**planned.opened.metadata, file.source.location: file.reader.metadata})
            step = decided(leaf, file.source, file.reader, planned.plan, config, self.loaded_before)
        except BaseException:
            self._steps.pop(leaf.path, None)
            file.reader.close()
            raise
        self._steps[leaf.path] = step
        return step

    def warn(self, message: str) -> None:
        """Log a warning under the name of the kind."""
        self._kind.logger.warning("%s: %s", self.config.kind, message)

    @contextmanager
    def _writing(self, what: str, leaves: Sequence[Leaf], done: Sequence[str]) -> Iterator[None]:
        """Turn an error in the middle of writing into ``PartlyInitializedError``, with what was written before."""
        try:
            yield
        except Exception as error:
            paths = [leaf.path for leaf in leaves]
            raise PartlyInitializedError(
                f"{self.config.kind}: {what}: {error}. Written before: {listed(done, none='none')}. "
                "Build the model anew before trying again",
                done=tuple(done),
                failed=paths[len(done)],
                pending=paths[len(done) + 1 :],
            ) from error


def _check_memory(leaf: Leaf, planned: Planned) -> None:
    """A model on the meta device gets memory, but only for what the file holds."""
    plan, targets = planned.plan, planned.targets[leaf.path]
    without = left_without_memory(leaf.model, plan.rows_of(leaf.path), targets)
    if without:
        raise PlanError(
            f"{leaf.path} is on the meta device, and {listed(without)} would stay there: the file does not have them, "
            "or they are kept. Next: module.to_empty(device='cpu'), then fill these, or build the module on the CPU",
            plan=plan,
            problems=[f"{key} is on the meta device" for key in without],
        )
    held = [name for name, tensor in on_meta(targets).items() if weakref.getweakrefs(tensor)]
    if held:
        raise PlanError(
            f"{leaf.path} is on the meta device, and {held[0]} cannot be given memory: something holds a weak "
            "reference to it. Next: module.to_empty(device='cpu')",
            plan=plan,
            problems=[f"{key} is held by a weak reference" for key in held],
        )
