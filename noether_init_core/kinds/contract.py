"""A static look at the class of an initializer: what would silently not work is found before it runs.

Nothing is called and nothing is created. Names and arguments of hooks are read from ``hookspec.HookSpecs``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from types import FunctionType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import pydantic

from noether_init_core.config.base import KindConfig
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.initializers.source import SourceInitializer, SourceInitializerConfig
from noether_init_core.kinds import hookspec
from noether_init_core.kinds.hookspec import HOOK_NAMES

__all__ = [
    "Finding",
    "advice",
    "config_fields",
    "declared_version",
    "examine",
    "findings",
    "hook_arguments",
    "models_in",
]

# Names that people write for a hook although they are not near by spelling.
_MISNOMERS = {
    "init_model": "init_weights",
    "init_optim": "init_optimizer",
    "init_params": "init_weights",
    "initialize_callbacks": "init_callbacks",
    "initialize_optimizer": "init_optimizer",
    "initialize_trainer": "init_trainer",
    "initialize_weights": "init_weights",
    "load_optimizer": "init_optimizer",
    "load_weights": "init_weights",
    "start_iteration": "start_checkpoint",
}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_INIT = "def __init__(self, config, *, path_provider=None, ...): super().__init__(config, path_provider=path_provider)"


@attrs.frozen
class Finding:
    """What is wrong with a class, and what to write instead."""

    message: str
    fix: str


def hook_arguments() -> dict[str, tuple[str, ...]]:
    """Hook -> the arguments that its specification offers."""
    return {name: tuple(inspect.signature(getattr(hookspec.HookSpecs, name)).parameters)[1:] for name in HOOK_NAMES}


def declared_version(cls: type[InitializerBase]) -> object:
    """The contract that ``cls`` itself declares; 1 where it declares none.

    An inherited value does not count: a base class of the core says what the installed core has, not what the author
    of ``cls`` wrote for.
    """
    return vars(cls).get("contract", 1)


def examine(cls: type[InitializerBase]) -> tuple[Finding, ...]:
    """Every way in which ``cls`` breaks the contract; empty where it keeps it. A class with one cannot be used."""
    found = [*_of_class(cls), *_of_names(cls)]
    for name, arguments in hook_arguments().items():
        found += _of_hook(cls, name, arguments)
    return (*found, *_of_check(cls), *(_of_source(cls) if issubclass(cls, SourceInitializer) else ()))


def findings(cls: type[InitializerBase]) -> tuple[str, ...]:
    """The messages of ``examine``."""
    return tuple(finding.message for finding in examine(cls))


def advice(cls: type[InitializerBase]) -> tuple[Finding, ...]:
    """What keeps the contract, and will trouble users or the author later."""
    return (*_of_version(cls), *_of_promises(cls), *_of_config(cls.config_class))


def _of_class(cls: type[InitializerBase]) -> Iterator[Finding]:
    version = declared_version(cls)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        yield Finding(
            f"contract is {version!r}, not a whole number of at least 1",
            f"contract: ClassVar[int] = {hookspec.CONTRACT_VERSION}",
        )
    config_class: object = inspect.getattr_static(cls, "config_class", None)
    if not (isinstance(config_class, type) and issubclass(config_class, KindConfig)):
        yield Finding(
            f"config_class is {config_class!r}, not a subclass of KindConfig",
            "derive the config from KindConfig, or from SourceInitializerConfig for a SourceInitializer",
        )
    elif config_class.model_config.get("extra") != "forbid":
        yield Finding(
            f"config_class {config_class.__qualname__} lets unknown keys pass; it must keep extra='forbid'",
            f"take extra out of the model_config of {config_class.__qualname__}",
        )
    for method in _unimplemented(cls):
        yield Finding(f"{method} is not implemented", f"implement {method}")
    try:
        inspect.signature(cls.__init__).bind_partial(None, None, path_provider=None)
    except TypeError as error:
        yield Finding(f"__init__ cannot be called with (config, path_provider=...): {error}", _INIT)


def _unimplemented(cls: type[InitializerBase]) -> Iterator[str]:
    """The abstract methods that ``cls`` leaves, as they are called: ``locate(model_name, part)``."""
    for name in sorted(getattr(cls, "__abstractmethods__", ())):
        function = inspect.getattr_static(cls, name)
        is_method = isinstance(function, FunctionType)
        yield f"{name}({', '.join([*inspect.signature(function).parameters][1:])})" if is_method else name


def _own_classes(cls: type) -> Iterator[type]:
    """``cls`` and its bases below the core's own: what the author wrote."""
    for base in cls.__mro__:
        if base is cls or not (
            base.__module__.split(".")[0] == "noether_init_core" or base.__module__ in ("abc", "builtins")
        ):
            yield base


