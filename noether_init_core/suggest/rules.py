"""Suggested rules, few and general: made of pairs of layers, with their reasons and doubts, and as text to paste."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from noether_init_core.messages import listed, one_line, yaml_line
from noether_init_core.suggest.layer_names import Layer, filled
from noether_init_core.suggest.pairs import Pair
from noether_init_core.surgery.plan import LoadPlan
from noether_init_core.surgery.steps import Concat, Reshape, Shape, Split, Stack, Step, Transpose, Unstack, written
from noether_init_core.surgery.transforms import Rule, Transforms

_MOST_SHOWN = 20
# no model has longer or deeper names, and what looks at names takes them apart
LONGEST, DEEPEST = 256, 32


@attrs.frozen
class SuggestedRule:
    """One rule.

    Attributes:
        rule: As ``Transforms`` takes it.
        config: As a config writes it, plain data.
        reason: Why it is there, where that is not plain.
        doubts: Why it may be wrong; none for a rule that names and shapes tell.
    """

    rule: Rule
    config: Mapping[str, Any]
    reason: str = ""
    doubts: tuple[str, ...] = ()

    @property
    def is_sure(self) -> bool:
        return not self.doubts

    def to_yaml(self) -> str:
        """The rule on one line, without the dash."""
        return yaml_line(dict(self.config))


@attrs.frozen
class Unsure:
    """Something that names and shapes do not tell.

    Attributes:
        what: In short: ``first. -> alpha.``.
        reason: Why it is not certain.
        alternatives: What else may be meant, in words or as rules.
        sources: Names of the file.
        targets: Names of the model; what a rule does for them may be wrong.
        is_suggested: Whether a rule does it; otherwise it is left to the reader.
    """

    what: str
    reason: str
    alternatives: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    is_suggested: bool = True


@attrs.frozen
class Suggestion:
    """Rules, what they would do, and how far they are certain.

    Attributes:
        rules: In the order in which they have to stand.
        source_root: What to write for ``source_root``; empty for nothing.
        target_root: The same for ``target_root``.
        plan: What these rules give, by ``plan_load``.
        unsure: What names and shapes do not tell. Entries of the model that are in none of them are certain.
        unmatched_sources: Names of the file that nothing would use.
        unmatched_targets: Names of the model that would get nothing, and that no rule keeps.
    """

    rules: tuple[SuggestedRule, ...]
    source_root: str
    target_root: str
    plan: LoadPlan
    unsure: tuple[Unsure, ...] = ()
    unmatched_sources: tuple[str, ...] = ()
    unmatched_targets: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Share of the elements of the model's parameters that would come from the file, from 0 to 1."""
        return self.plan.coverage()

    @property
    def is_fine(self) -> bool:
        """Whether the plan with these rules has no problem, and no name was too long for it."""
        return self.plan.is_fine and not any(map(is_too_long, (*self.unmatched_sources, *self.unmatched_targets)))

    @property
    def is_sure(self) -> bool:
        """Whether names and shapes tell everything."""
        return not self.unsure

    @property
    def transforms(self) -> Transforms:
        """The rules, ready for ``plan_load``."""
        return Transforms([one.rule for one in self.rules], source_root=self.source_root, target_root=self.target_root)

    def config(self) -> dict[str, Any]:
        """The fields for the config of an initializer: ``transforms``, and the roots where they are needed."""
        roots = {"source_root": self.source_root, "target_root": self.target_root}
        fields: dict[str, Any] = {key: root for key, root in roots.items() if root}
        return {**fields, "transforms": [dict(one.config) for one in self.rules]} if self.rules else fields

    def to_yaml(self) -> str:
        """``config`` as text to paste, each rule on a line, with reasons and doubts as comments."""
        lines = [f"{key}: {yaml_line(root)}" for key, root in self.config().items() if key != "transforms"]
        if self.rules:
            lines.append("transforms:")
        for one in self.rules:
            lines += [f"  # unsure: {one_line(doubt)}" for doubt in one.doubts]
            lines += [f"  # {one_line(one.reason)}"] if one.reason else []
            lines.append(f"  - {one.to_yaml()}")
        return "".join(f"{line}\n" for line in lines)

    def __str__(self) -> str:
        said = [self.to_yaml() or "# no rule is needed\n"]
        said.append(f"coverage {100 * self.coverage:.1f} %, {'no problem' if self.is_fine else 'not yet fine:'}\n")
        said += [f"  {one_line(problem.message)}\n" for problem in self.plan.problems]
        for one in self.unsure[:_MOST_SHOWN]:
            said.append(one_line(f"unsure: {one.what}: {one.reason}") + "\n")
            said += [f"  or: {other}\n" for other in one.alternatives]
        if len(self.unsure) > _MOST_SHOWN:
            said.append(f"unsure: and {len(self.unsure) - _MOST_SHOWN} more\n")
        for side, names in (("file", self.unmatched_sources), ("model", self.unmatched_targets)):
            if names:
                said.append(f"unmatched in the {side}: {listed(one_line(name, 200) for name in names)}\n")
        return "".join(said).rstrip("\n")


