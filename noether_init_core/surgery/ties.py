"""Names of a model that are one tensor, also of several submodels: what a plan may do with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence, Set

from noether_init_core.surgery.fit import TargetSpec
from noether_init_core.surgery.plan import LOADED_BEFORE, WRITING, PlanRow, Problem, memory_of

_DONE = {"keep": "kept", "reset": "reset"}
# actions that decide the final value of an entry
_SETTLED = WRITING | _DONE.keys()


def names_of_ties(targets: Mapping[str, TargetSpec]) -> dict[str, list[str]]:
    """First name of each tensor of a model that has several names -> all of its names."""
    tied: dict[str, list[str]] = {spec.tied_to: [] for spec in targets.values() if spec.tied_to is not None}
    for name, spec in targets.items() if tied else ():
        if (first := spec.tied_to or name) in tied:
            tied[first].append(name)
    return tied


def ties(
    rows: Sequence[PlanRow], kept: Set[tuple[str, str]]
) -> tuple[tuple[tuple[str, str, str, str], ...], list[Problem]]:
    """For entries that are one tensor: ``equal`` of a ``LoadPlan``, and problems.

    ``kept``: (model, name) of the entries that rules of the config keep.
    """
    places: defaultdict[Hashable, list[PlanRow]] = defaultdict(list)
    for row in rows:
        if row.target is not None and row.action in _SETTLED and row.rule != LOADED_BEFORE:
            places[memory_of(row)].append(row)
    equal: dict[tuple[str, str, str, str], None] = {}
    problems: list[Problem] = []
    for group in places.values():
        if len(group) == 1:
            continue
        # the entry that decides: the first one loaded, else the first one reset
        first = min(group, key=lambda row: (not row.writes, row.action != "reset"))
        for row in group:
            is_same_model = row.model == first.model
            one, other = (f"{each.key}{'' if is_same_model else f' of {each.model}'}" for each in (row, first))
            message = ""
            if row.writes:
                is_same = (row.sources, row.steps, row.part) == (first.sources, first.steps, first.part)
                if is_same_model and is_same:
                    continue
                if (row.steps, row.part, len(row.sources)) != (first.steps, first.part, len(first.sources)):
                    message = f"{other} and {one} are one tensor, and transforms compute it twice. Next: drop one"
                else:
                    equal.update(
                        ((first.model, mine, row.model, its), None)
                        for mine, its in zip(first.sources, row.sources, strict=True)
                    )
            elif row.action != first.action and ((row.model, row.key) in kept if is_same_model else first.writes):
                done = "loaded" if first.writes else "reset"
                message = f"{one} is {_DONE[row.action]}, but it is the same tensor as {other}, which is {done}"
            if message:
                problems.append(Problem("tied", message, row.model, (row.key,)))
    return tuple(equal), problems
