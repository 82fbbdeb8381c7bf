"""One name in one entry-point group: which distribution it comes from, its import, and the errors of both.

Kinds and observers are looked up alike. Nothing is imported before it is certain which distribution is meant.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Mapping

import attrs

from noether_init_core.errors import KindBlockedError, KindConflictError, KindImportError, UnknownKindError
from noether_init_core.kinds.entry_points import (
    ALLOW_VARIABLE,
    DENY_VARIABLE,
    KindInfo,
    clear_cache,
    found_under,
    offers,
)
from noether_init_core.messages import listed, near, quoted

__all__ = ["Group", "all_of", "choose", "conflict", "importing", "load", "summary"]

_CORE = "noether-init-core"
_LISTED = 12


@attrs.frozen
class Group:
    """An entry-point group.

    Attributes:
        name: As it stands in ``pyproject.toml``.
        noun: What messages call one of its entries.
        listing: The command that lists them.
        homes: Entry -> the distribution that it comes with. Install hints are taken from here, so that the text of a
            config can never name a package to install.
    """

    name: str
    noun: str
    listing: str
    homes: Mapping[str, str] = attrs.field(factory=dict)


def all_of(group: Group, registered: Iterable[KindInfo] = ()) -> tuple[KindInfo, ...]:
    """Every entry of ``group``, by name. A name may occur more than once (a conflict)."""
    installed = [info for name in offers(group.name) for info in found_under(group.name, name)]
    return tuple(sorted([*installed, *registered], key=lambda info: (info.name, info.distribution or "")))


def choose(group: Group, name: str, registered: Iterable[KindInfo] = ()) -> KindInfo:
    """The one entry called ``name``. Imports nothing. The group is scanned again before a name counts as unknown.

    Raises ``KindConflictError``, ``KindBlockedError`` or ``UnknownKindError``.
    """
    mine = [info for info in registered if info.name == name]
    if not mine and not found_under(group.name, name):
        clear_cache()  # it may have been installed since, beside a notebook that runs
    # in an order that does not depend on the import path
    named = sorted([*found_under(group.name, name), *mine], key=lambda info: (info.distribution or "~", info.target))
    allowed = [info for info in named if info.blocked_by is None]
    if len(allowed) == 1:
        return allowed[0]
    if allowed:
        raise conflict(group, name, allowed)
    if named:
        raise _blocked(group, named[0])
    raise _unknown(group, name, [info for info in all_of(group, registered) if info.blocked_by is None])


def load(group: Group, info: KindInfo) -> object:
    """Import what the entry point refers to. Raises ``KindImportError`` for whatever that raises."""
    with importing(group, info):
        return importlib.metadata.EntryPoint(info.name, info.target, group.name).load()


@contextlib.contextmanager
def importing(group: Group, info: KindInfo) -> Iterator[None]:
    """Turn what a plugin raises within the block, also ``SystemExit``, into ``KindImportError``."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # the target is foreign text, and the command is meant to be pasted into a shell
        parts = re.fullmatch(r"([\w.]+)\s*:\s*(\w+)[\w.]*\s*(\[.*\])?", info.target, re.ASCII)
        again = f'python -c "from {parts[1]} import {parts[2]}"' if parts else f"noether-init check {info.name}"
        raise KindImportError(
            f"{group.noun} {quoted(info.name)} ({info.source}): importing {info.target} raised "
            f"{type(error).__name__}: {error}. Other {group.noun}s are not affected. Next: {again}",
            kind=info.name,
        ) from error


def summary(group: Group, usable: Iterable[KindInfo]) -> str:
    """What is installed, for messages: ``Installed: file, resume (noether-init-core 0.1.0)``."""
    by_source: dict[str, list[str]] = {}
    for info in usable:
        # dotted names are second names of kinds, for configs of Noether
        if "." not in info.name:
            by_source.setdefault(info.source, []).append(info.name)
    shown = [f"{listed(names, _LISTED)} ({source})" for source, names in sorted(by_source.items())]
    return f"Installed: {listed(shown, _LISTED, separator='; ')}" if shown else f"No {group.noun} is installed"


def conflict(group: Group, name: str, claims: list[KindInfo]) -> KindConflictError:
    described = [f"{claim.source} -> {claim.target}" for claim in claims]
    installed = [claim.distribution for claim in claims if claim.distribution is not None]
    # never the core itself, which the other claim would then replace
    removable = [one for one in installed if one != _CORE] or installed
    return KindConflictError(
        f"{group.noun} {quoted(name)} is offered more than once: {' and '.join(described)}. None of them was "
        f"imported. Next: pip uninstall {removable[-1]}, or set {DENY_VARIABLE}={removable[-1]}",
        kind=name,
        offers=described,
    )


def _blocked(group: Group, info: KindInfo) -> KindBlockedError:
    distribution = info.distribution or ""
    if info.blocked_by == ALLOW_VARIABLE:
        reason, remedy = f"is not listed in {ALLOW_VARIABLE}", f"add {distribution} to {ALLOW_VARIABLE}"
    else:
        reason, remedy = f"is listed in {DENY_VARIABLE}", f"take {distribution} out of {DENY_VARIABLE}"
    return KindBlockedError(
        f"{group.noun} {quoted(info.name)} is offered by {info.source}, which {reason}. Next: {remedy}",
        kind=info.name,
        distribution=distribution,
    )


def _unknown(group: Group, name: str, usable: list[KindInfo]) -> UnknownKindError:
    sources = {info.name: info.source for info in usable}
    similar = near(name, sources, cutoff=0.75)
    absent = group.homes.keys() - {info.name for info in all_of(group)}
    hints = near(name, absent, cutoff=0.8)
    parts = [f"no {group.noun} {quoted(name)}"]
    if similar:
        parts.append("Near: " + ", ".join(f"{one} ({sources[one]})" for one in similar))
    elif not hints:
        parts.append(summary(group, usable))
    parts += [f"{one} comes with {group.homes[one]}, which is not installed" for one in hints]
    if not similar and len(name) <= 200 and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        module, _, attribute = name.rpartition(".")
        parts.append(
            f"A dotted {group.noun} is a registered name, never an import path; no installed distribution has the line "
            f'"{name}" = "{module}:{attribute}" under [project.entry-points."{group.name}"]'
        )
    parts.append(f"Next: {f'pip install {group.homes[hints[0]]}' if hints and not similar else group.listing}")
    return UnknownKindError(". ".join(parts), kind=name, candidates=similar)
