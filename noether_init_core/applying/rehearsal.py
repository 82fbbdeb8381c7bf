"""Rehearses the loading code of a model on a copy, so that a plan knows what it does with the entries of a file.

The copy has every module of the model, with tensors on the meta device, which take no memory. Only if the code needs
values, such as ``int(state["step"])``, does the copy get memory. The model itself is not touched: code that reaches it
in spite of the copy is stopped, and what it changed is put back.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from noether_init_core.applying.copying import CannotRehearseError, Copier, Watch
from noether_init_core.applying.places import is_ordinary
from noether_init_core.messages import listed
from noether_init_core.settings import isolated

#: Makes the state dict to load: on the meta device if the argument is True, else with values.
MakeState = Callable[[bool], dict[str, Any]]
#: Loads a state dict into a module; returns missing and unexpected keys, or None.
Load = Callable[[Any, dict[str, Any]], Any]

_META, _CPU = torch.device("meta"), torch.device("cpu")


@attrs.frozen
class Written:
    """What a tensor of the model holds after a rehearsal.

    Attributes:
        keys: Keys of the state dict whose values it was computed from; empty if it depends on no key.
        is_copy: Whether it is a copy of the single key, unchanged.
        shape: Its shape, which loading code may change.
        is_touched: Whether the code writes or replaces it.
        is_replaced: Whether the code registers another tensor under the name.
    """

    keys: tuple[str, ...]
    is_copy: bool
    shape: tuple[int, ...]
    is_touched: bool
    is_replaced: bool


@attrs.frozen
class Rehearsal:
    """The result of a rehearsal.

    Attributes:
        error: Why the loading code fails, or cannot be rehearsed, in words; empty if it does not.
        missing: Keys that the modules expect and that were not given.
        unexpected: Keys that were given and that no module takes; None if the loading code does not report them.
        written: Name of a parameter or buffer -> what it holds afterwards.
        is_refused: Whether ``error`` says that the code cannot be rehearsed.
        has_values: Whether the tensors had values.
    """

    error: str = ""
    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] | None = frozenset()
    written: Mapping[str, Written] = attrs.Factory(dict)
    is_refused: bool = False
    has_values: bool = False


def rehearse(
    module: torch.nn.Module, make_state: MakeState, load: Load, *, prefix: str = "", on_meta: bool = True
) -> Rehearsal:
    """Load a state dict into a copy of ``module`` at ``prefix``: on the meta device, and with values if that fails.

    ``on_meta`` False: with values at once.

    Never raises for errors of loading code or of the copy: they are ``error`` of the result.
    """
    tensors = [*module.parameters(), *module.buffers()]
    on_cpu = all(tensor.device.type in ("cpu", "meta") for tensor in tensors)
    # values of another device are tried on the CPU first, where there is more memory
    places = [*([_META] if on_meta else []), _CPU, *([] if on_cpu else [None])]
    error: BaseException | None = None
    for device in places:
        try:
            with undisturbed():
                return _rehearse(prefix, module, make_state, load, device)
        except CannotRehearseError as raised:
            return Rehearsal(str(raised), is_refused=True)
        except (Exception, SystemExit) as raised:
            error = raised
    return Rehearsal(f"{type(error).__name__}: {str(error).strip()}")


def act_on_copy(value: Any, tensors: Iterable[torch.Tensor], act: Callable[[Any], Any]) -> str:
    """Why ``act`` fails on a copy of ``value`` with values, in words; empty if it does not.

    ``tensors`` are those of ``value`` that ``act`` may change.
    """
    tensors = tuple(tensors)
    on_cpu = all(tensor.device.type in ("cpu", "meta") for tensor in tensors)
    error: BaseException | None = None
    for device in (_CPU, *([] if on_cpu else [None])):
        try:
            with undisturbed():
                copier = Copier(frozenset(map(id, tensors)), device)
                guarded(copier, partial(act, copier.of(value)), {})
            return ""
        except CannotRehearseError as raised:
            return str(raised)
        except (Exception, SystemExit) as raised:
            error = raised
    return f"{type(error).__name__}: {str(error).strip()}"


def copy_with_values(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module whose tensors have memory: zeros for those on the meta device."""
    copied: torch.nn.Module = Copier(frozenset(map(id, module.parameters())), None).of(module)
    return copied


