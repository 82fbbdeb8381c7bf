"""Checks that need new processes: the import of a plugin, and two ranks of a distributed run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import multiprocessing
import os
import random
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from noether_init_core.paths import PathProvider

_TIMEOUT_S = 120.0
_RANKS, _SEED = 2, 5
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
#: Audit events of these modules are work; reading files is not, because every import does it.
_WORKERS = ("os", "socket", "subprocess")
_LOOKS = {"os.fwalk", "os.getxattr", "os.listdir", "os.listxattr", "os.scandir", "os.walk", "socket.__new__"}


def work_at_import(module: str, distribution: str = "") -> list[str]:
    """What importing ``module`` does beside defining names, as phrases; observed in new processes.

    Its dependencies are imported before, so that their work is not counted. All modules of ``distribution`` count as
    its own. Raises the exception of the import, with the traceback of the process.
    """
    (dependencies,) = _in_new_processes(_modules_beside, [(module, distribution)])
    (found,) = _in_new_processes(_watch_import, [(module, dependencies)])
    return list(found)


def initialized_by_ranks(
    config: Mapping[str, Any], paths: PathProvider, meeting_point: Path
) -> list[tuple[str, dict[str, str]]]:
    """Initialize a single model in two processes at once, as ranks of one group. Raises their exceptions.

    Returns for each rank its start iteration, and model path and name -> digest of the values.
    """
    jobs = [(rank, config, paths, meeting_point, dict(os.environ)) for rank in range(_RANKS)]
    return _in_new_processes(_initialize_as_rank, jobs)


def _initialize_as_rank(
    rank: int, config: Mapping[str, Any], paths: PathProvider, meeting_point: Path, environment: Mapping[str, str]
) -> tuple[str, dict[str, str]]:
    import numpy
    import torch
    import torch.distributed as dist

    from noether_init_core.models import leaf_models
    from noether_init_core.stack.stack import InitializerStack
    from noether_init_core.testing.cases import Counter, NumberedTrainer, new_model

    torch.set_num_threads(1)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(_RANKS))
    # ranks usually have different states of the global generators
    torch.manual_seed(1000 + rank)
    numpy.random.seed(1000 + rank)
    random.seed(1000 + rank)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=_RANKS)
    try:
        model = new_model("single", _SEED)
        stack = InitializerStack.from_config([dict(config)], path_provider=paths)
        report = stack.initialize(model, trainer=NumberedTrainer(), callbacks=[Counter()])
        digests = {
            f"{path} {name}": hashlib.sha256(value.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
            for path, leaf in leaf_models(model)
            for name, value in leaf.state_dict().items()
        }
        dist.barrier()
        return str(report.start), digests
    finally:
        dist.destroy_process_group()


def _modules_beside(module: str, distribution: str) -> list[str]:
    before = set(sys.modules)
    importlib.import_module(module)
    by_package = importlib.metadata.packages_distributions() if distribution else {}
    own = {module.partition(".")[0]} | {name for name, those in by_package.items() if distribution in those}
    return [name for name in sys.modules if name not in before and name.partition(".")[0] not in own]


def _watch_import(module: str, dependencies: Sequence[str]) -> list[str]:
    from noether_init_core.testing.snapshots import differences, state_of_process

    for name in dependencies:
        try:
            importlib.import_module(name)
        except Exception:  # some modules can only be imported from within another; the import below counts
            continue
    found: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        about = os.fsdecode(arguments[0]) if arguments and isinstance(arguments[0], str | bytes) else str(arguments[:2])
        if "__pycache__" in about:  # Python caches bytecode there
            return
        if event.partition(".")[0] in _WORKERS and event not in _LOOKS:
            found.append(f"calls {event}: {about}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            found.append(f"opens {about} for writing")

    sys.addaudithook(watch)  # an audit hook cannot be removed, so `watching` switches it off
    before, threads = state_of_process(), threading.active_count()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            importlib.import_module(module)
    finally:
        watching = False
    found += [f"changes the {name}" for name in differences(before, state_of_process())]
    if printed.getvalue():
        found.append(f"prints {printed.getvalue()[:80]!r}")
    if threading.active_count() > threads:
        found.append("starts a thread")
    return list(dict.fromkeys(found))


def _in_new_processes(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call ``function`` once for each entry of ``arguments``, each in a new process, all at once."""
    with _context().Pool(len(arguments), maxtasksperchild=1) as pool:
        jobs = [pool.apply_async(function, one) for one in arguments]
        # after this time a rank waits for another one that failed, or a process ended without an answer
        return [job.get(_TIMEOUT_S) for job in jobs]


def _context() -> Any:
    """The context for new processes: they come from a server that has imported torch once, and no plugin."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "noether_init_core.testing.preload"])
    return context
