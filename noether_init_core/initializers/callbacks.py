"""States of callbacks and trainers: matched, loaded, restored after a failure; and files that callbacks resume from."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from noether_init_core import nested
from noether_init_core.errors import StateMismatchError, text_of, type_of
from noether_init_core.files.storage.disk import LOCAL, resolved
from noether_init_core.messages import listed
from noether_init_core.paths import PathProvider
from noether_init_core.sets.checkpoint_set import CheckpointSet, list_names
from noether_init_core.sets.file_names import CheckpointFileName, parse


@attrs.frozen(eq=False)
class CallbackPlan:
    """The stored state of each callback, and warnings for the user."""

    states: tuple[tuple[Any, dict[str, Any]], ...]
    warnings: tuple[str, ...] = ()


def callback_key(callback: Any) -> str:
    """``checkpoint_key`` of the callback, or else the name of its class."""
    key = getattr(callback, "checkpoint_key", None)
    return str(key) if key is not None else type(callback).__name__


def plan_callbacks(saved: Any, callbacks: Sequence[Any], *, where: str) -> CallbackPlan:
    """Match stored states to callbacks: by key, or by position for the list of older files. Pure.

    A state without a callback and a stateful callback without a state are warnings, as in Noether. Raises
    ``StateMismatchError`` if two callbacks with one key would both take a state, or if a positional list does not fit.
    """
    if isinstance(saved, Mapping):
        return _by_key(saved, callbacks, where)
    if isinstance(saved, list | tuple):
        return _by_position(saved, callbacks, where)
    raise StateMismatchError(f"{where}: callback_state_dicts is {type_of(saved)}, not a mapping or a list")


def _by_key(saved: Mapping[str, Any], callbacks: Sequence[Any], where: str) -> CallbackPlan:
    stateful = [callback for callback in callbacks if callable(getattr(callback, "load_state_dict", None))]
    counts = Counter(callback_key(callback) for callback in callbacks)
    states: list[tuple[Any, dict[str, Any]]] = []
    warnings: list[str] = []
    for callback in stateful:
        key = callback_key(callback)
        if saved.get(key) is None:
            if key not in saved and _own_state(callback):
                warnings.append(f"{where} has no state for callback {key}; it has {', '.join(saved) or 'none'}")
            continue
        if counts[key] > 1:
            raise StateMismatchError(
                f"{where} has one state for callback {key}, but {counts[key]} callbacks have that key. "
                "Give each its own checkpoint_key"
            )
        states.append((callback, saved[key]))
    unused = [key for key in saved if key not in counts]
    if unused:
        warnings.append(f"{where} has states of callbacks that this run has not: {', '.join(unused)}")
    return CallbackPlan(tuple(states), tuple(warnings))


def _by_position(saved: Sequence[Any], callbacks: Sequence[Any], where: str) -> CallbackPlan:
    if len(saved) != len(callbacks):
        raise StateMismatchError(
            f"{where} has the states of {len(saved)} callbacks by position, this run has {len(callbacks)} callbacks: "
            f"{', '.join(callback_key(callback) for callback in callbacks) or 'none'}"
        )
    states = []
    for number, (callback, state) in enumerate(zip(callbacks, saved, strict=True)):
        own = _own_state(callback)
        if set(own or {}) != set(state or {}):
            raise StateMismatchError(
                f"{where}: state {number} has {_fields(state)}, callback {number} ({callback_key(callback)}) has "
                f"{_fields(own)}; the order of the callbacks has changed since the file was written"
            )
        if state:
            states.append((callback, state))
    return CallbackPlan(tuple(states))


def apply_callbacks(plan: CallbackPlan) -> None:
    """Give each callback its state, unless it has that state already, because a trainer may have loaded it."""
    for callback, state in plan.states:
        if not nested.equal(_own_state(callback), state):
            callback.load_state_dict(copy.deepcopy(state))


def _own_state(callback: Any) -> dict[str, Any] | None:
    take = getattr(callback, "state_dict", None)
    state = take() if callable(take) else None
    return state if state else None


def _fields(state: Any) -> str:
    return ", ".join(sorted(map(str, state))) if state else "nothing"


@attrs.frozen(eq=False)
class StatesBefore:
    """States of trainer and callbacks as they were."""

    saved: tuple[tuple[Any, Any], ...]

    @classmethod
    def taken(cls, trainer: Any, callbacks: Sequence[Any]) -> StatesBefore:
        saved = []
        for owner in (trainer, *callbacks):
            take = getattr(owner, "state_dict", None)
            if callable(take) and callable(getattr(owner, "load_state_dict", None)):
                try:
                    saved.append((owner, copy.deepcopy(take())))
                except Exception as error:
                    raise StateMismatchError(
                        f"the state of {type_of(owner)} cannot be taken, so that it could not be put back: "
                        f"{text_of(error)}. Nothing was changed"
                    ) from error
        return cls(tuple(saved))

    def put_back(self) -> list[str]:
        """Give every owner its state again; what went wrong with that, in words.

        The state is taken again and compared, because ``load_state_dict`` may ignore a part without an error.
        """
        problems = []
        for owner, state in self.saved:
            name = type(owner).__name__
            try:
                if state is None:
                    if owner.state_dict() is not None:
                        problems.append(f"{name} had no state before and has one now.")
                    continue
                # load_state_dict may take entries out of what it is given
                expected = _with_own_containers(state)
                owner.load_state_dict(state)
                other = _differing(expected, _with_own_containers(owner.state_dict()))
                if other:
                    problems.append(f"The state of {name} was put back, but is not what it was: {listed(other)}.")
            except Exception as error:
                problems.append(f"The state of {name} could not be put back: {text_of(error)}.")
        return problems

    @classmethod
    @contextlib.contextmanager
    def kept(cls, trainer: Any, callbacks: Sequence[Any] = ()) -> Iterator[None]:
        """Restore the states if the block raises; the error gets a note of each state that could not be restored."""
        before = cls.taken(trainer, callbacks)
        try:
            yield
        except BaseException as error:
            for problem in before.put_back():
                error.add_note(problem)
            raise


def _with_own_containers(state: Any) -> Any:
    return nested.mapped(state, lambda leaf: leaf)


def _differing(before: Any, now: Any) -> list[str]:
    """The entries of a state that are not the same; empty if all are."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if _is_same(before, now) else ["all of it"]
    names = [*before, *(name for name in now if name not in before)]
    return [str(name) for name in names if not (name in before and name in now and _is_same(before[name], now[name]))]