def is_too_long(name: str) -> bool:
    """Whether a name is longer or deeper than rules are sought for."""
    return len(name) > LONGEST or name.count(".") >= DEEPEST


_NUMBER = re.compile("[0-9]+")
# captures for numbers within a segment; those of blocks are named from i on
_LETTERS = "nmxyz"

Segments = tuple[str, ...]


@attrs.frozen(eq=False)
class Draft:
    """A rule as a config writes it, with the pairs that it is for and why it is there."""

    config: Mapping[str, Any]
    pairs: tuple[Pair, ...] = ()
    reason: str = ""
    doubts: tuple[str, ...] = ()

    @property
    def all_doubts(self) -> tuple[str, ...]:
        """Its own and those of its pairs."""
        return tuple(dict.fromkeys((*self.doubts, *(doubt for pair in self.pairs for doubt in pair.doubts))))


@attrs.frozen(eq=False)
class _Move:
    """One tensor, or one of every block, under another name. ``flip`` is None where transposing changes nothing."""

    source: Segments
    target: Segments
    flip: bool | None
    pair: Pair


def drafts_of(pairs: Sequence[Pair], *, general: bool = True) -> list[Draft]:
    """Rules for the pairs, in an order that works: what needs steps first, then the special before the general.

    With ``general`` a rule may also take names that an earlier rule has taken already, so there are fewer of them.
    """
    drafts: list[Draft] = []
    moves: list[_Move] = []
    for pair in pairs:
        if pair.way == "rename":
            moves += _moves(pair)
        else:
            drafts += _special(pair)
    return drafts + list(_cover((), moves, general=general, forced=False))


def merged(drafts: Sequence[Draft]) -> list[Draft]:
    """The rules, those that differ only in a number within a segment as one. It may take more: the plan has to tell."""
    groups: dict[tuple[Any, ...], list[Draft]] = {}
    for draft in drafts:
        groups.setdefault(_without_number(draft) or (id(draft),), []).append(draft)
    found = []
    for key, group in groups.items():
        if len(group) == 1:
            found.append(group[0])
            continue
        names = {field: name for field, name in zip(("from", "to"), key[:2], strict=True) if name is not None}
        pairs = tuple({id(pair): pair for draft in group for pair in draft.pairs}.values())
        found.append(attrs.evolve(group[0], config={**group[0].config, **names}, pairs=pairs))
    return found


