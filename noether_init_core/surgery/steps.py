"""Steps that change tensors on their way from a file into a model: what they make of shapes, and of values.

A step takes a list of tensors and gives a list: ``split`` makes several of one, ``concat`` one of several, others
change each. What it makes of shapes is decided before anything is read, so that values cannot surprise anybody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import attrs

if TYPE_CHECKING:
    import torch

__all__ = [
    "Cast",
    "Concat",
    "Interpolate",
    "Pad",
    "Reshape",
    "Shape",
    "Slice",
    "Split",
    "Stack",
    "Step",
    "StepError",
    "Transpose",
    "Unstack",
    "carry_out",
    "described",
    "largest_between",
    "shapes_after",
    "step_from_dict",
    "step_to_dict",
]

Shape = tuple[int, ...]
#: Elements that a step may make of a tensor; a config must not ask for all memory.
_MOST_ELEMENTS = 1 << 40


class StepError(ValueError):
    """A step cannot be taken with tensors of these shapes; the message says why."""


class Step(Protocol):
    """One step. ``name`` is how configs write it; steps without ``inverse`` lose something."""

    name: ClassVar[str]
    #: Whether values of an optimizer's moments can follow.
    moves_moments: ClassVar[bool]

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Step:
        """The step with everything said that a config may leave out. Raises ``StepError``."""
        ...

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shapes afterwards, of a resolved step. Raises ``StepError``."""
        ...

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors afterwards, of a resolved step; views where that can be."""
        ...

    def inverse(self, shapes: Sequence[Shape]) -> Step | None:
        """The step back, for tensors that had ``shapes`` before; None where there is none."""
        ...


@attrs.frozen
class Transpose:
    """Exchange the last two dimensions; tensors of fewer dimensions stay, so that one rule serves weight and bias."""

    name: ClassVar[str] = "transpose"
    moves_moments: ClassVar[bool] = True

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Transpose:
        return self

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [shape if len(shape) < 2 else (*shape[:-2], shape[-1], shape[-2]) for shape in shapes]

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor if tensor.dim() < 2 else tensor.transpose(-2, -1) for tensor in tensors]

    def inverse(self, shapes: Sequence[Shape]) -> Transpose:
        return self


@attrs.frozen
class Split:
    """Cut one tensor along a dimension: into equal parts, or into ``sizes``."""

    dim: int = 0
    sizes: tuple[int, ...] | None = None
    name: ClassVar[str] = "split"
    moves_moments: ClassVar[bool] = True

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Split:
        shape = _only(shapes, self.name)
        dim = _dimension(self.dim, shape, self.name)
        if self.sizes is None:
            if shape[dim] % outputs:
                raise StepError(f"split: {shape[dim]} rows of dimension {dim} do not make {outputs} equal parts")
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
class Concat:
    """Put tensors behind each other along a dimension that they have."""

    dim: int = 0
    name: ClassVar[str] = "concat"
    moves_moments: ClassVar[bool] = True

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
class Stack:
    """Put tensors of one shape behind each other along a new dimension."""

    dim: int = 0
    name: ClassVar[str] = "stack"
    moves_moments: ClassVar[bool] = True

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
class Unstack:
    """Take one tensor apart along a dimension, which is gone afterwards."""

    dim: int = 0
    name: ClassVar[str] = "unstack"
    moves_moments: ClassVar[bool] = True

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
class Reshape:
    """The same elements in another shape; one size may be -1."""

    shape: Shape
    name: ClassVar[str] = "reshape"
    moves_moments: ClassVar[bool] = True

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Reshape:
        numbers = {math.prod(shape) for shape in shapes}
        known = math.prod(size for size in self.shape if size != -1)
        if len(numbers) > 1 or (-1 not in self.shape and numbers != {known}):
            raise StepError(f"reshape: {_listed(shapes)} cannot become {list(self.shape)}")
        if -1 not in self.shape:
            return self
        (number,) = numbers
        if self.shape.count(-1) > 1 or not known or number % known:
            raise StepError(f"reshape: {_listed(shapes)} cannot become {list(self.shape)}")
        return Reshape(tuple(number // known if size == -1 else size for size in self.shape))

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [self.shape] * len(shapes)

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.reshape(self.shape) for tensor in tensors]

    def inverse(self, shapes: Sequence[Shape]) -> Reshape | None:
        return Reshape(shapes[0]) if len(set(shapes)) == 1 else None


@attrs.frozen
class Slice:
    """The elements from ``start`` to before ``stop`` of a dimension."""

    dim: int = 0
    start: int = 0
    stop: int | None = None
    name: ClassVar[str] = "slice"
    moves_moments: ClassVar[bool] = True

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Slice:
        dim = _dimension(self.dim, shapes[0], self.name)
        sizes = {shape[dim] if dim < len(shape) else None for shape in shapes}
        stop = self.stop
        for size in sizes:
            stop = size if self.stop is None else self.stop
            if size is None or stop is None or not 0 <= self.start < stop <= size:
                raise StepError(
                    f"slice: {self.start} to {self.stop} is not within dimension {dim} of {_listed(shapes)}"
                )
        if self.stop is None and len(sizes) > 1:
            raise StepError(f"slice: say stop, since {_listed(shapes)} differ in dimension {dim}")
        return Slice(dim, self.start, stop)

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        size = (self.stop or 0) - self.start
        return [(*shape[: self.dim], size, *shape[self.dim + 1 :]) for shape in shapes]

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.narrow(self.dim, self.start, (self.stop or 0) - self.start) for tensor in tensors]

    def inverse(self, shapes: Sequence[Shape]) -> None:
        return None


@attrs.frozen
class Pad:
    """Lengthen a dimension at its end to ``size``, with ``value``.

    Without a value the model's own elements stay there, such as freshly initialized rows of an embedding; then the
    step has to be the last one, and moments of an optimizer are zero there.
    """

    size: int
    dim: int = 0
    value: float | None = None
    name: ClassVar[str] = "pad"
    moves_moments: ClassVar[bool] = True

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Pad:
        dim = _dimension(self.dim, shapes[0], self.name)
        if any(dim >= len(shape) or shape[dim] > self.size for shape in shapes):
            raise StepError(f"pad: dimension {dim} of {_listed(shapes)} is longer than {self.size} already")
        if any(math.prod(shape) * self.size > _MOST_ELEMENTS for shape in shapes):
            raise StepError(f"pad to {self.size} is absurd for {_listed(shapes)}")
        return Pad(self.size, dim, self.value)

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [(*shape[: self.dim], self.size, *shape[self.dim + 1 :]) for shape in shapes]

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        import torch

        padded = []
        for tensor, shape in zip(tensors, self.shapes([tuple(tensor.shape) for tensor in tensors]), strict=True):
            new = torch.full(shape, 0 if self.value is None else self.value, dtype=tensor.dtype)
            new.narrow(self.dim, 0, tensor.shape[self.dim]).copy_(tensor)
            padded.append(new)
        return padded

    def inverse(self, shapes: Sequence[Shape]) -> None:
        return None


@attrs.frozen
class Interpolate:
    """Resample a position embedding from one grid of patches to another.

    The embedding is ``[..., prefix_tokens + rows * columns, channels]``; the first ``prefix_tokens`` (a class token)
    are taken over. Bicubic, without aligned corners, smoothed where the grid becomes smaller; computed in float32.
    """

    grid: tuple[int, int]
    to_grid: tuple[int, int]
    prefix_tokens: int = 0
    mode: str = "bicubic"
    name: ClassVar[str] = "interpolate"
    moves_moments: ClassVar[bool] = False

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Interpolate:
        tokens = self.prefix_tokens + self.grid[0] * self.grid[1]
        for shape in shapes:
            if len(shape) < 2 or shape[-2] != tokens:
                more = shape[-2] - self.grid[0] * self.grid[1] if len(shape) > 1 else -1
                hint = f". Next: prefix_tokens: {more}" if 0 <= more <= 4 else ""
                raise StepError(
                    f"interpolate: a grid of {self.grid[0]} x {self.grid[1]} with {self.prefix_tokens} prefix tokens "
                    f"is {tokens} tokens, the tensor is {list(shape)}{hint}"
                )
        return self

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        tokens = self.prefix_tokens + self.to_grid[0] * self.to_grid[1]
        return [(*shape[:-2], tokens, shape[-1]) for shape in shapes]

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        import torch

        done = []
        for tensor in tensors:
            prefix, patches = tensor[..., : self.prefix_tokens, :], tensor[..., self.prefix_tokens :, :]
            channels = tensor.shape[-1]
            image = patches.reshape(-1, *self.grid, channels).permute(0, 3, 1, 2).float()
            options: dict[str, Any] = {} if self.mode == "nearest" else {"align_corners": False, "antialias": True}
            image = torch.nn.functional.interpolate(image, size=self.to_grid, mode=self.mode, **options)
            patches = image.permute(0, 2, 3, 1).reshape(*tensor.shape[:-2], -1, channels).to(tensor.dtype)
            done.append(torch.cat([prefix, patches], -2))
        return done

    def inverse(self, shapes: Sequence[Shape]) -> None:
        return None


@attrs.frozen
class Cast:
    """Convert to a dtype, by torch's name without ``torch.``; allowed here whatever the config says of casts."""

    dtype: str
    name: ClassVar[str] = "cast"
    moves_moments: ClassVar[bool] = True

    def resolved(self, shapes: Sequence[Shape], outputs: int) -> Cast:
        return self

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return list(shapes)

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        import torch

        return [tensor.to(getattr(torch, self.dtype)) for tensor in tensors]

    def inverse(self, shapes: Sequence[Shape]) -> None:
        return None


