"""The names of a new package: all of them from one, which are allowed, and which are free."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import keyword
import re
import sys
import unicodedata

import attrs

import noether_init_core
from noether_init_core import kinds
from noether_init_core.errors import ConfigError, InvalidNameError, KindConflictError

MAX_LENGTH = 100
_PREFIX = "noether-init-"
_OWN = ("noether-init", "noether-init-core")
# YAML 1.1, which other readers of configs still follow, takes these for a value that is no text.
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
#: What pytest imports under these names.
_TEST_FILES = ("conftest", "test_conformance", "test_kind")
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
    own_kind, own_distribution = _derived(name)
    asked = {
        "name": name,
        "kind": own_kind if kind is None else kind,
        "distribution": own_distribution if distribution is None else distribution,
    }
    for what, value in asked.items():
        problem = _problem_of(what, value)
        if problem:
            shown = value if len(value) <= _SHOWN else f"{value[: _SHOWN - 3]}..."
            message = f"{what} {shown!r} {problem}. Next: {_COMMANDS[what]} {_suggestion(what, value)}"
            raise InvalidNameError(message, what=what, value=value)
    dashed = asked["distribution"].replace("_", "-")
    return Names(name, dashed, dashed.replace("-", "_"), asked["kind"])


def check_free(names: Names) -> None:
    """Raise where an installed distribution has the kind, the distribution or the package. Imports no plugin.

    Raises ``KindConflictError`` for the kind, which could not be used where two distributions offer it; ``ConfigError``
    for the others, since installing the new package would replace what is there, or hide it.
    """
    offers = [f"{info.source} -> {info.target}" for info in kinds.installed() if info.name == names.kind]
    home = kinds.home_of(names.kind)
    if home is not None and not offers:
        offers = [f"{home}, which is not installed"]
    if offers:
        raise KindConflictError(
            f'kind "{names.kind}" is offered by {" and ".join(offers)}; a kind that two installed distributions offer '
            f"cannot be used. Next: {_with_another(names, f'--kind my_{names.kind}')}",
            kind=names.kind,
            offers=offers,
        )
    other = _with_another(names, f"--distribution {_PREFIX}my-{names.distribution.removeprefix(_PREFIX)}")
    for installed in importlib.metadata.distributions(name=names.distribution):
        raise ConfigError(
            f"distribution {names.distribution} is installed already ({installed.version}), and installing the new one "
            f"would replace it. Next: {other}"
        )
    found = importlib.util.find_spec(names.package)
    if found is not None and found.origin is not None:  # a folder of that name below the current one has no origin
        raise ConfigError(
            f"package {names.package} is there already ({found.origin}); the new one would hide it or be hidden. "
            f"Next: {other}"
        )


def _with_another(names: Names, option: str) -> str:
    """The command with another name for all; where names were given one by one, with ``option`` in the place of one."""
    kind, distribution = _derived(names.folder)
    if (names.kind, names.distribution) == (kind, distribution):
        return f"noether-init new my-{names.folder}"
    given = f" --kind {names.kind}" if names.kind != kind and not option.startswith("--kind") else ""
    if names.distribution != distribution and not option.startswith("--distribution"):
        given += f" --distribution {names.distribution}"
    return f"noether-init new {names.folder} {option}{given}"


def _derived(name: str) -> tuple[str, str]:
    """Kind and distribution of the package ``name``."""
    short = name.replace("_", "-").removeprefix(_PREFIX)
    return short.replace("-", "_"), f"{_PREFIX}{short}"


def _class_prefix(kind: str) -> str:
    return "".join(word.capitalize() for word in kind.split("_"))


def _problem_of(what: str, value: str) -> str:
    """What is wrong with a name, in words; empty where it is allowed."""
    dashed, module = value.replace("_", "-"), value.replace("-", "_")
    if what == "name" and dashed == _OWN[0]:
        return "is the beginning of a name"
    if what == "kind" and "." in value:
        return "holds a dot; dotted kinds are second names, for configs of other software"
    if what == "kind" and value in _YAML_WORDS:
        return "is a word of YAML, so that a config would not hold it as text"
    problem = _problem_of_text(value, "_" if what == "kind" else "_-")
    if problem or what == "name":
        return problem
    if what == "kind":
        classes = [f"{_class_prefix(value)}{ending}" for ending in ("Initializer", "Config", "InitializerConfig")]
        taken = [name for name in classes if name in noether_init_core.__all__]
        return f"would give a class the name {taken[0]}, which noether_init_core has" if taken else ""
    if dashed in _OWN:
        return "is the core's own"
    if module in sys.stdlib_module_names:
        return f"would install a package {module}, which Python itself has"
    if module in _TEST_FILES:
        return f"would install a package {module}, and the new package has tests/{module}.py"
    return ""


def _problem_of_text(value: str, between: str) -> str:
    if value and len(value) <= MAX_LENGTH and re.fullmatch(rf"[a-z][a-z0-9]*(?:[{between}][a-z0-9]+)*", value):
        return "is a keyword of Python" if keyword.iskeyword(value) else ""
    strange = re.search(rf"[^a-z0-9{between}]", value)
    dashes = " or ".join(between)
    if not value:
        problem = "is empty"
    elif len(value) > MAX_LENGTH:
        problem = f"has {len(value)} characters"
    elif strange:
        problem = f"holds {strange[0]!r}"
    else:
        problem = "begins with a digit" if value[0].isdigit() else f"has {dashes} first, last or twice in a row"
    return (
        f"{problem}; allowed are a to z, 0 to 9 but not first, and single {dashes} between them, at most {MAX_LENGTH} "
        "in all"
    )


def _suggestion(what: str, value: str) -> str:
    """A name that is allowed, as near as can be; of a package, also the names that are derived from it."""
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
