"""Transforms: rules that say which names of the file become which names of the model, and what is done on the way.

Every ``from`` is a name in the file and every ``to`` a name in the model; no rule sees what another has made. So swaps
work, and two sources for one target are an error. Pure: names in, decisions out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import attrs

from noether_init_core.messages import yaml_line
from noether_init_core.surgery.name_rules import WRAPPERS, NameMatch, NameProblem, Taken, bare_names, near
from noether_init_core.surgery.patterns import NameGlob, NamePattern, PatternSet, parse_glob, parse_pattern, repaired
from noether_init_core.surgery.steps import Step


@attrs.frozen
class Move:
    """``sources`` of the file become ``targets`` of the model; ``label`` names the rule in messages."""

    sources: tuple[NamePattern, ...]
    targets: tuple[NamePattern, ...]
    steps: tuple[Step, ...] = ()
    optional: bool = False
    label: str = ""
    field: ClassVar[str] = "from"


@attrs.frozen
class _Globs:
    globs: tuple[NameGlob, ...]
    label: str = ""


class Drop(_Globs):
    """Names of the file that are ignored."""

    field: ClassVar[str] = "drop"


class KeepModel(_Globs):
    """Names of the model that keep their present value."""

    field: ClassVar[str] = "keep_model"


class Only(_Globs):
    """The names of the file that are considered at all."""

    field: ClassVar[str] = "only"


Rule = Move | Drop | KeepModel | Only


@attrs.frozen
class _Group:
    """Names of the file that one rule takes together: number of the source in the rule -> name."""

    rule: Move
    captures: Mapping[str, str]
    names: dict[int, str] = attrs.Factory(dict)


class Transforms:
    """All rules of one initializer, with the roots that they are relative to. It can be used for any number of models.

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
        self._warns = warns
        takers: list[tuple[int, int]] = []
        expressions: list[str] = []
        for number, rule in enumerate(self.rules):
            if isinstance(rule, Move | Drop):
                patterns: Sequence[NamePattern | NameGlob] = rule.sources if isinstance(rule, Move) else rule.globs
                takers += [(number, index) for index in range(len(patterns))]
                expressions += [pattern.expression for pattern in patterns]
        self._takers, self._taking = takers, PatternSet(expressions)
        self._only = _GlobRules(self.rules, Only)
        self._keep = _GlobRules(self.rules, KeepModel)

    def match(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> NameMatch:
        """Decide for one file and one model."""
        return _Matching(self, sources, targets).run()

    def unmatched(
        self, matches: Sequence[NameMatch], sources: Sequence[str], targets: Sequence[str]
    ) -> list[tuple[str, bool]]:
        """Rules that matched in none of the files, each with what they may have missed, and whether it is an error."""
        matched = frozenset[str]().union(*(match.matched for match in matches))
        messages = []
        for rule in self.rules:
            if rule.label in matched or (isinstance(rule, Move) and rule.optional):
                continue
            taken = sorted({label for match in matches for label in match.shadowed.get(rule.label, ())})
            hint = f": what it would match is taken by {', '.join(taken)} before it. Next: move it up, or remove it"
            if not taken:
                file = [name.removeprefix(self.source_root) for name in sources]
                hint = self._hint(rule, file, list(_below(self.target_root, bare_names(targets))))
            messages.append((f"{rule.label} matches nothing{hint}", not self._warns))
        return messages

    @staticmethod
    def _hint(rule: Rule, file: Sequence[str], model: Sequence[str]) -> str:
        """What a rule that matched nothing may have missed, among names below the roots; empty where nothing tells."""
        texts = [pattern.text for pattern in (rule.sources if isinstance(rule, Move) else rule.globs)]
        side = model if isinstance(rule, KeepModel) else file
        if not isinstance(rule, KeepModel) and not WRAPPERS.isdisjoint(texts[0].split(".")):
            return "; prefixes of wrappers (module., _orig_mod., _fsdp_wrapped_module.) are gone before rules look"
        for text in texts if isinstance(rule, KeepModel) else texts[:1]:
            dotted = _with_dot(text)
            if dotted is not None and any(map(dotted.matching, side)):
                return f". Next: {rule.field}: {text}. (a trailing dot means everything below)"
        if isinstance(rule, Move) and _is_swapped(rule, file, model):
            swapped = {"from": _texts(rule.targets), "to": _texts(rule.sources)}
            return f"; from is a name in the file, to one in the model. Next: {yaml_line(swapped)}"
        similar = near(texts[0], side, most=1)
        if isinstance(rule, KeepModel):
            return f"; the model has {similar[0]}" if similar else "; it is about names of the model"
        if not similar:
            return ""
        better = repaired(rule.sources[0], similar[0]) if isinstance(rule, Move) else None
        return f"; the file says {similar[0]}" + (f". Next: from: {better}" if better else "")


@attrs.frozen(init=False)
class _GlobRules:
    """The rules of one class, and which of them match a name."""

    labels: list[str]
    patterns: PatternSet

    def __init__(self, rules: Sequence[Rule], kind: type[Drop | KeepModel | Only]) -> None:
        chosen = [(rule.label, glob) for rule in rules if isinstance(rule, kind) for glob in rule.globs]
        self.__attrs_init__([label for label, _ in chosen], PatternSet(glob.expression for _, glob in chosen))

    def matching(self, name: str) -> Sequence[str]:
        return [self.labels[number] for number in self.patterns.matching(name)] if self.labels else []


class _Matching:
    """The rules on one file and one model. Names are bare here: without roots and prefixes of wrappers."""

    def __init__(self, transforms: Transforms, sources: tuple[str, ...], targets: tuple[str, ...]) -> None:
        self._rules = transforms
        self._targets = _below(transforms.target_root, bare_names(targets))
        self._sources = _below(transforms.source_root, bare_names(sources))
        exact = {_cut(name, transforms.target_root): name for name in targets}
        self._exact_targets = {cut: name for cut, name in exact.items() if cut is not None}
        inside = set(self._sources.values())
        self._outside = [name for name in sources if name not in inside]
        reached = set(self._targets.values())
        self._untouched = [name for name in targets if name not in reached]
        self._matched: set[str] = set()
        self._shadowed: dict[str, set[str]] = {}
        self._removed: dict[str, str] = {}
        self._kept: dict[str, str] = {}
        self._unused_kept: dict[str, str] = {}
        self._problems: list[NameProblem] = []
        self._moves: dict[str, Taken] = {}
        self._astray: dict[str, tuple[str, str]] = {}

    def run(self) -> NameMatch:
        for bare, name in self._targets.items():
            for label in self._rules._keep.matching(bare) if self._rules._keep.labels else ():
                self._matched.add(label)
                self._kept.setdefault(name, label)
        groups, plain = self._choose()
        for group in groups:
            self._move(group)
        self._take_by_name(plain)
        for name in self._untouched:
            self._kept.setdefault(name, f"outside target_root {self._rules.target_root}")
        return NameMatch(
            self._moves,
            self._removed,
            self._kept,
            self._unused_kept,
            matched=frozenset(self._matched),
            problems=tuple(self._problems),
            outside=frozenset(self._outside),
            astray=self._astray,
            shadowed=self._shadowed,
            is_bare=True,
            said={name: bare for bare, name in (*self._targets.items(), *self._sources.items()) if name != bare},
        )

    def _take_by_name(self, plain: Mapping[str, str]) -> None:
        """Names that no rule takes: exact ones first, since a module may really be called module."""
        exact: set[str] = set()
        left = {}
        for bare, name in plain.items():
            target = self._exact_targets.get(_cut(name, self._rules.source_root) or "")
            if target is None:
                left[bare] = name
            else:
                exact.add(target)
                self._give(target, bare, Taken((name,), None if target == name else "the same name below the roots"))
        for bare, name in left.items():
            if self._targets.get(bare) in exact:
                self._astray.setdefault(name, (self._rules.target_root + bare, ""))
            else:
                self._put(bare, Taken((name,), "prefix of a wrapper"), "")

    def _choose(self) -> tuple[list[_Group], dict[str, str]]:
        """For each name the first rule that takes it: those of one rule and equal captures together, and the rest."""
        groups: dict[tuple[int, tuple[tuple[str, str], ...]], _Group] = {}
        singles: list[_Group] = []
        plain: dict[str, str] = {}
        rules, matching = self._rules, self._rules._taking.matching
        has_only = bool(rules._only.labels)
        for bare, name in self._sources.items():
            if has_only:
                allowed = rules._only.matching(bare)
                self._matched.update(allowed)
                if not allowed:
                    self._removed[name] = rules._only.labels[0]
                    continue
            hits = matching(bare)
            if not hits:
                plain[bare] = name
                continue
            number, index = rules._takers[hits[0]]
            rule = rules.rules[number]
            for other in hits[1:] if len(hits) > 1 else ():
                later = rules._takers[other][0]
                if later != number:
                    self._shadowed.setdefault(rules.rules[later].label, set()).add(rule.label)
            self._matched.add(rule.label)
            if isinstance(rule, Move):
                captures = rule.sources[index].match(bare)
                if captures is None:
                    raise AssertionError(f"{rule.sources[index].text} matches {bare}, and does not")
                if len(rule.sources) == 1:
                    singles.append(_Group(rule, captures, {0: bare}))
                else:
                    key = number, tuple(sorted(captures.items()))
                    groups.setdefault(key, _Group(rule, captures)).names[index] = bare
            else:
                self._removed[name] = rule.label
        return [*singles, *groups.values()], plain

    def _move(self, group: _Group) -> None:
        rule, names = group.rule, group.names
        if len(names) < len(rule.sources):
            have = ", ".join(names[index] for index in sorted(names))
            lacks = ", ".join(
                pattern.fill(group.captures) if pattern.segments else pattern.text
                for index, pattern in enumerate(rule.sources)
                if index not in names
            )
            message = f"{rule.label}: the file has {have} without {lacks}"
            self._problem("incomplete-group", message, tuple(names.values()))
            return
        if len(names) == 1:
            taken: tuple[str, ...] = (self._sources[names[0]],)
        else:
            taken = tuple([self._sources[names[index]] for index in range(len(rule.sources))])
        for part, target in enumerate(rule.targets):
            bare = target.fill(group.captures) if target.segments else names[0]
            self._put(bare, Taken(taken, rule.label, rule.steps, part, len(rule.targets)), rule.label)

    def _put(self, bare: str, taken: Taken, label: str) -> None:
        name = self._targets.get(bare)
        if name is None:
            for source in taken.sources:
                self._astray.setdefault(source, (self._rules.target_root + bare, label))
            return
        self._give(name, bare, taken)

    def _give(self, name: str, bare: str, taken: Taken) -> None:
        if name in self._kept:
            for source in taken.sources:
                self._unused_kept[source] = name
            return
        other = self._moves.get(name)
        if other is not None:
            self._problem(
                "two-sources",
                f"{bare} would be loaded twice: from {_said(other)} and from {_said(taken)}. Next: drop one of them",
                (*other.sources, *taken.sources),
            )
            return
        self._moves[name] = taken

    def _problem(self, code: str, message: str, names: tuple[str, ...]) -> None:
        self._problems.append(NameProblem(code, message, names))


def _with_dot(text: str) -> PatternSet | None:
    """What everything below a name would match; None for a text that has its dot, or is no name."""
    if text.endswith("."):
        return None
    try:
        parsed: NamePattern | NameGlob = parse_pattern(f"{text}.") if "<" in text else parse_glob(f"{text}.")
    except ValueError:
        return None
    return PatternSet([parsed.expression])


def _is_swapped(rule: Move, sources: Iterable[str], targets: Iterable[str]) -> bool:
    """Whether the file has what ``to`` says, and the model what ``from`` says."""
    if any(not pattern.segments for pattern in (*rule.sources, *rule.targets)):
        return False
    file, model = (PatternSet(one.expression for one in those) for those in (rule.targets, rule.sources))
    return any(map(file.matching, sources)) and any(map(model.matching, targets))


def _texts(patterns: Sequence[NamePattern]) -> str | list[str]:
    texts = [pattern.text for pattern in patterns]
    return texts if texts[1:] else texts[0]


def glob_set(globs: Sequence[str]) -> PatternSet:
    """Which of the globs match a name. Raises ``ValueError`` for one that is none."""
    return PatternSet(parse_glob(glob).expression for glob in globs)


def _said(taken: Taken) -> str:
    return (
        f"{', '.join(taken.sources)} by {taken.rule}"
        if taken.steps or taken.rule
        else f"{taken.sources[0]} by its name"
    )


def _prefix(root: str) -> str:
    """With its dot, and without the prefixes of wrappers, which are gone from names before roots are looked at."""
    segments = [segment for segment in root.split(".") if segment and segment not in WRAPPERS]
    return ".".join((*segments, "")) if segments else ""


def _cut(name: str, root: str) -> str | None:
    """The name below ``root`` as it stands, with all that wrappers put into it; None outside."""
    if not root:
        return name
    return name[len(root) :] if name.startswith(root) and name != root else None


def _below(root: str, names: Mapping[str, str]) -> dict[str, str]:
    """Names below ``root``, without it."""
    if not root:
        return dict(names)
    return {bare[len(root) :]: name for bare, name in names.items() if bare.startswith(root) and bare != root}
