"""CheckpointInitializer: weights and optimizer state from the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pydantic

from noether_init_core.config.base import InitializerConfig, KindConfig
from noether_init_core.errors import CheckpointNotFoundError, ConfigError
from noether_init_core.initializers.base import Outcome
from noether_init_core.initializers.location import LocateQuery, OptimizerStateConfig, Part, Source
from noether_init_core.initializers.optimizer import by_optimizer
from noether_init_core.initializers.source import SourceInitializer
from noether_init_core.iteration import TrainingIteration
from noether_init_core.models import Leaf
from noether_init_core.paths import PathProvider
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need, check_consistency, said_by
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.provenance import History, read_histories
from noether_init_core.sets.refusals import AskedBy
from noether_init_core.sets.selection import Selected, find_set, require
from noether_init_core.sets.snapshot import Snapshot


class CheckpointInitializerConfig(InitializerConfig, OptimizerStateConfig):
    """The config of kinds that read from the checkpoints of a run."""

    load_optim: bool = pydantic.Field(description="Whether the state of the optimizer is loaded too.")
    pop_ckpt_kwargs_keys: list[str] | None = pydantic.Field(
        default=None, description="Keys to drop from the stored model_config when a model is rebuilt from it."
    )
    output_path: Path | None = pydantic.Field(
        default=None, description="Output root of the source run; the current run's when null."
    )


@attrs.frozen(eq=False)
class RunSelection:
    """What an initializer selected among the checkpoints of a run; everything comes from it.

    Attributes:
        selected: The set, what was passed over on the way back to it, and the snapshot that it was selected from.
        root: The whole model's name in the files, where the trainer file decides it.
        trainer: The content of the trainer file, where it is taken.
    """

    selected: Selected
    root: str | None = None
    trainer: Mapping[str, Any] | None = None

    @property
    def chosen(self) -> CheckpointSet:
        """The set."""
        return self.selected.found


class CheckpointInitializer(SourceInitializer):
    """Weights, and with ``load_optim`` optimizer state, of one set of checkpoints of a run.

    Every file comes from one set: the same tag, the same training iteration. Base of ``previous_run`` and ``resume``;
    it can be derived from and is not a kind itself.

    Raises ``ConfigError`` if no run can be told from the config and the path provider.
    """

    config_class: ClassVar[type[KindConfig]] = CheckpointInitializerConfig
    config: CheckpointInitializerConfig

    #: Who asks for a set; errors advise what its config can say.
    asked_by: AskedBy = "tag"

    def __init__(self, config: KindConfig, *, path_provider: Any = None) -> None:
        super().__init__(config, path_provider=path_provider)
        self.source_paths = self._source_paths()

    @property
    def checkpoint_tag(self) -> str | dict[str, int]:
        """The tag that is asked for; ``latest`` where the config says none."""
        return self.config.checkpoint_tag if self.config.checkpoint_tag is not None else "latest"

    @property
    def selection(self) -> RunSelection | None:
        """What is selected in the present session; None before the first question and outside of a session."""
        found: RunSelection | None = None if self.session is None else self.session.selection
        return found

    def select(self, leaves: Sequence[Leaf] = (), part: Part = "model") -> None:
        """Select the set that the tag means, once for a session; afterwards make sure that it has further files.

        Raises ``CheckpointNotFoundError``, ``IncompleteSetError`` or ``AmbiguousCheckpointError``.
        """
        session = self.session
        snapshot = self._snapshot() if session.selection is None else session.selection.selected.snapshot
        needs = [self._need(leaf, part, snapshot) for leaf in leaves]
        if session.selection is None:
            with_state = by_optimizer(leaves)[0] if part == "model" and self.config.load_optim else []
            state = [self._need(leaf, "optim", snapshot) for leaf in with_state]
            session.selection = self._selected(snapshot, needs, state)
        require(session.selection.selected.snapshot, session.selection.chosen, needs, asked_by=self.asked_by)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.source_paths)

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

    def _checked(self, selected: Selected, root: str | None = None) -> RunSelection:
        """The selection, unless the set must not be taken; the log says what was selected."""
        kind, chosen = self.config.kind, selected.found
        self._check_run(chosen)
        for name, reason in selected.passed_over:
            self.logger.warning("%s: passed over %s: %s", kind, name, reason)
        if selected.passed_over:
            self.logger.warning("%s: walked back to %s, %s", kind, chosen.name, chosen.folder)
        else:
            self.logger.info("%s: %s is %s", kind, self.checkpoint_tag, chosen.folder)
        return RunSelection(selected, root)

    def locate(self, query: LocateQuery) -> Source | None:
        """The file of the selected set. Optimizer state belongs to the plain weights, whatever ``model_info`` says."""
        with self.in_session():
            if self.selection is None:
                self.select([Leaf(query.path, (query.model_name,), query.model)], query.part)
            assert self.selection is not None
            chosen = self.selection.chosen
            found = chosen.file(query.model_name, query.part, self._info(query.part))
            if found is None:
                return None
            origin = {"run_id": self.source_paths.run_id, "tag": self._tag_words()}
            if self.source_paths.stage_name is not None:
                origin["stage_name"] = self.source_paths.stage_name
            iteration = self.selection.selected.snapshot.iteration_of(chosen)
            if iteration is not None:
                origin["iteration"] = str(iteration)
            digests = chosen.digests_of(found) or chosen.digest_of(found)
            return Source(found.path, digests, origin=origin)

    def file_root(self, name: str, below: str) -> str:
        """``model_name`` where the config says it, also for a composite."""
        return self.config.model_name or super().file_root(name, below)

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
        return attrs.evolve(super().outcome(), passed_over=self.selection.selected.passed_over)

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
        dropped = self.config.pop_ckpt_kwargs_keys or []
        absent = [key for key in dropped if key not in stored]
        if absent:
            raise ConfigError(
                f"pop_ckpt_kwargs_keys: the stored model_config has no {', '.join(absent)}; it has "
                f"{', '.join(map(str, stored))}"
            )
        return {key: value for key, value in stored.items() if key not in dropped}

    def _info(self, part: Part) -> str | None:
        return self.config.model_info if part == "model" else None

    def _need(self, leaf: Leaf, part: Part, snapshot: Snapshot) -> Need:
        """The first name of the model that some set has, else its full path."""
        name = leaf.file_names[0]
        if len(leaf.file_names) > 1:
            name = next((one for one in leaf.file_names if (one, part) in snapshot.parts()), name)
        return Need(name, part, self._info(part))

    def _check_run(self, selected: CheckpointSet) -> None:
        """Warn of a committed set that another run or stage wrote: its folder was copied, or has another name now."""
        message = other_run(selected, self.source_paths)
        if message:
            self.logger.warning("%s: %s", self.config.kind, message)

    def _tag_words(self) -> str:
        tag = self.checkpoint_tag
        return str(TrainingIteration.from_mapping(tag)) if isinstance(tag, Mapping) else tag

    def _source_paths(self) -> PathProvider:
        config, current = self.config, self.path_provider
        if current is None:
            if config.output_path is None or config.run_id is None:
                raise ConfigError(
                    f"{config.kind} needs path_provider=PathProvider(output_root, run_id), or output_path and run_id "
                    "in its config"
                )
            return PathProvider(config.output_path, config.run_id, config.stage_name)
        stage = config.stage_name
        if config.run_id is None and stage is None:
            stage = current.stage_name
        return current.with_run(config.run_id, stage, output_root=config.output_path)


def other_run(selected: CheckpointSet, asked: PathProvider) -> str:
    """A warning of a committed set that is not of the run and stage that were asked for; else empty."""
    if not selected.committed or (selected.run_id, selected.stage_name) == (asked.run_id, asked.stage_name):
        return ""
    written, here = (
        f"run {run_id}" + (f", stage {stage_name}" if stage_name is not None else "")
        for run_id, stage_name in ((selected.run_id, selected.stage_name), (asked.run_id, asked.stage_name))
    )
    return f"{selected.folder} was written by {written}, and is read as {here}: the folder was renamed or copied"