_STEPS: dict[str, Any] = {
    kind.name: kind for kind in (Transpose, Split, Concat, Stack, Unstack, Reshape, Slice, Pad, Interpolate, Cast)
}


def shapes_after(steps: Sequence[Step], shapes: Sequence[Shape], outputs: int) -> tuple[tuple[Step, ...], list[Shape]]:
    """The steps resolved one after the other, and the shapes at the end. Raises ``StepError``.

    ``outputs`` is how many tensors there have to be then; the last ``split`` or ``unstack`` makes that many.
    """
    resolved, current = [], list(shapes)
    for step in steps:
        ready = step.resolved(current, outputs)
        current = ready.shapes(current)
        resolved.append(ready)
    if len(current) != outputs:
        raise StepError(
            f"{len(shapes)} tensors become {len(current)}, but there {'is' if outputs == 1 else 'are'} {outputs} in to"
            + (": several need concat or stack" if len(current) > outputs else ": it needs split or unstack")
        )
    return tuple(resolved), current


def largest_between(steps: Sequence[Step], shapes: Sequence[Shape]) -> int:
    """The most elements that all tensors together have after any of the steps, which are resolved."""
    current, most = list(shapes), 0
    for step in steps:
        current = step.shapes(current)
        most = max(most, sum(math.prod(shape) for shape in current))
    return most


