"""Kinds that read files: ``SourceInitializer`` from what they locate, ``CheckpointInitializer`` from sets of a run."""

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
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need, check_consistency, said_by
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
    """Initialize weights, and optimizer state where the config asks for it, from files that ``locate`` names.

    A subclass implements ``locate`` and gets the rest: screening, plan, verification, application in place, composites.
    Files are opened once and kept open from ``check`` to the end of ``init_weights``, so that what was verified is
    what is loaded. All submodels are planned and verified before the first one is changed.
    """

    config_class: ClassVar[type[KindConfig]] = SourceInitializerConfig
    config: SourceInitializerConfig

    #: Whether what ``locate`` finds is for one single model; a composite then needs ``submodel``, else it is refused.
    one_model: ClassVar[bool] = False
    #: The config line that keeps entries of the model, shown beside missing ones; empty where the kind has none.
    fresh_hint: ClassVar[str] = ""

    @abc.abstractmethod
    def locate(self, query: LocateQuery) -> Source | None:
        """The file that holds a part of a single model; None where there is none.

        It is called for each single model and part: for ``model``, and for ``optim`` with ``load_optim: true``.
        """

    def open(self, source: Source) -> Checkpoint:
        """The open checkpoint of a source. What derives from ``Checkpoint`` is planned, verified, loaded and traced.

        Nothing but the header is read. The session closes it.
        """
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
        """What ``init_weights(model)`` will do. Only headers are read; ``model`` may be on the meta device.

        What stands in the way of the optimizer is a problem of code ``optimizer``. Raises errors of ``locate`` and of
        the reader; problems of the plan itself are in the plan.
        """
        with self.in_session() as session:
            planned = session.plan(model)
            plan: LoadPlan = planned.plan
            problems, warnings = session.findings(planned)
            return attrs.evolve(plan, problems=(*plan.problems, *problems), warnings=(*plan.warnings, *warnings))

    def suggest_rules(self, model: Any) -> dict[str, Suggestion]:
        """Path of a single model -> transforms for it and its file, from names and shapes; nothing is applied.

        Only headers are read; ``model`` may be on the meta device. Raises errors of ``locate`` and of the reader.
        """
        policies = self.config.policies
        with self.in_session() as session:
            return {
                part.model: suggest(part.sources, part.targets, model=part.model, policies=policies, hidden=part.hidden)
                for part, _targets in session.parts(session.open(model))
            }

    def sources(self, model: Any) -> dict[str, Source]:
        """Path of a single model -> the file that its weights will be read from; only locates."""
        with self.in_session() as session:
            return {leaf.path: source for leaf, source in session.located(model) if source is not None}

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Plan the weights, verify every byte that will be read, and examine the values; likewise optimizer state."""
        with self.in_session() as session:
            session.checked(model)
            session.checked_optimizers(model)

    def init_weights(self, model: Any) -> None:
        """Write the weights in place, after everything about them has been checked.

        A problem that can be known beforehand leaves the model as it was. Should a disk fail between check and read,
        ``PartlyInitializedError`` names the models that were written.
        """
        with self.in_session() as session:
            session.apply(model)

    def init_optimizer(self, model: Any) -> None:
        """Restore the optimizer state by parameter name where the config asks for it, else do nothing.

        Everything is planned and verified before the first optimizer changes.
        """
        with self.in_session() as session:
            session.apply_optimizers(model)

    def outcome(self) -> Outcome:
        """The files that weights came from, what was restored besides, and where the time went."""
        files = None if self.session is None else self.session.files
        return attrs.evolve(super().outcome(), files=files or {}, continues=self.continues)

    @property
    def continues(self) -> bool:
        """Whether weights come from the very run that is started, which goes on."""
        return False

    # What kinds that select among several files override.

    def select(self, leaves: Sequence[Leaf] = (), part: Part = "model") -> object:
        """Select, once for a session, what all files come from; called before the first ``locate`` of a part.

        Args:
            leaves: The single models that ``locate`` will be asked for.
            part: The part that it will be asked for.
        """

    def check_together(self, metadata: Mapping[Path, Mapping[str, Any]]) -> None:
        """Raise where files do not belong together; called with their headers before anything is planned."""

    def history_of(self, source: Source) -> History:
        """Where the values in a file came from before, by their names in the file."""
        return {}

    def leaves(self, model: Any) -> tuple[Leaf, ...]:
        """The single models below ``model`` that this initializer is for, in declared order.

        Raises ``ConfigError`` if ``submodel`` names none, or ``model`` is no model.
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
    """What an initializer selected among the checkpoints of a run; everything comes from it.

    Attributes:
        chosen: The set.
        passed_over: (set, reason) of each that was passed over on the way back to it, newest first.
        snapshot: What it was selected from.
        root: The whole model's name in the files, where the trainer file decides it.
        trainer: The content of the trainer file, where it is taken.
    """

    chosen: CheckpointSet
    passed_over: tuple[tuple[str, str], ...]
    snapshot: Snapshot
    root: str | None = None
    trainer: Mapping[str, Any] | None = None


