"""Base classes of kinds that read files: ``SourceInitializer`` and, for sets of a run, ``CheckpointInitializer``."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import attrs

from noether_init_core.config.base import KindConfig
from noether_init_core.config.source import (
    CheckpointInitializerConfig,
    SourceInitializerConfig,
    rule_of,
)
from noether_init_core.errors import CheckpointNotFoundError, ConfigError, TornSetError
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import LOCAL
from noether_init_core.initializers.base import (
    InitializerBase,
    LocateQuery,
    Outcome,
    Source,
    dotted,
)
from noether_init_core.initializers.optimizer import LoadSession, by_optimizer
from noether_init_core.iteration import TrainingIteration
from noether_init_core.models import Leaf, check_model, leaves_of, submodel_of
from noether_init_core.paths import PathProvider, name_of_run
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need, check_consistency, recorded_in
from noether_init_core.sets.file_names import Part, parse
from noether_init_core.sets.provenance import History, read_histories
from noether_init_core.sets.refusals import AskedBy
from noether_init_core.sets.selection import Selected, find_set, require
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.suggest.rules import Suggestion
from noether_init_core.suggest.suggest import suggest
from noether_init_core.surgery.name_rules import NameRules, NoetherSurgery, Transforms
from noether_init_core.surgery.plan import LoadPlan


class SourceInitializer(InitializerBase, abc.ABC):
    """Base of kinds that initialize weights, and optimizer state if configured, from files that ``locate`` returns.

    A subclass implements ``locate``. The base class screens, plans, verifies and loads in place, also for composites.
    Files are opened once and stay open from ``check`` to the end of ``init_weights``, so that the verified bytes are
    the loaded bytes. All submodels are planned and verified before the first one is changed.
    """

    config_class: ClassVar[type[KindConfig]] = SourceInitializerConfig
    config: SourceInitializerConfig

    #: Whether a located file holds one single model; a composite then needs ``submodel``, or is refused.
    one_model: ClassVar[bool] = False
    #: The config line that keeps entries of the model, shown beside missing ones; empty where the kind has none.
    fresh_hint: ClassVar[str] = ""

    @abc.abstractmethod
    def locate(self, query: LocateQuery) -> Source | None:
        """The file that holds a part of a single model; None if no file does.

        It is called for each single model and part: for ``model``, and for ``optim`` with ``load_optim: true``. Every
        rank calls it, and it may be called more than once.
        """

    def open(self, source: Source) -> Checkpoint:
        """Open a source, as any class of ``Checkpoint``. Reads only the header; the session closes it."""
        return open_checkpoint(source.location, entry=source.entry, digests=source.digests, stopwatch=self.stopwatch)

    @property
    def rules(self) -> NameRules:
        """Surgery on names: ``transforms`` of the config."""
        config, where = self.config, dotted if self.session is None else self.session.where
        if not (config.transforms or config.source_root or config.target_root):
            return NoetherSurgery()
        return Transforms(
            [rule_of(rule, where("transforms", number)) for number, rule in enumerate(config.transforms)],
            source_root=config.source_root or "",
            target_root=config.target_root or "",
            warns=config.on_unmatched_rule == "warn",
        )

    def new_session(self) -> LoadSession:
        """A session with the stages of a load."""
        return LoadSession(self)

    def plan(self, model: Any) -> LoadPlan:
        """The plan of ``init_weights(model)``. Reads only headers; ``model`` may be on the meta device.

        A problem of the optimizer has the code ``optimizer``. Raises errors of ``locate`` and of the reader; problems
        of the plan itself are in the plan.
        """
        with self.in_session() as session:
            planned = session.plan(model)
            plan: LoadPlan = planned.plan
            problems, warnings = session.findings(planned)
            return attrs.evolve(plan, problems=(*plan.problems, *problems), warnings=(*plan.warnings, *warnings))

    def suggest_rules(self, model: Any) -> dict[str, Suggestion]:
        """Path of a single model -> suggested transforms for it and its file, from names and shapes.

        Changes nothing and reads only headers; ``model`` may be on the meta device. Raises errors of ``locate`` and the
        reader.
        """
        policies = self.config.policies
        with self.in_session() as session:
            return {
                part.model: suggest(part.sources, part.targets, model=part.model, policies=policies, hidden=part.hidden)
                for part, _targets in session.parts(session.open(model))
            }

    def sources(self, model: Any) -> dict[str, Source]:
        """Path of a single model -> the file that its weights will be read from; opens no file."""
        with self.in_session() as session:
            return {leaf.path: source for leaf, source in session.located(model) if source is not None}

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Plan the weights, verify every byte that will be read, and examine the values; also of optimizer state."""
        with self.in_session() as session:
            session.checked(model)
            session.checked_optimizers(model)

    def init_weights(self, model: Any) -> None:
        """Write the weights in place, after all checks.

        A problem that can be known before leaves the model unchanged. If a disk fails between check and read,
        ``PartlyInitializedError`` names the models that were written.
        """
        with self.in_session() as session:
            session.apply(model)

    def init_optimizer(self, model: Any) -> None:
        """Restore the optimizer state by parameter name if the config declares ``load_optim``, else do nothing.

        Everything is planned and verified before the first optimizer changes.
        """
        with self.in_session() as session:
            session.apply_optimizers(model)

    def outcome(self) -> Outcome:
        """The files that weights came from, what else was restored, and the time of each phase."""
        files = None if self.session is None else self.session.files
        return attrs.evolve(super().outcome(), files=files or {}, continues=self.continues)

    @property
    def continues(self) -> bool:
        """Whether the weights come from the run that is started."""
        return False

    # Kinds that select among several files override these.

    def select(self, leaves: Sequence[Leaf] = (), part: Part = "model") -> object:
        """Select the origin of all files, once per session; called before the first ``locate`` of a part.

        Args:
            leaves: The single models for which ``locate`` will be called.
            part: The part for which it will be called.
        """

    def check_together(self, metadata: Mapping[Path, Mapping[str, Any]]) -> None:
        """Raise if files do not belong together; called with their headers before planning."""

    def history_of(self, source: Source) -> History:
        """Earlier origins of the values in a file, by their names in the file."""
        return {}

    def leaves(self, model: Any) -> tuple[Leaf, ...]:
        """The single models below ``model`` that this initializer loads, in declared order.

        Raises ``ConfigError`` if ``submodel`` names no submodel, or ``model`` is not a model.
        """
        check_model(model)
        name, below = str(model.name), self.config.submodel or ""
        path = f"{name}.{below}" if below else name
        chosen = submodel_of(model, tuple(below.split(".")) if below else ())
        found = leaves_of(chosen, path, self.file_root(name, below))
        if self.one_model and len(found) > 1:
            names = ", ".join(leaf.path.removeprefix(f"{name}.") for leaf in found)
            raise ConfigError(
                f"{self.config.kind} brings the weights of one model, and {path} has several: {names}. "
                "Add: submodel: ..."
            )
        return found

    def file_root(self, name: str, below: str) -> str:
        """The name in the files of the submodel ``below`` (empty: the whole) of the model called ``name``."""
        return f"{name}.{below}" if below else name


