"""What can only be seen in a process of its own: the import of a plugin, and two ranks of a distributed run."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import multiprocessing
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.paths import PathProvider

__all__ = ["RankJob", "RankResult", "run_rank", "work_at_import"]

_TIMEOUT_S = 120.0
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
#: Audit events of these modules stand for work; reading files is what an import does.
_WORKERS = ("os", "socket", "subprocess")
_LOOKS = {"os.fwalk", "os.getxattr", "os.listdir", "os.listxattr", "os.scandir", "os.walk", "socket.__new__"}


def work_at_import(module: str, distribution: str = "") -> list[str]:
    """What importing ``module`` does beside defining names, in words; seen in new processes.

    What its dependencies do when they are imported is not its own: they are imported before it is watched. All modules
    of ``distribution`` are its own. Raises ``RuntimeError`` with the traceback where it cannot be imported.
    """
    (dependencies,) = _in_new_processes(_modules_beside, [(module, distribution)])
    (found,) = _in_new_processes(_watch_import, [(module, dependencies)])
    return list(found)


@attrs.frozen
class RankJob:
    """What one rank does. Everything in it can be pickled."""

    rank: int
    ranks: int
    meeting_point: Path
    config: Mapping[str, Any]
    shape: str
    seed: int
    output_root: Path
    run_id: str
    environment: Mapping[str, str] = attrs.field(factory=lambda: dict(os.environ))


@attrs.frozen
class RankResult:
    """What a rank ended with: the iteration it starts at, and model path and name -> digest of the values."""

    start: str
    digests: Mapping[str, str]


def run_rank(jobs: Sequence[RankJob]) -> list[RankResult]:
    """Initialize in one process for each job, all at once, in one group of ranks. Raises ``RuntimeError``."""
    return _in_new_processes(_initialize_as_rank, [(job,) for job in jobs])


def _initialize_as_rank(job: RankJob) -> RankResult:
    import numpy
    import torch
    import torch.distributed as dist

    from noether_init_core.protocols import leaf_models
    from noether_init_core.stack.stack import InitializerStack
    from noether_init_core.testing.models import Counter, NumberedTrainer, new_model

    torch.set_num_threads(1)
    os.environ.update(job.environment)
    os.environ.update(RANK=str(job.rank), LOCAL_RANK=str(job.rank), WORLD_SIZE=str(job.ranks))
    # each rank comes with another state of the global generator, as ranks do
    torch.manual_seed(1000 + job.rank)
    numpy.random.seed(1000 + job.rank)
    random.seed(1000 + job.rank)
    dist.init_process_group("gloo", init_method=f"file://{job.meeting_point}", rank=job.rank, world_size=job.ranks)
    try:
        model = new_model(job.shape, job.seed)
        stack = InitializerStack.from_config(
            [dict(job.config)], path_provider=PathProvider(job.output_root, job.run_id)
        )
        report = stack.initialize(model, trainer=NumberedTrainer(), callbacks=[Counter()])
        digests = {
            f"{path} {name}": hashlib.sha256(value.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
            for path, leaf in leaf_models(model)
            for name, value in leaf.state_dict().items()
        }
        dist.barrier()
        return RankResult(str(report.start), digests)
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
        except Exception:  # some modules come into being only within another; the import below counts
            continue
    found: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        about = os.fsdecode(arguments[0]) if arguments and isinstance(arguments[0], str | bytes) else str(arguments[:2])
        if "__pycache__" in about:  # Python keeps what it compiled
            return
        if event.partition(".")[0] in _WORKERS and event not in _LOOKS:
            found.append(f"calls {event}: {about}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            found.append(f"opens {about} for writing")

    sys.addaudithook(watch)  # there is no way to take it back, so it is told when to look
    said = _Said()
    before, threads = state_of_process(), threading.active_count()
    outputs = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = said
    try:
        importlib.import_module(module)
    finally:
        watching = False
        sys.stdout, sys.stderr = outputs
    found += [f"changes the {name}" for name in differences(before, state_of_process())]
    if said.text:
        found.append(f"prints {said.text[:80]!r}")
    if threading.active_count() > threads:
        found.append("starts a thread")
    return list(dict.fromkeys(found))


class _Said:
    """Stands for the standard output, and keeps what was printed."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered."""


def _in_new_processes(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call ``function`` once for each entry of ``arguments``, each in a new process, all at once."""
    context = _context()
    started = []
    for one in arguments:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(theirs, function, one), daemon=True)
        process.start()
        theirs.close()
        started.append((process, mine))
    results: list[Any] = []
    failures: list[Any] = []
    for _process, connection in started:
        try:
            if not connection.poll(_TIMEOUT_S):
                raise RuntimeError(f"no answer for {_TIMEOUT_S:.0f} s: a rank waits for one that does not come")
            is_good, result = connection.recv()
        except (EOFError, RuntimeError) as error:
            is_good, result = (
                False,
                f"the process ended without an answer: {error or 'it was killed, or left by os._exit'}",
            )
        finally:
            connection.close()
        (results if is_good else failures).append(result)
    for process, _connection in started:
        process.join(1 if failures else _TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
    if failures:
        raise RuntimeError("\n".join(map(str, failures)))
    return results


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = True, function(*arguments)
    except BaseException:  # whatever a plugin raises is told to the test that waits
        result = False, traceback.format_exc()
    connection.send(result)
    connection.close()


def _context() -> Any:
    """New processes come from a server that has imported torch once: each takes milliseconds, and none has a plugin."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "noether_init_core.testing.preload"])
    return context
