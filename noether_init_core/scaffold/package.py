"""The names, texts and folder of a new package, and the texts of an example loop."""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.resources
import importlib.util
import keyword
import re
import secrets
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import attrs

import noether_init_core
from noether_init_core import kinds
from noether_init_core.errors import ConfigError, InvalidNameError, KindConflictError
from noether_init_core.files.storage.disk import LOCAL, reaching
from noether_init_core.messages import in_shell, one_line, quoted, yaml_field

MAX_LENGTH = 100
_PREFIX = "noether-init-"
_OWN = ("noether_init", "noether_init_core")
# YAML 1.1, which other readers of configs still follow, reads these as booleans or null.
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
#: Modules in tests/ of a new package; pytest imports them by these names.
_TEST_FILES = ("conftest", "test_conformance", "test_kind")
_COMMANDS = {"name": "ninit new", "kind": "--kind", "distribution": "--distribution"}
_SHOWN = 60
_SUGGESTED = 40


@attrs.frozen
class Names:
    """The names of a new package.

    Attributes:
        folder: The name of its folder, as typed.
        distribution: The name for pip, such as ``noether-init-my-demo``.
        package: The name for Python: ``noether_init_my_demo``.
        kind: The name in configs: ``my_demo``.
        class_prefix: The prefix of its classes: ``MyDemo``.
    """

    folder: str
    distribution: str
    package: str
    kind: str

    @property
    def class_prefix(self) -> str:
        return _class_prefix(self.kind)


def names_of(name: str, *, kind: str | None = None, distribution: str | None = None) -> Names:
    """The names of the package ``name``; ``noether-init-demo`` and ``demo`` give one package in two folders.

    Raises ``InvalidNameError``, with the rule for names and a name that follows it.
    """
    own_kind, own_distribution = _derived(name)
    asked = {
        "name": name,
        "kind": own_kind if kind is None else kind,
        "distribution": own_distribution if distribution is None else distribution,
    }
    for what, value in asked.items():
        problem = _problem_of(what, value)
        if problem:
            message = f"{what} {quoted(value, _SHOWN)} {problem}. Next: {_COMMANDS[what]} {_suggestion(what, value)}"
            raise InvalidNameError(message, what=what, value=value)
    dashed = asked["distribution"].replace("_", "-")
    return Names(name, dashed, dashed.replace("-", "_"), asked["kind"])


def check_free(names: Names) -> None:
    """Raise if an installed distribution has the kind, the distribution or the package already. Imports no plugin.

    Raises ``KindConflictError`` for the kind, because a kind of two distributions cannot be used. Raises
    ``ConfigError`` for the others, because installing the new package would replace or hide the existing one.
    """
    # one new name changes all three, unless --kind or --distribution was given
    whole = f"ninit new my-{names.folder}" if _derived(names.folder) == (names.kind, names.distribution) else ""
    offers = [f"{info.source} -> {info.target}" for info in kinds.installed() if info.name == names.kind]
    home = kinds.home_of(names.kind)
    if home is not None and not offers:
        offers = [f"{home}, which is not installed"]
    if offers:
        raise KindConflictError(
            f'kind "{names.kind}" is provided by {" and ".join(offers)}; a kind of two installed distributions '
            f"cannot be used. Next: {whole or f'--kind my_{names.kind}'}",
            kind=names.kind,
            offers=offers,
        )
    other = whole or f"--distribution {_PREFIX}my-{names.distribution.removeprefix(_PREFIX)}"
    for installed in importlib.metadata.distributions(name=names.distribution):
        raise ConfigError(
            f"distribution {names.distribution} {installed.version} is installed, and installing the new one "
            f"would replace it. Next: {other}"
        )
    found = importlib.util.find_spec(names.package)
    if found is not None and found.origin is not None:  # a folder of that name below the current one has no origin
        raise ConfigError(
            f"package {names.package} exists ({found.origin}); one of the two packages would hide the other. "
            f"Next: {other}"
        )


def _derived(name: str) -> tuple[str, str]:
    """Kind and distribution of the package ``name``."""
    short = name.replace("_", "-").removeprefix(_PREFIX)
    return short.replace("-", "_"), f"{_PREFIX}{short}"


