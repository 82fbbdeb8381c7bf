"""Snapshots of what must not change, as values to compare: a model, the process, files.

The messages are complete without the details that pytest adds and cuts: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from noether_init_core.messages import listed, one_line
from noether_init_core.models import leaf_models
from noether_init_core.nested import equal


def state_of_model(model: Any) -> dict[str, Any]:
    """Every tensor of the model by value and by identity, flags, gradients, modules, hooks, and its optimizers."""
    found: dict[str, Any] = {}
    for path, leaf in leaf_models(model):
        for name, tensor in _tensors(leaf):
            is_meta = tensor.is_meta
            found[f"{path} {name}"] = "meta" if is_meta else tensor.detach().clone()
            # views, flat copies and buckets of wrappers refer to the memory, not to the object
            memory = None if is_meta else tensor.data_ptr()
            found[f"identity of {path} {name}"] = (
                (id(tensor), memory, tensor.shape, tensor.dtype, tensor.device),
                () if is_meta else (tensor.stride(), tensor.storage_offset()),
            )
            found[f"flags of {path} {name}"] = (tensor.requires_grad, tensor.grad is None, tensor.is_leaf)
            if tensor.grad is not None:
                found[f"gradient of {path} {name}"] = tensor.grad.detach().clone()
            hooks = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
            found[f"hooks of {path} {name}"] = [len(one or ()) for one in hooks]
        modules = list(leaf.named_modules())
        found[f"training of {path}"] = tuple(module.training for _name, module in modules)
        found[f"hooks of {path}"] = tuple(
            len(hooks) for _name, module in modules for kind, hooks in vars(module).items() if kind.endswith("_hooks")
        )
        found[f"modules of {path}"] = [
            (name, id(module), type(module), sorted(vars(module))) for name, module in modules
        ]
        found[f"optimizer of {path}"] = (id(leaf.optimizer), leaf.is_frozen, leaf.name)
        if leaf.optimizer is not None:
            found.update(state_of_optimizer(path, leaf.optimizer))
    return found


#: How the names in ``state_of_model`` begin that no initialization may change.
FIXED = ("identity of", "flags of", "gradient of", "training of", "hooks of", "modules of")


def values_of_model(model: Any) -> dict[str, Any]:
    """What an initialization writes: every tensor and optimizer state by value, without identities."""
    found = state_of_model(model)
    return {
        name: value
        for name, value in found.items()
        if not name.startswith(FIXED) and not re.fullmatch(r"optimizer of [^:]*(: parameters)?", name)
    }


def state_of_optimizer(path: str, optimizer: Any) -> dict[str, Any]:
    """State and groups of an optimizer by value, and which tensors it updates."""
    state = copy.deepcopy(optimizer.state_dict())
    found: dict[str, Any] = {
        f"optimizer of {path}: parameters": [id(one) for group in optimizer.param_groups for one in group["params"]],
        f"optimizer of {path}: groups": state["param_groups"],
    }
    for index, values in state["state"].items():
        found.update({f"optimizer of {path}: {index} {name}": value for name, value in values.items()})
    return found


def _tensors(leaf: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from leaf.named_parameters(remove_duplicate=False)
    yield from leaf.named_buffers(remove_duplicate=False)


def open_files(*folders: Path) -> list[str] | None:
    """The files below ``folders`` that this process has open or mapped; None if the system does not list them."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return None
    found = _open_below(folders)
    if found:
        gc.collect()  # what only a cycle of garbage keeps open is not counted
        found = _open_below(folders)
    return found


def _open_below(folders: Iterable[Path]) -> list[str]:
    found = set(descriptors_of_process())
    for line in Path("/proc/self/maps").read_text().splitlines():
        found.update(line.split(maxsplit=5)[5:])
    roots = tuple(f"{folder.resolve()}{os.sep}" for folder in folders)
    return sorted(one for one in found if one.startswith(roots))


def descriptors_of_process() -> list[str]:
    """The target of every open descriptor of this process; empty if the system does not list them."""
    found = []
    for entry in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # the descriptor of listdir itself, which is closed by now
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return found


def state_of_files(*folders: Path) -> dict[str, Any]:
    """Every file and folder below ``folders``: mode, time of the last change, and digest of the content."""
    found: dict[str, Any] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.exists() else ():
            status = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            found[str(path)] = (status.st_mode, status.st_mtime_ns if content else None, content)
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names under which the two differ: changed, removed, or new."""
    names = dict.fromkeys([*before, *after])
    return [name for name in names if not (name in before and name in after and equal(before[name], after[name]))]


@contextlib.contextmanager
def unchanged(look: Callable[[], Mapping[str, Any]], what: str, *, why: str, change: str) -> Iterator[None]:
    """Assert that ``look()`` returns the same before and after the block; the message has ``why`` and ``change``."""
    before = look()
    yield
    after = look()
    changed = [_change(name, before, after) for name in differences(before, after)]
    assert not changed, told(f"{what} changed {listed(changed)}", why, change)


def _change(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The name, and the values before and after if they are short."""
    values = [one_line(repr(one[name]), 41) if name in one else "nothing" for one in (before, after)]
    return name if max(map(len, values)) > 40 or values[0] == values[1] else f"{name} ({values[0]} -> {values[1]})"


def said(error: BaseException) -> str:
    """Class and message of an error, on one line and not too long."""
    return f"{type(error).__name__}: {one_line(str(error), 160)}"


def told(seen: str, why: str, change: str) -> str:
    """The message of a failed check: what was seen, why it matters, and what to change."""
    return f"{seen}. Why it matters: {why}. Next: {change}"