def _of_names(cls: type[InitializerBase]) -> Iterator[Finding]:
    own = [name for base in _own_classes(cls) for name in vars(base)]
    known = {name for base in cls.__mro__ if base not in _own_classes(cls) for name in vars(base)}
    for name in sorted(set(own)):
        # never by getattr: a descriptor of the author's would run
        is_method = isinstance(inspect.getattr_static(cls, name, None), FunctionType | classmethod | staticmethod)
        if name.startswith("_") or name in HOOK_NAMES or name in known or not is_method:
            continue
        near = (
            [_MISNOMERS[name]] if name in _MISNOMERS else difflib.get_close_matches(name, HOOK_NAMES, n=1, cutoff=0.85)
        )
        # Beside the hook itself, a method of a similar name is a helper.
        if near and near[0] not in own:
            yield Finding(
                f"{name} is no hook and would never be called; did you mean {near[0]}?",
                f"rename it to {near[0]}, or to _{name} if it is a helper",
            )


def _of_hook(cls: type[InitializerBase], name: str, arguments: tuple[str, ...]) -> Iterator[Finding]:
    function = inspect.getattr_static(cls, name, None)
    plain = f"def {name}(self, {', '.join(arguments[:-1])}): ...".replace("(self, )", "(self)")
    if not isinstance(function, FunctionType):
        yield Finding(f"{name} is a {type(function).__name__}, not a plain method", plain)
        return
    yield from _of_form(name, function)
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in _POSITIONAL:
        yield Finding(f"{name} does not take self", plain)
        return
    for parameter in parameters[1:]:
        offered = ", ".join(arguments)
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            star = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else "**"
            yield Finding(
                f"{name} takes {star}{parameter.name}, which would stay empty; name what it needs of: {offered}", plain
            )
        elif parameter.name not in arguments:
            yield Finding(f"{name} takes {parameter.name}, which would never be filled; it may take: {offered}", plain)
        elif parameter.default is not inspect.Parameter.empty or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            how = "keyword-only" if parameter.kind is inspect.Parameter.KEYWORD_ONLY else "with a default"
            yield Finding(
                f"{name} takes {parameter.name} {how}, so it would never be filled; make it a plain argument", plain
            )


def _of_check(cls: type[InitializerBase]) -> Iterator[Finding]:
    function: Any = inspect.getattr_static(cls, "check", None)
    plain = "def check(self, model, trainer=None, callbacks=None): ..."
    if not isinstance(function, FunctionType):
        yield Finding(f"check is a {type(function).__name__}, not a plain method", plain)
        return
    yield from _of_form("check", function)
    try:
        inspect.signature(function).bind(None, None, trainer=None, callbacks=None)
    except TypeError as error:
        yield Finding(f"check cannot be called with (model, trainer=..., callbacks=...): {error}", plain)


def _of_source(cls: type[SourceInitializer]) -> Iterator[Finding]:
    """What a kind that locates files must keep besides."""
    config_class: Any = inspect.getattr_static(cls, "config_class", None)
    if isinstance(config_class, type) and issubclass(config_class, KindConfig):
        if not issubclass(config_class, SourceInitializerConfig):
            yield Finding(
                f"config_class {config_class.__qualname__} is no SourceInitializerConfig",
                f"derive {config_class.__qualname__} from SourceInitializerConfig",
            )
        else:
            yield from _of_core_fields(config_class)
    function: Any = inspect.getattr_static(cls, "locate", None)
    if "locate" in getattr(cls, "__abstractmethods__", ()) or not isinstance(function, FunctionType):
        return
    yield from _of_form("locate", function)
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError as error:
        yield Finding(
            f"locate cannot be called with (model_name, part): {error}", "def locate(self, model_name, part): ..."
        )


