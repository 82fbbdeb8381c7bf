"""What stands behind the names that torch.save writes: the only callables that a file can reach.

A name of a file is looked up here and nowhere else. Every builder checks its arguments and returns plain values or
inert ones; none allocates more than bytes of the file account for.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from noether_init_core.files.content import ForeignObject, GlobalName, OpcodeError, RefusedTensor, StorageRef
from noether_init_core.files.tensor_info import ITEMSIZES, Piece, TensorInfo

#: No dimension, stride or offset of a tensor is larger, so that products with an itemsize fit into 64 bits.
LARGEST = 1 << 58
_MOST_DIMENSIONS = 64
#: Tuples as keys are hashed again at every use; their elements, nested ones included, are counted.
_KEY_DEPTH = 8
#: So many keys are inserted between two looks at the clock, and this is what they may take: fifty times the usual.
_SLICE = 256
_SECONDS_PER_KEY = 5e-6


@attrs.define
class Scope:
    """What is left of three budgets of a run."""

    #: bytes or elements that calls may still copy
    copies: int
    #: elements of compound keys that may still be hashed
    key_elements: int
    #: processor time that keys may still take beyond what is usual
    key_seconds: float = 0.5

    def charge(self, amount: int) -> None:
        """Account for a copy. A file cannot ask for more memory than its own size accounts for."""
        self.copies -= amount
        if self.copies < 0:
            raise OpcodeError("its calls copy far more than the file holds")

    def charge_keys(self, count: int, seconds: float) -> None:
        """Account for the insertion of keys that are no texts.

        Hashes of numbers and tuples are no secret, so that keys can be chosen to collide, and each then takes as long
        as all before it together. Only the clock sees every way of doing that and no honest dict, however large.
        """
        self.key_seconds -= max(0.0, seconds - count * _SECONDS_PER_KEY)
        if self.key_seconds < 0:
            raise OpcodeError("its keys are numbers or tuples that collide with each other")


Builder = Callable[[Scope, tuple[Any, ...]], Any]

STORAGES: dict[str, str | None] = {
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
# Their tensors are refused with the key; the storages' sizes are not looked at.
QUANTIZED_STORAGES = frozenset(f"torch.Q{kind}Storage" for kind in ("Int8", "Int32", "UInt8", "UInt4x2", "UInt2x4"))
_QUANTIZED_SCHEMES = frozenset(
    f"torch.per_{what}" for what in ("tensor_affine", "channel_affine", "tensor_symmetric", "channel_symmetric")
)
_PLAIN_TENSORS = frozenset({"torch.Tensor", "torch.nn.parameter.Buffer"})
_PARAMETERS = frozenset({"torch.nn.parameter.Parameter", "torch.nn.Parameter"})
_FACTORIES = frozenset(f"builtins.{kind}" for kind in ("list", "dict", "tuple", "int", "float", "str", "bool"))
_DTYPES = frozenset(f"torch.{dtype}" for dtype in ITEMSIZES)
_QUANTIZED_DTYPES = frozenset(f"torch.{dtype}" for dtype in ("qint8", "qint32", "quint8", "quint4x2", "quint2x4"))
_SUB_BYTE_DTYPES = frozenset(f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))


def set_items(scope: Scope, target: dict[Any, Any], items: list[Any]) -> None:
    """Set items of ``target``; keys and values alternate. Keys are checked before they are hashed."""
    for start in range(0, len(items), 2 * _SLICE):
        part = items[start : start + 2 * _SLICE]
        keys = part[0::2]
        unusual = [key for key in keys if type(key) is not str]
        for key in unusual:
            _check_key(scope, key)
        began = time.thread_time() if unusual else 0.0
        target.update(zip(keys, part[1::2], strict=True))
        if unusual:
            scope.charge_keys(len(unusual), time.thread_time() - began)


def add_members(scope: Scope, target: set[Any], members: Iterable[Any]) -> None:
    """Add to ``target``; members are checked before they are hashed."""
    following = iter(members)
    while part := list(itertools.islice(following, _SLICE)):
        for member in part:
            _check_key(scope, member)
        began = time.thread_time()
        target.update(part)
        scope.charge_keys(len(part), time.thread_time() - began)


def _check_key(scope: Scope, key: object) -> None:
    """Check a key of a dict or a member of a set before it is hashed for the first time."""
    pending = [(key, 0)]
    while pending:
        value, depth = pending.pop()
        kind = type(value)
        scope.key_elements -= 1
        if kind is tuple or kind is frozenset:
            if depth == _KEY_DEPTH:
                raise OpcodeError(f"a key is a tuple nested deeper than {_KEY_DEPTH}")
            scope.key_elements -= len(value)  # type: ignore[arg-type]
            if scope.key_elements < 0:
                break
            pending.extend((element, depth + 1) for element in value)  # type: ignore[attr-defined]
        elif kind not in _HASHABLE:
            raise OpcodeError(f"a key is a {kind.__name__}")
    if scope.key_elements < 0:
        raise OpcodeError("its keys are tuples with far more elements than the file holds")


_HASHABLE = frozenset({str, int, float, bool, complex, bytes, type(None), range, GlobalName, ForeignObject})


def _tensor(storage: object, offset: object, shape: object, stride: object, dtype: str | None, extra: object) -> Any:
    if type(storage) is RefusedTensor:
        return storage
    if type(storage) is not StorageRef:
        raise OpcodeError("a tensor has no storage")
    if type(shape) is not tuple or type(stride) is not tuple or type(offset) is not int:
        raise OpcodeError("a tensor has a shape, stride or offset of a wrong type")
    if dtype is None or dtype not in ITEMSIZES:
        return RefusedTensor(f"its dtype {dtype} cannot be read")
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        return RefusedTensor(f"it has {len(shape)} dimensions and {len(stride)} strides")
    if not (0 <= offset < LARGEST):
        return RefusedTensor("its offset is negative or absurd")
    numel, product, last, is_row_major = 1, 1, 0, True
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if type(size) is not int or type(step) is not int or size < 0 or step < 0:
            return RefusedTensor("its shape and stride are not all whole numbers from 0 on")
        is_row_major &= step == product
        numel *= size
        product *= size or 1
        last += (size - 1) * step
        if product >= LARGEST or step >= LARGEST:
            return RefusedTensor("its shape or stride is absurd")
    itemsize = ITEMSIZES[dtype]
    if numel and ((offset + last + 1) * itemsize > storage.nbytes or numel * itemsize > storage.nbytes):
        return RefusedTensor(
            f"{dtype} {list(shape)} at {offset} with stride {list(stride)} takes more than its storage "
            f"{storage.record} has ({storage.nbytes} bytes)"
        )
    is_conjugated = is_negated = False
    if extra:
        if type(extra) is not dict or not set(extra) <= {"conj", "neg"}:
            return RefusedTensor("it has properties that are not known here")
        is_conjugated, is_negated = extra.get("conj", False) is True, extra.get("neg", False) is True
        if is_conjugated and not dtype.startswith("complex"):
            return RefusedTensor("it is conjugated and not complex")
    kept = None if is_row_major else stride
    nbytes = (last + 1) * itemsize if numel else 0
    piece = Piece(storage.offset + offset * itemsize, nbytes, kept, None, "", "raw", is_conjugated, is_negated)
    return TensorInfo(shape, dtype, (piece,))


def _tensor_2(scope: Scope, args: tuple[Any, ...]) -> Any:
    if len(args) not in (6, 7):
        raise OpcodeError("a tensor has a wrong number of arguments")
    storage = args[0]
    dtype = storage.dtype if type(storage) is StorageRef else None
    return _tensor(storage, args[1], args[2], args[3], dtype, args[6] if len(args) == 7 else None)


def _tensor_3(scope: Scope, args: tuple[Any, ...]) -> Any:
    if len(args) not in (7, 8) or type(args[6]) is not GlobalName:
        raise OpcodeError("a tensor has a wrong number of arguments or no dtype")
    dtype = args[6].name.removeprefix("torch.")
    return _tensor(args[0], args[1], args[2], args[3], dtype, args[7] if len(args) == 8 else None)


def _parameter(scope: Scope, args: tuple[Any, ...]) -> Any:
    # A fourth argument is what Python code has attached to the parameter: no part of its values.
    if len(args) not in (3, 4):
        raise OpcodeError("a parameter has a wrong number of arguments")
    if type(args[0]) is TensorInfo or type(args[0]) is RefusedTensor:
        return args[0]
    if type(args[0]) is ForeignObject:
        return ForeignObject("torch.nn.parameter.Parameter", (args[0],))
    raise OpcodeError("a parameter is built from something that is no tensor")


def _of_type(scope: Scope, args: tuple[Any, ...]) -> Any:
    """A tensor whose class is written with it: a subclass, or a plain one to which attributes were given."""
    if (
        len(args) != 4
        or type(args[0]) is not GlobalName
        or type(args[1]) is not GlobalName
        or type(args[2]) is not tuple
    ):
        raise OpcodeError("a tensor of a class has arguments of a wrong type")
    function, kind = args[0].name, args[1].name
    if function not in _TENSOR_FUNCTIONS:
        return ForeignObject(kind, (ForeignObject(function, args[2]),), args[3])
    tensor = BUILDERS[function](scope, args[2])
    is_plain = kind in _PLAIN_TENSORS or (kind in _PARAMETERS and type(tensor) is TensorInfo)
    if is_plain or type(tensor) is RefusedTensor:
        return tensor
    return ForeignObject(kind, (tensor,), args[3])


def _refuse(what: str) -> Builder:
    return lambda scope, args: RefusedTensor(f"it is {what}")


def _plain_dict(scope: Scope, args: tuple[Any, ...]) -> Any:
    """``OrderedDict()``, ``OrderedDict([[key, value], ...])``, ``Counter({...})``."""
    if not args:
        return {}
    content = args[0]
    if len(args) != 1 or type(content) not in (dict, list):
        raise OpcodeError("a dict is built from arguments of a wrong type")
    scope.charge(len(content))
    if type(content) is dict:
        return dict(content)
    result: dict[Any, Any] = {}
    if any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in content):
        raise OpcodeError("a dict is built from something that is no pair")
    set_items(scope, result, list(itertools.chain.from_iterable(content)))
    return result


def _default_dict(scope: Scope, args: tuple[Any, ...]) -> Any:
    if len(args) > 1 or (args and args[0] is not None and type(args[0]) is not GlobalName):
        raise OpcodeError("a defaultdict is built from arguments of a wrong type")
    return {}


def _set(scope: Scope, args: tuple[Any, ...]) -> Any:
    result: set[Any] = set()
    if args:
        if len(args) != 1 or type(args[0]) not in (list, tuple):
            raise OpcodeError("a set is built from arguments of a wrong type")
        scope.charge(len(args[0]))
        add_members(scope, result, args[0])
    return result


def _frozen_set(scope: Scope, args: tuple[Any, ...]) -> Any:
    return frozenset(_set(scope, args))


def _encode(scope: Scope, args: tuple[Any, ...]) -> Any:
    """How bytes are written in protocol 2: as text that is encoded again."""
    if len(args) != 2 or type(args[0]) is not str or args[1] not in ("latin1", "latin-1"):
        raise OpcodeError("_codecs.encode is used otherwise than for bytes")
    scope.charge(len(args[0]))
    return args[0].encode("latin-1")


def _bytes(scope: Scope, args: tuple[Any, ...]) -> Any:
    if args:
        raise OpcodeError("bytes are built from arguments")
    return b""


def _byte_array(scope: Scope, args: tuple[Any, ...]) -> Any:
    if len(args) == 2:
        args = (_encode(scope, args),)
    if len(args) > 1 or (args and type(args[0]) is not bytes):
        # bytearray(n) would be n bytes of memory for three bytes of file
        raise OpcodeError("a bytearray is built from something else than bytes")
    scope.charge(len(args[0]) if args else 0)
    return bytearray(*args)


def _complex(scope: Scope, args: tuple[Any, ...]) -> Any:
    if len(args) != 2 or any(type(part) is not float for part in args):
        raise OpcodeError("a complex number is built from something else than two numbers")
    return complex(*args)


def _slice(scope: Scope, args: tuple[Any, ...]) -> Any:
    if not 1 <= len(args) <= 3 or any(part is not None and type(part) is not int for part in args):
        raise OpcodeError("a slice is built from something else than whole numbers")
    return slice(*args)


def _range(scope: Scope, args: tuple[Any, ...]) -> Any:
    if not 1 <= len(args) <= 3 or any(type(part) is not int for part in args) or (len(args) == 3 and args[2] == 0):
        raise OpcodeError("a range is built from something else than whole numbers")
    return range(*args)


def _size(scope: Scope, args: tuple[Any, ...]) -> Any:
    values = args[0] if len(args) == 1 else ()
    if len(args) > 1 or type(values) not in (tuple, list) or any(type(value) is not int for value in values):
        raise OpcodeError("a torch.Size is built from something else than whole numbers")
    scope.charge(len(values))
    return tuple(values)


def _device(scope: Scope, args: tuple[Any, ...]) -> Any:
    if not 1 <= len(args) <= 2 or type(args[0]) is not str or (len(args) == 2 and type(args[1]) is not int):
        raise OpcodeError("a torch.device is built from arguments of a wrong type")
    return ForeignObject("torch.device", args)


BUILDERS: dict[str, Builder] = {
    "_codecs.encode": _encode,
    "builtins.bytearray": _byte_array,
    "builtins.bytes": _bytes,
    "builtins.complex": _complex,
    "builtins.frozenset": _frozen_set,
    "builtins.range": _range,
    "builtins.set": _set,
    "builtins.slice": _slice,
    "collections.Counter": _plain_dict,
    "collections.OrderedDict": _plain_dict,
    "collections.defaultdict": _default_dict,
    "torch.Size": _size,
    "torch.device": _device,
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

#: Names that may stand in a file; those without a builder stand as values or arguments only.
KNOWN_NAMES = frozenset(
    {*BUILDERS, *STORAGES, *QUANTIZED_STORAGES, *_QUANTIZED_SCHEMES, *_PLAIN_TENSORS, *_PARAMETERS, *_FACTORIES}
    | _DTYPES
    | _QUANTIZED_DTYPES
    | _SUB_BYTE_DTYPES
)