@attrs.define(eq=False)
class RunSelection:
    """The selection of an initializer among the checkpoints of a run; all files come from it.

    Attributes:
        chosen: The set.
        passed_over: (set, reason) of each set that was passed over, newest first.
        snapshot: The snapshot that it was selected from.
        root: The whole model's name in the files, if the trainer file decides it.
        trainer: The content of the trainer file, if it is used.
    """

    chosen: CheckpointSet
    passed_over: tuple[tuple[str, str], ...]
    snapshot: Snapshot
    root: str | None = None
    trainer: Mapping[str, Any] | None = None


class CheckpointInitializer(SourceInitializer):
    """Base of kinds that load weights, and optimizer state with ``load_optim``, from one set of a run.

    Every file comes from one set: the same tag, the same training iteration. ``previous_run`` and ``resume`` derive
    from it; it is not a kind itself.

    ``init_run_path_provider`` names the folders of the source run. Raises ``ConfigError`` if neither the config nor the
    path provider names a run.
    """

    config_class: ClassVar[type[KindConfig]] = CheckpointInitializerConfig
    config: CheckpointInitializerConfig

    #: What selects the set; errors advise keys of its config.
    asked_by: AskedBy = "tag"

    def __init__(
        self,
        config: KindConfig | None = None,
        *,
        path_provider: Any = None,
        initializer_config: KindConfig | None = None,
    ) -> None:
        super().__init__(config, path_provider=path_provider, initializer_config=initializer_config)
        paths, stage = self.path_provider, self.stage_name
        if paths is None:
            if self.config.output_path is None or self.run_id is None:
                raise ConfigError(
                    f"{self.config.kind} needs path_provider=PathProvider(output_root, run_id), or output_path and "
                    "run_id in its config"
                )
            paths = PathProvider(self.config.output_path, self.run_id)
        if self.run_id is None and stage is None:
            stage = paths.stage_name
        self.init_run_path_provider = paths.with_run(self.run_id, stage, output_root=self.config.output_path)

    # Properties, because a run_id that is assigned after __init__ would have no effect.
    @cached_property
    def pop_ckpt_kwargs_keys(self) -> list[str]:
        """``pop_ckpt_kwargs_keys`` of the config, as a list of this instance."""
        return list(self.config.pop_ckpt_kwargs_keys or ())

    @property
    def run_id(self) -> str | None:
        """``run_id`` of the config; None means the current run."""
        return self.config.run_id

    @property
    def stage_name(self) -> str | None:
        """``stage_name`` of the config."""
        return self.config.stage_name

    @property
    def model_name(self) -> str | None:
        """``model_name`` of the config."""
        return self.config.model_name

    @property
    def model_info(self) -> str | None:
        """``model_info`` of the config."""
        return self.config.model_info

    @property
    def load_optim(self) -> bool:
        """``load_optim`` of the config."""
        return self.config.load_optim

    @property
    def checkpoint_tag(self) -> str | TrainingIteration:
        """``checkpoint_tag`` of the config: a text, or an iteration with one field or all; ``latest`` for None."""
        tag = self.config.checkpoint_tag
        return TrainingIteration.from_mapping(tag) if isinstance(tag, Mapping) else tag or "latest"

    @property
    def selection(self) -> RunSelection | None:
        """The selection of the present session; None before it is made, and outside of a session."""
        found: RunSelection | None = None if self.session is None else self.session.selection
        return found

    def select(self, leaves: Sequence[Leaf] = (), part: Part = "model") -> RunSelection:
        """Select the set of the tag, once per session; later calls check that it has further files.

        Returns the selection. Raises ``CheckpointNotFoundError``, ``IncompleteSetError`` or
        ``AmbiguousCheckpointError``.
        """
        session, selection = self.session, self.selection
        snapshot = self._snapshot() if selection is None else selection.snapshot
        needs = [self._need(leaf, part, snapshot) for leaf in leaves]
        if selection is None:
            asks_for_state = part == "model" and self.load_optim
            known = [leaf for leaf in leaves if leaf.model is not None] if asks_for_state else []
            state = [self._need(leaf, "optim", snapshot) for leaf in by_optimizer(known)[0]]
            selection = session.selection = self._selected(snapshot, needs, state)
        if needs:
            require(selection.snapshot, selection.chosen, needs, asked_by=self.asked_by)
        return selection

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.init_run_path_provider)

    def _selected(self, snapshot: Snapshot, needs: Sequence[Need], state: Sequence[Need]) -> RunSelection:
        """The set with all needed files; if no such set has the optimizer state, one without it."""
        try:
            found = find_set(snapshot, self.checkpoint_tag, (*needs, *state), asked_by=self.asked_by)
        except CheckpointNotFoundError:
            if not state:
                raise
            # the plan reports the missing state, together with problems of the weights
            found = find_set(snapshot, self.checkpoint_tag, needs, asked_by=self.asked_by)
        return self._checked(found)

    def _checked(
        self, selected: Selected, root: str | None = None, trainer: Mapping[str, Any] | None = None
    ) -> RunSelection:
        """The selection, unless the set must not be used; logs what was selected."""
        kind, chosen = self.config.kind, selected.found
        message = _other_run(chosen, self.init_run_path_provider)
        if message:
            self._of_other_run(chosen, message)
        for name, reason in selected.passed_over:
            self.logger.warning("%s: passed over %s: %s", kind, name, reason)
        if selected.passed_over:
            self.logger.warning("%s: walked back to %s, %s", kind, chosen.name, chosen.folder)
        else:
            self.logger.info("%s: %s is %s", kind, self.checkpoint_tag, chosen.folder)
        return RunSelection(chosen, selected.passed_over, selected.snapshot, root, trainer)

    def locate(self, query: LocateQuery) -> Source | None:
        """The file of the selected set. Optimizer state belongs to the plain weights, for any ``model_info``."""
        with self.in_session():
            asked = [] if self.selection else [Leaf(query.path, (query.model_name,), query.model)]
            selection = self.select(asked, query.part)
            chosen = selection.chosen
            found = chosen.file(query.model_name, query.part, self._info(query.part))
            if found is None:
                return None
            origin = {"run_id": self.init_run_path_provider.run_id, "tag": self._tag_words()}
            if self.init_run_path_provider.stage_name is not None:
                origin["stage_name"] = self.init_run_path_provider.stage_name
            iteration = selection.snapshot.iteration_of(chosen)
            if iteration is not None:
                origin["iteration"] = str(iteration)
            digests = chosen.digests_of(found)
            return Source(found.path, digests, origin=origin)

    def open(self, source: Source) -> Checkpoint:
        """Open a file of the set, as ``SourceInitializer`` does.

        Raises ``TornSetError`` for a flat optimizer file that was written again since it was selected. Such a file
        records no iteration, so that ``check_together`` could not find it.
        """
        reader = super().open(source)
        files = [] if self.selection is None else self.selection.chosen.files
        for file in files:
            is_asked = file.path == source.location and file.part == "optim" and file.identity is not None
            if is_asked and file.identity != LOCAL.identity_of(file.path, True):
                reader.close()
                raise TornSetError(
                    f"{file.path} was written again since it was selected, by the run that it is of: it may not be of "
                    "one iteration with the other files. Next: start again",
                    path=file.path,
                )
        return reader

    def file_root(self, name: str, below: str) -> str:
        """``model_name`` of the config if it is set, also for a composite."""
        return self.model_name or super().file_root(name, below)

    def check_together(self, metadata: Mapping[Path, Mapping[str, Any]]) -> None:
        """Check that the files of the set are of one iteration and one run."""
        assert self.selection is not None
        found = {path.name: recorded_in(header, path) for path, header in metadata.items()}
        trainer = self.selection.trainer
        if trainer is not None:
            found["trainer"] = recorded_in(trainer, self.selection.chosen.folder)
        check_consistency(found, self.selection.chosen)

    def history_of(self, source: Source) -> History:
        """The recorded origins of the set's weights; empty if it records none."""
        parsed = parse(source.location.name)
        if self.selection is None or parsed is None:
            return {}
        return read_histories(self.selection.chosen).get(parsed.model, {})

    def outcome(self) -> Outcome:
        """As in ``SourceInitializer``, and the sets that were passed over."""
        if self.selection is None:
            return super().outcome()
        return attrs.evolve(super().outcome(), passed_over=self.selection.passed_over)

    def stored_model_config(self, model_name: str) -> dict[str, Any]:
        """The ``model_config`` stored with the weights, without ``pop_ckpt_kwargs_keys``.

        Raises ``ConfigError`` if the file does not have one, or if a key to drop is absent.
        """
        with self.in_session():
            source = self.locate(LocateQuery(model_name))
            tag = self._tag_words()
        stored = None
        if source is not None:
            with self.open(source) as reader:
                stored = reader.metadata.get("model_config")
        if not isinstance(stored, Mapping):
            raise ConfigError(f"the file of {model_name} at {tag} stores no model_config")
        dropped = self.pop_ckpt_kwargs_keys
        absent = [key for key in dropped if key not in stored]
        if absent:
            raise ConfigError(
                f"pop_ckpt_kwargs_keys: the stored model_config has no {', '.join(absent)}; it has "
                f"{', '.join(map(str, stored))}"
            )
        return {key: value for key, value in stored.items() if key not in dropped}

    def _info(self, part: Part) -> str | None:
        return self.model_info if part == "model" else None

    def _need(self, leaf: Leaf, part: Part, snapshot: Snapshot) -> Need:
        """The first name of the model that some set has, else its full path."""
        name = leaf.file_names[0]
        if len(leaf.file_names) > 1:
            name = next((one for one in leaf.file_names if (one, part) in snapshot.parts()), name)
        return Need(name, part, self._info(part))

    def _of_other_run(self, selected: CheckpointSet, message: str) -> None:
        """Warn of a committed set of another run or stage: its folder was copied or renamed."""
        self.logger.warning("%s: %s", self.config.kind, message)

    def _tag_words(self) -> str:
        return str(self.checkpoint_tag)


def _other_run(selected: CheckpointSet, asked: PathProvider) -> str:
    """A warning for a committed set that is not of the requested run and stage; else empty."""
    if not selected.committed or (selected.run_id, selected.stage_name) == (asked.run_id, asked.stage_name):
        return ""
    written, here = name_of_run(selected.run_id, selected.stage_name), name_of_run(asked.run_id, asked.stage_name)
    return f"{selected.folder} was written by run {written} and is read as run {here}: the folder was renamed or copied"
