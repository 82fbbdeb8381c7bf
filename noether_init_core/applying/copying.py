"""Copies of modules for a rehearsal, with everything that their code refers to, and a watch over the originals.

No code of the copied objects runs: neither constructors nor ``__deepcopy__``. Closures, methods, partial functions and
weak references refer to the copies. What cannot be copied becomes a stand-in, which raises when code uses it.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import io
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import torch

from noether_init_core.applying.places import is_ordinary

#: Values that never change, or that belong to the process: a copy refers to the same ones.
_SHARED = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type, enum.Enum, types.ModuleType, types.CodeType,
    types.BuiltinFunctionType, types.GetSetDescriptorType, logging.Logger, torch.dtype, torch.device, torch.Size,
    torch.layout, torch.memory_format, property, staticmethod, classmethod, np.generic, np.dtype,
)  # fmt: skip
_LOCKS = {type(make()): make for make in (threading.Lock, threading.RLock)}
#: Larger arrays and tensors beside the model, in bytes, are not copied: code may read but not change them.
_LARGE = 16 << 20
_IS_OF_PYTHON = 1 << 9


class CannotRehearseError(Exception):
    """Loading code needs something that a copy cannot have."""


class StandIn:
    """Stands for a value without a copy; every use raises ``CannotRehearseError``."""

    def __init__(self, value: Any) -> None:
        object.__setattr__(self, "_kind", f"{type(value).__module__}.{type(value).__qualname__}")

    def _refuse(self, *_arguments: Any, **_keywords: Any) -> Any:
        kind = object.__getattribute__(self, "_kind")
        raise CannotRehearseError(f"it uses an object of {kind}, which cannot be copied, so it cannot be rehearsed")

    __getattr__ = __setattr__ = __call__ = __iter__ = __next__ = __len__ = __bool__ = __getitem__ = _refuse
    __setitem__ = __delitem__ = __contains__ = __enter__ = __int__ = __float__ = __add__ = __eq__ = _refuse
    __radd__ = __mul__ = __rmul__ = __lt__ = __gt__ = __le__ = __ge__ = __iadd__ = __str__ = __ne__ = _refuse
    __exit__ = __await__ = _refuse
    __hash__ = object.__hash__


class Copier:
    """Copies modules with all that they refer to.

    Args:
        registered: Ids of the tensors of the model.
        device: Where copies of tensors lie: ``meta`` for no values, or None for the device of each tensor.
    """

    def __init__(self, registered: frozenset[int], device: torch.device | None) -> None:
        self._registered, self._device = registered, device
        self._memo: dict[int, Any] = {}
        # the id of an object that was freed would be used again
        self._alive: list[Any] = []
        self._memory: dict[int, torch.UntypedStorage] = {}
        self.modules: list[torch.nn.Module] = []
        self.tensors: list[torch.Tensor] = []

    def of(self, value: Any) -> Any:
        """The copy of a value; the same one for each call."""
        if isinstance(value, _SHARED) or value is Ellipsis or value is NotImplemented:
            return value
        if id(value) not in self._memo:
            # the code of tensor subclasses is not for copies either
            with torch._C.DisableTorchFunctionSubclass():
                self._known(value, self._made(value))
        return self._memo[id(value)]

    def _known(self, value: Any, made: Any) -> Any:
        if id(value) not in self._memo:
            self._alive.append(value)
            self._memo[id(value)] = made
        return made

    def _made(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, torch.nn.Module):
            return self._module(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if kind in (list, set, dict):
            made: Any = self._known(value, kind())
            self._fill(made, value)
            return made
        if kind in (tuple, frozenset):
            return kind(self.of(one) for one in value)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return types.MethodType(self.of(value.__func__), self.of(value.__self__))
        if kind is functools.partial:
            return functools.partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        if isinstance(value, weakref.ref):
            target = value()
            return value if target is None else weakref.ref(self.of(target))
        if kind is types.CellType:
            cell = self._known(value, types.CellType())
            with contextlib.suppress(ValueError):  # a cell may be empty
                cell.cell_contents = self.of(value.cell_contents)
            return cell
        if kind in _LOCKS:
            return _LOCKS[kind]()
        if isinstance(value, io.IOBase):
            # what loading code writes to a log is written by its real run only
            return io.StringIO() if isinstance(value, io.TextIOBase) else io.BytesIO()
        if isinstance(value, np.ndarray):
            return self._array(value)
        if kind is torch.Generator:
            generator = torch.Generator(value.device)
            generator.set_state(value.get_state())
            return generator
        return self._object(value)

    def _fill(self, made: Any, value: Any) -> None:
        """Copy what a container of Python holds."""
        if isinstance(value, dict):
            for key, one in dict.items(value):
                dict.__setitem__(made, self.of(key), self.of(one))
        elif isinstance(value, set):
            set.update(made, {self.of(one) for one in set.__iter__(value)})
        elif isinstance(value, list):
            list.extend(made, [self.of(one) for one in list.__iter__(value)])

    def _module(self, module: torch.nn.Module) -> Any:
        if isinstance(module, torch.jit.ScriptModule):
            raise CannotRehearseError(f"{type(module).__name__} is a compiled ScriptModule, which cannot be copied")
        if hasattr(type(module), "__del__"):
            raise CannotRehearseError(f"{type(module).__name__} has __del__, which would run for a copy as well")
        self.modules.append(module)
        made = self._known(module, _blank(type(module)))
        self._attributes(made, module)
        self._fill(made, module)
        return made

    def _attributes(self, made: Any, value: Any) -> None:
        """Copy ``__dict__`` and slots, without the code of the class."""
        for cls in type(value).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in [slots] if isinstance(slots, str) else slots:
                member = cls.__dict__.get(f"_{cls.__name__.lstrip('_')}{name}" if name[:2] == "__" else name)
                if isinstance(member, types.MemberDescriptorType):
                    with contextlib.suppress(AttributeError):  # a slot may be empty
                        member.__set__(made, self.of(member.__get__(value)))
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            made.__dict__.update({name: self.of(one) for name, one in own.items()})

    def _function(self, function: types.FunctionType) -> Any:
        if not (function.__closure__ or function.__defaults__ or function.__kwdefaults__):
            return function
        cells = tuple(types.CellType() for _cell in function.__closure__ or ())
        code, names = function.__code__, function.__globals__
        made = self._known(function, types.FunctionType(code, names, function.__name__, None, cells or None))
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            self._known(old, cell)
            with contextlib.suppress(ValueError):  # a cell may be empty
                cell.cell_contents = self.of(old.cell_contents)
        made.__defaults__ = self.of(function.__defaults__)
        made.__kwdefaults__ = self.of(function.__kwdefaults__)
        made.__qualname__, made.__module__ = function.__qualname__, function.__module__
        made.__dict__.update({name: self.of(one) for name, one in function.__dict__.items()})
        return made

    def _array(self, array: np.ndarray[Any, Any]) -> Any:
        if array.dtype.hasobject:
            return StandIn(array)
        place = array.__array_interface__["data"][0]
        for storage in self._alive:
            if isinstance(storage, torch.UntypedStorage) and storage.device.type == "cpu":
                begin = storage.data_ptr()
                if begin <= place < begin + storage.nbytes():
                    memory = self._memory[storage._cdata]
                    if memory.device.type != "cpu":
                        raise RuntimeError("an array shares memory with a tensor, so its values are needed")
                    whole = torch.empty(0, dtype=torch.uint8, device="cpu")
                    whole.set_(memory, 0, (memory.nbytes(),), (1,))
                    return np.ndarray(array.shape, array.dtype, whole.numpy(), place - begin, array.strides)
        if array.nbytes <= _LARGE and not isinstance(array, np.memmap):
            return array.copy()
        made = array.view()
        made.flags.writeable = False
        return made

    def _object(self, value: Any) -> Any:
        kind = type(value)
        if hasattr(kind, "__del__") or isinstance(value, types.GeneratorType | types.CoroutineType | threading.Thread):
            return StandIn(value)
        if kind.__module__ == "torch._C._distributed_c10d":  # such as a process group, which may be asked for its rank
            return value
        bases = [base for base in kind.__mro__ if not base.__flags__ & _IS_OF_PYTHON]
        if kind.__flags__ & _IS_OF_PYTHON and bases[0] in (object, list, dict, set):
            try:
                made = self._known(value, _blank(kind))
            except TypeError:  # a type of C that Python cannot make
                return self._reduced(value)
            self._attributes(made, value)
            self._fill(made, value)
            return made
        return self._reduced(value)

    def _reduced(self, value: Any) -> Any:
        """Copy an object of C by what its type gives to pickle."""
        try:
            reduced = value.__reduce_ex__(4)
            if isinstance(reduced, str):
                return value
            make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
            made = self._known(value, make(*self.of(arguments)))
            if hasattr(made, "__setstate__") and state is not None:
                made.__setstate__(self.of(state))
            elif state is not None:
                own, slots = state if isinstance(state, tuple) else (state, None)
                for name, one in {**(own or {}), **(slots or {})}.items():
                    object.__setattr__(made, name, self.of(one))
            for one in items or ():
                made.append(self.of(one))
            for key, one in pairs or ():
                made[self.of(key)] = self.of(one)
        except CannotRehearseError:
            raise
        except Exception:  # any type may refuse, in its own way
            return StandIn(value)
        return made

    def _tensor(self, tensor: torch.Tensor) -> Any:
        self.tensors.append(tensor)
        if not is_ordinary(tensor):
            made = tensor.detach().clone()
            made = torch.nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else made
        else:
            made = torch.Tensor._make_subclass(type(tensor), self._values(tensor), tensor.requires_grad)
        self._known(tensor, made)
        if tensor.is_leaf and tensor.grad is not None:
            made.grad = self.of(tensor.grad)
        made.__dict__.update({name: self.of(one) for name, one in tensor.__dict__.items()})
        return made

    def _values(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._alive.append(storage)
            self._memory[storage._cdata] = self._storage(tensor, storage)
        memory = self._memory[storage._cdata]
        made = torch.empty(0, dtype=tensor.dtype, device=memory.device)
        made.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
        made = torch._conj(made) if tensor.is_conj() else made
        return torch._neg_view(made) if tensor.is_neg() else made

    def _storage(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        size = storage.nbytes()
        if self._device is not None and self._device.type == "meta":
            return torch.UntypedStorage(size, device="meta")  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if tensor.is_meta:
            return torch.zeros(size, dtype=torch.uint8, device="cpu").untyped_storage()
        if size > _LARGE and id(tensor) not in self._registered:
            return storage
        made = torch.UntypedStorage(size, device=self._device or storage.device)  # type: ignore[no-untyped-call]  # as above
        return made.copy_(storage, False)


def _blank(cls: type) -> Any:
    """An object of a class, without its constructor."""
    base: Any = next(base for base in cls.__mro__ if not base.__flags__ & _IS_OF_PYTHON)
    return base.__new__(cls)


@attrs.define(eq=False)
class _Noted:
    """An object and the values that it had; ``read`` gives those that it has, ``write`` puts them back."""

    what: str
    read: Callable[[], list[Any]]
    write: Callable[[list[Any]], None]
    had: list[Any] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.had = self.read()

    def is_changed(self) -> bool:
        has = self.read()
        return len(has) != len(self.had) or any(one is not other for one, other in zip(has, self.had, strict=True))


class Watch:
    """Notes modules and tensors as they are, says what was changed, and puts it back."""

    def __init__(self, modules: list[torch.nn.Module], tensors: list[torch.Tensor]) -> None:
        noted: dict[int, Any] = {}
        for module in modules:
            name = type(module).__name__
            noted.setdefault(id(module.__dict__), _noted(f"attributes of {name}", module.__dict__))
            for attribute, value in module.__dict__.items():
                if isinstance(value, dict) or type(value) in (list, set):
                    noted.setdefault(id(value), _noted(f"{attribute} of {name}", value))
        self._noted = [one for one in noted.values() if one is not None]
        with torch._C.DisableTorchFunctionSubclass():
            self._tensors = [
                (one, one.data, one.data.data_ptr(), _version(one), _noted("attributes of a tensor", one.__dict__))
                for one in {id(tensor): tensor for tensor in tensors}.values()
                if is_ordinary(one)
            ]

    def changes(self) -> Iterator[str]:
        """What differs from before, in words; it is put back."""
        with torch._C.DisableTorchFunctionSubclass():
            yield from self._changes()

    def _changes(self) -> Iterator[str]:
        for noted in self._noted:
            if noted.is_changed():
                noted.write(noted.had)
                yield noted.what
        for tensor, data, place, version, own in self._tensors:
            if tensor.device != data.device or tensor.data.data_ptr() != place or tensor.shape != data.shape:
                tensor.data = data
                yield "a tensor of the model"
            elif _version(tensor) != version:
                yield "values of a tensor of the model"
            if own.is_changed():
                own.write(own.had)
                yield own.what


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _noted(what: str, value: Any) -> _Noted:
    if isinstance(value, dict):

        def put_pairs(had: list[Any]) -> None:
            dict.clear(value)
            dict.update(value, zip(had[::2], had[1::2], strict=True))

        return _Noted(what, lambda: [each for pair in dict.items(value) for each in pair], put_pairs)

    def put(had: list[Any]) -> None:
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(had)

    return _Noted(what, lambda: list(value), put)