def at_prefix(prefix: str, module: torch.nn.Module) -> torch.nn.Module:
    """Modules without tensors of their own around ``module``, so that its names begin with ``prefix``."""
    for segment in reversed(prefix.split(".")[:-1]):
        outer = torch.nn.Module()
        # add_module would refuse names such as "type" that torch.nn.Module uses itself
        outer._modules[segment] = module
        module = outer
    return module


def _rehearse(
    prefix: str, module: torch.nn.Module, make_state: MakeState, load: Load, device: torch.device | None
) -> Rehearsal:
    tensors = [*module.parameters(), *module.buffers()]
    copier = Copier(frozenset(map(id, tensors)), device)
    for tensor in tensors:  # an array may share memory with one
        copier.of(tensor)
    twin = at_prefix(prefix, copier.of(module))
    state = make_state(device == _META)
    found, origins = guarded(copier, lambda: load(twin, state), state)
    registered = [
        *twin.named_parameters(remove_duplicate=False),
        *twin.named_buffers(remove_duplicate=False),
    ]
    missing, unexpected = getattr(found, "missing_keys", ()), getattr(found, "unexpected_keys", None)
    own = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    return Rehearsal(
        "",
        frozenset(map(str, missing)),
        None if unexpected is None else frozenset(map(str, unexpected)),
        {
            name: origins.written(tensor, own.get(name.removeprefix(prefix)), copier)
            for name, tensor in registered
            if is_ordinary(tensor)
        },
        has_values=device != _META,
    )