def carry_out(steps: Sequence[Step], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors after all steps, which were resolved by ``shapes_after``."""
    current = list(tensors)
    for step in steps:
        current = step.apply(current)
    return current


def step_to_dict(step: Step) -> dict[str, Any]:
    """As plain data, with ``step`` for the name."""
    return {"step": step.name, **attrs.asdict(step)}  # type: ignore[arg-type]  # every step is an attrs class


def step_from_dict(values: Mapping[str, Any]) -> Step:
    """The reverse of ``step_to_dict``."""
    kind = _STEPS[values["step"]]
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    del arguments["step"]
    step: Step = kind(**arguments)
    return step


def described(step: Step) -> str:
    """As a config writes it: ``split 0``, ``interpolate 14 x 14 to 16 x 16``."""
    match step:
        case Split(dim, sizes):
            return f"split {dim}" if sizes is None or len(set(sizes)) == 1 else f"split {dim} {list(sizes)}"
        case Concat(dim) | Stack(dim) | Unstack(dim):
            return f"{step.name} {dim}"
        case Reshape(shape):
            return f"reshape {list(shape)}"
        case Slice(dim, start, stop):
            return f"slice {dim} [{start}:{stop}]"
        case Pad(size, dim, _):
            return f"pad {dim} to {size}"
        case Interpolate(grid, to_grid, _, _):
            return f"interpolate {grid[0]} x {grid[1]} to {to_grid[0]} x {to_grid[1]}"
        case Cast(dtype):
            return f"cast {dtype}"
        case _:
            return step.name


def _only(shapes: Sequence[Shape], name: str) -> Shape:
    if len(shapes) != 1:
        raise StepError(f"{name} takes one tensor, there are {len(shapes)}; concat or stack them first")
    return shapes[0]


def _dimension(dim: int, shape: Shape, name: str) -> int:
    if not -len(shape) <= dim < len(shape):
        raise StepError(f"{name}: {list(shape)} has no dimension {dim}")
    return dim % len(shape) if shape else dim


def _listed(shapes: Sequence[Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
