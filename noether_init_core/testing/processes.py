"""Checks that need new processes: the import of a plugin, and two ranks of a distributed run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import io
import multiprocessing
import os
import pickle
import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]  # as Pool.apply_async uses it
from pathlib import Path
from typing import Any
from unittest import mock

from noether_init_core.paths import PathProvider

_TIMEOUT_S = 120.0
_RANKS, _SEED = 2, 5
#: The exit code of a process that has sent its answer.
_ANSWERED = 77
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
    shape: str, config: Mapping[str, Any], paths: PathProvider, meeting_point: Path
) -> list[tuple[str, dict[str, str]]]:
    """Initialize a model of a shape in two processes at once, as ranks of one group. Raises their exceptions.

    Returns for each rank its start iteration, and model path and name -> digest of the values.
    """
    jobs = [(rank, shape, config, paths, meeting_point, dict(os.environ)) for rank in range(_RANKS)]
    return _in_new_processes(_initialize_as_rank, jobs)


def _initialize_as_rank(
    rank: int,
    shape: str,
    config: Mapping[str, Any],
    paths: PathProvider,
    meeting_point: Path,
    environment: Mapping[str, str],
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
        model = new_model(shape, _SEED)
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
    from noether_init_core.testing.process_state import state_of_process
    from noether_init_core.testing.snapshots import differences

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
    before = state_of_process()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            importlib.import_module(module)
    finally:
        watching = False
    found += [f"changes the {name}" for name in differences(before, state_of_process())]
    if printed.getvalue():
        found.append(f"prints {printed.getvalue()[:80]!r}")
    return list(dict.fromkeys(found))


def _in_new_processes(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call ``function`` once for each entry of ``arguments`` (at most two), each in a new process, all at once."""
    servers = _servers()[: len(arguments)]
    for server, one in zip(servers, arguments, strict=True):
        server.send_bytes(pickle.dumps((function, one)))
    # after this time a rank waits for another one that failed, or a process ended without an answer
    if not all(server.poll(_TIMEOUT_S) for server in servers):
        _servers.cache_clear()  # a late answer must not be taken for that of the next job
        raise TimeoutError(f"a process of the conformance kit did not answer within {_TIMEOUT_S:g} s")
    answers = [pickle.loads(server.recv_bytes()) for server in servers]
    for is_fine, answer in answers:
        if not is_fine:
            raise answer
    return [answer for _is_fine, answer in answers]


@functools.cache
def _servers() -> tuple[Connection, ...]:
    """Connections to two processes that have imported torch once, and no plugin; each forks a process for each job.

    Like the ranks of a launcher, they have different seeds of ``hash()`` for text.
    """
    context, made = multiprocessing.get_context("spawn"), []
    with mock.patch.dict(os.environ):
        for number in range(_RANKS):
            ours, theirs = context.Pipe()
            os.environ["PYTHONHASHSEED"] = str(number + 1)
            context.Process(target=_serve, args=(theirs,), daemon=True).start()
            theirs.close()
            made.append(ours)
    return tuple(made)


def _serve(connection: Connection) -> None:
    """Run every job of ``connection`` in a process of its own, until the other end is closed."""
    from noether_init_core.testing import cases

    cases.new_model("single", seed=0)  # the first step of an optimizer imports further parts of torch
    while True:
        try:
            job = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        child = os.fork() if hasattr(os, "fork") else 0  # Windows: in this process, one job after the other
        if child:
            _pid, status = os.waitpid(child, 0)
            if os.waitstatus_to_exitcode(status) != _ANSWERED:
                connection.send_bytes(pickle.dumps((False, ChildProcessError(f"a process ended with {status}"))))
            continue
        try:
            function, arguments = pickle.loads(job)
            answer = pickle.dumps((True, function(*arguments)))
        except BaseException as error:  # the caller raises it
            answer = _packed(error)
        connection.send_bytes(answer)
        if hasattr(os, "fork"):
            os._exit(_ANSWERED)


def _packed(error: BaseException) -> bytes:
    """The error with its traceback; in words if it cannot be pickled."""
    try:
        packed = pickle.dumps((False, ExceptionWithTraceback(error, error.__traceback__)))
        pickle.loads(packed)
    except Exception:
        packed = pickle.dumps((False, RuntimeError("".join(traceback.format_exception(error)))))
    return packed
