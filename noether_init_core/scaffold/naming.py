"""The names of a new package: all of them from one, which are allowed, and which are free."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import keyword
import re
import sys
import unicodedata
from collections.abc import Callable

import attrs

import noether_init_core
from noether_init_core import kinds
from noether_init_core.errors import ConfigError, InvalidNameError, KindConflictError

__all__ = ["MAX_LENGTH", "Names", "check_free", "names_of"]

MAX_LENGTH = 100
_PREFIX = "noether-init-"
_OWN = ("noether-init", "noether-init-core")
# YAML 1.1, which other readers of configs still follow, takes these for a value that is no text.
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
_COMMANDS = {"name": "noether-init new", "kind": "--kind", "distribution": "--distribution"}
_SHOWN = 60
_SUGGESTED = 40


@attrs.frozen
class Names:
    """What a new package is called.

    Attributes:
        folder: The name of its folder, as it was asked for.
        distribution: What pip calls it, such as ``noether-init-my-demo``.
        package: What Python calls it: ``noether_init_my_demo``.
        kind: What a config calls it: ``my_demo``.
        class_prefix: What its classes begin with: ``MyDemo``.
    """

    folder: str
    distribution: str
    package: str
    kind: str

    @property
    def class_prefix(self) -> str:
        return _class_prefix(self.kind)


def names_of(name: str, *, kind: str | None = None, distribution: str | None = None) -> Names:
    """The names of the package ``name``; ``noether-init-demo`` and ``demo`` are one package in two folders.

    Raises ``InvalidNameError`` with what is allowed and a name that is.
    """
    _check("name", name, _problem_of_name)
    if kind is None:
        kind = _kind_of(name)
    _check("kind", kind, _problem_of_kind)
    if distribution is None:
        distribution = _distribution_of(name)
    _check("distribution", distribution, _problem_of_distribution)
    distribution = distribution.replace("_", "-")
    return Names(name, distribution, distribution.replace("-", "_"), kind)


def check_free(names: Names) -> None:
    """Raise where an installed distribution has the kind, the distribution or the package. Imports no plugin.

    Raises ``KindConflictError`` for the kind, which could not be used where two distributions offer it; ``ConfigError``
    for the others, since installing the new package would replace what is there, or hide it.
    """
    offers = [info for info in kinds.installed() if info.name == names.kind]
    other = f"another kind: noether-init new {names.folder} --kind my_{names.kind}"
    if offers:
        described = [f"{info.source} -> {info.target}" for info in offers]
        raise KindConflictError(
            f'kind "{names.kind}" is offered by {" and ".join(described)}, and a kind that is offered more than once '
            f"cannot be used. Next: {other}",
            kind=names.kind,
            offers=described,
        )
    home = kinds.home_of(names.kind)
    if home is not None:
        raise KindConflictError(
            f'kind "{names.kind}" is that of {home}, which is not installed; where both are, neither can be used. '
            f"Next: pip install {home}, or {other}",
            kind=names.kind,
            offers=[home],
        )
    other = f"noether-init new {names.folder} --distribution {_PREFIX}my-{names.distribution.removeprefix(_PREFIX)}"
    try:
        version = importlib.metadata.version(names.distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        raise ConfigError(
            f"distribution {names.distribution} is installed already ({version}), and installing the new one would "
            f"replace it. Next: {other}"
        )
    found = importlib.util.find_spec(names.package)
    if found is not None and found.origin is not None:  # a folder of that name below the current one has no origin
        raise ConfigError(
            f"package {names.package} is there already ({found.origin}); the new one would hide it or be hidden. "
            f"Next: {other}"
        )


def _kind_of(name: str) -> str:
    return _short(name).replace("-", "_")


def _distribution_of(name: str) -> str:
    return f"{_PREFIX}{_short(name)}"


def _short(name: str) -> str:
    return name.replace("_", "-").removeprefix(_PREFIX)


def _check(what: str, value: str, problem_of: Callable[[str], str]) -> None:
    problem = problem_of(value)
    if not problem:
        return
    shown = value if len(value) <= _SHOWN else f"{value[: _SHOWN - 3]}..."
    raise InvalidNameError(
        f"{what} {shown!r} {problem}. Next: {_COMMANDS[what]} {_suggestion(what, value)}", what=what, value=value
    )


def _problem_of_name(value: str) -> str:
    if value.replace("_", "-") == _OWN[0]:
        return "is the beginning of a name"
    return _problem_of_text(value, "_-")


def _problem_of_kind(value: str) -> str:
    if "." in value:
        return "holds a dot; dotted kinds are second names, for configs of other software"
    if value in _YAML_WORDS:
        return "is a word of YAML, so that a config would not hold it as text"
    problem = _problem_of_text(value, "_")
    if problem:
        return problem
    for name in (f"{_class_prefix(value)}{ending}" for ending in ("Initializer", "Config", "InitializerConfig")):
        if name in noether_init_core.__all__:
            return f"would give a class the name {name}, which noether_init_core has"
    return ""


#: What pytest imports under these names.
_TEST_FILES = ("conftest", "test_conformance", "test_kind")


def _problem_of_distribution(value: str) -> str:
    problem = _problem_of_text(value, "_-")
    module = value.replace("-", "_")
    if problem:
        return problem
    if value.replace("_", "-") in _OWN:
        return "is the core's own"
    if module in sys.stdlib_module_names:
        return f"would install a package {module}, which Python itself has"
    if module in _TEST_FILES:
        return f"would install a package {module}, and the new package has tests/{module}.py"
    return ""


def _problem_of_text(value: str, between: str) -> str:
    if value and len(value) <= MAX_LENGTH and re.fullmatch(rf"[a-z][a-z0-9]*(?:[{between}][a-z0-9]+)*", value):
        return "is a keyword of Python" if keyword.iskeyword(value) else ""
    strange = [one for one in value if not re.fullmatch(rf"[a-z0-9{between}]", one)]
    if not value:
        problem = "is empty"
    elif len(value) > MAX_LENGTH:
        problem = f"has {len(value)} characters"
    elif strange:
        problem = f"holds {strange[0]!r}"
    else:
        problem = (
            "begins with a digit" if value[0].isdigit() else f"has {' or '.join(between)} first, last or twice in a row"
        )
    return (
        f"{problem}; allowed are a to z, 0 to 9 but not first, and single {' or '.join(between)} between them, at most "
        f"{MAX_LENGTH} in all"
    )


def _suggestion(what: str, value: str) -> str:
    """A name that is allowed, as near as can be."""
    dash = "_" if what == "kind" else "-"
    problem_of = {"name": _problem_alone, "kind": _problem_of_kind, "distribution": _problem_of_distribution}[what]
    # é becomes e, MyKind becomes my-kind
    text = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", dash, text).lower()
    text = re.sub(r"^[^a-z]+|[^a-z0-9]+$", "", re.sub(r"[^a-z0-9]+", dash, text))[:_SUGGESTED].rstrip(dash)
    base = text.removeprefix(f"noether{dash}init").lstrip(dash)
    prefix = _PREFIX if what == "distribution" else ""
    candidates = (text, f"{prefix}{base}", f"{prefix}my{dash}{base}", f"{prefix}demo")
    return next(one for one in candidates if not problem_of(one))


def _problem_alone(name: str) -> str:
    """What is wrong with ``name`` where nothing else is said."""
    return (
        _problem_of_name(name) or _problem_of_kind(_kind_of(name)) or _problem_of_distribution(_distribution_of(name))
    )


def _class_prefix(kind: str) -> str:
    return "".join(word.capitalize() for word in kind.split("_"))