def _class_prefix(kind: str) -> str:
    return "".join(word.capitalize() for word in kind.split("_"))


def _problem_of(what: str, value: str) -> str:
    """What is wrong with a name, in words; empty if it is allowed."""
    between = "_" if what == "kind" else "_-"
    if len(value) > MAX_LENGTH or not re.fullmatch(rf"[a-z][a-z0-9]*(?:[{between}][a-z0-9]+)*", value):
        return (
            f"is not allowed: use a to z, 0 to 9 but not first, and single {' or '.join(between)} between them, "
            f"at most {MAX_LENGTH} characters"
        )
    if keyword.iskeyword(value):
        return "is a keyword of Python"
    classes = [f"{_class_prefix(value)}{ending}" for ending in ("Initializer", "Config", "InitializerConfig")]
    taken = "".join([name for name in classes if name in noether_init_core.__all__][:1])
    module = value.replace("-", "_")
    problems = {
        "name": {},
        "kind": {
            "is a word of YAML, which a config would not read as text": value in _YAML_WORDS,
            f"would name a class {taken}, which exists in noether_init_core": bool(taken),
        },
        "distribution": {
            "is the name of the core": module in _OWN,
            f"would install a package {module}, which is a module of Python": module in sys.stdlib_module_names,
            f"would install a package {module}, and the new package has tests/{module}.py": module in _TEST_FILES,
        },
    }
    return next((problem for problem, is_so in problems[what].items() if is_so), "")


def _suggestion(what: str, value: str) -> str:
    """The nearest name that is allowed; for a package, one whose derived names are allowed too."""
    dash = "_" if what == "kind" else "-"
    # é becomes e, MyKind becomes my-kind
    text = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", dash, text).lower()
    text = re.sub(r"^[^a-z]+|[^a-z0-9]+$", "", re.sub(r"[^a-z0-9]+", dash, text))[:_SUGGESTED].rstrip(dash)
    base = text.removeprefix(f"noether{dash}init").lstrip(dash)
    prefix = _PREFIX if what == "distribution" else ""

    def is_allowed(one: str) -> bool:
        derived = zip(("kind", "distribution"), _derived(one), strict=True) if what == "name" else ()
        return not any(_problem_of(*each) for each in ((what, one), *derived))

    return next(filter(is_allowed, (text, f"{prefix}{base}", f"{prefix}my{dash}{base}", f"{prefix}demo")))


_HERE = importlib.resources.files("noether_init_core.scaffold")
_SUFFIX = ".jinja"
_MAX_AUTHOR = 200
_WITH_MAIL = re.compile(r"(?P<name>[^<>]*[^<>\s])\s*<(?P<mail>[^<>\s@]+@[^<>\s@]+)>")
_PLAN = "ninit plan init.yaml --model train:build --runs runs --run-id {run}"
_AGAIN = "train; stop it with Ctrl-C and type it again: it resumes"
_TRAIN = "python train.py --run-id {run}{more}"

#: Kind -> (the run that it starts from, the run that it starts, options of the first one).
BUILT_IN: Mapping[str, tuple[str, str, str]] = {
    "previous_run": ("pretrain", "finetune", " --classes 10"),
    "resume": ("first", "fork", ""),
    "file": ("first", "second", ""),
}


class Base(enum.StrEnum):
    """The base class of the new kind, and what its example does."""

    SOURCE = "source"
    PLAIN = "plain"


