"""Read and restore states of random generators as plain tensors and lists, and derive seeds."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch

from noether_init_core.errors import StateMismatchError, type_of
from noether_init_core.messages import logger_of, one_line
from noether_init_core.nested import equal

_logger = logger_of(__name__)


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a seed of 63 bits, a pure function of ``seed`` and ``path`` that is the same on every machine."""
    text = ":".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), Python's ``random`` and NumPy's global generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # NumPy accepts only 32 bits


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of the CPU inside the block, and restore their states afterwards."""
    kept = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    # torch.manual_seed would also seed the accelerators, and their states would have to be restored as well.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        numpy.random.set_state(kept[2])


def take_rng() -> dict[str, Any]:
    """Return the states of torch (CPU and each CUDA device in use), Python's ``random`` and NumPy.

    They consist of tensors, numbers, lists and None only, so that ``torch.load(weights_only=True)`` can read them.
    """
    version, numbers, gauss = random.getstate()
    legacy = numpy.random.get_state(legacy=False)
    if not isinstance(legacy, dict) or legacy.get("bit_generator") != "MT19937":
        raise StateMismatchError(
            "NumPy's global generator was replaced by one other than MT19937, which cannot be stored. Next: keep the "
            "global generator, and pass your own generator to TrainerState as a stateful object"
        )
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "state": torch.tensor(numbers, dtype=torch.int64, device="cpu"), "gauss": gauss},
        "numpy": {
            "state": torch.from_numpy(legacy["state"]["key"].astype(numpy.int64)),
            "position": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
    }
    # On a CUDA device that is not initialized, nothing was drawn; reading its state would initialize it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch lacks it
        state["cuda"] = [device_state.cpu() for device_state in torch.cuda.get_rng_state_all()]
    return state


def check_rng(state: Mapping[str, Any]) -> None:
    """Raise ``StateMismatchError`` unless ``put_rng(state)`` will succeed; no generator is changed."""
    try:
        cpu, python, legacy = _parsed(state)
        torch.Generator("cpu").set_state(cpu)
        random.Random().setstate(python)
        numpy.random.RandomState().set_state(legacy)
        for device_state in state.get("cuda", ()):
            if device_state.dtype != torch.uint8:
                raise TypeError(f"the state of a CUDA device is {device_state.dtype}, not uint8")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise StateMismatchError(
            f"the stored states of random generators are invalid: {type(error).__name__}: {one_line(str(error))}. "
            "Next: resume from another tag, or start a new training with kind: previous_run"
        ) from error


def same_rng(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two results of ``take_rng`` are equal, apart from CUDA devices."""
    return equal({**first, "cuda": ()}, {**second, "cuda": ()})


def put_rng(state: Mapping[str, Any]) -> None:
    """Restore every generator from a result of ``take_rng``."""
    cpu, python, legacy = _parsed(state)
    torch.set_rng_state(cpu)
    random.setstate(python)
    numpy.random.set_state(legacy)
    stored = state.get("cuda", ())
    available = torch.cuda.device_count() if stored and torch.cuda.is_available() else 0
    for device in range(min(len(stored), available)):
        torch.cuda.set_rng_state(stored[device].cpu(), device)
    if len(stored) > available:
        _logger.warning(
            "the checkpoint has generators of %d CUDA devices, found %d; the other generators are not restored",
            len(stored),
            available,
        )


def _parsed(state: Mapping[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Convert stored states of torch, Python and NumPy to the arguments of their generators."""
    cpu, python, legacy = state["torch"], state["python"], state["numpy"]
    if not isinstance(cpu, torch.Tensor):
        raise TypeError(f"torch: {type_of(cpu)}, not a tensor")
    key = legacy["state"].cpu().numpy().astype(numpy.uint32)
    if key.shape != (624,):
        raise ValueError(f"numpy: {key.size} words, not 624")
    return (
        cpu.cpu().clone(),
        (python["version"], tuple(python["state"].tolist()), python["gauss"]),
        {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": legacy["position"]},
            "has_gauss": legacy["has_gauss"],
            "gauss": legacy["gauss"],
        },
    )
