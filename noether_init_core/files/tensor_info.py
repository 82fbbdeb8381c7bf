"""What a checkpoint says of its tensors, known without torch and without reading their bytes."""

from __future__ import annotations

import attrs

__all__ = ["ITEMSIZES", "TensorInfo"]

#: Bytes per element of every dtype that can be read, by torch's name without ``torch.``.
ITEMSIZES = {
    "bfloat16": 2,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
    "bits8": 1,
    "bool": 1,
    "complex128": 16,
    "complex32": 4,
    "complex64": 8,
    "float16": 2,
    "float32": 4,
    "float4_e2m1fn_x2": 1,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "int8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "uint8": 1,
}


@attrs.frozen
class TensorInfo:
    """One tensor of a file: how it looks, and where its bytes are.

    ``storage_offset`` and ``stride`` count elements, ``nbytes`` is the number of elements times their size. Two keys
    with equal ``record``, ``storage_offset``, ``shape`` and ``stride`` are one tensor (tied weights). The stored bytes
    of a tensor with ``is_conjugated`` or ``is_negated`` are those before that lazy operation; reading carries it out.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    record: str
    storage_offset: int
    stride: tuple[int, ...]
    is_parameter: bool = False
    is_conjugated: bool = False
    is_negated: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZES[self.dtype]

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last one that the tensor uses."""
        if self.nbytes == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in the storage one after the other, in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.nbytes == 0
            expected *= size
        return True