def render(names: Names, base: Base, *, author: str | None, year: int, core: str) -> dict[str, str]:
    """The files of the package: path with ``/`` below its folder -> text, sorted by path.

    Args:
        names: Its names.
        base: Which example it has.
        author: ``Jane Doe`` or ``Jane Doe <jane@example.org>``; None: the developers of the distribution.
        year: Year of the licence.
        core: The version of the core that it is written for, such as ``0.1.0``.

    Raises ``ConfigError`` for an author that metadata cannot hold.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    # require the minor release of the core; a pre-release such as 0.2.0rc1 is older than 0.2, so require it itself
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
    # in metadata a comma separates authors, and a quote or a backslash would end the TOML string
    if not name or len(author) > _MAX_AUTHOR or not f"{name}{mail}".isprintable() or set(name + mail) & set('<>"\\,'):
        raise ConfigError(
            f"author {author[:60]!r} cannot be put into pyproject.toml. Next: --author 'Jane Doe' or --author "
            f"'Jane Doe <jane@example.org>', on one line, without commas and quotes, at most {_MAX_AUTHOR} characters"
        )
    return name, mail


def check_absent(folder: Path) -> None:
    """Raise ``ConfigError`` if ``folder`` exists, also as a file or a broken link, or if its parent does not exist."""
    with reaching(folder):
        has_parent, is_there = LOCAL.is_folder(folder.parent), LOCAL.exists(folder)
    if not has_parent:
        raise ConfigError(
            f"--into {folder.parent} is not a folder. Next: mkdir -p {in_shell(folder.parent)}, or another --into"
        )
    if is_there:
        raise ConfigError(f"{folder} exists and was not changed. Next: another name, or --into another folder")


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Write ``files`` (path with ``/`` -> text) as the new ``folder``: all of them, or nothing.

    The files are written into a hidden folder beside it, which is renamed at the end. Only a killed process leaves the
    hidden folder behind. Raises ``ConfigError`` if ``folder`` exists or cannot be written.
    """
    check_absent(folder)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        for name, text in files.items():
            path = partial.joinpath(*name.split("/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        check_absent(folder)  # another process may have created it since; rename() would replace an empty folder
        partial.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} could not be written, and no file was left: {error}. Next: --into another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def example_of(
    kind: str, schema: Mapping[str, Any] | None = None
) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """Files of an example for one kind, and the commands to type next: name -> text, and (command, purpose).

    Args:
        kind: The kind, as a config names it.
        schema: The JSON schema of its config, for kinds outside ``BUILT_IN``; required keys are left to fill in.
    """

    def text(name: str) -> str:
        return (_HERE / "loop" / name).read_text(encoding="utf-8")

    loop = {"train.py": text("train.py.txt")}
    # --html needs the distribution noether-init-pages
    page = "" if importlib.util.find_spec("noether_init_pages") is None else " --html plan.html"
    if kind not in BUILT_IN:
        return {**loop, "init.yaml": _skeleton(kind, schema or {})}, (
            ("ninit validate init.yaml", "lists the keys to fill in"),
            (f"{_PLAN.format(run='first')}{page}", f"show what it will do{', as a page' * bool(page)}"),
            (_TRAIN.format(run="first", more=""), _AGAIN),
        )
    earlier, later, options = BUILT_IN[kind]
    plan = (f"{_PLAN.format(run=later)}{page}", f"show what init.yaml will do{', as a page' * bool(page)}")
    return {**loop, "scratch.yaml": text("scratch.yaml"), "init.yaml": text(f"{kind}.yaml")}, (
        (_TRAIN.format(run=earlier, more=f" --config scratch.yaml{options}"), "train the run to start from"),
        plan,
        (_TRAIN.format(run=later, more=" --epochs 100"), _AGAIN),
        ("ninit inspect runs", "list the saved sets"),
    )


def _empty(field: Mapping[str, Any]) -> Any:
    """A value of the type of a field whose default is made anew each time, so that its schema states none."""
    kinds = [field.get("type"), *(one.get("type") for one in field.get("anyOf", ()))]
    return {} if "object" in kinds or "$ref" in field else [] if "array" in kinds else None


def _skeleton(kind: str, schema: Mapping[str, Any]) -> str:
    """A config with every required key, to fill in, and the other keys as comments."""
    lines = [
        "# Once this run has saved a set, it resumes from its newest one.",
        "auto_resume: true",
        "initializers:",
        f"  - {yaml_field('kind', kind)}",
    ]
    required = set(schema.get("required", ()))
    fields = {name: field for name, field in schema.get("properties", {}).items() if name != "kind"}
    for name in sorted(fields, key=lambda name: name not in required):
        described = one_line(" ".join(str(fields[name].get("description", "")).split()))
        if name in required:
            key = yaml_field(name, None).removesuffix(" null")
            lines.append(f"    {key}  # required{': ' if described else ''}{described}")
        else:
            line = yaml_field(name, fields[name]["default"] if "default" in fields[name] else _empty(fields[name]))
            lines.append(f"    # {line}{'  # ' if described else ''}{described}")
    return "\n".join(lines) + "\n"
