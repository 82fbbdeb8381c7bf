"""One rank of a distributed run, as a program: ``rank_cases.py RANK RANKS FOLDER``. Prints what each case came to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from noether_init_core import InitializerStack, PathProvider, bind

Made = tuple[Any, InitializerStack, Mapping[str, Any]]


def model(width: int = 2) -> Any:
    """A model and its optimizer, with the same values on every rank."""
    torch.manual_seed(5)
    module = torch.nn.Linear(3, width)
    return bind(module, name="net", optimizer=torch.optim.AdamW(module.parameters()))


def stack(config: Any, root: Path, run_id: str = "source") -> InitializerStack:
    """The stack of a config in a run."""
    return InitializerStack.from_config(config, path_provider=PathProvider(root, run_id))


def cases(rank: int, folder: Path) -> dict[str, Callable[[], Made]]:
    """Name -> model, stack and further arguments of this rank."""
    one, other, empty = folder / "one", folder / "other", folder / "empty"
    resume = {"auto_resume": True, "initializers": []}
    legacy = {"auto_resume": {"load_optim": False}, "initializers": []}
    weights = [{"kind": "previous_run", "run_id": "source"}]
    first = rank == 0
    flat = {"kind": "file", "path": str(folder / "flat0" / "w.pt")}
    only_first = dist.new_group([0])
    alone = [dist.new_group([number]) for number in range(dist.get_world_size())][rank]
    return {
        "the same": lambda: (model(), stack(resume, one), {}),
        "weights alike": lambda: (model(), stack(weights, one, "new"), {}),
        "another root": lambda: (model(), stack(resume, one if first else empty), {}),
        "behind": lambda: (model(), stack(resume, one if first else folder / "behind"), {}),
        "another run, the same iteration": lambda: (model(), stack(resume, one if first else other), {}),
        "other bytes": lambda: (model(), stack(weights, one if first else other, "new"), {}),
        "other flat bytes": lambda: (
            model(),
            stack([{"kind": "file", "path": str(folder / f"flat{rank}" / "w.pt")}], one, "new"),
            {},
        ),
        "other flat state": lambda: (model(), stack(legacy, folder / f"legacy{rank}"), {}),
        "other settings": lambda: (
            model(),
            stack([{**weights[0], "on_nonfinite": "warn" if first else "error"}], one, "new"),
            {},
        ),
        "other bytes without checksums": lambda: (
            model(),
            stack([{"kind": "file", "path": str(folder / f"flat{rank}" / "w.safetensors")}], one, "new"),
            {},
        ),
        "another order": lambda: (
            model(),
            stack([*weights, flat][:: 1 if first else -1], one, "new"),
            {},
        ),
        "not in the group": lambda: (model(), stack(weights, one, "new"), {"group": only_first}),
        "damaged on one": lambda: (model(), stack(weights, one if first else folder / "damaged", "new"), {}),
        "another config": lambda: (model(), stack(weights if first else [], one, "new"), {}),
        "another model on one": lambda: (model(2 if first else 4), stack(weights, one, "new"), {}),
        "another model on all": lambda: (model(4), stack(weights, one, "new"), {}),
        "groups of one": lambda: (model(), stack(weights if first else [], one, "new"), {"group": alone}),
        "none": lambda: (model(), stack([], one, "new"), {}),
    }


def result(made: Callable[[], Made]) -> dict[str, Any]:
    """What ``initialize`` came to, and whether it changed the model."""
    subject, initializers, more = made()
    before = {name: value.clone() for name, value in subject.state_dict().items()}
    found: dict[str, Any] = {"error": None, "text": "", "cause": None}
    try:
        found["start"] = str(initializers.initialize(subject, trains=False, **more).start)
    except Exception as error:  # every error is a result here, and the other ranks must not wait for this one
        cause = type(error.__cause__).__name__ if error.__cause__ else None
        found |= {"error": type(error).__name__, "text": str(error), "cause": cause}
        found["ranks"] = sorted(getattr(error, "found", {}))
    after = subject.state_dict()
    found["changed"] = any(not torch.equal(before[name], after[name]) for name in before)
    return found


def main() -> None:
    """Run every case; then one in which only rank 0 calls ``initialize``."""
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks)
    found = {name: result(made) for name, made in cases(rank, folder).items()}
    dist.barrier()
    if rank == 0:
        one = folder / "one"
        weights = [{"kind": "previous_run", "run_id": "source"}]
        found["absent"] = result(lambda: (model(), stack(weights, one, "new"), {"timeout_s": 2.0}))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
