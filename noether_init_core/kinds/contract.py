"""Static checks of the class of an initializer: they find what would silently not work, before it runs.

No code of the class is called, and no instance is created. Names and arguments of hooks are read from
``hookspec.HookSpecs``.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from inspect import Parameter
from types import FunctionType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import pydantic

from noether_init_core.config.base import KindConfig
from noether_init_core.config.source import SourceInitializerConfig
from noether_init_core.errors import KindContractError
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.initializers.source import SourceInitializer
from noether_init_core.kinds.hookspec import CONTRACT_VERSION, HOOK_NAMES, HookSpecs
from noether_init_core.messages import near

# Names that authors write for a hook, although the spelling is not near.
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
_INIT = "def __init__(self, config, *, path_provider=None, ...): super().__init__(config, path_provider=path_provider)"


# Classes that were examined and keep the contract.
_good: weakref.WeakSet[type] = weakref.WeakSet()


def forget(cls: type) -> None:
    """Drop the result for a class, so that it is examined again: in a notebook its methods may have changed."""
    _good.discard(cls)


@attrs.frozen
class Finding:
    """What is wrong with a class, and what to write instead."""

    message: str
    fix: str


def check(loaded: object, kind: str, described: str, fix: str) -> type[InitializerBase]:
    """``loaded`` if it is a class that keeps the contract of this core, else ``KindContractError``; examined once.

    In the message, ``described`` names the object, and ``fix`` is the next step.
    """
    if not (isinstance(loaded, type) and issubclass(loaded, InitializerBase)):
        what = (
            f"the class {loaded.__qualname__}" if isinstance(loaded, type) else f"of type {type(loaded).__qualname__}"
        )
        problem = f"is {what}, not a subclass of InitializerBase"
        findings: tuple[str, ...] = (problem,)
    elif too_new := newer(loaded):
        findings, problem, fix = (too_new.message,), too_new.message, too_new.fix
    elif loaded not in _good and (findings := tuple(finding.message for finding in examine(loaded))):
        problem = f"breaks the contract of initializers: {'; '.join(findings)}"
    else:
        _good.add(loaded)
        return loaded
    raise KindContractError(f"{described} {problem}. Next: {fix}", kind=kind, findings=findings)


def newer(cls: type[InitializerBase]) -> Finding | None:
    """The finding for a class whose contract is newer than that of the installed core; None if it is not."""
    version = _declared_version(cls)
    if not isinstance(version, int) or version <= CONTRACT_VERSION:
        return None
    return Finding(
        f"was written for contract {version}; the installed noether-init-core has contract {CONTRACT_VERSION}",
        "pip install --upgrade noether-init-core",
    )


def examine(cls: type[InitializerBase]) -> tuple[Finding, ...]:
    """Every way in which ``cls`` breaks the contract; empty if it keeps it. A class with a finding cannot be used."""
    found = [*_of_class(cls), *_of_names(cls)]
    for name in HOOK_NAMES:
        found += _of_hook(cls, name, _arguments_of(getattr(HookSpecs, name)))
    found += _of_method(cls, "check", "(self, model, trainer=None, callbacks=None)", trainer=None, callbacks=None)
    if issubclass(cls, SourceInitializer):
        found += _of_source(cls)
    return tuple(found)


def advice(cls: type[InitializerBase]) -> Iterator[Finding]:
    """Findings that keep the contract, but will cause trouble for users or the author."""
    if "contract" not in vars(cls):
        yield Finding(
            "it does not declare the contract that it was written for, so it counts as 1",
            f"contract: ClassVar[int] = {CONTRACT_VERSION}",
        )
    if inspect.getattr_static(cls, "check", None) is inspect.getattr_static(InitializerBase, "check"):
        yield Finding(
            "it has no check, so that a failure in init_weights may leave a model half changed",
            "def check(self, model, trainer=None, callbacks=None): raise there what can be known beforehand",
        )
    inner_models: dict[type[pydantic.BaseModel], None] = {}
    for path, field in config_fields(cls.config_class):
        inner_models.update(dict.fromkeys(_models_in(field.annotation)))
        if not field.description:
            yield Finding(f"the key {path} has no description", f'{path}: ... = Field(..., description="...")')
    for inner in inner_models:
        if inner.model_config.get("extra", "ignore") == "ignore":
            yield Finding(
                f"{inner.__qualname__}, a part of the config, lets unknown keys pass",
                f'model_config = ConfigDict(extra="forbid") in {inner.__qualname__}',
            )
    try:
        cls.config_class.model_json_schema()
    except Exception as error:  # building a schema may run code of the author's fields
        yield Finding(
            f"its config has no JSON schema, for editors and ninit schema: {str(error).splitlines()[0]}",
            "keep what comes from Python only in kwargs, out of the fields",
        )


def config_fields(
    cls: type[pydantic.BaseModel], path: str = "", above: tuple[type, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Every key except ``kind`` of a config and of nested models, as ``rules.match``, with its pydantic field."""
    for name, field in cls.model_fields.items():
        if name == "kind" and not path:  # not described by the author of each kind
            continue
        yield f"{path}{name}", field
        for inner in _models_in(field.annotation):
            if inner is not cls and inner not in above:
                yield from config_fields(inner, f"{path}{name}.", (*above, cls))


