"""SourceInitializer: weights from files that the kind locates; all else is inherited."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs

from noether_init_core.config.base import KindConfig
from noether_init_core.config.transforms import rule_of
from noether_init_core.errors import ConfigError
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.initializers.base import InitializerBase, Outcome, dotted
from noether_init_core.initializers.location import LocateQuery, Part, Source, SourceInitializerConfig
from noether_init_core.initializers.session import LoadSession
from noether_init_core.models import Leaf, check_model, leaves_of, submodel_of
from noether_init_core.sets.provenance import History
from noether_init_core.suggest.rules import Suggestion
from noether_init_core.suggest.suggest import suggest
from noether_init_core.surgery.name_rules import NameRules, NoetherSurgery
from noether_init_core.surgery.plan import LoadPlan
from noether_init_core.surgery.transforms import Transforms


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
        """The open checkpoint of a source. Whatever satisfies ``Checkpoint`` is planned, verified, loaded and traced.

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

    def new_session(self, *, where: Callable[..., str] = dotted) -> LoadSession:
        """A session with the stages of a load."""
        return LoadSession(self, where=where)

    def plan(self, model: Any) -> LoadPlan:
        """What ``init_weights(model)`` will do. Only headers are read; ``model`` may be on the meta device.

        What stands in the way of the optimizer is a problem of code ``optimizer``. Raises errors of ``locate`` and of
        the reader; problems of the plan itself are in the plan.
        """
        with self.in_session() as session:
            plan: LoadPlan = session.plan(model).plan
            problems, warnings = session.findings(model)
            if not (problems or warnings):
                return plan
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
            leaves = self.leaves(model)
            self.select(leaves)
            return {leaf.path: found for leaf in leaves if (found := session.source(leaf, "model")) is not None}

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Plan the weights, verify every byte that will be read, and examine the values; likewise optimizer state."""
        with self.in_session() as session:
            session.verify(model)
            session.verify_optimizers(model)

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

    def select(self, leaves: Sequence[Leaf] = (), part: Part = "model") -> None:
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
