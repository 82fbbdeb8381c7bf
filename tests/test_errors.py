"""The errors: what each carries, and that all of it crosses processes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import attrs
import pytest

from noether_init_core import errors
from noether_init_core.errors import InitError

#: Keyword -> a value that is not its default.
VALUES: dict[str, Any] = {
    "kind": "k", "path": Path("p"), "line": 3, "key_path": "a.b", "what": "w", "value": "v", "candidates": ("a",),
    "offers": ("o",), "distribution": "d", "findings": ("f",), "asked": "q", "missing": ("m",), "found": {"a": "b"},
    "names": ("n",), "key": "k", "tried": {"s": "why"}, "plan": {"rows": 1}, "problems": ("p",), "output": "out",
    "expected": 1, "difference": 0.5, "starts": {"0": "E1"}, "done": ("x",), "failed": "y", "pending": ("z",),
}  # fmt: skip
CLASSES = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, InitError)]


def _made(kind: type[InitError]) -> InitError:
    names = [one.name for one in attrs.fields(kind) if one.init and one.name != "message"]
    return kind("it failed\x1b[2J", **{name: VALUES[name] for name in names})


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_pickles_with_its_data(kind: type[InitError]) -> None:
    """Class, message and data arrive; also after something was added to the message."""
    error = _made(kind)
    error.add(". Next: look")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert str(other) == str(error)
        assert (vars(other), other.args) == (vars(error), error.args)
        assert len(vars(other)) >= 1


def _fails(_number: int) -> None:
    raise errors.UnknownKindError("no kind of that name", kind="previous_rum", candidates=["previous_run"])


def test_an_error_of_a_worker_reaches_the_pool_that_asked() -> None:
    """A pool that cannot read the error of a worker waits for ever."""
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(errors.UnknownKindError) as caught:
        pool.map_async(_fails, [1]).get(timeout=300)
    assert caught.value.candidates == ("previous_run",)
