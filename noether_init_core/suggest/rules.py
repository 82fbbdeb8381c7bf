"""Suggested rules from pairs of layers, with reasons and doubts, and as YAML to paste."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from noether_init_core.config.source import TransformConfig, rule_of
from noether_init_core.messages import listed, one_line, yaml_field, yaml_line
from noether_init_core.suggest.pairs import Pair
from noether_init_core.surgery.advice import is_sayable
from noether_init_core.surgery.name_rules import Transforms
from noether_init_core.surgery.plan import LoadPlan
from noether_init_core.surgery.steps import Concat, Reshape, Split, Stack, Step, Transpose, Unstack, written

_MOST_SHOWN = 20


@attrs.frozen
class SuggestedRule:
    """One suggested rule.

    Attributes:
        config: The rule as a config writes it, plain data.
        reason: Why it is suggested, if that is not obvious.
        doubts: Why it may be wrong; empty if names and shapes decide.
    """

    config: Mapping[str, Any]
    reason: str = ""
    doubts: tuple[str, ...] = ()

    def to_yaml(self) -> str:
        """The rule on one line, without the dash."""
        return yaml_line(dict(self.config))


@attrs.frozen
class Unsure:
    """Something that names and shapes do not decide.

    Attributes:
        what: In short: ``first. -> alpha.``.
        reason: Why it is not certain.
        alternatives: Other possibilities, in words or as rules.
        sources: Names of the file.
        targets: Names of the model for which a rule may be wrong.
    """

    what: str
    reason: str
    alternatives: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


@attrs.frozen
class Suggestion:
    """Suggested rules, their plan, and their doubts. Returned by ``suggest()``.

    Attributes:
        rules: The rules, in the order that a config needs.
        plan: The plan with these rules, by ``plan_load``.
        unsure: What names and shapes do not decide. An entry of the model in none of them is certain.
        unmatched_sources: Names of the file that no entry uses.
        unmatched_targets: Names of the model that get no tensor, and that no rule keeps.
        on_missing: ``keep`` if a later initializer is expected to load what the file lacks; else None.
        source_root: The part of the file that the rules are relative to, if the config has to name it; else empty.
        place: The place of the initializer in its config: ``initializers.0, init.yaml:2``; empty if unknown.
        within: The roots of the config that the rules are relative to, such as ``source_root: model.``; may be empty.
    """

    rules: tuple[SuggestedRule, ...]
    plan: LoadPlan
    unsure: tuple[Unsure, ...] = ()
    unmatched_sources: tuple[str, ...] = ()
    unmatched_targets: tuple[str, ...] = ()
    on_missing: str | None = None
    within: str = ""
    place: str = ""
    source_root: str = ""

    @property
    def is_sure(self) -> bool:
        """Whether names and shapes decide everything."""
        return not self.unsure

    def config(self) -> dict[str, Any]:
        """The fields for the config: ``source_root``, ``transforms``, ``on_missing``, each only if it is needed."""
        fields: dict[str, Any] = {"source_root": self.source_root} if self.source_root else {}
        if self.rules:
            fields["transforms"] = [dict(one.config) for one in self.rules]
        return {**fields, "on_missing": self.on_missing} if self.on_missing else fields

    def to_yaml(self) -> str:
        """``config`` as YAML to paste, one rule per line, with reasons and doubts as comments."""
        lines = [yaml_field("source_root", self.source_root)] if self.source_root else []
        lines += ["transforms:"] if self.rules else []
        for one in self.rules:
            lines += [f"  # unsure: {one_line(doubt)}" for doubt in one.doubts]
            lines += [f"  # {one_line(one.reason)}"] if one.reason else []
            lines.append(f"  - {one.to_yaml()}")
        if self.on_missing:
            lines += ["# a later initializer loads what this file lacks", f"on_missing: {self.on_missing}"]
        return "".join(f"{line}\n" for line in lines)

    def __str__(self) -> str:
        """YAML to paste: the rules, then plan, doubts and unmatched names as comments."""
        state = "no problem" if self.plan.is_fine else "the plan has problems:"
        lines = [] if any("from" in one.config for one in self.rules) else self._without_moves()
        lines.append(f"coverage {100 * self.plan.coverage():.1f} %, {state}")
        lines += [f"  {one_line(problem.message, 1000)}" for problem in self.plan.problems]
        for one in self.unsure[:_MOST_SHOWN]:
            lines.append(f"unsure: {one_line(one.what)}: {one_line(one.reason)}")
            lines += [f"  or: {other}" for other in one.alternatives]
        if len(self.unsure) > _MOST_SHOWN:
            lines.append(f"unsure: and {len(self.unsure) - _MOST_SHOWN} more")
        for side, names in (("file", self.unmatched_sources), ("model", self.unmatched_targets)):
            if names:
                lines.append(f"unmatched in the {side}: {listed(one_line(name, 200) for name in names)}")
        return self.to_yaml() + "\n".join(f"# {one_line(line)}" for line in lines)

    def _without_moves(self) -> list[str]:
        """Comments for a suggestion without renames: no rule is needed, or none was found."""
        is_left = any(str(row.rule).startswith("on_missing:") for row in self.plan.rows)
        if self.plan.is_fine and (self.config() or not is_left or self.plan.coverage() == 1):
            return [] if self.config() else ["no rule is needed"]
        if any(one.code == "source-root" for one in self.plan.problems):
            return ["no rule was found: the file has nothing below source_root"]
        others = [one for one in self.plan.problems if one.code not in ("missing", "unexpected", "mismatch")]
        if not (self.unmatched_sources or self.unmatched_targets) and others:
            return ["rules on names do not solve the problems of the plan"]
        lines = ["no rule was found: names and shapes do not decide which entry becomes which"]
        if not (self.unmatched_sources or is_left):
            lines = ["no rename is needed: every entry of the file has its place in the model"]
        if self.unmatched_targets:
            # a name that no rule can match is not written as one
            target = next(filter(is_sayable, self.unmatched_targets), None)
            source = next(filter(is_sayable, self.unmatched_sources), None)
            moves = [{"from": source, "to": target}] if source and target else []
            keeps = [{"keep_model": target}] if target else []
            if moves or keeps:
                lines.append("Next: write the rules by hand, such as")
                lines += ["transforms:", f"  - {yaml_line((moves or keeps)[0])}"]
            if moves and keeps:
                lines += ["or, where the file has no such entry:", f"  - {yaml_line(keeps[0])}"]
        return lines


def transforms_of(rules: Sequence[SuggestedRule], source_root: str = "", target_root: str = "") -> Transforms:
    """The rules as ``plan_load`` takes them, relative to the roots."""
    configs = [TransformConfig.model_validate(one.config) for one in rules]
    made = [rule_of(config, f"transforms.{number}") for number, config in enumerate(configs)]
    return Transforms(made, source_root=source_root, target_root=target_root)


# a number within a segment, after letters, and not beside a capture
_NUMBER = re.compile("(?<=[^.>0-9])[0-9]+(?![0-9<])")
# captures for numbers within a segment; those of blocks are named from i on
_LETTERS = "nmxyz"

Segments = tuple[str, ...]


@attrs.frozen(eq=False)
class _Move:
    """A rename of one tensor, or of one tensor per block. ``flip`` is None if transposing changes nothing."""

    source: Segments
    target: Segments
    flip: bool | None
    pair: Pair


def rules_of(pairs: Sequence[Pair]) -> list[SuggestedRule]:
    """Rules for the pairs, in an order that works: those with steps first, then special before general ones.

    A rule may match names that an earlier rule took already, which needs fewer rules.
    """
    special = [rule for pair in pairs if pair.way != "rename" for rule in _special(pair)]
    moves = [move for pair in pairs if pair.way == "rename" for move in _moves(pair)]
    return special + list(_cover((), moves, forced=False))


def merged(rules: Sequence[SuggestedRule]) -> list[SuggestedRule]:
    """The rules, with those that differ only in a number within a segment as one. Check the plan: it may match more."""
    groups: dict[Hashable, list[SuggestedRule]] = {}
    for rule in rules:
        general = _without_number(rule)
        alike = yaml_line([general.config]), rule.reason, rule.doubts
        groups.setdefault(alike if general != rule else id(rule), []).append(rule)
    return [_without_number(one) if others else one for one, *others in groups.values()]


def _without_number(rule: SuggestedRule) -> SuggestedRule:
    """The rule with a capture for the last number within a segment of both names; unchanged without such a number."""
    source, target = rule.config.get("from"), rule.config.get("to")
    letter = next((one for one in _LETTERS if f"<{one}" not in str(source)), None)
    if letter is None or not isinstance(source, str) or not isinstance(target, str | None):
        return rule
    for number in reversed(list(_NUMBER.finditer(source))):
        its = [one for one in _NUMBER.finditer(target or "") if one[0] == number[0]]
        if target is None or len(its) == 1:
            found = [("from", number), *(("to", one) for one in its)]
            names = {key: f"{at.string[: at.start()]}<{letter}>{at.string[at.end() :]}" for key, at in found}
            return attrs.evolve(rule, config={**rule.config, **names})
    return rule


def _moves(pair: Pair) -> Iterator[_Move]:
    source, target = pair.sources[0], pair.targets[0]
    for leaf in pair.leaves:
        is_matrix = any(len(source.shapes[index].get(leaf, ())) > 1 for index in pair.indices)
        flip = pair.flip == "yes" if is_matrix else None
        yield _Move(tuple(source.name(leaf).split(".")), tuple(target.name(leaf).split(".")), flip, pair)


def _captures(segments: Segments) -> set[str]:
    return {found for segment in segments for found in re.findall("<.>", segment)}


def _cover(prefix: Segments, moves: Sequence[_Move], *, forced: bool) -> Iterator[SuggestedRule]:
    """Rules for all moves below ``prefix``; with ``forced``, also for moves that change nothing."""
    at = len(prefix)
    ways: Counter[tuple[Segments, bool]] = Counter()
    for move in moves:
        below = move.source[at:]
        base = move.target[: len(move.target) - len(below)]
        if below and base + below == move.target and _captures(base) == _captures(prefix):
            ways.update((base, flip) for flip in ((False, True) if move.flip is None else (move.flip,)))
    if ways:
        (base, flip), count = min(ways.items(), key=lambda way: (-way[1], way[0][1], len(way[0][0]), way[0][0]))
        agree: list[_Move] = []
        others: list[_Move] = []
        for move in moves:
            is_alike = move.source[at:] and move.target == base + move.source[at:] and move.flip in (None, flip)
            (agree if is_alike else others).append(move)
        is_plain = base == prefix and not flip
        if not others and is_plain and not forced:
            return
        is_most = not is_plain and count > 2 * len(others) and count > 1
        if (prefix or base) and (not others or is_most):
            yield from _by_child(prefix, others, forced=True)
            rest = "" if prefix and base else "<rest..>"
            yield _renamed((*prefix, rest), (*base, rest), flip, agree)
            return
    yield from _by_child(prefix, moves, forced=forced)


def _by_child(prefix: Segments, moves: Sequence[_Move], *, forced: bool) -> Iterator[SuggestedRule]:
    children: dict[str, list[_Move]] = defaultdict(list)
    for move in moves:
        if len(move.source) == len(prefix):
            if move.source != move.target or move.flip or forced:
                yield _renamed(move.source, move.target, bool(move.flip), [move])
        else:
            children[move.source[len(prefix)]].append(move)
    # a rule with a capture would also match the names that are written out, so it comes last
    for child, below in sorted(children.items(), key=lambda item: "<" in item[0]):
        yield from _cover((*prefix, child), below, forced=forced)


def _renamed(source: Segments, target: Segments, flip: bool, moves: Sequence[_Move]) -> SuggestedRule:
    pairs = {id(move.pair): move.pair for move in moves}.values()
    return _rule([".".join(source)], [".".join(target)], [Transpose()] if flip else [], *pairs)


def _rule(sources: list[str], targets: list[str], steps: Sequence[Step], *pairs: Pair) -> SuggestedRule:
    """A rule with its steps, and with the reasons and doubts of its pairs."""
    config: dict[str, Any] = {"from": sources if len(sources) > 1 else sources[0]}
    if targets != sources:
        config["to"] = targets if len(targets) > 1 else targets[0]
    if steps:
        config["do"] = [written(step) for step in steps]
    reasons = [pair.why for pair in pairs if pair.why and steps]
    doubts = dict.fromkeys(doubt for pair in pairs for doubt in pair.doubts)
    return SuggestedRule(config, reasons[0] if reasons else "", tuple(doubts))


def _special(pair: Pair) -> Iterator[SuggestedRule]:
    """The rules of a pair that needs more than a rename."""
    leaves = pair.leaves
    if pair.way in ("split", "concat"):
        # one rule for all leaves, if every layer has the same leaves under the same names
        is_alike = len(leaves) > 1 and len({frozenset(layer.leaves.items()) for layer in pair.layers}) == 1
        for leaf in ("<leaf>",) if is_alike else leaves:
            yield _rule(*_templates(pair, leaf), _fused_steps(pair), pair)
        return
    for leaf in leaves:
        if pair.way in ("stack", "unstack"):
            yield _rule(*pair.names(leaf)[0], [Stack() if pair.way == "stack" else Unstack()], pair)
        elif pair.grid is not None:
            yield _rule(*_templates(pair, leaf), [pair.grid], pair)
        else:
            # some blocks may not have this leaf
            having = [index for index in pair.indices if all(leaf in layer.shapes[index] for layer in pair.layers)]
            mine, its = ([layer.shapes[index][leaf] for index in having] for layer in pair.layers)
            if len(set(its)) == 1:
                yield _rule(*_templates(pair, leaf), [Reshape(its[0])] if set(mine) != set(its) else [], pair)
            else:
                for names, shape in zip(attrs.evolve(pair, indices=tuple(having)).names(leaf), its, strict=True):
                    yield _rule(*names, [Reshape(shape)], pair)


def _templates(pair: Pair, leaf: str) -> tuple[list[str], list[str]]:
    """Names of the file and the model with captures, for one leaf, or for all with a capture for it."""
    mine, its = ([one.template + one.leaves.get(leaf, leaf) for one in side] for side in (pair.sources, pair.targets))
    return mine, its


def _fused_steps(pair: Pair) -> tuple[Step, ...]:
    is_split, is_flipped = pair.way == "split", pair.flip == "yes"
    dim = 0 if is_flipped else pair.dim
    join: Step = Concat(dim)
    if is_split:
        shapes = [max(next(iter(part.shapes.values())).values(), key=len) for part in pair.targets]
        sizes = tuple((shape[::-1] if is_flipped else shape)[pair.dim] for shape in shapes)
        join = Split(dim, sizes if len(set(sizes)) > 1 else None)
    if not is_flipped:
        return (join,)
    return (Transpose(), join) if is_split == (pair.dim == -1) else (join, Transpose())