def _without_number(draft: Draft) -> tuple[Any, ...] | None:
    """What rules have in common that differ only in a number: a capture stands for the last that both names have."""
    source, target = draft.config.get("from"), draft.config.get("to")
    if not isinstance(source, str) or not isinstance(target, str | None):
        return None
    letter = next((one for one in _LETTERS if f"<{one}" not in source), None)
    for number in reversed(list(_NUMBER.finditer(source))):
        its = [] if target is None else [one for one in _NUMBER.finditer(target) if one[0] == number[0]]
        if letter is None or not _is_within(source, number) or (target is not None and len(its) != 1):
            continue
        if its and not _is_within(target or "", its[0]):
            continue
        names = [
            None if text is None else f"{text[: at.start()]}<{letter}>{text[at.end() :]}"
            for text, at in ((source, number), (target, its[0] if its else number))
        ]
        return (*names, yaml_line(draft.config.get("do")), draft.reason, draft.all_doubts)
    return None


def _is_within(name: str, number: re.Match[str]) -> bool:
    """Whether a number is a part of a segment, behind letters, and not beside a capture."""
    before, behind = name[: number.start()][-1:], name[number.end() :][:1]
    return before not in ("", ".", ">") and behind != "<"


def _moves(pair: Pair) -> Iterator[_Move]:
    source, target = pair.sources[0], pair.targets[0]
    for leaf in pair.leaves:
        is_matrix = any(len(source.shapes[index].get(leaf, ())) > 1 for index in pair.indices)
        flip = pair.flip == "yes" if is_matrix else None
        yield _Move(tuple(source.name(leaf).split(".")), tuple(target.name(leaf).split(".")), flip, pair)


def _captures(segments: Segments) -> set[str]:
    return {found for segment in segments for found in re.findall("<.>", segment)}


def _cover(prefix: Segments, moves: Sequence[_Move], *, general: bool, forced: bool) -> Iterator[Draft]:
    """Rules for all moves below ``prefix``; with ``forced`` also for those that change nothing."""
    at = len(prefix)
    ways: Counter[tuple[Segments, bool]] = Counter()
    for move in moves:
        below = move.source[at:]
        if below and move.target[len(move.target) - len(below) :] == below:
            base = move.target[: len(move.target) - len(below)]
            if _captures(base) == _captures(prefix):
                ways.update((base, flip) for flip in ((False, True) if move.flip is None else (move.flip,)))
    if ways:
        (base, flip), count = min(ways.items(), key=lambda way: (-way[1], way[0][1], len(way[0][0]), way[0][0]))
        others = [move for move in moves if not _agrees(move, at, base, flip)]
        is_plain = base == prefix and not flip
        if not others and is_plain and not forced:
            return
        has_name = bool(prefix or base)
        is_most = general and not is_plain and count > 2 * len(others) and count > 1
        if has_name and (not others or is_most):
            yield from _by_child(prefix, others, general=general, forced=True)
            yield _draft(prefix, base, flip, [move for move in moves if _agrees(move, at, base, flip)])
            return
    yield from _by_child(prefix, moves, general=general, forced=forced)


def _agrees(move: _Move, at: int, base: Segments, flip: bool) -> bool:
    below = move.source[at:]
    return bool(below) and move.target == base + below and move.flip in (None, flip)


def _by_child(prefix: Segments, moves: Sequence[_Move], *, general: bool, forced: bool) -> Iterator[Draft]:
    children: dict[str, list[_Move]] = defaultdict(list)
    for move in moves:
        if len(move.source) == len(prefix):
            if move.source != move.target or move.flip or forced:
                yield _draft(move.source, move.target, bool(move.flip), [move], whole=True)
        else:
            children[move.source[len(prefix)]].append(move)
    # a capture would take the names that are written out
    for child, below in sorted(children.items(), key=lambda item: "<" in item[0]):
        yield from _cover((*prefix, child), below, general=general, forced=forced)


def _draft(source: Segments, target: Segments, flip: bool, moves: Sequence[_Move], *, whole: bool = False) -> Draft:
    tail = () if whole else ("<rest..>",) if not source or not target else ("",)
    config: dict[str, Any] = {"from": ".".join((*source, *tail))}
    if target != source:
        config["to"] = ".".join((*target, *tail))
    pairs = tuple({id(move.pair): move.pair for move in moves}.values())
    steps: tuple[Step, ...] = (Transpose(),) if flip else ()
    why = next((pair.why for pair in pairs if flip and pair.why), "")
    return Draft(_with_steps(config, steps), pairs, why)


