"""Builders for the names that torch.save writes: the only callables that a file can reach.

Names in a file are looked up here and nowhere else. Every builder checks its arguments and returns plain or inert
values. The memory that builders allocate is limited by the size of the file.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from noether_init_core.errors import type_of
from noether_init_core.files.content import (
    ITEMSIZES,
    ForeignName,
    ForeignObject,
    GlobalName,
    OpcodeError,
    Piece,
    Record,
    RefusedTensor,
    StorageRef,
    TensorInfo,
    TensorKey,
)

#: Limit of a dimension, stride or offset of a tensor, so that products with an item size fit into 64 bits.
_LARGEST = 1 << 58
_MOST_DIMENSIONS = 64
#: Python does not cache the hash of a tuple, so a nested key is hashed again at every use.
_KEY_DEPTH = 8
#: Cost, as a copy, of remembering a dict with a foreign key.
_MARK = 16
#: Number of bytes that are compared in about the time of one element of a tuple.
_BYTES_OF_A_PART = 64


class Scope:
    """The remaining budgets of a run over ``size`` bytes."""

    def __init__(self, size: int) -> None:
        #: Bytes or elements that calls may still copy.
        self.copies = 1024 + 2 * size
        #: Elements of compound keys that may still be hashed.
        self.key_elements = 1024 + 16 * size
        #: Comparisons that are still allowed for keys with predictable hashes.
        self.key_comparisons = (32 << 20) + 4 * size
        #: Whether the key that was weighed last contains a tensor, and whether one since this was reset is inert.
        self.has_tensor = self.has_foreign = False
        #: Dicts with keys of foreign classes. These keys may equal others, so what the dicts hold is not known.
        self.foreign_keyed: list[dict[Any, Any]] = []
        #: Key of each storage -> its dtype, or ``meta``.
        self.storages: dict[str, str] = {}

    def charge(self, amount: int) -> None:
        """Subtract a copy from the budget. Raises ``OpcodeError`` if the copies are far larger than the file."""
        self.copies -= amount
        if self.copies < 0:
            raise OpcodeError("its calls copy far more than the file holds")


Builder = Callable[[Scope, tuple[Any, ...]], Any]

_STORAGES: dict[str, str | None] = {
    "torch.BFloat16Storage": "bfloat16",
    "torch.BoolStorage": "bool",
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.ShortStorage": "int16",
    "torch.UntypedStorage": None,
    "torch.storage.UntypedStorage": None,
    "torch.storage._UntypedStorage": None,
}
# Tensors on these storages are refused with their key; the sizes of the storages are not checked.
_QUANTIZED_STORAGES = frozenset(f"torch.Q{kind}Storage" for kind in ("Int8", "Int32", "UInt8", "UInt4x2", "UInt2x4"))
_QUANTIZED_SCHEMES = frozenset(
    f"torch.per_{what}" for what in ("tensor_affine", "channel_affine", "tensor_symmetric", "channel_symmetric")
)
_PLAIN_TENSORS = frozenset({"torch.Tensor", "torch.nn.parameter.Buffer"})
_PARAMETERS = frozenset({"torch.nn.parameter.Parameter", "torch.nn.Parameter"})
_FACTORIES = frozenset(f"builtins.{kind}" for kind in ("list", "dict", "tuple", "int", "float", "str", "bool"))
_DTYPES = frozenset(f"torch.{dtype}" for dtype in ITEMSIZES)
_QUANTIZED_DTYPES = frozenset(f"torch.{dtype}" for dtype in ("qint8", "qint32", "quint8", "quint4x2", "quint2x4"))
_SUB_BYTE_DTYPES = frozenset(f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))


def set_items(scope: Scope, target: dict[Any, Any], items: Sequence[Any]) -> None:
    """Set items of ``target``; keys and values alternate. Keys are checked before they are hashed."""
    scope.has_foreign = False
    keys = _checked_keys(scope, items[0::2], len(target))
    target.update(zip(keys, items[1::2], strict=True))
    if scope.has_foreign:
        scope.charge(_MARK)
        scope.foreign_keyed.append(target)


def add_members(scope: Scope, target: set[Any], members: Sequence[Any]) -> None:
    """Add to ``target``; members are checked before they are hashed."""
    target.update(_checked_keys(scope, members, len(target)))


def _checked_keys(scope: Scope, keys: Sequence[Any], present: int) -> Sequence[Any]:
    """Check keys before they are added to ``present`` others; a key with a tensor in it is returned as ``TensorKey``.

    Hashes of numbers and tuples are predictable, so a file can choose keys that all collide. Each is then compared with
    all before it. Hashes of strings are randomized in each process, and integers below the modulus of Python's hashes
    do not collide. All other keys are counted as if they collided, with the cost of a comparison: 5,000 of them are
    accepted; 70,000 would take minutes.
    """
    kinds = set(map(type, keys))
    if kinds == {str} or (kinds == {int} and -sys.hash_info.modulus < min(keys) <= max(keys) < sys.hash_info.modulus):
        return keys
    with_tensors: dict[int, TensorKey] = {}
    for place, key in enumerate(keys, present):
        kind = type(key)
        if kind is str or (kind is int and -sys.hash_info.modulus < key < sys.hash_info.modulus):
            continue
        scope.has_tensor = False
        weight = _weight(scope, key, 0)
        if scope.has_tensor:
            with_tensors[place - present] = TensorKey(key)
        elif kind not in _SECRET_HASHES:
            scope.key_comparisons -= place * weight
            if scope.key_comparisons < 0:
                raise OpcodeError("it has so many numbers or tuples as keys that they may collide with each other")
    if not with_tensors:
        return keys
    return [with_tensors.get(number, key) for number, key in enumerate(keys)]


def _weight(scope: Scope, key: Any, depth: int) -> int:
    """Check a key and return the cost of comparing it with an equal key: its elements, long ones counted several
    times."""
    scope.key_elements -= 1
    if scope.key_elements < 0:
        raise OpcodeError("its keys are tuples with far more elements than the file holds")
    kind = type(key)
    if kind is tuple or kind is frozenset:
        if depth == _KEY_DEPTH:
            raise OpcodeError(f"a key is a tuple nested deeper than {_KEY_DEPTH}")
        return sum(_weight(scope, part, depth + 1) for part in key) or 1
    if kind in _TENSORS:
        scope.has_tensor = True
        return 1
    if kind is ForeignObject or kind is ForeignName:
        scope.has_foreign = True
    if kind not in _HASHABLE:
        raise OpcodeError(f"a key is a {kind.__name__}")
    nbytes = len(key) if kind is str or kind is bytes else key.bit_length() // 8 if kind is int else 0
    return 1 + nbytes // _BYTES_OF_A_PART


# An inert object is hashed by its address.
_SECRET_HASHES = frozenset({str, bytes, GlobalName, ForeignName, ForeignObject, TensorKey})
#: torch hashes tensors by their address, so that a dict or set may have them as keys.
_TENSORS = frozenset({TensorInfo, RefusedTensor, StorageRef})
_HASHABLE = _SECRET_HASHES | {int, float, bool, complex, type(None), range}


def storage_of(scope: Scope, records: Mapping[str, Record], reference: object) -> StorageRef | RefusedTensor:
    """Resolve a persistent id: torch.save writes only ``('storage', type, key, location, number of elements)``.

    torch gives a storage the type and place under which it appears first, so another one later is refused.
    """
    if type(reference) is not tuple or len(reference) != 5:
        raise OpcodeError("a persistent id is not that of a storage")
    tag, kind, key, location, numel = reference
    if not (type(tag) is str and tag == "storage" and isinstance(kind, GlobalName)):
        raise OpcodeError("a persistent id is not that of a storage")
    if not (type(key) is str and type(location) is str and type(numel) is int and 0 <= numel < _LARGEST):
        raise OpcodeError("the persistent id of a storage has arguments of a wrong type or size")
    used_as = "meta" if location == "meta" else _STORAGES.get(kind.name, kind.name) or "uint8"
    first = scope.storages.setdefault(key, used_as)
    if first != used_as:
        return RefusedTensor(f"its storage data/{key[:80]} is used as {first} before, and as {used_as} here")
    if kind.name not in _STORAGES:
        what = "quantized" if kind.name in _QUANTIZED_STORAGES else "of the unknown kind " + kind.name
        return RefusedTensor(f"its storage is {what}")
    if location == "meta":
        return RefusedTensor("it is a meta tensor: it has a shape and no values")
    dtype = _STORAGES[kind.name]
    nbytes = numel * (ITEMSIZES[dtype] if dtype else 1)
    record = records.get("data/" + key)
    if record is None:
        return RefusedTensor(f"its record data/{key[:80]} is missing", is_damaged=True)
    if record.size != nbytes:
        reason = f"its storage needs {nbytes} bytes, but the record data/{key} has {record.size}"
        return RefusedTensor(reason, is_damaged=True)
    return StorageRef(record.name, record.offset, nbytes, dtype)


def _tensor(args: tuple[Any, ...], dtype: str | None, extra: object) -> Any:
    storage, offset, shape, stride, requires_grad = args[:5]
    if type(storage) is RefusedTensor:
        return storage
    if type(storage) is not StorageRef:
        raise OpcodeError("a tensor has no storage")
    if type(shape) is not tuple or type(stride) is not tuple or type(offset) is not int:
        raise OpcodeError("a tensor has a shape, stride or offset of a wrong type")
    if dtype is None or dtype not in ITEMSIZES:
        return RefusedTensor(f"its dtype {dtype} cannot be read")
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        return RefusedTensor(f"it has {len(shape)} dimensions and {len(stride)} strides", is_damaged=True)
    if not (0 <= offset < _LARGEST):
        return RefusedTensor("its offset is negative or too large", is_damaged=True)
    numel, product, last, is_row_major = 1, 1, 0, True
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if type(size) is not int or type(step) is not int or size < 0 or step < 0:
            return RefusedTensor("its shape and stride are not all integers >= 0", is_damaged=True)
        is_row_major &= step == product
        numel *= size
        product *= size or 1
        last += (size - 1) * step
        if product >= _LARGEST or step >= _LARGEST:
            return RefusedTensor("its shape or stride is too large", is_damaged=True)
    itemsize = ITEMSIZES[dtype]
    is_inside = (offset + last + 1) * itemsize <= storage.nbytes
    if numel and not (is_inside and numel * itemsize <= storage.nbytes):
        shared = (
            "; its elements share memory, as after expand(). Saved again it is the same: save its contiguous() copy"
        )
        return RefusedTensor(
            f"{dtype} {list(shape)} at {offset} with stride {list(stride)} does not fit into its storage "
            f"{storage.record} ({storage.nbytes} bytes){shared if is_inside else ''}",
            is_damaged=True,
        )
    if _cannot_learn(requires_grad, dtype):
        return RefusedTensor(_NO_GRADIENT)
    is_conjugated = is_negated = False
    if extra:
        if type(extra) is not dict or not set(extra) <= {"conj", "neg"}:
            return RefusedTensor("it has unknown properties besides conj and neg")
        is_conjugated, is_negated = extra.get("conj", False), extra.get("neg", False)
        if type(is_conjugated) is not bool or type(is_negated) is not bool:
            return RefusedTensor("its properties conj and neg are not both True or False")
        if is_conjugated and not dtype.startswith("complex"):
            return RefusedTensor("it is conjugated and not complex")
    kept = None if is_row_major else stride
    nbytes = (last + 1) * itemsize if numel else 0
    # a tensor without elements may begin anywhere, and is placed within its storage
    begin = storage.offset + min(offset * itemsize, storage.nbytes)
    piece = Piece(begin, nbytes, kept, None, "", "raw", is_conjugated, is_negated)
    return TensorInfo(shape, dtype, (piece,))


#: dtypes whose tensors may require gradients; torch refuses others.
_LEARNING = ("float", "bfloat", "complex")
_NO_GRADIENT = "it requires gradients, which its dtype cannot have, or says neither True nor False"


def _cannot_learn(requires_grad: object, dtype: str) -> bool:
    return requires_grad is not False and not (requires_grad is True and dtype.startswith(_LEARNING))


def _tensor_2(scope: Scope, args: tuple[Any, ...]) -> Any:
    if len(args) not in (6, 7):
        raise OpcodeError("a tensor has a wrong number of arguments")
    storage = args[0]
    dtype = storage.dtype if type(storage) is StorageRef else None
    return _tensor(args, dtype, args[6] if len(args) == 7 else None)


def _tensor_3(scope: Scope, args: tuple[Any, ...]) -> Any:
    if len(args) not in (7, 8) or type(args[6]) is not GlobalName:
        raise OpcodeError("a tensor has a wrong number of arguments or no dtype")
    dtype = args[6].name.removeprefix("torch.")
    return _tensor(args, dtype, args[7] if len(args) == 8 else None)


def _parameter(scope: Scope, args: tuple[Any, ...]) -> Any:
    if len(args) not in (3, 4):
        raise OpcodeError("a parameter has a wrong number of arguments")
    if type(args[0]) is TensorInfo:
        if _cannot_learn(args[1], args[0].dtype):
            return RefusedTensor(_NO_GRADIENT)
        return _with_state(scope, args[0], args[3] if len(args) == 4 else None)
    if type(args[0]) is RefusedTensor:
        return args[0]
    if type(args[0]) is ForeignObject:
        return ForeignObject("torch.nn.parameter.Parameter", (args[0],))
    raise OpcodeError("a parameter is built from something that is not a tensor")


def _with_state(scope: Scope, tensor: TensorInfo, state: object) -> TensorInfo | RefusedTensor:
    """Return a tensor with attributes of its own; one with an attribute that all tensors have is refused.

    torch sets each of them, and to set ``data`` or ``real`` changes the values.
    """
    for attributes in state if type(state) is tuple and len(state) == 2 else (state,):
        if attributes is None:
            continue
        if type(attributes) is not dict:
            return RefusedTensor("its attributes are not a dict")
        scope.charge(len(attributes))
        if attributes:
            import torch  # here, because nearly no file has such attributes

            wrong = next((key for key in attributes if type(key) is not str or hasattr(torch.nn.Parameter, key)), None)
            if wrong is not None:
                shown = wrong[:80] if type(wrong) is str else type_of(wrong)
                return RefusedTensor(f"it sets the attribute {shown}, which may change its values")
    return tensor


def _of_type(scope: Scope, args: tuple[Any, ...]) -> Any:
    """Build a tensor that was written with its class: a subclass, or a plain tensor with attributes."""
    if len(args) != 4 or not (isinstance(args[0], GlobalName) and isinstance(args[1], GlobalName)):
        raise OpcodeError("a tensor of a class has arguments of a wrong type")
    if type(args[2]) is not tuple:
        raise OpcodeError("a tensor of a class has arguments of a wrong type")
    function, kind = args[0].name, args[1].name
    is_plain = kind in _PLAIN_TENSORS or kind in _PARAMETERS
    if function not in _TENSOR_FUNCTIONS and function not in KNOWN_NAMES:
        return ForeignObject(kind, (ForeignObject(function, args[2]),), args[3])
    if function not in _TENSOR_FUNCTIONS or (kind in KNOWN_NAMES and not is_plain):
        raise OpcodeError(f"a tensor of the class {kind} is built by {function}")
    tensor = BUILDERS[function](scope, args[2])
    if type(tensor) is RefusedTensor:
        return tensor
    if is_plain and type(tensor) is TensorInfo:
        return _with_state(scope, tensor, args[3])
    return ForeignObject(kind, (tensor,), args[3])


def _refuse(what: str) -> Builder:
    return lambda scope, args: RefusedTensor(f"it is {what}")


def _plain_dict(scope: Scope, args: tuple[Any, ...]) -> Any:
    """Build a dict for ``OrderedDict()``, ``OrderedDict([[key, value], ...])`` and ``Counter({...})``."""
    content = args[0] if args else {}
    scope.charge(len(content))
    if type(content) is dict:
        content = content.items()
    elif any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in content):
        raise OpcodeError("a dict is built from something that is not a pair")
    result: dict[Any, Any] = {}
    set_items(scope, result, list(itertools.chain.from_iterable(content)))
    return result


def _set(scope: Scope, args: tuple[Any, ...]) -> Any:
    result: set[Any] = set()
    scope.charge(sum(map(len, args)))
    add_members(scope, result, args[0] if args else ())
    return result


def _encode(scope: Scope, args: tuple[Any, ...]) -> Any:
    """Build bytes; protocol 2 has no opcode for them and writes latin-1 text with a call of ``_codecs.encode``."""
    if args[1] not in ("latin1", "latin-1"):
        raise OpcodeError("_codecs.encode is called with another encoding than latin-1")
    scope.charge(len(args[0]))
    return args[0].encode("latin-1")


def _byte_array(scope: Scope, args: tuple[Any, ...]) -> Any:
    content = _encode(scope, args) if len(args) == 2 else b"".join(args)
    scope.charge(len(content))
    return bytearray(content)


def _size(scope: Scope, args: tuple[Any, ...]) -> Any:
    values = args[0] if args else ()
    if any(type(value) is not int for value in values):
        raise OpcodeError("a torch.Size is built from something else than integers")
    scope.charge(len(values))
    return tuple(values)


def _range(scope: Scope, args: tuple[Any, ...]) -> Any:
    if args[2:] == (0,):
        raise OpcodeError("a range has the step 0")
    return range(*args)


def _checked(name: str, build: Builder, *signatures: tuple[type, ...]) -> Builder:
    """Return ``build`` with a check that the types of its arguments match one of ``signatures``."""

    def checked(scope: Scope, args: tuple[Any, ...]) -> Any:
        # A longer tuple is refused by its length: a file may pass one memoized tuple to many calls, and scanning it
        # each time would take quadratic time.
        if len(args) <= 3 and tuple(map(type, args)) in signatures:
            return build(scope, args)
        raise OpcodeError(f"{name} is called with {len(args)} arguments of a wrong number or type")

    return checked


_SEQUENCES: tuple[tuple[type, ...], ...] = ((), (list,), (tuple,))
_UP_TO_3 = [bounds for count in (1, 2, 3) for bounds in itertools.product((int, type(None)), repeat=count)]
#: Builders of plain values with the types of their arguments. ``bytearray(n)`` is refused, because it would allocate n
#: bytes for a few bytes of the file.
_VALUES: dict[str, tuple[Any, ...]] = {
    "_codecs.encode": (_encode, (str, str)),
    "builtins.bytearray": (_byte_array, (), (bytes,), (str, str)),
    "builtins.bytes": (lambda scope, args: b"", ()),
    "builtins.complex": (lambda scope, args: complex(*args), (float, float)),
    "builtins.frozenset": (lambda scope, args: frozenset(_set(scope, args)), *_SEQUENCES),
    "builtins.range": (_range, (int,), (int, int), (int, int, int)),
    "builtins.set": (_set, *_SEQUENCES),
    "builtins.slice": (lambda scope, args: slice(*args), *_UP_TO_3),
    "collections.Counter": (_plain_dict, (), (dict,)),
    "collections.OrderedDict": (_plain_dict, (), (dict,), (list,)),
    "collections.defaultdict": (lambda scope, args: {}, (), (type(None),), (GlobalName,)),
    "torch.Size": (_size, *_SEQUENCES),
    "torch.device": (lambda scope, args: ForeignObject("torch.device", args), (str,), (str, int)),
}
BUILDERS: dict[str, Builder] = {
    **{name: _checked(name, *spec) for name, spec in _VALUES.items()},
    "torch._tensor._rebuild_from_type": _of_type,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _refuse("a tensor of a device that needs its own software"),
    "torch._utils._rebuild_device_tensor_from_numpy": _refuse("a tensor of a device that needs its own software"),
    "torch._utils._rebuild_meta_tensor_no_storage": _refuse("a meta tensor: it has a shape and no values"),
    "torch._utils._rebuild_nested_tensor": _refuse("a nested tensor"),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_qtensor": _refuse("a quantized tensor; store it dequantized"),
    "torch._utils._rebuild_sparse_tensor": _refuse("a sparse tensor; store it with .to_dense()"),
    "torch._utils._rebuild_tensor_v2": _tensor_2,
    "torch._utils._rebuild_tensor_v3": _tensor_3,
    "torch._utils._rebuild_wrapper_subclass": _refuse("a tensor subclass without storage of its own"),
    "torch.serialization._get_layout": lambda scope, args: None,
}
_TENSOR_FUNCTIONS = frozenset(name for name in BUILDERS if name.startswith("torch._utils._rebuild_"))

#: Names that a file may contain; names without a builder may only be values or arguments.
KNOWN_NAMES = frozenset(
    {*BUILDERS, *_STORAGES, *_QUANTIZED_STORAGES, *_QUANTIZED_SCHEMES, *_PLAIN_TENSORS, *_PARAMETERS, *_FACTORIES}
    | _DTYPES
    | _QUANTIZED_DTYPES
    | _SUB_BYTE_DTYPES
)