def _models_in(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    """The pydantic models in an annotation, without configs of other kinds, which are examined by themselves."""
    is_model = isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)
    if is_model and not issubclass(annotation, KindConfig):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _declared_version(cls: type[InitializerBase]) -> object:
    # An inherited value is that of the installed core, not the one that the author of cls wrote for.
    return vars(cls).get("contract", 1)


def _arguments_of(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]


def _of_class(cls: type[InitializerBase]) -> Iterator[Finding]:
    version = _declared_version(cls)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        yield Finding(
            f"contract is {version!r}, not a whole number of at least 1",
            f"contract: ClassVar[int] = {CONTRACT_VERSION}",
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
    missing = set(getattr(cls, "__abstractmethods__", ()))
    if not _delegates(cls):
        own = ("init_weights", "init_optimizer")
        missing.update(one for one in own if inspect.getattr_static(cls, one) is vars(InitializerBase)[one])
    for name in sorted(missing):
        function = inspect.getattr_static(cls, name)
        method = f"{name}({', '.join(_arguments_of(function))})" if isinstance(function, FunctionType) else name
        yield Finding(f"{method} is not implemented", f"implement {method}")
    try:
        inspect.signature(cls.__init__).bind_partial(None, None, path_provider=None)
    except TypeError as error:
        yield Finding(f"__init__ cannot be called with (config, path_provider=...): {error}", _INIT)


def _delegates(cls: type) -> bool:
    """Whether a class of the author sets ``delegates``, in its body or in its ``__init__``."""
    for base in cls.__mro__[: cls.__mro__.index(InitializerBase)]:
        code = getattr(vars(base).get("__init__"), "__code__", None)
        if "delegates" in vars(base) or (code is not None and "delegates" in code.co_names):
            return True
    return False


def _of_names(cls: type[InitializerBase]) -> Iterator[Finding]:
    """Findings for methods that were probably intended as hooks."""
    core = [
        base
        for base in cls.__mro__
        if base is not cls and base.__module__.split(".")[0] in ("noether_init_core", "abc", "builtins")
    ]
    known = {name for base in core for name in vars(base)}
    own = {name for base in cls.__mro__ if base not in core for name in vars(base)}
    for name in sorted(own - known):
        # getattr would run a descriptor of the author
        is_method = isinstance(inspect.getattr_static(cls, name, None), FunctionType | classmethod | staticmethod)
        if name.startswith("_") or not is_method:
            continue
        meant = [_MISNOMERS[name]] if name in _MISNOMERS else near(name, HOOK_NAMES, 1, cutoff=0.85)
        # Beside the hook itself, a method of a similar name is a helper.
        if meant and meant[0] not in own:
            yield Finding(
                f"{name} is not a hook and would never be called; did you mean {meant[0]}?",
                f"rename it to {meant[0]}, or to _{name} if it is a helper",
            )


def _of_hook(cls: type[InitializerBase], name: str, arguments: Sequence[str]) -> Iterator[Finding]:
    function = inspect.getattr_static(cls, name, None)
    plain = f"def {name}({', '.join(('self', *arguments[:-1]))}): ..."
    yield from _of_form(function, name, plain)
    if not isinstance(function, FunctionType):
        return
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
        yield Finding(f"{name} does not take self", plain)
        return
    every = {argument for hook in HOOK_NAMES for argument in _arguments_of(getattr(HookSpecs, hook))}
    for one in parameters[1:]:
        is_plain = one.kind is Parameter.POSITIONAL_OR_KEYWORD and one.default is Parameter.empty
        shown = f"{'*, ' if one.kind is Parameter.KEYWORD_ONLY else ''}{one.replace(annotation=Parameter.empty)}"
        # An argument with a default is for direct calls, as in Noether; near the name of one that the stack fills, it
        # is a typing error, and would keep its default.
        is_optional = one.default is not Parameter.empty and not near(one.name, every, 1, cutoff=0.8)
        if one.name not in arguments and is_optional:
            continue
        if one.name not in arguments:
            allowed = ", ".join(arguments)
            yield Finding(f"{name} takes {shown}, which would never be filled; it may take: {allowed}", plain)
        elif not is_plain:
            yield Finding(f"{name} takes {shown}; {one.name} must be a plain argument, without a default", plain)


def _of_source(cls: type[SourceInitializer]) -> Iterator[Finding]:
    """Findings of the further rules for a kind that locates files."""
    config_class: Any = inspect.getattr_static(cls, "config_class", None)
    if isinstance(config_class, type) and issubclass(config_class, SourceInitializerConfig):
        for name, own in SourceInitializerConfig.model_fields.items():
            annotation = config_class.model_fields[name].annotation
            # A key of the core with another meaning would switch off a protection; fewer choices are allowed.
            if annotation != own.annotation and not set(_choices(annotation)) <= set(_choices(own.annotation)):
                yield Finding(
                    f"the key {name} of {config_class.__qualname__} is the core's, with other values",
                    f"another name for {name}, or fewer of its values: Literal[...]",
                )
    elif isinstance(config_class, type) and issubclass(config_class, KindConfig):
        yield Finding(
            f"config_class {config_class.__qualname__} is no SourceInitializerConfig",
            f"derive {config_class.__qualname__} from SourceInitializerConfig",
        )
    if "locate" not in cls.__abstractmethods__:
        arguments = _arguments_of(SourceInitializer.locate)
        yield from _of_method(cls, "locate", f"({', '.join(('self', *arguments))})", *arguments[1:])


def _choices(annotation: Any) -> Iterator[object]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _choices(one)
    else:
        yield annotation


def _of_method(cls: type, name: str, signature: str, *more: object, **keywords: object) -> Iterator[Finding]:
    """Of a method that is called with itself, one argument, ``more`` and ``keywords``."""
    function = inspect.getattr_static(cls, name, None)
    plain = f"def {name}{signature}: ..."
    yield from _of_form(function, name, plain)
    if isinstance(function, FunctionType):
        try:
            inspect.signature(function).bind(None, None, *more, **keywords)
        except TypeError as error:
            shown = signature.replace("self, ", "").replace("None", "...")
            yield Finding(f"{name} cannot be called with {shown}: {error}", plain)


def _of_form(function: object, name: str, plain: str) -> Iterator[Finding]:
    if not isinstance(function, FunctionType):
        yield Finding(f"{name} is a {type(function).__name__}, not a plain method", plain)
        return
    inner: Any = inspect.unwrap(function)
    if inspect.isasyncgenfunction(inner) or inspect.iscoroutinefunction(inner):
        yield Finding(f"{name} is async, so calling it would do nothing", f"def {name}, without async")
    elif inspect.isgeneratorfunction(inner):
        yield Finding(
            f"{name} is a generator (it holds a yield), so calling it would do nothing",
            "move what yields into a helper, and go through it in the hook",
        )