def _special(pair: Pair) -> Iterator[Draft]:
    """The rules of a pair that is more than a rename."""
    one = pair.sources[0]
    if pair.way in ("split", "concat"):
        for leaves in _leaf_groups(pair):
            yield _moved(pair, leaves, _fused_steps(pair))
    elif pair.way in ("stack", "unstack"):
        step = Stack(pair.dim) if pair.way == "stack" else Unstack(pair.dim)
        for leaf in pair.leaves:
            names: list[list[str]] = [
                [layer.name(leaf)] if "<" not in layer.template else [layer.name(leaf, at) for at in pair.indices]
                for layer in pair.layers
            ]
            yield _written(pair, names[0], names[1], (step,))
    else:
        for leaf in pair.leaves:
            shapes = {pair.targets[0].shapes[index][leaf] for index in pair.indices}
            if pair.grid is not None:
                yield _moved(pair, leaf, (pair.grid,))
            elif len(shapes) == 1:
                is_same = all(one.shapes[index][leaf] in shapes for index in pair.indices)
                yield _moved(pair, leaf, () if is_same else (Reshape(shapes.pop()),))
            else:
                for index in pair.indices:
                    shape: Shape = pair.targets[0].shapes[index][leaf]
                    names = [[filled(layer.name(leaf), index)] for layer in pair.layers]
                    yield _written(pair, names[0], names[1], (Reshape(shape),))


def _leaf_groups(pair: Pair) -> list[str]:
    """``<leaf>`` for all leaves at once, where every layer writes them alike and has no others."""
    leaves = pair.leaves
    written = {frozenset(layer.leaves.items()) for layer in pair.layers}
    return ["<leaf>"] if len(written) == 1 and len(leaves) > 1 else leaves


def _moved(pair: Pair, leaf: str, steps: tuple[Step, ...]) -> Draft:
    def names(layers: Sequence[Layer]) -> list[str]:
        return [layer.template + leaf if leaf == "<leaf>" else layer.name(leaf) for layer in layers]

    return _written(pair, names(pair.sources), names(pair.targets), steps)


def _written(pair: Pair, sources: list[str], targets: list[str], steps: tuple[Step, ...]) -> Draft:
    config: dict[str, Any] = {"from": sources if len(sources) > 1 else sources[0]}
    if targets != sources:
        config["to"] = targets if len(targets) > 1 else targets[0]
    return Draft(_with_steps(config, steps), (pair,), pair.why)


def _fused_steps(pair: Pair) -> tuple[Step, ...]:
    flip = pair.flip == "yes"
    parts = pair.targets if pair.way == "split" else pair.sources
    if pair.way == "split":
        shapes = [next(iter(part.shapes.values())) for part in parts]
        rows = [
            its["weight"][_row_dim(pair)] if len(its.get("weight", ())) > 1 else min(its.values())[0] for its in shapes
        ]
        uneven = tuple(rows) if len(set(rows)) > 1 else None
        if flip and pair.dim == -1:
            return (Transpose(), Split(0, uneven))
        return (Split(pair.dim, uneven), Transpose()) if flip else (Split(pair.dim, uneven),)
    if flip and pair.dim == -1:
        return (Concat(0), Transpose())
    return (Transpose(), Concat(0)) if flip else (Concat(pair.dim),)


def _row_dim(pair: Pair) -> int:
    """Which dimension of the weights of the parts is the one that is put together."""
    return (1 if pair.flip == "yes" else 0) if pair.dim == 0 else (0 if pair.flip == "yes" else 1)


def _with_steps(config: dict[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    if steps:
        config["do"] = [written(step) for step in steps]
    return config