def _of_core_fields(config_class: type[SourceInitializerConfig]) -> Iterator[Finding]:
    """A key of the core with another meaning would switch off what it protects; fewer choices of the same are fine."""
    for name, own in SourceInitializerConfig.model_fields.items():
        said = config_class.model_fields[name].annotation
        if said == own.annotation or set(_choices(said)) <= set(_choices(own.annotation)) != set():
            continue
        yield Finding(
            f"the key {name} of {config_class.__qualname__} is the core's, with other values",
            f"another name for {name}, or fewer of its values: Literal[...]",
        )


def _choices(annotation: Any) -> Iterator[object]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif annotation is type(None):
        yield None
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _choices(one)
    else:
        yield annotation


def _of_form(name: str, decorated: FunctionType) -> Iterator[Finding]:
    function: Any = inspect.unwrap(decorated)
    if inspect.isasyncgenfunction(function) or inspect.iscoroutinefunction(function):
        yield Finding(f"{name} is async, so calling it would do nothing", f"def {name}, without async")
    elif inspect.isgeneratorfunction(function):
        yield Finding(
            f"{name} is a generator (it holds a yield), so calling it would do nothing",
            "move what yields into a helper, and go through it in the hook",
        )


def _of_version(cls: type[InitializerBase]) -> Iterator[Finding]:
    if "contract" not in vars(cls):
        yield Finding(
            "it does not say the contract that it was written for, so it counts as 1",
            f"contract: ClassVar[int] = {hookspec.CONTRACT_VERSION}",
        )


def _of_promises(cls: type[InitializerBase]) -> Iterator[Finding]:
    if inspect.getattr_static(cls, "check", None) is inspect.getattr_static(InitializerBase, "check"):
        yield Finding(
            "it has no check, so that a failure in init_weights may leave a model half changed",
            "def check(self, model, trainer=None, callbacks=None): raise there what can be known beforehand",
        )


def _of_config(config_class: type[KindConfig]) -> Iterator[Finding]:
    for path, field in config_fields(config_class):
        if not field.description:
            yield Finding(f"the key {path} has no description", f'{path}: ... = Field(..., description="...")')
    for inner in _models_below(config_class):
        if inner.model_config.get("extra", "ignore") == "ignore":
            yield Finding(
                f"{inner.__qualname__}, a part of the config, lets unknown keys pass",
                f'model_config = ConfigDict(extra="forbid") in {inner.__qualname__}',
            )
    try:
        config_class.model_json_schema()
    except Exception as error:  # the schema may run code of the author's fields
        yield Finding(
            f"its config has no JSON schema, for editors and noether-init schema: {str(error).splitlines()[0]}",
            "keep what comes from Python only in kwargs, out of the fields",
        )


def config_fields(cls: type[pydantic.BaseModel]) -> Iterator[tuple[str, Any]]:
    """Every key of a config and of the models below it, as ``rules.match``, with its pydantic field."""
    yield from _fields(cls, "", (cls,))


def _fields(cls: type[pydantic.BaseModel], path: str, above: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    for name, field in cls.model_fields.items():
        yield f"{path}{name}", field
        for inner in models_in(field.annotation):
            if inner not in above:
                yield from _fields(inner, f"{path}{name}.", (*above, inner))


def _models_below(cls: type[pydantic.BaseModel], seen: set[type] | None = None) -> Iterator[type[pydantic.BaseModel]]:
    seen = {cls} if seen is None else seen
    for field in cls.model_fields.values():
        for inner in models_in(field.annotation):
            if inner not in seen:
                seen.add(inner)
                yield inner
                yield from _models_below(inner, seen)


def models_in(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    """The pydantic models in an annotation; configs of other kinds are left out, they have a look of their own."""
    is_model = isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)
    if is_model and not issubclass(annotation, KindConfig):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from models_in(argument)
