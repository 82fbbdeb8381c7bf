"""Rules on names: which entry of a file becomes which entry of a model. Pure.

``Transforms`` are the rules of a config. Each ``from`` is a name in the file and each ``to`` a name in the model; no
rule sees the result of another. So swaps work, and two sources for one target are an error. ``NoetherSurgery`` are the
four fields of Noether, with its results. ``match`` decides, and ``unmatched`` lists rules that matched in no file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs

from noether_init_core.messages import listed, yaml_line
from noether_init_core.surgery.patterns import NamePattern, PatternSet, lacks_dot, near, repaired
from noether_init_core.surgery.plan import Problem
from noether_init_core.surgery.steps import Step
from noether_init_core.surgery.wrapper_rules import names_wrapper, partly_matched
from noether_init_core.surgery.wrappers import WRAPPERS, Forms, bare_names, below, forms_of, paired


@attrs.frozen
class Taken:
    """The source of one entry of a model.

    ``steps`` are applied to the tensors of ``sources`` and give ``parts`` tensors, of which the entry takes number
    ``part``. ``rule`` is None if the name is the same on both sides.
    """

    sources: tuple[str, ...]
    rule: str | None = None
    steps: tuple[Step, ...] = ()
    part: int = 0
    parts: int = 1

    def shown(self) -> str:
        return f"{', '.join(self.sources)} by {self.rule or 'its name'}"


@attrs.define
class NameMatch:
    """The decisions of rules for one file and one model.

    Attributes:
        moves: Name in the model -> its source.
        removed: Name in the file that a rule drops -> rule.
        kept: Name in the model that keeps its present value -> rule.
        unused_kept: Name in the file whose target keeps its own value -> that target.
        overwritten: (name in the file that loses, name that wins, their common target, rule).
        matched: Rules that matched at least one name.
        problems: Why the rules cannot be applied, without the name of the model.
        outside: Names of the file outside ``source_root``.
        astray: Name in the file -> (its new name, which is not in the model; the rule, or empty).
        shadowed: Rule -> earlier rules that took names which it would have matched.
        written: Name -> the name in rules, below roots and without wrappers, if that differs.
    """

    moves: dict[str, Taken] = attrs.Factory(dict)
    removed: dict[str, str] = attrs.Factory(dict)
    kept: dict[str, str] = attrs.Factory(dict)
    unused_kept: dict[str, str] = attrs.Factory(dict)
    overwritten: tuple[tuple[str, str, str, str], ...] = ()
    matched: set[str] = attrs.Factory(set)
    problems: tuple[Problem, ...] = ()
    outside: frozenset[str] = frozenset()
    astray: dict[str, tuple[str, str]] = attrs.Factory(dict)
    shadowed: defaultdict[str, set[str]] = attrs.field(factory=lambda: defaultdict(set))
    written: dict[str, str] = attrs.Factory(dict)

    def give(self, name: str, taken: Taken, shown: str = "") -> None:
        """Let ``name``, ``shown`` in messages, come from ``taken``, unless it keeps its value or has one already."""
        if name in self.kept:
            self.unused_kept.update(dict.fromkeys(taken.sources, name))
            return
        other = self.moves.setdefault(name, taken)
        if other is not taken:
            message = (
                f"{shown or name} would be loaded twice: from {other.shown()} and from {taken.shown()}. "
                "Next: drop one of them"
            )
            self.problems += (Problem("two-sources", message, "", (*other.sources, *taken.sources)),)

    def pair(
        self,
        sources: Mapping[str, Forms],
        targets: Mapping[str, Forms],
        in_rules: tuple[Mapping[str, str], Mapping[str, str]],
    ) -> set[str]:
        """Pair names of the file and the model that no rule took; prefixes such as ``module.`` may differ.

        Each pair goes to ``give``. A name that can be read in several ways becomes a problem. Returns the names
        in the file that were paired or became a problem. ``in_rules``: name as rules write it -> name, of the file and
        of the model.
        """
        found = paired(sources, targets, self.moves)
        for target, source in found.moves.items():
            is_same = sources[source][1] == targets[target][1]
            how = "the same name below the roots" if is_same else "prefix of a wrapper"
            self.give(target, Taken((source,), None if target == source else how), targets[target][2] or target)
        if found.unclear:
            readings = [
                f"{source} may be {' or '.join(choices if len(choices) > 1 else (*choices, 'no entry of the model'))}"
                for source, choices in found.unclear
            ]
            source, choices = found.unclear[0]
            # rules do not see the prefix that all names have
            of_file, of_model = ({name: written for written, name in names.items()} for names in in_rules)
            rules = " or ".join(yaml_line({"from": of_file[source], "to": of_model[target]}) for target in choices)
            message = (
                f"{listed(readings, 3, separator='; ')}: prefixes of wrappers (module. and the like) can be read in "
                f"several ways. Next: choose, for example under transforms: {rules}"
            )
            names = dict.fromkeys(name for source, choices in found.unclear for name in (source, *choices))
            self.problems += (Problem("unclear-prefix", message, "", tuple(names)),)
        return {*found.moves.values(), *(source for source, _choices in found.unclear)}


@attrs.frozen
class Rename:
    """Replaces every occurrence of ``src`` in a name by ``dst``."""

    src: str
    dst: str


@attrs.frozen
class NoetherSurgery:
    """The four surgery fields of Noether, in its order, on substrings, with its results.

    ``keys_to_remove`` are whole names. Each rename of ``patterns_to_rename`` sees the result of the one before, and a
    name that becomes another's replaces it. ``patterns_to_instantiate`` are names of the model that keep their present
    value.
    """

    keys_to_remove: tuple[str, ...] = ()
    patterns_to_remove: tuple[str, ...] = ()
    patterns_to_rename: tuple[Rename, ...] = ()
    patterns_to_instantiate: tuple[str, ...] = ()
    unmatched_is_error: bool = False

    def match(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> NameMatch:
        """Decide as Noether does; see the class.

        Names that no rule changed are taken as they are, or despite the prefixes of wrappers: ``wrappers.paired``.
        """
        match = NameMatch()
        current: dict[str, str] = {name: name for name in sources}
        last_rule: dict[str, str] = {}
        for key in self.keys_to_remove:
            if key in current:
                match.removed[current.pop(key)] = rule = f"keys_to_remove: {key}"
                match.matched.add(rule)
        for pattern in self.patterns_to_remove:
            rule = f"patterns_to_remove: {pattern}"
            for name in [name for name in current if pattern in name]:
                match.removed[current.pop(name)] = rule
                match.matched.add(rule)
        for rename in self.patterns_to_rename:
            rule = f"patterns_to_rename: {rename.src} -> {rename.dst}"
            for name in [name for name in current if rename.src in name]:
                source = current.pop(name)
                match.matched.add(rule)
                target = name.replace(rename.src, rename.dst)
                if target in current:
                    match.overwritten += ((current[target], source, target, rule),)
                    match.removed[current[target]] = f"{rule} (overwritten by {source})"
                    last_rule.pop(current[target], None)
                current[target] = source
                last_rule[source] = rule
        for pattern in self.patterns_to_instantiate:
            rule = f"patterns_to_instantiate: {pattern}"
            for name in targets:
                if pattern in name:
                    match.kept.setdefault(name, rule)
                    match.matched.add(rule)
        for name in targets:
            if current.get(name) in last_rule:
                match.give(name, Taken((current[name],), last_rule[current[name]]))
        of_file, of_model = forms_of(sources), forms_of(targets)
        match.pair(
            {name: of_file[name] for name, source in current.items() if source not in last_rule},
            {name: forms for name, forms in of_model.items() if name not in match.moves},
            (bare_names(sources), bare_names(targets)),
        )
        match.astray = {
            source: (name, last_rule[source])
            for name, source in current.items()
            if source in last_rule and name not in of_model
        }
        return match

    def unmatched(
        self, matches: Sequence[NameMatch], sources: Sequence[str], targets: Sequence[str]
    ) -> list[tuple[str, bool]]:
        """Messages about rules that matched in no file, and whether each is an error.

        As in ``docs/noether-differences.md``, an absent key is an error and an unmatched pattern a warning.
        """
        matched = set[str]().union(*(match.matched for match in matches))
        messages = []
        for key in self.keys_to_remove:
            if f"keys_to_remove: {key}" not in matched:
                close = ", ".join(near(key, sources))
                messages.append(
                    (f"keys_to_remove: {key} not found in the file" + (f"; near: {close}" if close else ""), True)
                )
        patterns = [
            *((f"patterns_to_remove: {pattern}", "") for pattern in self.patterns_to_remove),
            *((f"patterns_to_instantiate: {pattern}", "") for pattern in self.patterns_to_instantiate),
            *((f"patterns_to_rename: {rename.src}", f" -> {rename.dst}") for rename in self.patterns_to_rename),
        ]
        unmatched = [rule for rule, rest in patterns if rule + rest not in matched]
        return messages + [(f"{rule} matches nothing", self.unmatched_is_error) for rule in unmatched]


@attrs.frozen
class Rule:
    """One rule; ``label`` names it in messages.

    Attributes:
        field: ``from``: names of the file that ``patterns`` match become ``targets`` of the model, by ``steps``;
            ``drop``: they are ignored; ``only``: all others are ignored; ``keep_model``: names of the model keep their
            present value.
        optional: Whether a ``from`` may match nothing.
    """

    field: Literal["from", "drop", "keep_model", "only"]
    patterns: tuple[NamePattern, ...]
    label: str = ""
    targets: tuple[NamePattern, ...] = ()
    steps: tuple[Step, ...] = ()
    optional: bool = False


@attrs.frozen
class _Group:
    """Names of the file that one rule combines: number of the source in the rule -> name."""

    rule: Rule
    captures: Mapping[str, str]
    names: dict[int, str] = attrs.Factory(dict)


class Transforms:
    """All rules of one initializer, with the roots that they are relative to. May be used for any number of models.

    Args:
        rules: In the order of the config.
        source_root: Names of the file outside it are reported as ``outside``; empty for all.
        target_root: Names of the model outside it keep their value; empty for all.
        warns: Whether a rule that matched nothing is a warning instead of an error.
    """

    def __init__(
        self, rules: Sequence[Rule] = (), *, source_root: str = "", target_root: str = "", warns: bool = False
    ) -> None:
        self.rules = tuple(rules)
        self.source_root = _prefix(source_root)
        self.target_root = _prefix(target_root)
        self.given = {"source_root": source_root, "target_root": target_root}
        self._warns = warns
        self._takers, self._taking = _asked(self.rules, "from", "drop")
        self._only_rules, self._only = _asked(self.rules, "only")
        self._keep_rules, self._keep = _asked(self.rules, "keep_model")
        self._of_wrappers = [rule for rule in self.rules if len(rule.patterns) == 1 and names_wrapper(rule.patterns[0])]

    def match(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> NameMatch:
        """Decide for one file and one model."""
        return _Matching(self, sources, targets).run()

    def unmatched(
        self, matches: Sequence[NameMatch], sources: Sequence[str], targets: Sequence[str]
    ) -> list[tuple[str, bool]]:
        """Rules that matched in none of the files: a message with a likely reason, and whether it is an error."""
        matched = set[str]().union(*(match.matched for match in matches))
        messages = []
        for rule in self.rules:
            if rule.label in matched or rule.optional:
                continue
            taken = sorted({label for match in matches for label in match.shadowed.get(rule.label, ())})
            hint = f": earlier rules take its names: {', '.join(taken)}. Next: move it up, or remove it"
            if not taken:
                file = [name.removeprefix(self.source_root) for name in sources]
                hint = self._hint(rule, file, list(below(self.target_root, bare_names(targets))))
            messages.append((f"{rule.label} matches nothing{hint}", not self._warns))
        return messages

    @staticmethod
    def _hint(rule: Rule, file: Sequence[str], model: Sequence[str]) -> str:
        """Why a rule may have matched nothing, judged by names below the roots; empty if no reason is found."""
        texts = [pattern.text for pattern in rule.patterns]
        if rule.field == "keep_model":
            dotted = next((text for text in texts if lacks_dot(text, model)), None)
            if dotted is not None:
                return f". Next: keep_model: {dotted}. (a trailing dot means everything below)"
            similar = near(texts[0], model, most=1)
            return f"; the model has {similar[0]}" if similar else "; it matches names of the model, not of the file"
        if not WRAPPERS.isdisjoint(texts[0].split(".")):
            return "; prefixes of wrappers (module., _orig_mod., _fsdp_wrapped_module.) are removed before rules match"
        if lacks_dot(texts[0], file):
            return f". Next: {rule.field}: {texts[0]}. (a trailing dot means everything below)"
        similar = near(texts[0], file, most=1)
        if not similar:
            return ""
        better = repaired(rule.patterns[0], similar[0])
        return f"; the file has {similar[0]}" + (f". Next: from: {better}" if better else "")


def _asked(rules: Sequence[Rule], *fields: str) -> tuple[list[tuple[Rule, int]], PatternSet]:
    """Rule and number of each pattern of the rules of some fields, and all of them as one set."""
    asked = [(rule, index) for rule in rules if rule.field in fields for index in range(len(rule.patterns))]
    return asked, PatternSet(rule.patterns[index].expression for rule, index in asked)


class _Matching:
    """The rules applied to one file and one model. Names in it are bare: without roots and prefixes of wrappers."""

    def __init__(self, transforms: Transforms, sources: tuple[str, ...], targets: tuple[str, ...]) -> None:
        self._rules = transforms
        self._targets = below(transforms.target_root, bare_names(targets))
        self._sources = below(transforms.source_root, bare_names(sources))
        self._forms = forms_of(sources, transforms.source_root), forms_of(targets, transforms.target_root)
        reached = set(self._targets.values())
        self._untouched = [name for name in targets if name not in reached]
        self._match = NameMatch(
            outside=frozenset(sources).difference(self._sources.values()),
            written={name: bare for bare, name in (*self._targets.items(), *self._sources.items()) if name != bare},
        )

    def run(self) -> NameMatch:
        match, keep = self._match, self._rules._keep_rules
        match.problems += tuple(self._ignored_roots())
        for bare, name in self._targets.items() if keep else ():
            for number in self._rules._keep.matching(bare):
                label = keep[number][0].label
                match.matched.add(label)
                match.kept.setdefault(name, label)
        groups, plain = self._choose()
        match.problems += tuple(self._partly_matched(plain))
        for group in groups:
            self._move(group)
        self._take_by_name(plain)
        for name in self._untouched:
            match.kept.setdefault(name, f"outside target_root {self._rules.target_root}")
        return match

    def _ignored_roots(self) -> Iterator[Problem]:
        """Roots that are the prefix of a wrapper, and so are ignored, although they would leave names out."""
        for field, names in zip(("source_root", "target_root"), self._forms, strict=True):
            root = ".".join(filter(None, self._rules.given[field].split(".")))
            inside = [name for name in names if name.startswith(f"{root}.")] if root and not _prefix(root) else []
            if 0 < len(inside) < len(names):
                message = (
                    f"{field}: {root} is the prefix of a wrapper and is ignored, but {len(inside)} of {len(names)} "
                    f"names begin with it. Next: leave {field} out, and drop or rename names by rules"
                )
                yield Problem("unclear-prefix", message, "", tuple(inside[:3]))

    def _partly_matched(self, plain: Iterable[str]) -> Iterator[Problem]:
        match, of_file, of_model = self._match, *self._forms
        for rule in self._rules._of_wrappers:
            if rule.label not in match.matched:
                continue
            if rule.field == "keep_model":
                left = [bare for bare, name in self._targets.items() if name not in match.kept]
                yield from partly_matched(rule, self._targets, of_model, left)
            else:
                by_only = self._rules._only_rules[0][0].label if rule.field == "only" else ""
                left = [bare for bare, name in self._sources.items() if match.removed.get(name) == by_only]
                yield from partly_matched(rule, self._sources, of_file, left if by_only else plain)

    def _take_by_name(self, plain: Mapping[str, str]) -> None:
        """Names that no rule takes."""
        of_file, of_model = self._forms
        reached = {name: of_model[name] for name in self._targets.values()}
        in_rules = self._sources, self._targets
        decided = self._match.pair({name: of_file[name] for name in plain.values()}, reached, in_rules)
        for bare, name in plain.items():
            if name not in decided:
                self._match.astray.setdefault(name, (self._rules.target_root + bare, ""))

    def _choose(self) -> tuple[Iterable[_Group], dict[str, str]]:
        """For each name the first rule that takes it: groups of one rule and equal captures; and the other names."""
        groups: dict[tuple[Any, ...], _Group] = {}
        plain: dict[str, str] = {}
        match, takers, matching = self._match, self._rules._takers, self._rules._taking.matching
        only = self._rules._only_rules
        for bare, name in self._sources.items():
            if only:
                allowed = self._rules._only.matching(bare)
                match.matched.update(only[number][0].label for number in allowed)
                if not allowed:
                    match.removed[name] = only[0][0].label
                    continue
            hits = matching(bare)
            if not hits:
                plain[bare] = name
                continue
            rule, index = takers[hits[0]]
            for other in hits[1:] if len(hits) > 1 else ():
                later = takers[other][0]
                if later is not rule:
                    match.shadowed[later.label].add(rule.label)
            match.matched.add(rule.label)
            if rule.field == "drop":
                match.removed[name] = rule.label
                continue
            captures = rule.patterns[index].match(bare)
            if captures is None:
                raise AssertionError(
                    f"{rule.patterns[index].text}: RE2 matches {bare}, and the parsed pattern does not"
                )
            key = (bare,) if len(rule.patterns) == 1 else (id(rule), *sorted(captures.items()))
            groups.setdefault(key, _Group(rule, captures)).names[index] = bare
        return groups.values(), plain

    def _move(self, group: _Group) -> None:
        rule, names = group.rule, group.names
        if len(names) < len(rule.patterns):
            have = ", ".join(names[index] for index in sorted(names))
            lacking = (pattern for index, pattern in enumerate(rule.patterns) if index not in names)
            absent = ", ".join(pattern.fill(group.captures) for pattern in lacking)
            message = f"{rule.label}: the file has {have}, and {absent} was not found"
            self._match.problems += (Problem("incomplete-group", message, "", tuple(names.values())),)
            return
        taken = tuple([self._sources[names[index]] for index in range(len(rule.patterns))])
        for part, target in enumerate(rule.targets):
            bare = target.fill(group.captures) if target.segments else names[0]
            self._put(bare, Taken(taken, rule.label, rule.steps, part, len(rule.targets)), rule.label)

    def _put(self, bare: str, taken: Taken, label: str) -> None:
        name = self._targets.get(bare)
        if name is not None:
            self._match.give(name, taken, bare)
            return
        for source in taken.sources:
            self._match.astray.setdefault(source, (self._rules.target_root + bare, label))


NameRules = NoetherSurgery | Transforms


def _prefix(root: str) -> str:
    """The root with its dot, without the prefixes of wrappers: those are removed before roots are compared."""
    segments = [segment for segment in root.split(".") if segment and segment not in WRAPPERS]
    return ".".join((*segments, "")) if segments else ""
