"""What a format says of a file: the object in it, and which bytes are verified together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from noether_init_core.files.formats.module_versions import Versions
from noether_init_core.files.formats.object_graph import ObjectGraph
from noether_init_core.files.formats.records import Record

__all__ = ["Content"]


@attrs.frozen(eq=False)
class Content:
    """A screened file, before bytes of its tensors are read.

    Attributes:
        format: Which format it is.
        value: The object, plain Python, with ``TensorInfo`` in the place of tensors.
        graph: Where tensors are in ``value``.
        records: All bytes that carry values, in their order; each has a checksum, or none of them.
        versions: Id of a dict in ``value`` -> the versions of modules that are attached to it.
        metadata: What the file says besides ``value``; None where ``value`` is all.
    """

    format: Literal["torch", "safetensors"]
    value: Any
    graph: ObjectGraph
    records: Mapping[str, Record]
    versions: Mapping[int, Versions] = attrs.Factory(dict)
    metadata: Mapping[str, str] | None = None
