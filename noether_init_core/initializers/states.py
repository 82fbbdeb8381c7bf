"""States of trainers and callbacks as they were, to be put back where user code fails."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from noether_init_core.errors import StateMismatchError, type_of

__all__ = ["StatesBefore"]


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
                        f"{error}. Nothing was changed"
                    ) from error
        return cls(tuple(saved))

    def put_back(self) -> list[str]:
        """Give every owner its state again; what went wrong with that, in words."""
        problems = []
        for owner, state in self.saved:
            try:
                if state is not None:
                    owner.load_state_dict(state)
                elif owner.state_dict() is not None:
                    problems.append(f"{type(owner).__name__} had no state before and has one now.")
            except Exception as error:
                problems.append(f"The state of {type(owner).__name__} could not be put back: {error}.")
        return problems

    @classmethod
    @contextlib.contextmanager
    def kept(cls, trainer: Any, callbacks: Sequence[Any] = ()) -> Iterator[None]:
        """Put the states back if the block raises; the error goes on, with a note of what could not be put back."""
        before = cls.taken(trainer, callbacks)
        try:
            yield
        except BaseException as error:
            for problem in before.put_back():
                error.add_note(problem)
            raise
