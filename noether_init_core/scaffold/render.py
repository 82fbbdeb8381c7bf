"""The files of a new package, as text: a template, the names, and nothing of the machine."""

from __future__ import annotations

import enum
import importlib.resources
import re
from collections.abc import Iterator
from importlib.resources.abc import Traversable

import attrs

from noether_init_core.errors import ConfigError
from noether_init_core.scaffold.naming import Names

_SUFFIX = ".jinja"
_MAX_AUTHOR = 200
_WITH_MAIL = re.compile(r"(?P<name>[^<>]*[^<>\s])\s*<(?P<mail>[^<>\s@]+@[^<>\s@]+)>")


class Base(enum.StrEnum):
    """What the class of the new kind derives from, and what its example does."""

    SOURCE = "source"
    PLAIN = "plain"


def render(names: Names, base: Base, *, author: str | None, year: int, core: str) -> dict[str, str]:
    """Path below the folder of the package, with ``/`` -> text; sorted, folders among files, as a listing would be.

    Args:
        names: Its names.
        base: Which example it has.
        author: ``Jane Doe`` or ``Jane Doe <jane@example.org>``; None: whoever writes the distribution.
        year: Of the licence.
        core: The version of the core that it is written for, such as ``0.1.0``.

    Raises ``ConfigError`` for an author that no metadata can hold.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    # the minor release that the core belongs to; of a version before its release, itself
    public = core.partition("+")[0]
    released = re.fullmatch(r"(\d+\.\d+)(\.\d+)*", public)
    developers = f"The {names.distribution} developers"
    name, mail = (developers, "") if author is None else _author(author)
    values = {
        **attrs.asdict(names),
        "class_prefix": names.class_prefix,
        "base": base.value,
        "author": name,
        "mail": mail,
        "year": year,
        "core": released[1] if released else public,
    }
    files = {}
    for part in ("common", base.value):
        for path, source in _sources(importlib.resources.files("noether_init_core.scaffold") / "template" / part):
            target = environment.from_string(path.removesuffix(_SUFFIX)).render(values)
            files[target] = environment.from_string(source).render(values)
    return dict(sorted(files.items()))


def _sources(folder: Traversable, below: str = "") -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{below}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            yield f"{below}{entry.name}", entry.read_text(encoding="utf-8")


def _author(author: str) -> tuple[str, str]:
    """Name and mail address, which may be empty."""
    found = _WITH_MAIL.fullmatch(author.strip())
    name, mail = (found["name"], found["mail"]) if found else (author.strip(), "")
    # metadata separates authors by commas
    if not name or len(author) > _MAX_AUTHOR or not f"{name}{mail}".isprintable() or set(name + mail) & set('<>"\\,'):
        raise ConfigError(
            f"author {author[:60]!r} cannot be put into pyproject.toml. Next: --author 'Jane Doe' or --author "
            f"'Jane Doe <jane@example.org>', on one line, without commas and quotes, at most {_MAX_AUTHOR} characters"
        )
    return name, mail
