"""Rehearses the loading code of a model on a copy, so that a plan knows what it does with the entries of a file.

The copy has every module of the model, with tensors on the meta device, which take no memory. Only if the code needs
values, such as ``int(state["step"])``, does the copy get memory. The model itself is not touched.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import attrs
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from noether_init_core.applying.places import Identity, tensor_identity

#: Makes the state dict to load: on the meta device if the argument is True, else with values.
MakeState = Callable[[bool], dict[str, Any]]
#: Loads a state dict into a module; returns missing and unexpected keys, or None.
Load = Callable[[torch.nn.Module, dict[str, Any]], Any]


@attrs.frozen
class Written:
    """What a tensor of the model holds after a rehearsal.

    Attributes:
        keys: Keys of the state dict whose values it was computed from; empty if it depends on no key.
        is_copy: Whether it is a copy of the single key, unchanged.
        shape: Its shape, which loading code may change.
    """

    keys: tuple[str, ...]
    is_copy: bool
    shape: tuple[int, ...]


@attrs.frozen
class Rehearsal:
    """The result of a rehearsal.

    Attributes:
        error: Why the loading code fails, in words; empty if it does not.
        missing: Keys that the modules expect and that were not given.
        unexpected: Keys that were given and that no module takes; None if the loading code does not report them.
        written: Name of a parameter or buffer -> what it holds afterwards.
    """

    error: str = ""
    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] | None = frozenset()
    written: Mapping[str, Written] = attrs.Factory(dict)


def rehearse(
    prefix: str, module: torch.nn.Module, make_state: MakeState, load: Load, *, with_values: bool = True
) -> Rehearsal:
    """Load a state dict into a copy of ``module`` at ``prefix``: on the meta device, and with values if that fails.

    ``with_values`` False: on the meta device only.

    Never raises for errors of loading code or of the copy: they are ``error`` of the result.
    """
    error: BaseException | None = None
    for on_meta in (True, False) if with_values else (True,):
        try:
            with _undisturbed():
                return _rehearse(prefix, module, make_state, load, on_meta=on_meta)
        except (Exception, SystemExit) as raised:
            error = raised
    return Rehearsal(f"{type(error).__name__}: {str(error).strip()}")


def copy_with_values(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module whose tensors have memory: zeros for those on the meta device."""
    return _Copy(on_meta=False).of(module)


def at_prefix(prefix: str, module: torch.nn.Module) -> torch.nn.Module:
    """Modules without tensors of their own around ``module``, so that its names begin with ``prefix``."""
    for segment in reversed(prefix.split(".")[:-1]):
        outer = torch.nn.Module()
        # add_module would refuse names such as "type" that torch.nn.Module uses itself
        outer._modules[segment] = module
        module = outer
    return module


