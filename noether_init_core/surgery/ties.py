"""Entries that are the same memory, in one model or across submodels: what must be equal, and what cannot be. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from noether_init_core.surgery.rows import LOADED_BEFORE, PlanRow, Problem, TargetSpec

__all__ = ["names_of_ties", "ties_across", "ties_within"]

_DONE = {"keep": "kept", "reset": "reset"}


def names_of_ties(targets: Mapping[str, TargetSpec]) -> dict[str, list[str]]:
    """The first name of each tensor of a model that has several -> all of its names."""
    tied: dict[str, list[str]] = {spec.tied_to: [] for spec in targets.values() if spec.tied_to is not None}
    for name, spec in targets.items() if tied else ():
        if (first := spec.tied_to or name) in tied:
            tied[first].append(name)
    return tied


def ties_within(
    model: str, tied: Iterable[Sequence[str]], rows: Sequence[PlanRow], kept: Mapping[str, str]
) -> tuple[list[tuple[str, str, str]], list[Problem]]:
    """For names of one tensor of a model: entries of the file that must be equal, and problems.

    ``kept`` are the names that rules of the config keep.
    """
    equal: list[tuple[str, str, str]] = []
    problems: list[Problem] = []
    groups = [names for names in tied if len(names) > 1]
    by_name = {row.target: row for row in rows if row.target is not None} if groups else {}
    for names in groups:
        group = [by_name[name] for name in names]
        written = [row for row in group if row.writes]
        if any(row.steps for row in written) and len({(row.sources, row.steps, row.part) for row in written}) > 1:
            both = " and ".join(row.key for row in written[:2])
            message = f"{both} are one tensor, and transforms make it twice. Next: drop one"
            problems.append(Problem("tied", message, model, tuple(names)))
        elif written:
            sources = list(dict.fromkeys(row.sources[0] for row in written))
            equal += [(model, sources[0], other) for other in sources[1:]]
        held = [row for row in group if row.action == "keep" and row.rule != LOADED_BEFORE and row.key in kept]
        changed = written or [row for row in group if row.action == "reset"]
        if held and changed:
            done = "loaded" if written else "reset"
            message = f"{held[0].key} is kept, but it is the same tensor as {changed[0].key}, which is {done}"
            problems.append(Problem("tied", message, model, tuple(names)))
    return equal, problems


def ties_across(rows: Sequence[PlanRow]) -> tuple[tuple[tuple[str, str, str, str], ...], list[Problem]]:
    """For entries of different models that are one tensor: entries of the files that must be equal, and problems."""
    places: dict[Hashable, list[PlanRow]] = {}
    for row in rows:
        if row.identity is not None and row.rule != LOADED_BEFORE and (row.writes or row.action in _DONE):
            places.setdefault(row.identity, []).append(row)
    across: list[tuple[str, str, str, str]] = []
    problems: list[Problem] = []
    for group in places.values():
        first = next((row for row in group if row.writes), None)
        for row in group if first is not None else ():
            if first is None or row.model == first.model:
                continue
            if row.writes and not (row.steps or first.steps):
                across.append((first.model, first.sources[0], row.model, row.sources[0]))
                continue
            if row.writes:
                message = (
                    f"{row.target} of {row.model} and {first.target} of {first.model} are one tensor, and transforms "
                    "make it twice. Next: a rule that makes it once"
                )
            else:
                message = (
                    f"{row.model}: {row.target} is {_DONE[row.action]}, but it is the same tensor as {first.target} "
                    f"of {first.model}, which is loaded"
                )
            problems.append(Problem("tied", message, row.model, (row.key,)))
    return tuple(dict.fromkeys(across)), problems
