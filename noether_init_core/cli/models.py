"""``--model module:callable``: the model that a command is about, built by the user's own code."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

from noether_init_core.errors import ConfigError
from noether_init_core.messages import listed, near

_DEFAULT_NAME = "model"


def check_reference(said: str) -> tuple[str, str]:
    """Module and callable of ``module:callable``. Raises ``typer.BadParameter``; imports nothing."""
    module, colon, attribute = said.partition(":")
    if not colon or not module or not attribute:
        example = f"{module}:build" if module and not colon and module.isidentifier() else "my_package.models:build"
        raise _wrong(f"{said!r} is not module:callable. Next: --model {example}")
    if not all(part.isidentifier() for part in module.split(".")):
        raise _wrong(f"{module!r} is no module as Python imports it. Next: --model {Path(module).stem}:{attribute}")
    return module, attribute


def load_model(said: str, *, app_dir: Path, name: str | None = None, real: bool = False) -> Any:
    """Import the module and call the callable; what it gives, as a model or composite.

    Args:
        said: ``module:callable``, also ``module:Class.method``; something that is a model already is taken as it is.
        app_dir: Put first on the import path, and left there: models import when they are built, too.
        name: Name of a plain module in checkpoint files; None: its own ``name``, or ``model``.
        real: Build it with memory and values; else on torch's meta device, where it costs neither.

    What the user's code prints goes to standard error. Raises ``typer.BadParameter`` for a text that leads to no
    model, ``ConfigError`` where the user's code fails; its own traceback is printed and chained.
    """
    module_name, attribute = check_reference(said)
    if not app_dir.is_dir():
        raise typer.BadParameter(f"{app_dir} is no folder", param_hint="--app-dir")
    sys.path.insert(0, str(app_dir.resolve()))
    importlib.invalidate_caches()
    with contextlib.redirect_stdout(sys.stderr):
        found = _attribute(_module(module_name, said, app_dir), attribute)
        return _as_model(_built(found, said, real), said, name)


def _module(name: str, said: str, app_dir: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a module that the user's module lacks is not a wrong --model
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(f"importing {name} for --model {said}", error) from error
        parent, _, last = error.name.rpartition(".")
        folder = app_dir.joinpath(*parent.split(".")) if parent else app_dir
        there = [module.name for module in pkgutil.iter_modules([str(folder)])]
        hint = _near(last, there) or f"; {folder} has {listed(sorted(there), 8, none='no module')}"
        raise _wrong(f"no module {error.name!r}{hint}. Next: --app-dir FOLDER, if it is elsewhere") from error
    except (Exception, SystemExit) as error:
        raise _failed(f"importing {name} for --model {said}", error) from error


def _attribute(module: ModuleType, path: str) -> Any:
    found: Any = module
    shown = module.__name__
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            hint = _near(name, [other for other in dir(found) if not other.startswith("_")])
            raise _wrong(f"{shown} has no {name!r}{hint}") from error
        shown = f"{shown}.{name}"
    return found


def _built(found: Any, said: str, real: bool) -> Any:
    import torch

    from noether_init_core.models import CompositeModelLike, ModelLike

    if isinstance(found, torch.nn.Module) or (
        not isinstance(found, type) and isinstance(found, ModelLike | CompositeModelLike)
    ):
        return found
    if not callable(found):
        raise _wrong(f"{said} is {_said(found)}, which cannot be called")
    needs = _needed_arguments(found)
    if needs:
        raise _wrong(f"{said} needs {', '.join(needs)}. Next: write a function without arguments that calls it")
    try:
        with contextlib.nullcontext() if real else torch.device("meta"):
            return found()
    except (Exception, SystemExit) as error:
        hint = "" if real else ". It was built on the meta device, where tensors have no values; with values: --real"
        raise _failed(f"{said}()", error, hint) from error


def _needed_arguments(call: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _as_model(built: Any, said: str, name: str | None) -> Any:
    import torch

    from noether_init_core.models import BoundModel, CompositeModelLike, ModelLike, bind

    if isinstance(built, BoundModel) and name is not None:
        return bind(built, name)
    if isinstance(built, ModelLike | CompositeModelLike) and (name is None or not isinstance(built, torch.nn.Module)):
        return built
    if not isinstance(built, torch.nn.Module):
        raise _wrong(f"{said} gives {_said(built)}, not a module, a bound model or a composite")
    own = getattr(built, "name", None)
    return bind(built, name if name is not None else own if isinstance(own, str) else _DEFAULT_NAME)


def _failed(what: str, error: BaseException, hint: str = "") -> ConfigError:
    """The error that says what failed, once the traceback of the user's code has been printed."""
    ours = (__file__, importlib.__file__)
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        file = frame.tb_frame.f_code.co_filename
        if file not in ours and not file.startswith("<frozen importlib"):
            break
        frame = frame.tb_next
    traceback.print_exception(type(error), error, frame, file=sys.stderr)
    return ConfigError(f"--model: {what} failed: {type(error).__name__}: {error}{hint}")


def _wrong(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="--model")


def _near(name: str, others: Collection[str]) -> str:
    found = near(name, others)
    return f". Near: {', '.join(found)}" if found else ""


def _said(value: Any) -> str:
    return "None" if value is None else f"an object of class {type(value).__name__}"
