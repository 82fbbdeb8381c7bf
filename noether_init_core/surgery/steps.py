"""Steps that change tensors between file and model: their effect on shapes, and on values.

A step takes a list of tensors and returns a list: ``split`` makes several of one, ``concat`` one of several, other
steps change each. Shapes are computed before any file is read.

``STEPS`` is the only table of steps. Configs, their JSON schema, suggestions and views are derived from it: a step
class with its docstring, and for each argument the type, bounds and description of its annotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import attrs
from annotated_types import Ge, MinLen

from noether_init_core.messages import listed, yaml_line

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Grid = tuple[Positive, Positive]


class StepError(ValueError):
    """A step cannot be applied to tensors of these shapes; the message gives the reason."""


@attrs.frozen
class Step:
    """One step; its arguments are its fields. The base class serves steps that change each tensor separately."""

    #: The argument that a config may write without its name.
    short: ClassVar[str] = ""
    #: Whether the moments of an optimizer can follow the step.
    moves_moments: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The name of the step in configs."""
        return type(self).__name__.lower()

    @property
    def keeps_model(self) -> bool:
        """Whether some of the model's own elements stay beside the loaded ones."""
        return False

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Step:
        """The step with every argument that a config may leave out. Raises ``StepError``.

        Args:
            shapes: Shapes of the tensors before the step.
            outputs: How many tensors the step has to return, if it can return several.
        """
        return self

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shapes after a resolved step. Raises ``StepError``."""
        return [self._shape(shape) for shape in shapes]

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors after a resolved step; views where possible."""
        return [self._value(tensor) for tensor in tensors]

    def inverse(self, shapes: Sequence[Shape]) -> Step | None:
        """The inverse step, for tensors with ``shapes`` before this step; None for a step that loses information."""
        return None

    def _shape(self, shape: Shape) -> Shape:
        return shape

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@attrs.frozen
class Transpose(Step):
    """Exchange the last two dimensions. Tensors with fewer dimensions stay, so that one rule serves weight and bias."""

    def inverse(self, shapes: Sequence[Shape]) -> Transpose:
        return self

    def _shape(self, shape: Shape) -> Shape:
        return shape if len(shape) < 2 else (*shape[:-2], shape[-1], shape[-2])

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dim() < 2 else tensor.transpose(-2, -1)


