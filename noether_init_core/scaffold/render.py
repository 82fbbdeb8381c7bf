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

__all__ = ["Base", "Package", "render"]

_SUFFIX = ".jinja"
_MAX_AUTHOR = 200
_WITH_MAIL = re.compile(r"(?P<name>[^<>]*[^<>\s])\s*<(?P<mail>[^<>\s@]+@[^<>\s@]+)>")


class Base(enum.StrEnum):
    """What the class of the new kind derives from, and what its example does."""

    SOURCE = "source"
    PLAIN = "plain"


@attrs.frozen
class Package:
    """All that the text of a new package depends on.

    Attributes:
        names: Its names.
        base: Which example it has.
        author: ``Jane Doe`` or ``Jane Doe <jane@example.org>``; None: whoever writes the distribution.
        year: Of the licence.
        core: The version of the core that it is written for, such as ``0.1.0``.
    """

    names: Names
    base: Base
    author: str | None
    year: int
    core: str


def render(package: Package) -> dict[str, str]:
    """Path below the folder of the package, with ``/`` -> text; sorted, folders among files, as a listing would be.

    Raises ``ConfigError`` for an author that no metadata can hold.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    name, mail = _author(package)
    values = {
        **attrs.asdict(package.names),
        "class_prefix": package.names.class_prefix,
        "base": package.base.value,
        "author": name,
        "mail": mail,
        "year": package.year,
        "core": _least_core(package.core),
    }
    files = {}
    for part in ("common", package.base.value):
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


def _author(package: Package) -> tuple[str, str]:
    """Name and mail address, which may be empty."""
    author = package.author
    if author is None:
        return f"The {package.names.distribution} developers", ""
    found = _WITH_MAIL.fullmatch(author.strip())
    name, mail = (found["name"], found["mail"]) if found else (author.strip(), "")
    # metadata separates authors by commas
    if not name or len(author) > _MAX_AUTHOR or not f"{name}{mail}".isprintable() or set(name + mail) & set('<>"\\,'):
        raise ConfigError(
            f"author {author[:60]!r} cannot be put into pyproject.toml. Next: --author 'Jane Doe' or --author "
            f"'Jane Doe <jane@example.org>', on one line, without commas and quotes, at most {_MAX_AUTHOR} characters"
        )
    return name, mail


def _least_core(version: str) -> str:
    """The minor release that ``version`` belongs to; of a version before its release, itself."""
    public = version.partition("+")[0]
    released = re.fullmatch(r"(\d+\.\d+)(\.\d+)*", public)
    return released[1] if released else public
