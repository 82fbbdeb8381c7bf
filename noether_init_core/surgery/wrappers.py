"""Prefixes that wrappers of modules put into names: which name of a file is which name of a model despite them.

``module.`` comes from DistributedDataParallel, ``_orig_mod.`` from torch.compile, ``_fsdp_wrapped_module.`` from FSDP.
A module may really be called ``module``, so a prefix alone decides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import attrs

#: Segments that wrappers of modules put into names.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})
_WRAPPER = re.compile("|".join(sorted(WRAPPERS)))


@attrs.frozen
class Pairing:
    """Which names of a file and a model belong together.

    Attributes:
        moves: Name in the model -> name in the file.
        unclear: (name in the file, the names in the model that it may be) where two readings differ.
    """

    moves: dict[str, str] = attrs.Factory(dict)
    unclear: tuple[tuple[str, tuple[str, ...]], ...] = ()


def are_wrapped(names: Iterable[str]) -> bool:
    """Whether any name may have a segment of a wrapper."""
    return any(map(_WRAPPER.search, names))


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Name as rules say it -> name: without the segments of wrappers.

    Where several would be one, each stays as it is below the prefix that all names have.
    """
    names = tuple(names)
    if not are_wrapped(names):
        return dict(zip(names, names, strict=True))
    start, found = len(prefix_of_all(names)), _by_bare_form(forms_of(names))
    return {(bare if len(those) == 1 else name[start:]): name for bare, those in found.items() for name in those}


def prefix_of_all(names: Sequence[str]) -> str:
    """The segments of wrappers that every one of ``names`` begins with: ``module._orig_mod.``, or nothing."""
    taken = []
    # names that every name lies between have every common prefix, too
    for one, other in zip(min(names).split(".")[:-1], max(names).split(".")[:-1], strict=False) if names else ():
        if one != other or one not in WRAPPERS:
            break
        taken.append(one)
    return ".".join((*taken, "")) if taken else ""


def cut(name: str, root: str) -> str | None:
    """The name below ``root`` as it stands, with all that wrappers put into it; None outside."""
    return name[len(root) :] if not root or (name.startswith(root) and name != root) else None


def below(root: str, names: Mapping[str, str]) -> dict[str, str]:
    """The names below ``root``, without it -> name; ``root`` as ``Transforms`` keeps it, with a trailing dot."""
    cuts = ((cut(bare, root), name) for bare, name in names.items())
    return {cut: name for cut, name in cuts if cut is not None}


#: How a name reads below a root: without the prefix that all names have, as it stands, and without all wrappers.
Forms = tuple[str | None, str | None, str | None]


def forms_of(names: Iterable[str], root: str = "") -> dict[str, Forms]:
    """Name -> how it reads below ``root``. ``names`` are all of the file or of the model."""
    names = tuple(names)
    start = len(prefix_of_all(names))
    below = {name: cut(name[start:], root) for name in names}
    # a wrapper inside the root puts its prefix below the root
    further = len(prefix_of_all([text for text in below.values() if text is not None]))
    return {
        name: (None if text is None else text[further:], cut(name, root), cut(_bare(name), root))
        for name, text in below.items()
    }


def paired(sources: Mapping[str, Forms], targets: Mapping[str, Forms], taken: Collection[str] = ()) -> Pairing:
    """Pair names that differ in the segments of wrappers only.

    There are two readings of a name: below the prefix that the whole file and the whole model have, and as it stands.
    The reading that fits more names is used for all of them, since a wrapper renames all of them. Then names that are
    equal without all such segments are paired if nothing else is equal to them. If both readings fit equally many names
    in different ways, these names are unclear, unless every name of the model stands in the file as it is. So is what
    is left of names that only their wrappers tell apart, some of which were paired.

    Args:
        sources: Name in the file -> how it reads, of those that no rule took.
        targets: The same of the model.
        taken: Names of the model that a rule gives a value.
    """
    stripped, standing = _equal(sources, targets, 0), _equal(sources, targets, 1)
    # names that are the same for the whole model leave nothing to read
    is_same = len(standing) == len(targets) and all(source == target for source, target in standing.items())
    chosen = stripped if len(stripped) >= len(standing) and not is_same else standing
    moves = {target: source for source, target in chosen.items()}
    unclear: list[tuple[str, tuple[str, ...]]] = []
    if len(stripped) == len(standing) and stripped != standing and not is_same:
        for name in stripped.keys() | standing.keys():
            choices = dict.fromkeys(one[name] for one in (standing, stripped) if name in one)
            if stripped.get(name) != standing.get(name):
                unclear.append((name, tuple(choices)))
    used = set(moves.values())
    of_file, of_model = _by_bare_form(sources), _by_bare_form(targets)
    for bare, those in of_model.items():
        twins = of_file.get(bare, ())
        left = [name for name in twins if name not in used]
        untaken = [name for name in those if name not in taken]
        free = [name for name in untaken if name not in moves]
        if left and free and len(twins) == len(untaken) == 1:
            moves[free[0]] = left[0]
        elif left and free and len(left) < len(twins):
            unclear += [(name, tuple(free)) for name in left]
    return Pairing(moves, tuple(sorted(unclear)))


def _equal(sources: Mapping[str, Forms], targets: Mapping[str, Forms], form: int) -> dict[str, str]:
    """Name in the file -> name in the model that reads the same in this form."""
    of_model = {forms[form]: name for name, forms in targets.items() if forms[form] is not None}
    found = ((name, of_model.get(forms[form])) for name, forms in sources.items() if forms[form] is not None)
    return {name: target for name, target in found if target is not None}


def _bare(name: str) -> str:
    if not _WRAPPER.search(name):
        return name
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def _by_bare_form(names: Mapping[str, Forms]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, (_stripped, _standing, bare) in names.items():
        if bare is not None:
            found.setdefault(bare, []).append(name)
    return found
