"""A static look at the class of an initializer: what would silently not work is found before it runs.

Nothing is called and nothing is created. Names and arguments of hooks are read from ``hooks.HookSpecs``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from noether_init_core.config.base import KindConfig
from noether_init_core.hooks import HOOK_NAMES, HookSpecs
from noether_init_core.initializers.base import InitializerBase

__all__ = ["declared_version", "findings", "hook_arguments", "unimplemented"]

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
_NOT_THE_AUTHORS = ("abc", "builtins", "noether_init_core")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def hook_arguments() -> dict[str, tuple[str, ...]]:
    """Hook -> the arguments that its specification offers."""
    return {name: tuple(inspect.signature(getattr(HookSpecs, name)).parameters)[1:] for name in HOOK_NAMES}


def declared_version(cls: type[InitializerBase]) -> object:
    """The contract that ``cls`` itself declares; 1 where it declares none.

    An inherited value does not count: a base class of the core says what the installed core has, not what the author
    of ``cls`` wrote for.
    """
    return vars(cls).get("contract", 1)


def findings(cls: type[InitializerBase]) -> tuple[str, ...]:
    """Every way in which ``cls`` breaks the contract, in words; empty where it keeps it."""
    found = [*_class_findings(cls), *_name_findings(cls)]
    for name, arguments in hook_arguments().items():
        found += _hook_findings(cls, name, arguments)
    return (*found, *_check_findings(cls))


def unimplemented(cls: type[InitializerBase]) -> tuple[str, ...]:
    """The abstract methods that ``cls`` leaves, as they are called: ``locate(model_name, part)``."""
    found = []
    for name in sorted(getattr(cls, "__abstractmethods__", ())):
        function = inspect.getattr_static(cls, name)
        is_method = isinstance(function, FunctionType)
        found.append(f"{name}({', '.join([*inspect.signature(function).parameters][1:])})" if is_method else name)
    return tuple(found)


def _class_findings(cls: type[InitializerBase]) -> Iterator[str]:
    version = declared_version(cls)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        yield f"contract is {version!r}, not a whole number of at least 1"
    config_class: object = getattr(cls, "config_class", None)
    if not (isinstance(config_class, type) and issubclass(config_class, KindConfig)):
        yield f"config_class is {config_class!r}, not a subclass of KindConfig"
    elif config_class.model_config.get("extra") != "forbid":
        yield f"config_class {config_class.__qualname__} lets unknown keys pass; it must keep extra='forbid'"
    for method in unimplemented(cls):
        yield f"{method} is not implemented"
    try:
        inspect.signature(cls.__init__).bind_partial(None, None, path_provider=None)
    except TypeError as error:
        yield f"__init__ cannot be called with (config, path_provider=...): {error}"


def _own_classes(cls: type) -> Iterator[type]:
    """``cls`` and its bases below the core's own: what the author wrote."""
    for base in cls.__mro__:
        if base is cls or not (
            base.__module__.split(".")[0] == "noether_init_core" or base.__module__ in ("abc", "builtins")
        ):
            yield base


def _name_findings(cls: type[InitializerBase]) -> Iterator[str]:
    own = [name for base in _own_classes(cls) for name in vars(base)]
    known = {name for base in cls.__mro__ if base not in _own_classes(cls) for name in vars(base)}
    for name in sorted(set(own)):
        if name.startswith("_") or name in HOOK_NAMES or name in known or not callable(getattr(cls, name, None)):
            continue
        near = (
            [_MISNOMERS[name]] if name in _MISNOMERS else difflib.get_close_matches(name, HOOK_NAMES, n=1, cutoff=0.85)
        )
        # Beside the hook itself, a method of a similar name is a helper.
        if near and near[0] not in own:
            yield f"{name} is no hook and would never be called; did you mean {near[0]}?"


def _hook_findings(cls: type[InitializerBase], name: str, arguments: tuple[str, ...]) -> Iterator[str]:
    function = inspect.getattr_static(cls, name, None)
    if not isinstance(function, FunctionType):
        yield f"{name} is a {type(function).__name__}, not a plain method"
        return
    yield from _kind_of_function(name, function)
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        yield f"{name} does not take self"
        return
    for parameter in parameters[1:]:
        offered = ", ".join(arguments)
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            star = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else "**"
            yield f"{name} takes {star}{parameter.name}, which would stay empty; name what it needs of: {offered}"
        elif parameter.name not in arguments:
            yield f"{name} takes {parameter.name}, which would never be filled; it may take: {offered}"
        elif parameter.default is not inspect.Parameter.empty or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            how = "keyword-only" if parameter.kind is inspect.Parameter.KEYWORD_ONLY else "with a default"
            yield f"{name} takes {parameter.name} {how}, so it would never be filled; make it a plain argument"


def _check_findings(cls: type[InitializerBase]) -> Iterator[str]:
    function: Any = inspect.getattr_static(cls, "check", None)
    if not isinstance(function, FunctionType):
        yield f"check is a {type(function).__name__}, not a plain method"
        return
    yield from _kind_of_function("check", function)
    try:
        inspect.signature(function).bind(None, None, trainer=None, callbacks=None)
    except TypeError as error:
        yield f"check cannot be called with (model, trainer=..., callbacks=...): {error}"


def _kind_of_function(name: str, function: FunctionType) -> Iterator[str]:
    if inspect.isasyncgenfunction(function) or inspect.iscoroutinefunction(function):
        yield f"{name} is async, so calling it would do nothing"
    elif inspect.isgeneratorfunction(function):
        yield f"{name} is a generator (it holds a yield), so calling it would do nothing"