class CheckpointInitializer(SourceInitializer):
    """Weights, and with ``load_optim`` optimizer state, of one set of checkpoints of a run.

    Every file comes from one set: the same tag, the same training iteration. Base of ``previous_run`` and ``resume``;
    it can be derived from and is not a kind itself.

    ``init_run_path_provider`` names the folders of the source run. Raises ``ConfigError`` if neither the config nor the
    path provider names a run.
    """

    config_class: ClassVar[type[KindConfig]] = CheckpointInitializerConfig
    config: CheckpointInitializerConfig

    #: Who asks for a set; errors advise what its config can say.
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

    # Properties, since a run_id that is assigned after __init__ would have no effect.
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
        """What is selected in the present session; None before the first question and outside of a session."""
        found: RunSelection | None = None if self.session is None else self.session.selection
        return found

    def select(self, leaves: Sequence[Leaf] = (), part: Part = "model") -> RunSelection:
        """Select the set that the tag means, once for a session; afterwards make sure that it has further files.

        Returns what is selected. Raises ``CheckpointNotFoundError``, ``IncompleteSetError`` or
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
        """The set with the files that are needed; where no such set has the optimizer state besides, one without."""
        try:
            found = find_set(snapshot, self.checkpoint_tag, (*needs, *state), asked_by=self.asked_by)
        except CheckpointNotFoundError:
            if not state:
                raise
            # that the state is missing is a problem of the plan, beside those of the weights
            found = find_set(snapshot, self.checkpoint_tag, needs, asked_by=self.asked_by)
        return self._checked(found)

    def _checked(
        self, selected: Selected, root: str | None = None, trainer: Mapping[str, Any] | None = None
    ) -> RunSelection:
        """The selection, unless the set must not be taken; the log says what was selected."""
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
        """The file of the selected set. Optimizer state belongs to the plain weights, whatever ``model_info`` says."""
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
        """As ``SourceInitializer`` does.

        Raises ``TornSetError`` for a flat optimizer file that was written again since it was selected: it says no
        iteration, so that ``check_together`` cannot tell.
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
        """``model_name`` where the config says it, also for a composite."""
        return self.model_name or super().file_root(name, below)

    def check_together(self, metadata: Mapping[Path, Mapping[str, Any]]) -> None:
        """Make sure that the files of the set are of one iteration and one run."""
        assert self.selection is not None
        found = {path.name: said_by(header, path) for path, header in metadata.items()}
        trainer = self.selection.trainer
        if trainer is not None:
            found["trainer"] = said_by(trainer, self.selection.chosen.folder)
        check_consistency(found, self.selection.chosen)

    def history_of(self, source: Source) -> History:
        """What the set records of where its weights came from; nothing where it records nothing."""
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

        Raises ``ConfigError`` where the file has none or a key to drop is absent.
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
        """Warn of a committed set that another run or stage wrote: its folder was copied, or has another name now."""
        self.logger.warning("%s: %s", self.config.kind, message)

    def _tag_words(self) -> str:
        return str(self.checkpoint_tag)


def _other_run(selected: CheckpointSet, asked: PathProvider) -> str:
    """A warning of a committed set that is not of the run and stage that were asked for; else empty."""
    if not selected.committed or (selected.run_id, selected.stage_name) == (asked.run_id, asked.stage_name):
        return ""
    written, here = name_of_run(selected.run_id, selected.stage_name), name_of_run(asked.run_id, asked.stage_name)
    return f"{selected.folder} was written by run {written} and is read as run {here}: the folder was renamed or copied"
