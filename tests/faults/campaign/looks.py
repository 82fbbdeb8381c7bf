"""Looks at the disk that fail: each call of the system in turn, for everything that reads or saves checkpoints.

A look is a call that asks the system what is there: ``stat``, ``open``, ``read``, a listing, a link. A disk that fails
says nothing about what exists, so after such a call there are two right answers. One is the same as without the fault.
The other is an error that names the path and the reason.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import io
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from faults.campaign.disk import Quick
from faults.campaign.saves import Numbered, save_in_place
from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, cli
from noether_init_core.errors import InitError
from noether_init_core.sets.snapshot import Snapshot

__all__ = ["CODES", "MODES", "QUESTIONS", "SERIES", "FailingLooks", "looking_failures"]

CODES = {"EIO": errno.EIO, "ESTALE": errno.ESTALE, "EACCES": errno.EACCES}
#: A failing disk once, a lost server once, a permission from then on.
SERIES = (("EIO", "once"), ("ESTALE", "once"), ("EACCES", "lasting"))
#: ``once``: the call with the number. ``lasting``: from then on each call that asks for the same path.
MODES = ("once", "lasting")
WIDTH = 4
#: Functions that take a path first, and those that take a descriptor.
_BY_PATH = ("stat", "lstat", "open", "listdir", "scandir", "readlink", "access")
_BY_DESCRIPTOR = ("fstat", "read", "pread", "preadv")


class FailingLooks:
    """Counts the calls of the system that look below a folder, and lets the one with the number ``at`` fail.

    The functions of ``os`` and ``open`` are replaced for the time of the block. Calls from C, such as those of
    ``os.scandir`` for one entry, are not seen: the package makes none of these.
    """

    def __init__(self, root: Path, at: int, code: int, *, lasting: bool = False) -> None:
        self.root, self.at, self.code, self.lasting = os.path.abspath(root), at, code, lasting
        self.calls: list[tuple[str, str]] = []
        self.failed: tuple[str, str] | None = None
        self._paths: dict[int, str] = {}
        self._close = os.close

    def __enter__(self) -> FailingLooks:
        self._before = [(os, name, getattr(os, name)) for name in (*_BY_PATH, *_BY_DESCRIPTOR)]
        self._before += [(module, "open", module.open) for module in (builtins, io)]
        for module, name, original in self._before:
            setattr(module, name, self._replacement(name, original))
        return self

    def __exit__(self, *_exception: object) -> None:
        for module, name, original in self._before:
            setattr(module, name, original)

    def _replacement(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def look(asked: Any = ".", *arguments: Any, **options: Any) -> Any:
            path = self._path_of(asked, options.get("dir_fd"))
            if path is not None and self._fails(name, path):
                if name == "access":  # it says no, and never why
                    return False
                raise OSError(self.code, os.strerror(self.code), *([path] if name not in _BY_DESCRIPTOR else []))
            found = original(asked, *arguments, **options)
            descriptor = found if name == "open" and isinstance(found, int) else None
            if name == "open" and hasattr(found, "fileno"):
                descriptor = found.fileno()
            if descriptor is not None:
                # the system gives the number of a closed file to the next one
                self._paths.pop(descriptor, None)
                if path is not None:
                    self._paths[descriptor] = path
            return found

        return look

    def _path_of(self, asked: Any, parent: int | None) -> str | None:
        """The path if it is below the folder; None for any other."""
        if isinstance(asked, int):
            return self._paths.get(asked)
        path = os.fsdecode(os.fspath(asked))
        if parent is not None:
            path = os.path.join(self._paths.get(parent, os.sep), path)
        path = os.path.normpath(os.path.join(self.root, path)) if os.path.isabs(path) else os.path.abspath(path)
        return path if path == self.root or path.startswith(self.root + os.sep) else None

    def _fails(self, name: str, path: str) -> bool:
        self.calls.append((name, path))
        is_again = self.lasting and self.failed is not None and path == self.failed[1]
        is_its_turn = len(self.calls) == self.at
        if is_its_turn:
            self.failed = name, path
        return is_its_turn or is_again


@attrs.frozen
class Answer:
    """What was asked for gave ``value`` or ``error``; ``said``: everything that was printed, logged or raised."""

    value: Any
    error: Exception | None
    said: str


@attrs.frozen
class Question:
    """Something that looks at checkpoints.

    Attributes:
        prepare: Makes the folder, without faults, and returns what to call with faults.
        saves: Whether the call saves a further set, so that each call needs a folder of its own.
    """

    prepare: Callable[[Path], Callable[[], Any]]
    saves: bool = False


def _runs(root: Path, sets: int, *, flat: bool = False) -> Numbered:
    """A run with sets, or with flat files as Noether writes them."""
    numbered = Numbered(WIDTH)
    for number in range(1, sets + 1):
        numbered.save(root, number, storage=Quick())
    if flat:
        shutil.rmtree(root / "run" / "checkpoints" / "sets")
        (root / "run" / "checkpoints" / ".noether-init-flat.json").unlink()
    return numbered


def _starts(config: Any, *, run: str = "run", flat: bool = False, sets: int = 3) -> Question:
    """Values after an initialization, and where training starts."""

    def prepare(root: Path) -> Callable[[], Any]:
        _runs(root, sets, flat=flat)

        def ask() -> Any:
            process = Numbered(WIDTH)
            stack = InitializerStack.from_config(config, path_provider=PathProvider(root, run))
            report = stack.initialize(process.model, trainer=process.trainer)
            return sorted(process.values()), str(report.start)

        return ask

    return Question(prepare)


def _prints(*words: str, flat: bool = False, sets: int = 3) -> Question:
    """What a command prints as JSON; ``{}`` in its words is the folder."""

    def prepare(root: Path) -> Callable[[], Any]:
        _runs(root, sets, flat=flat)
        if not flat:
            save_in_place(Numbered(WIDTH), root / "other", 7)

        def ask() -> Any:
            out = io.StringIO()
            before, sys.argv = sys.argv, ["ninit", *(word.format(root) for word in words), "--json"]
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                    cli.main()
            except SystemExit as ended:
                if ended.code:
                    raise InitError(out.getvalue()) from None
            finally:
                sys.argv = before
            return out.getvalue()

        return ask

    return Question(prepare)


def _saves(sets: int, *, remembers: bool = False, **arguments: Any) -> Question:
    """A further save, by a new writer, or by one that ``remembers`` the sets from before."""

    def prepare(root: Path) -> Callable[[], Any]:
        numbered = Numbered(WIDTH)
        paths = PathProvider(root, "run")
        writers = [CheckpointWriter(paths, storage=Quick(), **arguments) for _ in range(2)]
        for number in range(1, sets + 2):
            writer = writers[0] if remembers or number <= sets else writers[1]
            save = functools.partial(_save, numbered, writer, number)
            if number <= sets:
                save()
        return save

    return Question(prepare, saves=True)


def _save(numbered: Numbered, writer: CheckpointWriter, number: int) -> str:
    numbered.become(number)
    iteration = TrainingIteration(number, number, number)
    tags = ("latest", "best_model.loss") if number == 1 else ("latest",)
    return writer.save(numbered.model, iteration, trainer=numbered.trainer, tags=tags).folder.name


_RESUME: Mapping[str, Any] = {"auto_resume": True, "initializers": [{"kind": "previous_run", "run_id": "run"}]}
QUESTIONS: Mapping[str, Question] = {
    "auto_resume": _starts({"auto_resume": True}),
    "auto_resume, walking back": _starts({"auto_resume": True, "on_invalid": "previous"}),
    "auto_resume, Noether's files": _starts({"auto_resume": True}, flat=True),
    "auto_resume, Noether's files, walking back": _starts({"auto_resume": True, "on_invalid": "previous"}, flat=True),
    "resume": _starts([{"kind": "resume"}]),
    "resume of E2": _starts([{"kind": "resume", "checkpoint_tag": "E2"}]),
    "previous_run": _starts([{"kind": "previous_run", "run_id": "run", "load_optim": True}], run="new"),
    "verify": _prints("verify", "{}"),
    "verify, Noether's files": _prints("verify", "{}/run", flat=True),
    "verify, copies": _prints("verify", "{}/run", "--flat"),
    "inspect, run": _prints("inspect", "{}/run"),
    "inspect, root": _prints("inspect", "{}"),
    "inspect, set": _prints("inspect", "{}/run/checkpoints/sets/00000003_E3_U3_S3"),
    "inspect, file": _prints("inspect", "{}/run/checkpoints/sets/00000003_E3_U3_S3/mlp_cp=E3_U3_S3_model.th"),
    "inspect, Noether's files": _prints("inspect", "{}/run", flat=True),
    "diff": _prints("diff", "{}/run", "{}/run@E1_U1_S1"),
    "lineage": _prints("lineage", "{}/run"),
    "save": _saves(2),
    "save with flat names": _saves(2, flat_names=True),
    "retention": _saves(4, keep_last=2),
    "retention, remembered": _saves(4, keep_last=2, remembers=True, flat_names=True),
    "retention, best and every": _saves(3, retention={"last": 1, "every": {"epoch": 2}}, remembers=True),
}


def asked(question: Callable[[], Any], looks: FailingLooks) -> Answer:
    """Ask with the fault; what is logged counts as said."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("noether_init_core")
    disabled, logging.root.manager.disable = logging.root.manager.disable, 0
    logger.addHandler(handler)
    value, error = None, None
    try:
        with looks:
            value = question()
    except Exception as caught:
        error = caught
        records.append(str(caught))
    finally:
        logger.removeHandler(handler)
        logging.root.manager.disable = disabled
    return Answer(value, error, "\n".join(records))


