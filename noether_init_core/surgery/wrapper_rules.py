"""Rules that name a wrapper of modules, and match some of the names below it only. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Protocol

from noether_init_core.messages import listed, yaml_line
from noether_init_core.surgery.patterns import NamePattern, PatternSet
from noether_init_core.surgery.plan import Problem
from noether_init_core.surgery.wrappers import WRAPPERS, Forms

_MOST = 3


def names_wrapper(pattern: NamePattern) -> bool:
    """Whether a pattern may be written for the prefix of a wrapper: ``module.``, ``mod*.``, a regular expression."""
    segments = re.sub("<[^<>]*>", "*", pattern.text).split(".")
    globs = [segment for segment in segments if "*" in segment and segment.strip("*")]
    return any(one in pattern.text or any(fnmatchcase(one, glob) for glob in globs) for one in WRAPPERS)


class OneRule(Protocol):
    """What is known of a rule with one pattern; see ``name_rules.Rule``."""

    @property
    def label(self) -> str: ...
    @property
    def field(self) -> str: ...
    @property
    def patterns(self) -> tuple[NamePattern, ...]: ...
    @property
    def targets(self) -> tuple[NamePattern, ...]: ...
    @property
    def steps(self) -> tuple[object, ...]: ...


def partly_matched(
    rule: OneRule, names: Mapping[str, str], forms: Mapping[str, Forms], untaken: Iterable[str]
) -> Iterator[Problem]:
    """The problem of a rule that matched a name, and would match others with what wrappers put into them.

    Rules see names without it, unless two names would become one. So a rule for ``module.`` may match one name below
    it, and not the next one.

    Args:
        rule: A rule with one pattern, for which ``names_wrapper`` holds.
        names: Name as rules see it -> name, of the file or of the model.
        forms: Name -> how it reads.
        untaken: Names as rules see them that no rule took.
    """
    field, pattern = rule.field, rule.patterns[0]
    target = rule.targets[0] if len(rule.targets) == 1 and not rule.steps else None
    matches = PatternSet([pattern.expression]).matching
    unseen: dict[str, str] = {}
    for bare in untaken:
        stripped, standing, _bare = forms[names[bare]]
        found = [text for text in (stripped, standing) if text is not None and text != bare and matches(text)]
        if found:
            unseen[bare] = found[0]
    if not unseen:
        return
    written = [f"{names[bare]} (in rules {bare})" for bare in unseen]
    message = (
        f"{rule.label}: rules see names without the prefix of a wrapper, so it leaves out {listed(written, _MOST)}"
    )
    rules: list[dict[str, str]] = []
    if field != "from":
        rules = [{field: name} for name in _below(unseen, names)]
    elif target is not None:
        rules = [{"from": bare, "to": target.fill(pattern.match(text) or {})} for bare, text in unseen.items()]
    if rules:
        message += f". Next: further rules under transforms: {listed(map(yaml_line, rules), _MOST)}"
    yield Problem("unclear-prefix", message, "", tuple(names[bare] for bare in unseen))


def _below(chosen: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """``chosen`` as few patterns: ``b.`` if all of ``names`` below ``b`` are among them."""
    every: dict[str, list[str]] = {}
    for name in names:
        every.setdefault(name.partition(".")[0], []).append(name)
    found: dict[str, None] = {}
    for name in chosen:
        first, dot, _rest = name.partition(".")
        found[f"{first}." if dot and all(one in chosen for one in every[first]) else name] = None
    return list(found)