@attrs.frozen
class Split(Step):
    """Split one tensor along a dimension: into equal parts, one for each name in ``to``, or into given sizes."""

    dim: Annotated[int, "The dimension to split."] = 0
    sizes: Annotated[
        Annotated[tuple[Positive, ...], MinLen(1)] | None, "The size of each part, in order; null: equal parts."
    ] = None
    short: ClassVar[str] = "dim"

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Split:
        shape = _only(shapes, self.name)
        dim = _dimension(self.dim, shape, self.name)
        if self.sizes is None:
            if shape[dim] % outputs:
                raise StepError(f"split: dimension {dim} has {shape[dim]}, which is not {outputs} equal parts")
            return Split(dim, (shape[dim] // outputs,) * outputs)
        if len(self.sizes) != outputs:
            raise StepError(f"split into {len(self.sizes)} sizes, but there are {outputs} names in to")
        if sum(self.sizes) != shape[dim]:
            raise StepError(
                f"split: sizes {list(self.sizes)} add up to {sum(self.sizes)}, dimension {dim} has {shape[dim]}"
            )
        return Split(dim, self.sizes)

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        shape = _only(shapes, self.name)
        return [(*shape[: self.dim], size, *shape[self.dim + 1 :]) for size in self.sizes or ()]

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(tensors[0].split_with_sizes(list(self.sizes or ()), self.dim))

    def inverse(self, shapes: Sequence[Shape]) -> Concat:
        return Concat(self.dim)


@attrs.frozen
class Concat(Step):
    """Concatenate tensors along an existing dimension."""

    dim: Annotated[int, "The dimension to concatenate along."] = 0
    short: ClassVar[str] = "dim"

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Concat:
        dim = _dimension(self.dim, shapes[0], self.name)
        rests = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
        if len({len(shape) for shape in shapes}) > 1 or len(rests) > 1:
            raise StepError(f"concat along dimension {dim}: {_listed(shapes)} differ in another dimension")
        return Concat(dim)

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        first = shapes[0]
        return [(*first[: self.dim], sum(shape[self.dim] for shape in shapes), *first[self.dim + 1 :])]

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        import torch

        return [torch.cat(list(tensors), self.dim)]

    def inverse(self, shapes: Sequence[Shape]) -> Split:
        return Split(self.dim, tuple(shape[self.dim] for shape in shapes))


@attrs.frozen
class Stack(Step):
    """Stack tensors of one shape along a new dimension."""

    dim: Annotated[int, "The new dimension."] = 0
    short: ClassVar[str] = "dim"

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Stack:
        if len(set(shapes)) > 1:
            raise StepError(f"stack needs one shape, there are {_listed(shapes)}")
        return Stack(_dimension(self.dim, (*shapes[0], len(shapes)), self.name))

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [(*shapes[0][: self.dim], len(shapes), *shapes[0][self.dim :])]

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        import torch

        return [torch.stack(list(tensors), self.dim)]

    def inverse(self, shapes: Sequence[Shape]) -> Unstack:
        return Unstack(self.dim)


@attrs.frozen
class Unstack(Step):
    """Split one tensor along a dimension into tensors without that dimension."""

    dim: Annotated[int, "The dimension to remove."] = 0
    short: ClassVar[str] = "dim"

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Unstack:
        shape = _only(shapes, self.name)
        dim = _dimension(self.dim, shape, self.name)
        if shape[dim] != outputs:
            raise StepError(f"unstack: dimension {dim} has {shape[dim]}, but there are {outputs} names in to")
        return Unstack(dim)

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        shape = _only(shapes, self.name)
        return [(*shape[: self.dim], *shape[self.dim + 1 :])] * shape[self.dim]

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(tensors[0].unbind(self.dim))

    def inverse(self, shapes: Sequence[Shape]) -> Stack:
        return Stack(self.dim)


@attrs.frozen
class Reshape(Step):
    """Give the tensor another shape with the same elements."""

    shape: Annotated[
        tuple[Annotated[int, Ge(-1)], ...], MinLen(1), "The new shape; one dimension may be -1, which is computed."
    ]
    short: ClassVar[str] = "shape"

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Reshape:
        numbers = {math.prod(shape) for shape in shapes}
        known = math.prod(size for size in self.shape if size != -1)
        unknown = self.shape.count(-1)
        number = max(numbers)
        if len(numbers) > 1 or unknown > 1 or (not known or number % known if unknown else number != known):
            raise StepError(f"reshape: {_listed(shapes)} cannot become {list(self.shape)}")
        return Reshape(tuple(number // known if size == -1 else size for size in self.shape))

    def inverse(self, shapes: Sequence[Shape]) -> Reshape | None:
        return Reshape(shapes[0]) if len(set(shapes)) == 1 else None

    def _shape(self, shape: Shape) -> Shape:
        return self.shape

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(self.shape)


@attrs.frozen
class Slice(Step):
    """Take a part along one dimension: from ``start`` to before ``stop``."""

    dim: Annotated[int, "The dimension to cut."] = 0
    start: Annotated[Count, "The first index that is taken, from 0."] = 0
    stop: Annotated[Positive | None, "The index to stop before; null: to the end."] = None

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Slice:
        dim = _dimension(self.dim, shapes[0], self.name)
        sizes = {shape[dim] if dim < len(shape) else 0 for shape in shapes}
        if self.stop is None and len(sizes) > 1:
            raise StepError(f"slice: stop is required, because {_listed(shapes)} differ in dimension {dim}")
        stop = max(sizes) if self.stop is None else self.stop
        if not 0 <= self.start < stop <= min(sizes):
            raise StepError(f"slice: {self.start} to {self.stop} is not within dimension {dim} of {_listed(shapes)}")
        return Slice(dim, self.start, stop)

    def _shape(self, shape: Shape) -> Shape:
        return (*shape[: self.dim], (self.stop or 0) - self.start, *shape[self.dim + 1 :])

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(self.dim, self.start, (self.stop or 0) - self.start)


@attrs.frozen
class Pad(Step):
    """Make one dimension longer, at its end.

    Without a value, the model's own elements stay there, such as freshly initialized rows of an embedding. Then the
    step must be the last one, and moments of an optimizer are zero there.
    """

    size: Annotated[Positive, "The new size of the dimension."]
    dim: Annotated[int, "The dimension that grows."] = 0
    value: Annotated[float | None, "The value of the new elements; null: the model's own elements stay."] = None

    @property
    def keeps_model(self) -> bool:
        return self.value is None

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Pad:
        dim = _dimension(self.dim, shapes[0], self.name)
        if any(dim >= len(shape) or shape[dim] > self.size for shape in shapes):
            raise StepError(f"pad: dimension {dim} of {_listed(shapes)} is longer than {self.size} already")
        return Pad(self.size, dim, self.value)

    def _shape(self, shape: Shape) -> Shape:
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        filling = 0 if self.value is None else self.value
        new = torch.full(self._shape(tuple(tensor.shape)), filling, dtype=tensor.dtype, device=tensor.device)
        new.narrow(self.dim, 0, tensor.shape[self.dim]).copy_(tensor)
        return new


@attrs.frozen
class Interpolate(Step):
    """Interpolate a position embedding to another grid of patches.

    The embedding has the shape ``[..., prefix_tokens + rows * columns, channels]``; the first ``prefix_tokens`` (a
    class token) are copied. Corners are not aligned, a smaller grid is smoothed, and it is computed in float32.
    """

    grid: Annotated[Grid, "Rows and columns in the file."]
    to_grid: Annotated[Grid, "Rows and columns in the model."]
    prefix_tokens: Annotated[Count, "Leading entries that are not in the grid, such as a class token."] = 0
    mode: Annotated[Literal["bicubic", "bilinear"], "The kind of interpolation."] = "bicubic"
    moves_moments: ClassVar[bool] = False

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Interpolate:
        patches = math.prod(self.grid)
        tokens = self.prefix_tokens + patches
        for shape in shapes:
            if len(shape) < 2 or shape[-2] != tokens:
                more = shape[-2] - patches if len(shape) > 1 else -1
                hint = f". Next: prefix_tokens: {more}" if 0 <= more <= 4 else ""
                raise StepError(
                    f"interpolate: a grid of {self.grid[0]} x {self.grid[1]} with {self.prefix_tokens} prefix tokens "
                    f"is {tokens} tokens, the tensor is {list(shape)}{hint}"
                )
        return self

    def _shape(self, shape: Shape) -> Shape:
        return (*shape[:-2], self.prefix_tokens + math.prod(self.to_grid), shape[-1])

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        prefix, patches = tensor[..., : self.prefix_tokens, :], tensor[..., self.prefix_tokens :, :]
        channels = tensor.shape[-1]
        image = patches.reshape(-1, *self.grid, channels).permute(0, 3, 1, 2).float()
        image = torch.nn.functional.interpolate(
            image, size=self.to_grid, mode=self.mode, align_corners=False, antialias=True
        )
        patches = image.permute(0, 2, 3, 1).reshape(*tensor.shape[:-2], -1, channels).to(tensor.dtype)
        return torch.cat([prefix, patches], -2)


@attrs.frozen
class Cast(Step):
    """Convert to a dtype, also where ``cast:`` of the config does not allow it."""

    dtype: Annotated[str, "The new dtype, such as float32."]
    short: ClassVar[str] = "dtype"

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        return tensor.to(getattr(torch, self.dtype))


#: Name in a config -> an example of the step.
STEPS: Mapping[str, Step] = {
    step.name: step
    for step in (
        Transpose(),
        Split(0),
        Concat(0),
        Stack(0),
        Unstack(0),
        Reshape((8, -1)),
        Slice(0, 0, 4),
        Pad(8),
        Interpolate((14, 14), (16, 16)),
        Cast("float32"),
    )
}


def shapes_after(
    steps: Sequence[Step], shapes: Sequence[Shape], outputs: int, most: float = math.inf
) -> tuple[tuple[Step, ...], list[Shape]]:
    """The steps resolved one after the other, and the resulting shapes. Raises ``StepError``.

    Args:
        steps: The steps in order.
        shapes: Shapes of the tensors before them.
        outputs: How many tensors must result; the last ``split`` or ``unstack`` makes that many.
        most: How many elements all tensors together may have after any step.
    """
    resolved, current = [], list(shapes)
    for step in steps:
        ready = step.resolved(current, outputs)
        current = ready.shapes(current)
        if sum(map(math.prod, current)) > most:
            raise StepError(f"a step makes many more elements than file and model have (over {most:,})")
        resolved.append(ready)
    if len(current) != outputs:
        raise StepError(
            f"{len(shapes)} tensors become {len(current)}, but there {'is' if outputs == 1 else 'are'} {outputs} in to"
            + (": several need concat or stack" if len(current) > outputs else ": it needs split or unstack")
        )
    return tuple(resolved), current


def carry_out(steps: Sequence[Step], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors after all steps, which ``shapes_after`` has resolved."""
    current = list(tensors)
    for step in steps:
        current = step.apply(current)
    return current


def written(step: Step) -> Any:
    """The step as a config writes it, without optional arguments: ``transpose``, ``{split: 0}``."""
    arguments = {
        field.name: list(value) if isinstance(value := getattr(step, field.name), tuple) else value
        for field in attrs.fields(type(step))
        if field.name == step.short or getattr(step, field.name) != field.default
    }
    if isinstance(step, Split) and len(set(step.sizes or ())) == 1:
        del arguments["sizes"]
    if not attrs.fields(type(step)):
        return step.name
    return {step.name: arguments[step.short] if arguments.keys() == {step.short} else arguments}


@lru_cache(maxsize=1024)
def described(step: Step) -> str:
    """The step as a config writes it, as text: ``transpose``, ``split: 0``."""
    plain = written(step)
    return plain if isinstance(plain, str) else f"{step.name}: {yaml_line(plain[step.name])}"


def _only(shapes: Sequence[Shape], name: str) -> Shape:
    if len(shapes) != 1:
        raise StepError(f"{name} takes one tensor, there are {len(shapes)}; concat or stack them first")
    return shapes[0]


def _dimension(dim: int, shape: Shape, name: str) -> int:
    if not -len(shape) <= dim < len(shape):
        raise StepError(f"{name}: {list(shape)} has no dimension {dim}")
    return dim % len(shape) if shape else dim


def _listed(shapes: Sequence[Shape]) -> str:
    return listed(map(list, dict.fromkeys(shapes)))