def judged(answer: Answer, truth: Any, looks: FailingLooks) -> Counter[str]:
    """The outcome of one question; every key but ``same`` and ``refused`` is a fault of ours."""
    counted = Counter(tried=1)
    if answer.error is None:
        counted["same" if answer.value == truth else "silent"] += 1
        return counted
    counted["refused"] += 1
    counted["foreign error"] += not isinstance(answer.error, InitError)
    counted["unnamed"] += not _is_named(answer.said, looks)
    return counted


def _is_named(said: str, looks: FailingLooks) -> bool:
    """Whether path and reason of the failed call are said."""
    assert looks.failed is not None
    name, path = looks.failed
    return name == "access" or (path in said and os.strerror(looks.code) in said)


def _sets_in(root: Path) -> set[str]:
    """The sets that can be resumed from."""
    snapshot = Snapshot(PathProvider(root, "run"))
    return {one.folder.name for one in snapshot.readable() if snapshot.problem_of(one) is None}


def looking_failures(
    name: str, root: Path, code: str, mode: str, *, start: int = 0, every: int = 1
) -> Iterator[Counter[str]]:
    """Let each look of one question fail, one after the other; one counter for each.

    ``lost``: a set from before is gone, which the question without a fault leaves.
    """
    question = QUESTIONS[name]
    folder = root / "runs"
    ask = question.prepare(folder)
    before = _sets_in(folder)
    counting = FailingLooks(folder, 0, 0)
    truth = asked(ask, counting)
    if truth.error is not None:
        raise truth.error
    left = _sets_in(folder)
    for at in range(1 + start, len(counting.calls) + 1):
        if (at - 1) % every:
            continue
        if question.saves:
            shutil.rmtree(folder)
            ask = question.prepare(folder)
        looks = FailingLooks(folder, at, CODES[code], lasting=mode == "lasting")
        answer = asked(ask, looks)
        counted = judged(answer, truth.value, looks)
        if question.saves:
            kept = _sets_in(folder)
            counted["lost"] += not (left if answer.error is None else before) <= kept
            counted["unnamed"] += answer.error is None and kept != left and not _is_named(answer.said, looks)
        for problem in ("silent", "lost", "unnamed", "foreign error"):
            if counted[problem] and looks.failed is not None:
                call, path = looks.failed
                counted[f"place: {problem} at {call} {os.path.relpath(path, folder)}"] += 1
        yield counted