def _rehearse(prefix: str, module: torch.nn.Module, make_state: MakeState, load: Load, *, on_meta: bool) -> Rehearsal:
    twin = at_prefix(prefix, _Copy(on_meta=on_meta).of(module))
    state = make_state(on_meta)
    with _Origins(state) as origins:
        found = load(twin, state)
    registered = [
        *twin.named_parameters(remove_duplicate=False),
        *twin.named_buffers(remove_duplicate=False),
    ]
    missing, unexpected = getattr(found, "missing_keys", ()), getattr(found, "unexpected_keys", None)
    return Rehearsal(
        "",
        frozenset(map(str, missing)),
        None if unexpected is None else frozenset(map(str, unexpected)),
        {name: origins.written(tensor) for name, tensor in registered},
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep output, warnings and random numbers of loading code to its real run."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


class _Copy:
    """Copies the modules of a model; tensors go to the meta device, or are cloned.

    Attributes that cannot be copied, such as process groups, are shared. Functions that refer to a module of the
    model, as hooks do, refer to its copy afterwards.
    """

    def __init__(self, *, on_meta: bool) -> None:
        self._on_meta = on_meta
        self._memo: dict[int, Any] = {}
        self._memory: dict[Identity, torch.Tensor] = {}
        self._functions: dict[int, FunctionType] = {}

    def of(self, root: torch.nn.Module) -> torch.nn.Module:
        """The copy of ``root``."""
        modules = [*root.modules()]
        copies = [object.__new__(type(module)) for module in modules]
        self._memo.update((id(module), made) for module, made in zip(modules, copies, strict=True))
        for module in modules:
            for holder in (module._parameters, module._buffers, module.__dict__):
                for tensor in holder.values():
                    if isinstance(tensor, torch.Tensor):
                        self._tensor(tensor)
        with _CopiesTensors(self._tensor):
            for module, made in zip(modules, copies, strict=True):
                for name, value in module.__dict__.items():
                    made.__dict__[name] = self._value(value)
        root_copy: torch.nn.Module = self._memo[id(root)]
        return root_copy

    def _value(self, value: Any) -> Any:
        try:
            made = copy.deepcopy(value, self._memo)
        except Exception:  # objects without a copy are shared, as by copy.copy
            return value
        if type(made) is FunctionType:
            return self._rebound(made)
        for key, inner in made.items() if isinstance(made, dict) else ():
            if type(inner) is FunctionType:
                made[key] = self._rebound(inner)
            elif type(getattr(inner, "hook", None)) is FunctionType:  # torch's wrapper of a hook
                inner.hook = self._rebound(inner.hook)
        return made

    def _rebound(self, function: FunctionType) -> FunctionType:
        """The function with the copies of the modules that it refers to."""
        known = self._functions.get(id(function))
        if known is not None:
            return known
        closure = function.__closure__ or ()
        cells = tuple(CellType() for _cell in closure)
        made = FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells if closure else None
        )
        self._functions[id(function)] = made
        made.__defaults__ = tuple(map(self._referred, function.__defaults__ or ())) or None
        made.__kwdefaults__ = {key: self._referred(one) for key, one in (function.__kwdefaults__ or {}).items()} or None
        made.__dict__.update(function.__dict__)
        for cell, old in zip(cells, closure, strict=True):
            with contextlib.suppress(ValueError):  # a cell may be empty
                cell.cell_contents = self._referred(old.cell_contents)
        return made

    def _referred(self, value: Any) -> Any:
        if type(value) is FunctionType:
            return self._rebound(value)
        if isinstance(value, MethodType | torch.nn.Module | torch.Tensor | list | dict | tuple):
            return self._value(value)
        return value

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        known = self._memo.get(id(tensor))
        if known is not None:
            return known  # type: ignore[no-any-return]  # the memo holds copies of any type
        identity = tensor_identity(tensor)
        memory = self._memory.get(identity)
        if memory is None:
            if self._on_meta:
                memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            elif tensor.is_meta:
                memory = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
            else:
                memory = tensor.detach().clone()
            self._memory[identity] = memory
        made: torch.Tensor = memory.detach()
        if isinstance(tensor, torch.nn.Parameter):
            kind = type(tensor) if type(tensor).__torch_function__ is torch.Tensor.__torch_function__ else None
            made = torch.Tensor._make_subclass(kind or torch.nn.Parameter, made, tensor.requires_grad)
        made.__dict__.update(tensor.__dict__)
        self._memo[id(tensor)] = made
        return made


class _CopiesTensors(TorchFunctionMode):
    """Makes ``copy.deepcopy`` copy tensors by a function."""

    def __init__(self, copied: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._copied = copied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self._copied(args[0])
        return func(*args, **(kwargs or {}))


class _Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Follows values through operations: of which keys of a state dict is the memory of a tensor computed?"""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._keys: dict[int, frozenset[str]] = {}
        self._copies: dict[int, str] = {}
        # memory that was freed would be used again, under the same address
        self._alive: list[Any] = []
        self._given: dict[int, tuple[str, torch.Tensor]] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                place = self._place(value)
                self._keys[place] = self._keys.get(place, frozenset()) | {key}
                self._given.setdefault(place, (key, value))

    def _place(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return int(storage._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = {self._place(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        keys = frozenset[str]().union(*(self._keys.get(place, ()) for place in inputs))
        if func is torch.ops.aten.copy_.default:
            self._copied(*args[:2])
            return result
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                place = self._place(one)
                if place not in inputs or func._schema.is_mutable:
                    self._keys[place] = keys
                    self._copies.pop(place, None)
        return result

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        place, origin = self._place(target), self._place(source)
        keys = self._keys.get(origin, frozenset())
        is_whole = target.numel() * target.element_size() == target.untyped_storage().nbytes()
        self._keys[place] = keys if is_whole else keys | self._keys.get(place, frozenset())
        self._copies.pop(place, None)
        key, given = self._given.get(origin, ("", None))
        if is_whole and given is not None and _same_view(given, source) and given.shape == target.shape:
            self._copies[place] = key
        elif is_whole and origin in self._copies and source.shape == target.shape:
            self._copies[place] = self._copies[origin]

    def written(self, tensor: torch.Tensor) -> Written:
        """What the tensor holds now."""
        place = self._place(tensor)
        keys = self._keys.get(place, frozenset())
        given = self._given.get(place)
        is_given = given is not None and _same_view(given[1], tensor)
        return Written(tuple(sorted(keys)), len(keys) == 1 and (is_given or place in self._copies), tuple(tensor.shape))


def _same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    places = [(each.shape, each.stride(), each.storage_offset()) for each in (one, other)]
    return places[0] == places[1]
