"""Lines of a config that put a plan right: the rule or policy, how the config writes it, and where it goes. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import attrs

from noether_init_core.messages import yaml_field, yaml_line
from noether_init_core.surgery.patterns import PatternSet, parse_glob
from noether_init_core.surgery.steps import Pad, Shape, Slice, Step

# More entries than that are no advice, but a sign that something else is wrong.
_MOST_ENTRIES = 8
_NUMBER = re.compile("[0-9]+")
# Rows of these tables belong to tokens; those that a larger vocabulary adds come last.
_TABLES = re.compile(r"emb|wte|tok|vocab|shared", re.IGNORECASE)
# Tensors of other shapes in more modules than that: the model has another size, and resizing them is no advice.
_FEW_MODULES = 4


@attrs.frozen
class Advice:
    """How the config of one initializer writes a line, and where the line goes.

    Attributes:
        place: The place of the initializer in its config: ``initializers.0, init.yaml:2``; empty if unknown.
        style: ``rules``: the config has a list of transforms, and the line is an item of it. ``transforms``: it has
            none, and the line is the whole field. ``fields``: the same, with the surgery fields of Noether.
        whole: The key whose value is the whole config, such as ``auto_resume``; the line then begins with it.
        fields: The surgery fields of Noether that the config has, with their values.
        is_followed: Whether a later initializer loads weights, too.
        is_repeated: Whether the config applies at each start of the run, to what the run has trained until then.
    """

    place: str = ""
    style: Literal["rules", "transforms", "fields"] = "rules"
    whole: str = ""
    fields: Mapping[str, Sequence[Any]] = attrs.Factory(dict)
    is_followed: bool = False
    is_repeated: bool = False

    def rule(self, rule: Mapping[str, Any], note: str = "") -> str:
        """The line that adds a rule of ``transforms``; ``note`` begins its comment."""
        note = note and f"{note}, "
        if self.style == "rules":
            ((key, value), *others) = rule.items()
            line = f"- {yaml_line(dict(rule))}" if others else f"- {yaml_line(key)}: {yaml_line(value)}"
            # of several rules for a name of the file the first one counts; keep_model holds wherever it stands
            return line + self._where("transforms of ", f"{note}{'in' if 'keep_model' in rule else 'first in'}")
        also = "with the other fields written as transforms, " if self.fields else ""
        return self._field("transforms", [dict(rule)], note + also)

    def field(self, name: str, value: Any) -> str:
        """The line that sets a field of the config."""
        return self._field(name, value)

    def keep(self, names: Sequence[str], others: Collection[str], written: Mapping[str, str]) -> str:
        """The line that keeps exactly ``names`` of the model, and none of ``others``; empty if no short one does.

        ``written``: name -> the name that rules see, where it is another one.
        """
        if self.style == "fields":
            entries = covering(names, others)
            if entries and not _is_wide(entries, others):
                return self._more("patterns_to_instantiate", entries)
        entries = covering(in_rules(names, written), in_rules(others, written))
        if not entries:
            return ""
        # the values that the run has trained since would be replaced at each later resume
        return self.rule({"keep_model": _alone(entries)}, "only until the next save" if self.is_repeated else "")

    def drop(self, names: Sequence[str], others: Collection[str], written: Mapping[str, str]) -> str:
        """The line that leaves exactly ``names`` of the file unread, and none of ``others``; ``written`` as in keep."""
        if self.style == "fields":
            # the fields of Noether see whole names
            entries = covering(names, others)
            if entries and all(entry in names for entry in entries):
                return self._more("keys_to_remove", entries)
            if entries and not _is_wide(entries, others):
                return self._more("patterns_to_remove", entries)
        entries = covering(in_rules(names, written), in_rules(others, written))
        return self.rule({"drop": _alone(entries)}) if entries else self.field("on_unexpected", "ignore")

    def root(self, names: Sequence[str]) -> str:
        """The line that selects a part of the file, with the other ones that fit as well in its comment."""
        line = yaml_field(self.whole, {"source_root": names[0]}) if self.whole else yaml_field("source_root", names[0])
        return line + self._where("", f"{''.join(f'or {name}, ' for name in names[1:])}in")

    def _more(self, name: str, entries: Sequence[str]) -> str:
        """A field of Noether with its present entries, and further ones."""
        return self._field(name, [*self.fields.get(name, ()), *entries])

    def _field(self, name: str, value: Any, also: str = "") -> str:
        line = yaml_field(self.whole, {name: value}) if self.whole else yaml_field(name, value)
        return line + self._where("", f"{also}in")

    def _where(self, part: str, how: str) -> str:
        """A comment of YAML with the place, so that the line can be pasted with it."""
        if self.whole or not self.place:
            words = how.removesuffix("in").rstrip(", ")
            return f"  # {words}" if words else ""
        return f"  # {how} {part}{self.place}"


def in_rules(names: Iterable[str], written: Mapping[str, str]) -> list[str]:
    """Names as rules see them."""
    return [written.get(name, name) for name in names]


def _is_wide(entries: Iterable[str], others: Collection[str]) -> bool:
    """Whether a pattern of Noether would match one of ``others``, too: 5.weight is a substring of 15.weight."""
    return any("*" in entry or entry in other for entry in entries for other in others)


def _alone(entries: Sequence[str]) -> str | list[str]:
    return entries[0] if len(entries) == 1 else list(entries)


def covering(names: Sequence[str], others: Iterable[str]) -> list[str]:
    """A few globs that match each of ``names`` and no other one; empty if that needs many globs.

    Whole modules come first, then single names, and ``*`` for numbers of layers.
    """
    others = tuple(others)
    used = {prefix for other in others for prefix in _prefixes(other)}
    entries = list(dict.fromkeys(next((one for one in _prefixes(name) if one not in used), name) for name in names))
    leaves = list(dict.fromkeys(f"**.{name.rpartition('.')[2]}" for name in names))
    for found in (entries, _without_numbers(entries), leaves):
        if len(found) <= _MOST_ENTRIES and all(map(is_sayable, found)):
            globs = PatternSet(parse_glob(one).expression for one in found)
            if not any(map(globs.matching, others)) and all(map(globs.matching, names)):
                return found
    return []


def _without_numbers(names: Iterable[str]) -> list[str]:
    """The names with ``*`` for each number in which those of the same form differ."""
    forms: dict[str, list[list[str]]] = {}
    for name in names:
        forms.setdefault(_NUMBER.sub("*", name), []).append(_NUMBER.findall(name))
    found = []
    for form, numbers in forms.items():
        first, *others = form.split("*")
        columns = [set(column) for column in zip(*numbers, strict=True)]
        parts = ("*" if len(column) > 1 else column.pop() for column in columns)
        # a name may have a star of its own, which is no number
        text = first + "".join(map("".join, zip(parts, others, strict=False)))
        found.append(text if len(others) == len(columns) else form)
    return found


def _prefixes(name: str) -> list[str]:
    """``a.`` and ``a.b.`` for ``a.b.c``."""
    return [f"{one}." for one in list(accumulate(name.split("."), "{}.{}".format))[:-1]]


def is_sayable(name: str) -> bool:
    """Whether a glob can match the name."""
    try:
        parse_glob(name)
    except ValueError:
        return False
    return True


def resized(
    shapes: Mapping[str, tuple[Shape, Shape]], done: Mapping[str, tuple[Shape, Shape]]
) -> dict[str, tuple[Step, ...]]:
    """The steps that take a part of the file over where the model has more or fewer rows or channels.

    A larger vocabulary keeps the rows of the file, and a wider input its channels. A head with another number of
    classes is left out, because its rows would belong to other classes.

    Args:
        shapes: Name in the model -> shapes in the file and in the model, of all entries whose shapes differ.
        done: The same of entries whose shapes differ, and which rules of the config resize.
    """
    modules: dict[str, list[str]] = {}
    for name in shapes:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    if len(modules) > _FEW_MODULES:
        return {}
    # an output layer over the same vocabulary grows with the table, with or without a bias
    tables = {
        (have[0], want[0])
        for name, (have, want) in {**done, **shapes}.items()
        if len(have) > 1 and _TABLES.search(name) and have[1:] == want[1:]
    }
    found = {}
    for name, (have, want) in shapes.items():
        if len(have) != len(want) or not have:
            continue
        is_alone = len(modules[name.rpartition(".")[0]]) == 1
        of_vocabulary = (have[0], want[0]) in tables and have[1:] == want[1:]
        of_input = len(have) > 1 and have[0] == want[0] and is_alone
        steps = _fitted(have, want) if of_vocabulary or of_input else ()
        if steps:
            found[name] = steps
    return found


def _fitted(have: Shape, want: Shape) -> tuple[Step, ...]:
    pairs = list(zip(have, want, strict=True))
    if all(mine <= its for mine, its in pairs):
        return tuple(Pad(its, dim) for dim, (mine, its) in enumerate(pairs) if mine < its)
    if all(mine >= its for mine, its in pairs):
        return tuple(Slice(dim, 0, its) for dim, (mine, its) in enumerate(pairs) if mine > its)
    return ()
