"""What ``suggest`` gives: rules with their reasons and doubts, and what they would do. Data, and text to paste."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from noether_init_core.messages import listed, one_line, yaml_line
from noether_init_core.surgery.plan import LoadPlan
from noether_init_core.surgery.transforms import Rule, Transforms

__all__ = ["DEEPEST", "LONGEST", "SuggestedRule", "Suggestion", "Unsure", "is_too_long"]

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
