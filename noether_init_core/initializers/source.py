"""Base class of kinds that read files."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs

from noether_init_core.config.base import KindConfig
from noether_init_core.config.source import (
    SourceInitializerConfig,
    rule_of,
)
from noether_init_core.errors import ConfigError
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.opening import FileCheckpoint, open_checkpoint
from noether_init_core.initializers.base import (
    InitializerBase,
    LocateQuery,
    Outcome,
    Source,
    dotted,
)
from noether_init_core.initializers.optimizer import LoadSession
from noether_init_core.initializers.session import OpenFile
from noether_init_core.models import Leaf, check_model, leaves_of, submodel_of
from noether_init_core.sets.file_names import Part
from noether_init_core.sets.provenance import History
from noether_init_core.suggest.rules import Suggestion
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

        The rules are relative to ``source_root`` and ``target_root`` of the config. Changes nothing and reads only
        headers; ``model`` may be on the meta device. Raises errors of ``locate`` and the reader.
        """
        with self.in_session() as session:
            return session.suggested(model)  # type: ignore[no-any-return]  # the session of this kind

    def sources(self, model: Any) -> dict[str, Source]:
        """Path of a single model -> the file that its weights will be read from; opens no file."""
        with self.in_session() as session:
            return {leaf.path: source for leaf, source in session.located(model) if source is not None}

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Plan the weights, verify every byte that will be read, and examine the values; also of optimizer state."""
        with self.in_session() as session:
            session.checked(model)
            session.checked_optimizers(model)

    def fingerprint(self) -> tuple[str, ...]:
        """The file of each single model, with a digest of its checksums, or of its header and samples of its bytes."""
        opened = None if self.session is None else self.session.opened
        files = {} if opened is None else opened.weights
        return tuple(f"{path} from {file.source.location.name}, {_content(file)}" for path, file in files.items())

    def init_weights(self, model: Any) -> None:
        """Write the weights in place, after all checks.

        A problem that can be known before leaves the model unchanged. If a disk fails between check and read,
        ``PartlyInitializedError`` names the models that were written.
        """
        with self.in_session() as session:
            session.apply(model)

    def has_state(self, leaf: Leaf) -> bool:
        """Whether the source has optimizer state of a single model that takes none; False where that is unknown."""
        return False

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
            names = [leaf.path.removeprefix(f"{name}.") for leaf in found]
            raise ConfigError(
                f"{self.config.kind} brings the weights of one model, and {path} has several: {', '.join(names)}. "
                f"Next: submodel: {names[0]}, or another of them"
            )
        return found

    def file_root(self, name: str, below: str) -> str:
        """The name in the files of the submodel ``below`` (empty: the whole) of the model called ``name``."""
        return f"{name}.{below}" if below else name


def _content(file: OpenFile) -> str:
    """The bytes of an open file in words, without reading them."""
    if isinstance(file.reader, FileCheckpoint):
        return file.reader.identity()
    return file.source.digest or f"{len(file.reader.tensors())} tensors"
