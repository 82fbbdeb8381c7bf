"""The probe of a set: taken when the set is saved, repeated with the model that was loaded from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from noether_init_core.errors import CheckpointFormatError, ConfigError
from noether_init_core.files.plain_data import plain
from noether_init_core.models import leaf_models
from noether_init_core.nested import mapped
from noether_init_core.probe.isolated_run import called, device_of, hindrance, quietly, tensors_of
from noether_init_core.probe.outputs import Output, has_values, outputs_of, uncompared


@attrs.frozen(eq=False)
class Probe:
    """A batch, and what a model made of it.

    Attributes:
        batch: Tensors in CPU memory, plain values, and dicts, lists and tuples of them. A dict is passed as keywords, a
            list or tuple as arguments, anything else as the only argument.
        outputs: What is kept of all tensors, numbers and texts that came back.
        model: Name of the model.
        models: Paths of its single models; the model's name alone for one that is no composite.
        device: Type of the device that it ran on.
        dtype: Dtype of its first floating-point parameter or buffer; None where it has none.
        has_drawn: Whether it drew random numbers, from generators that were seeded for that: another kind of device
            draws others.
        uncompared: What else came back, in words: objects that cannot be compared.
        computed_by: Release of torch, threads and processor.
    """

    batch: Any
    outputs: tuple[Output, ...]
    model: str
    models: tuple[str, ...]
    device: str
    dtype: str | None
    has_drawn: bool
    uncompared: tuple[str, ...]
    computed_by: str


def take(model: Any, batch: Any) -> Probe:
    """Run ``model`` on a batch and keep both; the model and the process are as before.

    Raises ``ConfigError`` for a batch that cannot be kept, and for a model that cannot be run on it.
    """
    try:
        kept = _changed(plain(batch, "probe"), torch.Tensor.clone)
    except CheckpointFormatError as error:
        raise ConfigError(
            f"{error}. A probe holds tensors, plain values, and dicts, lists and tuples of them. Nothing was written"
        ) from error
    reason = hindrance(model)
    problem = check_batch(kept) or (f"{model.name} cannot be run here: {reason}" if reason else "")
    if problem:
        raise ConfigError(f"probe: {problem}. Nothing was written. Next: another probe, or save without")
    try:
        outputs, others, has_drawn = _run(model, kept)
        if not has_values(outputs):
            raise ConfigError(
                f"probe: all that {model.name} returns is NaN, which tells models apart by nothing. "
                "Next: look into its weights, or save without"
            )
    except ConfigError as error:
        error.add(". Nothing was written")
        raise
    except Exception as error:
        raise ConfigError(
            f"probe: {model.name} cannot be run on it: {type(error).__name__}: {error}. Nothing was written. A dict "
            "is passed as keywords, a list or tuple as arguments, a tensor as the only argument; dtypes stay as they "
            "are. Next: another probe, or save without"
        ) from error
    return Probe(
        kept,
        outputs,
        str(model.name),
        tuple(path for path, _leaf in leaf_models(model)),
        device_of(model).type,
        dtype_of(model),
        has_drawn,
        others,
        computed_by(model),
    )


def computed_by(model: Any) -> str:
    """What the last bits depend on: release of torch, threads, instructions of the processor, name of the GPU."""
    device = device_of(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device.type} {name}"


def repeat(model: Any, probe: Probe) -> tuple[Output, ...]:
    """What ``model`` makes of the batch of ``probe`` now; the model and the process are as before.

    If the model's dtype is another one than then, the batch follows it. Raises what the model raises.
    """
    now = dtype_of(model)
    then = None if probe.dtype is None else getattr(torch, probe.dtype, None)

    def follow(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(getattr(torch, now)) if now is not None and tensor.dtype is then else tensor

    return _run(model, _changed(probe.batch, follow))[0]


def dtype_of(model: Any) -> str | None:
    """Dtype of the first floating-point parameter, else buffer, of ``model``."""
    floating = (one.dtype for _name, one in tensors_of(model) if one.is_floating_point() or one.is_complex())
    return next((str(dtype).removeprefix("torch.") for dtype in floating), None)


def check_batch(batch: Any) -> str:
    """What is wrong with a batch, in words: keywords that are none. Empty where it can be passed."""
    if isinstance(batch, Mapping):
        wrong = [key for key in batch if not (isinstance(key, str) and key.isidentifier())]
        if wrong:
            return f"a dict is passed as keywords, and {wrong[0]!r} is none"
        if "self" in batch:
            return "a dict is passed as keywords, and 'self' is the model itself"
    return ""


def _run(model: Any, batch: Any) -> tuple[tuple[Output, ...], tuple[str, ...], bool]:
    """What came back, what of it cannot be compared, and whether random numbers were drawn."""
    function, device = called(model), device_of(model)
    # a copy: the model may write into it
    ready = _changed(batch, lambda tensor: tensor.to(device, copy=True))
    with quietly(model) as has_drawn:
        if isinstance(ready, Mapping):
            returned = function(**ready)
        elif isinstance(ready, list | tuple):
            returned = function(*ready)
        else:
            returned = function(ready)
        # in here: an output may be a buffer, which gets its former value
        return outputs_of(returned), uncompared(returned), has_drawn()


def _changed(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return mapped(batch, lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf)
