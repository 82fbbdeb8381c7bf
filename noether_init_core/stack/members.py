"""The members of a stack: what each is for, and what it will do, planned and checked in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from noether_init_core.applying.targets import model_targets
from noether_init_core.initializers.base import InitializerBase, dotted, with_delegates
from noether_init_core.initializers.models import submodel_of
from noether_init_core.kinds.hookspec import HOOK_NAMES
from noether_init_core.protocols import leaf_models
from noether_init_core.surgery.plan import LoadPlan

__all__ = ["Member", "Prepared", "prepare"]


@attrs.frozen(eq=False)
class Member:
    """An initializer, the part of the model that it is for, the hooks that it is called for, its place in the config.

    ``units`` are its delegates, depth first, and itself.
    """

    initializer: InitializerBase
    submodel: tuple[str, ...] = ()
    hooks: frozenset[str] = frozenset(HOOK_NAMES)
    where: Callable[..., str] = dotted
    units: tuple[InitializerBase, ...] = attrs.field(init=False)

    @units.default
    def _find_units(self) -> tuple[InitializerBase, ...]:
        return tuple(with_delegates(self.initializer)) if isinstance(self.initializer, InitializerBase) else ()

    @property
    def kind(self) -> str:
        """The kind, as the config names it."""
        return self.initializer.config.kind

    def takes_part_in(self, hook: str) -> bool:
        """Whether the stack calls ``hook`` for it."""
        return hook in self.hooks and self.initializer.takes_part_in(hook)

    def model(self, model: Any) -> Any:
        """The part of the model that it is for. Raises ``ConfigError`` where there is none."""
        return submodel_of(model, self.submodel)


@attrs.frozen(eq=False)
class Prepared:
    """The plans of one member, each with the initializer that states it; none where nothing is said beforehand."""

    member: Member
    plans: tuple[tuple[InitializerBase, LoadPlan], ...]


def prepare(
    members: Sequence[Member], model: Any, check: tuple[Any, list[Any] | None] | None = None
) -> Iterator[Prepared]:
    """The plans of every member, each made with what those before it will have loaded.

    With ``check`` (trainer, callbacks) everything is checked too, and problems of a plan are raised.
    """
    loaded: frozenset[int] = frozenset()
    for member in members:
        # nobody asks what the last one writes
        plans, loaded = _prepare(member, member.initializer, model, loaded, check, is_last=member is members[-1])
        yield Prepared(member, tuple(plans))


def _prepare(
    member: Member,
    initializer: InitializerBase,
    model: Any,
    loaded: frozenset[int],
    check: tuple[Any, list[Any] | None] | None,
    *,
    is_last: bool = False,
) -> tuple[list[tuple[InitializerBase, LoadPlan]], frozenset[int]]:
    """The plan of an initializer, or else those of its delegates, and the ids of what is loaded after them."""

    def has(hook: str) -> bool:
        return member.takes_part_in(hook) and initializer.takes_part_in(hook)

    part, loads = member.model(model), has("init_weights")
    initializer.session.loaded_before = within = loaded
    found: list[tuple[InitializerBase, LoadPlan]] = []
    for one in initializer.delegates:
        plans, within = _prepare(member, one, model, within, check)
        found += plans
    if check is not None:
        trainer, callbacks = check
        initializer.check(
            part,
            trainer if has("init_trainer") else None,
            callbacks if has("init_callbacks") else None,
        )
    plan = initializer.plan(part) if loads else None
    if plan is None:
        return (found, within) if loads else ([], loaded)
    if check is not None:
        plan.raise_for_problems()
    return [(initializer, plan)], loaded if is_last else loaded | _written_by(plan, part)


def _written_by(plan: LoadPlan, model: Any) -> frozenset[int]:
    """Ids of the tensors of ``model`` that a plan writes."""
    tensors = {path: model_targets(leaf).tensors for path, leaf in leaf_models(model)}
    found = (tensors.get(row.model, {}).get(row.target or "") for row in plan.rows if row.writes)
    return frozenset(id(tensor) for tensor in found if tensor is not None)