def guarded(copier: Copier, act: Callable[[], Any], state: Mapping[str, Any]) -> tuple[Any, Origins]:
    """Call ``act``, which works on copies of ``copier``, and stop it before it changes an original.

    Raises ``CannotRehearseError`` if it reaches an original; what it changed there is put back.
    """
    watch = Watch(copier.modules, copier.tensors)
    origins = Origins(state, copier.tensors)
    found: Any = None
    try:
        with origins:
            found = act()
    finally:
        changed = [*watch.changes()]
        if changed or origins.reached:
            what = listed(dict.fromkeys([*origins.reached, *changed]), 3)
            raise CannotRehearseError(
                f"it changes the model through a global variable, a class or memory of its own ({what}), so it cannot "
                "be rehearsed on a copy"
            ) from None
    return found, origins


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep output, warnings, random numbers and settings of loading code to its real run."""
    with isolated([]), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        yield


class Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Follows values through operations: of which keys of a state dict is the memory of a tensor computed?

    An operation that changes memory of ``originals`` raises ``CannotRehearseError``; ``reached`` names it.
    """

    def __init__(self, state: Mapping[str, Any], originals: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # memory that was freed would be used again, under the same address
        self._alive: list[Any] = []
        self._originals = {self._place(tensor) for tensor in originals if is_ordinary(tensor)}
        self.reached: list[str] = []
        self._regions: dict[int, dict[_Region, tuple[frozenset[str], str]]] = {}
        self._given: dict[int, tuple[str, torch.Tensor]] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and is_ordinary(value):
                self._put(value, self._keys(value) | {key}, "")
                self._given.setdefault(self._place(value), (key, value))

    def _place(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return int(storage._cdata)

    def _keys(self, tensor: torch.Tensor) -> frozenset[str]:
        own = _region(tensor)
        regions = self._regions.get(self._place(tensor), {})
        return frozenset[str]().union(*(keys for other, (keys, _copy) in regions.items() if own.meets(other)))

    def _put(self, tensor: torch.Tensor, keys: frozenset[str], copy: str) -> None:
        own, regions = _region(tensor), self._regions.setdefault(self._place(tensor), {})
        for other, (before, _copy) in list(regions.items()):
            if own.covers(other):
                del regions[other]
            elif own.meets(other):
                regions[other] = (before | keys, "")
        regions[own] = (keys, copy)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        changed = _changed_by(func, args, kwargs)
        if any(self._place(one) in self._originals for one in changed):
            self.reached.append(str(func._schema.name).removeprefix("aten::"))
            raise CannotRehearseError("it changes the model itself, so it cannot be rehearsed on a copy")
        if func is torch.ops.aten.copy_.default and is_ordinary(args[0]) and is_ordinary(args[1]):
            target, source = args[:2]
            keys, copy = self._keys(source), self._copy_of(target, source)
            result = func(*args, **kwargs)
            self._put(target, keys, copy)
            return result
        inputs = _tensors((args, kwargs))
        keys = frozenset[str]().union(*map(self._keys, inputs))
        places = set(map(self._place, inputs))
        result = func(*args, **kwargs)
        made = [one for one in _tensors(result) if self._place(one) not in places]
        for one in (*changed, *made):
            self._put(one, keys, "")
        return result

    def _copy_of(self, target: torch.Tensor, source: torch.Tensor) -> str:
        """The key of which ``target`` becomes a copy by a copy of ``source``; empty for none."""
        if source.shape != target.shape:
            return ""
        key, given = self._given.get(self._place(source), ("", None))
        if given is not None and _same_view(given, source):
            return key
        return self._regions.get(self._place(source), {}).get(_region(source), (frozenset(), ""))[1]

    def written(self, tensor: torch.Tensor, original: torch.Tensor | None, copier: Copier) -> Written:
        """What the tensor holds now; ``original`` is the tensor of that name in the model."""
        keys = self._keys(tensor)
        _key, given = self._given.get(self._place(tensor), ("", None))
        is_given = given is not None and _same_view(given, tensor)
        copy = self._regions.get(self._place(tensor), {}).get(_region(tensor), (frozenset(), ""))[1]
        is_same = original is not None and copier.of(original) is tensor
        is_copy = len(keys) == 1 and (is_given or bool(copy))
        is_touched = not is_same or any(map(_region(tensor).meets, self._regions.get(self._place(tensor), {})))
        # NumPy may write memory that it shares with a tensor
        is_touched = is_touched or (original is not None and not tensor.is_meta and not _is_equal(tensor, original))
        return Written(tuple(sorted(keys)), is_copy, tuple(tensor.shape), is_touched, not is_same)


def _is_equal(tensor: torch.Tensor, original: torch.Tensor) -> bool:
    plain = (each.detach().resolve_conj().resolve_neg() for each in (tensor, original))
    one, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in plain)
    return original.is_meta or torch.equal(one, other.to(one.device))


@attrs.frozen
class _Region:
    """The bytes of its storage that a tensor takes."""

    begin: int
    end: int
    is_dense: bool

    def meets(self, other: _Region) -> bool:
        return self.begin < other.end and other.begin < self.end

    def covers(self, other: _Region) -> bool:
        return self.is_dense and self.begin <= other.begin and other.end <= self.end


def _region(tensor: torch.Tensor) -> _Region:
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    if not is_ordinary(tensor) or not tensor.numel():
        return _Region(begin, begin + 1, is_dense=True)
    reach = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _Region(begin, begin + reach * size, is_dense=reach == tensor.numel())


def _changed_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation changes in place."""
    if not func._schema.is_mutable:
        return []
    arguments = {argument.name: argument for argument in func._schema.arguments}
    given = [*zip(arguments, args, strict=False), *kwargs.items()]
    chosen = [value for name, value in given if (alias := arguments[name].alias_info) is not None and alias.is_write]
    return _tensors(chosen)


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested values whose memory can be followed."""
    return [one for one in tree_leaves(value) if isinstance(one, torch.Tensor) and is_ordinary(one)]


def _same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    places = [(each.shape, each.stride(), each.storage_offset()) for each in (one, other)]
    return places[0] == places[1]
