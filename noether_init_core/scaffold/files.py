"""The files that ``noether-init new`` and ``example`` write, as text, and the one place that puts a package on disk."""

from __future__ import annotations

import enum
import importlib.resources
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.errors import ConfigError
from noether_init_core.scaffold.naming import Names

_HERE = importlib.resources.files("noether_init_core.scaffold")
_SUFFIX = ".jinja"
_MAX_AUTHOR = 200
_WITH_MAIL = re.compile(r"(?P<name>[^<>]*[^<>\s])\s*<(?P<mail>[^<>\s@]+@[^<>\s@]+)>")
_PLAN = "noether-init plan init.yaml --model train:build --runs runs --run-id {run} --html plan.html"
_AGAIN = "train; press Ctrl-C or kill it, and type it again: it goes on"
_TRAIN = "python train.py --run-id {run}{more}"

#: Kind -> (the run that it starts from, the run that it starts, options of the first one).
BUILT_IN: Mapping[str, tuple[str, str, str]] = {
    "previous_run": ("pretrain", "finetune", " --classes 10"),
    "resume": ("first", "fork", ""),
    "file": ("first", "second", ""),
}


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
        for path, source in _sources(_HERE / "template" / part):
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


def check_absent(folder: Path) -> None:
    """Raise ``ConfigError`` where ``folder`` exists, be it as a file or as a link to nothing, or has no parent."""
    if not folder.parent.is_dir():
        raise ConfigError(f"--into {folder.parent} is no folder. Next: mkdir -p {folder.parent}, or another --into")
    if os.path.lexists(folder):
        raise ConfigError(
            f"{folder} exists, and nothing was changed in it. Next: another name, or --into another folder"
        )


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Write ``files`` (path with ``/`` -> text) as the new ``folder``: all of them, or nothing.

    They are written into a hidden folder beside it, which gets the name at the end. Only a kill leaves that one behind.
    Raises ``ConfigError`` where ``folder`` exists or cannot be written.
    """
    check_absent(folder)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        for name, text in files.items():
            path = partial.joinpath(*name.split("/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        check_absent(folder)  # somebody may have made it meanwhile
        partial.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} could not be written, and nothing is left behind: {error}. Next: --into another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def example_of(
    kind: str, schema: Mapping[str, Any] | None = None
) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """A loop and configs for one kind: name -> text of the files, and the commands to type, each with what it does.

    Args:
        kind: The kind, as a config names it.
        schema: The JSON schema of its config, for kinds that are not in ``BUILT_IN``: what is required is left open.
    """

    def text(name: str) -> str:
        return (_HERE / "loop" / name).read_text(encoding="utf-8")

    loop = {"train.py": text("train.py.txt")}
    if kind not in BUILT_IN:
        return {**loop, "init.yaml": _skeleton(kind, schema or {})}, (
            ("noether-init validate init.yaml", "names what is still to be filled in"),
            (_PLAN.format(run="first"), "what it will do, as a page to look at"),
            (_TRAIN.format(run="first", more=""), _AGAIN),
        )
    earlier, later, options = BUILT_IN[kind]
    return {**loop, "scratch.yaml": text("scratch.yaml"), "init.yaml": text(f"{kind}.yaml")}, (
        (_TRAIN.format(run=earlier, more=f" --config scratch.yaml{options}"), "the run to start from, once"),
        (_PLAN.format(run=later), "what init.yaml will do, as a page to look at"),
        (_TRAIN.format(run=later, more=" --epochs 100"), _AGAIN),
        ("noether-init inspect runs", "what was saved"),
    )


def _skeleton(kind: str, schema: Mapping[str, Any]) -> str:
    """A config with every required key, to be filled in, and the others as comments."""
    lines = [
        "# Once this run has sets of its own, it goes on from those.",
        "auto_resume: true",
        "initializers:",
        f"  - kind: {kind}",
    ]
    required = set(schema.get("required", ()))
    fields = {name: field for name, field in schema.get("properties", {}).items() if name != "kind"}
    for name in sorted(fields, key=lambda name: name not in required):
        described = " ".join(str(fields[name].get("description", "")).split())
        if name in required:
            lines.append(f"    {name}:  # required{': ' if described else ''}{described}")
        else:
            default = json.dumps(fields[name].get("default"))
            lines.append(f"    # {name}: {default}{'  # ' if described else ''}{described}")
    return "\n".join(lines) + "\n"
