"""Base class of kinds that read sets of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import attrs

from noether_init_core.config.base import KindConfig
from noether_init_core.config.source import (
    CheckpointInitializerConfig,
)
from noether_init_core.errors import CheckpointNotFoundError, ConfigError
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.initializers.base import (
    LocateQuery,
    Outcome,
    Source,
)
from noether_init_core.initializers.optimizer import by_optimizer
from noether_init_core.initializers.source import SourceInitializer
from noether_init_core.iteration import TrainingIteration
from noether_init_core.models import Leaf
from noether_init_core.paths import PathProvider, name_of_run
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need, check_consistency, recorded_in
from noether_init_core.sets.file_names import Part, parse
from noether_init_core.sets.flat_files import check_as_listed, own_files
from noether_init_core.sets.hints import AskedBy
from noether_init_core.sets.manifest import digest_of
from noether_init_core.sets.provenance import History, read_histories
from noether_init_core.sets.selection import Selected, find_set, require
from noether_init_core.sets.snapshot import Snapshot


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

    @property
    def own(self) -> CheckpointSet:
        """The set; in a flat set, averages of another iteration are replaced by those of its own.

        Raises ``TornSetError`` if these were not found.
        """
        chosen, snapshot = self.chosen, self.snapshot
        if chosen.committed:
            return chosen
        return attrs.evolve(chosen, flat_files=tuple(own_files(chosen, snapshot.iteration_of(chosen), snapshot.flat)))


class CheckpointInitializer(SourceInitializer):
    """Base of kinds that load weights, and optimizer state with ``load_optim``, from one set of a run.

    Every file comes from one set: the same tag, the same training iteration. ``previous_run`` and ``resume`` derive
    from it; it is not a kind itself.

    ``init_run_path_provider`` names the folders of the source run. Raises ``ConfigError`` if neither the config nor the
    path provider names a run.
    """

    config_class: ClassVar[type[KindConfig]] = CheckpointInitializerConfig
    config: CheckpointInitializerConfig

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
        """Whether the state of the optimizer is loaded."""
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

    @property
    def asked_by(self) -> AskedBy:
        """What selects the set; errors advise lines of its config."""
        session = self.session
        return AskedBy() if session is None else AskedBy(place=session.place, whole=session.key)

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

    def has_state(self, leaf: Leaf) -> bool:
        """Whether the selected set has optimizer state of a single model."""
        selection = self.select()
        need = self._need(leaf, "optim", selection.snapshot)
        return selection.chosen.file(need.model, "optim") is not None

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
            iteration = selection.snapshot.iteration_of(chosen)
            found = chosen.file(query.model_name, query.part, self._info(query.part))
            if found is None:
                return None
            if not chosen.committed:
                (found,) = own_files(attrs.evolve(chosen, flat_files=(found,)), iteration, selection.snapshot.flat)
            origin = {"run_id": self.init_run_path_provider.run_id, "tag": self._tag_words()}
            if self.init_run_path_provider.stage_name is not None:
                origin["stage_name"] = self.init_run_path_provider.stage_name
            if iteration is not None:
                origin["iteration"] = str(iteration)
            digests = chosen.digests_of(found)
            return Source(found.path, digests, origin=origin)

    def open(self, source: Source) -> Checkpoint:
        """Open a file of the set, as ``SourceInitializer`` does.

        Raises ``TornSetError`` for a flat file that was written again since it was selected: it may record the same
        iteration, or none, so that ``check_together`` could not find it.
        """
        reader = super().open(source)
        files = () if self.selection is None else self.selection.chosen.files
        with ExitStack() as opened:
            opened.enter_context(reader)
            for file in files:
                if file.path == source.location:
                    check_as_listed(file)
            opened.pop_all()
        return reader

    def file_root(self, name: str, below: str) -> str:
        """``model_name`` of the config if it is set, also for a composite."""
        return self.model_name or super().file_root(name, below)

    def check_together(self, metadata: Mapping[Path, Mapping[str, Any]]) -> None:
        """Check that the files of the set are of one iteration and one run."""
        assert self.selection is not None
        chosen = self.selection.chosen
        found = {path.name: recorded_in(header, path) for path, header in metadata.items()}
        trainer = self.selection.trainer
        if trainer is not None:
            found["trainer"] = recorded_in(trainer, chosen.folder)
        # Flat files that are not loaded say which run the loaded ones must be of.
        models = {parsed.model for name in found if (parsed := parse(name)) is not None}
        for file in () if chosen.committed else chosen.files:
            # a trainer file that was read may have been written again since
            is_trainer = file.part == "trainer" and trainer is None
            is_plain = (file.part, file.info) == ("model", None) and file.model in models
            if (is_trainer or is_plain) and file.name not in found:
                with open_checkpoint(file.path) as reader:
                    found[file.name] = recorded_in(reader.metadata, file.path)
        # A file that is not loaded may decide the iteration of the set, such as the trainer file for a warm start. That
        # of a state that was read is known, and the file may have been written again since.
        own = self.selection.snapshot.iteration_of(chosen) if trainer is None else found["trainer"][0]
        check_consistency(found, attrs.evolve(chosen, iteration=own))

    def history_of(self, source: Source) -> History:
        """The recorded origins of the set's weights; empty if it records none."""
        parsed = parse(source.location.name)
        if self.selection is None or parsed is None:
            return {}
        return read_histories(self.selection.chosen).get(parsed.model, {})

    def fingerprint(self) -> tuple[str, ...]:
        """As in ``SourceInitializer``, and the set: by the seal of its manifest, a flat one by its other files."""
        if self.selection is None:
            return super().fingerprint()
        chosen = self.selection.chosen
        if chosen.manifest is not None:
            seal = digest_of(chosen.manifest.to_bytes())
            return (f"the set {chosen.name} ({seal})", *super().fingerprint())
        beside = []
        for state in chosen.files:
            if state.part != "model":  # weights are in the fingerprint of the files that are open
                with open_checkpoint(state.path) as reader:
                    beside.append(f"{state.path.name}, {reader.identity()}")
        return (f"the flat set {chosen.name}", *beside, *super().fingerprint())

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