def _is_same(before: Any, now: Any) -> bool:
    return nested.equal(nested.mapped(before, _comparable), nested.mapped(now, _comparable))


def _comparable(leaf: Any) -> Any:
    """The value, or its type if it has no ``==`` of its own: its copy would never be equal to it."""
    has_own = any("__eq__" in vars(one) for one in type(leaf).__mro__ if one is not object)
    return leaf if has_own else type(leaf)


@attrs.frozen
class ResumptionPaths(PathProvider):
    """The path provider for ``resume_from_checkpoint`` of a callback.

    Noether's EMA callback reads the tag ``latest``, whatever tag is resumed. So ``checkpoint_path`` is a temporary
    folder of links to the files of the run, in which ``latest`` names the files of the resumed set. It exists inside
    the ``with`` block only.
    """

    view: Path = attrs.field(kw_only=True)

    @property
    def checkpoint_path(self) -> Path:
        """The folder of links."""
        return self.view


class HasOwnSet(Protocol):
    """What a kind has selected."""

    @property
    def own(self) -> CheckpointSet:
        """The set, without files of another iteration."""
        ...


def resume_callbacks(
    callbacks: Iterable[Any], model: Any, paths: PathProvider, selected: CheckpointSet, logger: logging.Logger
) -> None:
    """Let every callback with ``resume_from_checkpoint`` resume from files; without one, no folder is made."""
    resuming = _resuming(callbacks)
    if resuming:
        with tempfile.TemporaryDirectory(prefix="noether-init-") as folder:
            view = Path(folder)
            _link_files(view, paths.checkpoint_path, selected, logger)
            shown = ResumptionPaths(paths.output_root, paths.run_id, paths.stage_name, debug=paths.debug, view=view)
            for resume in resuming:
                resume(resumption_paths=shown, model=model)


def check_resumption(callbacks: Iterable[Any], selection: HasOwnSet) -> None:
    """Check that callbacks can resume from files of the selected set.

    Raises ``StateMismatchError`` if no folder of links can be made, ``TornSetError`` for averages of another iteration.
    """
    if not _resuming(callbacks):
        return
    _ = selection.own
    try:
        with tempfile.TemporaryDirectory(prefix="noether-init-") as folder:
            os.symlink(folder, Path(folder) / "link")
    except OSError as error:
        raise StateMismatchError(
            "callbacks with resume_from_checkpoint are shown their files in a temporary folder of links, and none can "
            f"be made: {error}. Nothing was changed. Next: TMPDIR=... with a folder that can be written"
        ) from error


def _resuming(callbacks: Iterable[Any]) -> list[Callable[..., Any]]:
    found = (getattr(callback, "resume_from_checkpoint", None) for callback in callbacks)
    return [resume for resume in found if callable(resume)]


def _link_files(view: Path, folder: Path, selected: CheckpointSet, logger: logging.Logger) -> None:
    links: dict[str, Path] = {}
    latest: set[tuple[str, str | None]] = set()
    for entry in list_names(folder, LOCAL):
        name = parse(entry)
        if name is not None:
            links[entry] = folder / entry
            if name.tag == "latest" and name.part == "model" and name.info is not None:
                latest.add((name.model, name.info))
    for file in selected.files:
        links[str(CheckpointFileName(file.model, file.info, "latest", file.part))] = file.path
        latest.discard((file.model, file.info))
    for model, info in sorted(latest):
        logger.warning("%s has no %s of %s; callbacks find that of latest instead", selected.name, info, model)
    for link, target in links.items():
        os.symlink(resolved(target), view / link)
