"""Lineage as a graph: runs and files, and whose weights went into whom. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import attrs

LINEAGE_VERSION = 1

Relation = Literal["focus", "ancestor", "descendant", "other"]


@attrs.frozen
class LineageSet:
    """One set of checkpoints of a run; ``bytes`` are those of its files, None where a manifest does not say them."""

    name: str
    tags: tuple[str, ...]
    iteration: str | None
    committed: bool
    created: str | None
    bytes: int | None


@attrs.frozen
class LineageNode:
    """A run (and stage), or a file.

    Attributes:
        id: Its name in edges: ``pretrain``, ``pretrain/stage``, the path below the output root; ``file:`` and the path
            of a file; of what is not there any more what was recorded of it. Two runs of one name in two output roots
            have the root in front.
        type: ``missing`` for a run or file that was recorded and is not where it was.
        run_id: None for a file.
        stage: Its stage, where it has one.
        path: Where it is, or was when it was recorded.
        sets: Its sets, newest first.
        relation: How it stands to the run that was asked for.
        resumed: How often the run was continued from a set of its own, as far as the sets that are there tell.
        note: What there is to know besides, in words; empty for nothing.
    """

    id: str
    type: Literal["run", "file", "missing"]
    run_id: str | None
    stage: str | None
    path: str
    sets: tuple[LineageSet, ...] = ()
    relation: Relation = "other"
    resumed: int = 0
    note: str = ""


@attrs.frozen
class LineageEdge:
    """Weights of ``source`` went into ``target``.

    Attributes:
        source: Id of the node that they came from.
        target: Id of the run that took them.
        kind: The kind of initializer.
        model: Path of names of the single model.
        file: Name of the file that was read.
        tag: The tag that was asked for, where it was one.
        iteration: The iteration of the set that it meant.
        from_set: Name of that set's folder.
        tensors: How many entries of the model came from there, and are not loaded over since. Where the target is not
            there any more: how many of those that others took from it.
        share: The same as a share of all entries of the model, from 0 to 1; None where the target is not there.
        is_resume: Whether training was continued: optimizer and iteration came along.
        note: What there is to know besides, in words; empty for nothing.
    """

    source: str
    target: str
    kind: str
    model: str
    file: str
    tag: str | None
    iteration: str | None
    from_set: str | None
    tensors: int | None
    share: float | None
    is_resume: bool = False
    note: str = ""


@attrs.frozen
class Lineage:
    """Runs, files, and whose weights went into whom; pure data.

    Attributes:
        focus: Id of the run that was asked for; None where it was an output root, or a run with several stages.
        nodes: Those that have to do with what was asked for, ancestors first; all of an output root.
        edges: Between them.
        problems: What could not be read, a sentence each; the rest is there all the same.
    """

    focus: str | None
    nodes: tuple[LineageNode, ...]
    edges: tuple[LineageEdge, ...]
    problems: tuple[str, ...] = ()

    def node(self, name: str) -> LineageNode:
        """The node of that id. Raises ``KeyError``."""
        for node in self.nodes:
            if node.id == name:
                return node
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """The lineage as plain data, by ``docs/schemas/lineage.schema.json``."""
        return {"format": "noether-init-lineage", "version": LINEAGE_VERSION, **attrs.asdict(self)}

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)


def related(
    focus: str | Sequence[str] | None,
    nodes: Sequence[LineageNode],
    edges: Sequence[LineageEdge],
    problems: Sequence[str] = (),
) -> Lineage:
    """The lineage of a node, or of several: ancestors and descendants, and the edges between those; of all for None.

    What is both, in a circle, is an ancestor.
    """
    foci = [focus] if isinstance(focus, str) else focus
    if foci is None:
        return Lineage(None, tuple(nodes), tuple(edges), tuple(problems))
    ancestors = _reached(foci, [(edge.target, edge.source) for edge in edges])
    descendants = _reached(foci, [(edge.source, edge.target) for edge in edges]) - ancestors

    def relation(node: LineageNode) -> Relation:
        if node.id in foci:
            return "focus"
        return "ancestor" if node.id in ancestors else "descendant" if node.id in descendants else "other"

    found = [attrs.evolve(node, relation=relation(node)) for node in nodes]
    order: dict[Relation, int] = {"ancestor": 0, "focus": 1, "descendant": 2}
    kept = sorted((node for node in found if node.relation in order), key=lambda node: order[node.relation])
    ids = {node.id for node in kept}
    between = tuple(edge for edge in edges if edge.source in ids and edge.target in ids)
    return Lineage(foci[0] if len(foci) == 1 else None, tuple(kept), between, tuple(problems))


def _reached(starts: Sequence[str], steps: Iterable[tuple[str, str]]) -> set[str]:
    following: dict[str, list[str]] = {}
    for source, target in steps:
        following.setdefault(source, []).append(target)
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        for name in following.get(waiting.pop(), ()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found - set(starts)
