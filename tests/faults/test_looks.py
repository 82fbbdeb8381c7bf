"""Looks at the disk that fail, a few of each question; the campaign tries all."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

import pytest

from faults.campaign.looks import QUESTIONS, SERIES, FailingLooks, looking_failures
from noether_init_core import InitializerStack, PathProvider
from noether_init_core.errors import CheckpointUnreachableError

#: Each n-th look of a question, another n for each series.
EVERY = (19, 23, 29)


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_look_that_fails_is_no_answer(name: str, tmp_path: Path) -> None:
    """Neither an older set nor a new training nor a removed set: the right answer, or an error with the path."""
    found = Counter[str]()
    for every, (code, mode) in zip(EVERY, SERIES, strict=True):
        found += sum(looking_failures(name, tmp_path / code, code, mode, every=every), Counter[str]())
    assert found["refused"] > 0
    assert found["refused"] + found["same"] == found["tried"]
    assert [key for key in found if key not in ("tried", "refused", "same")] == []


@pytest.mark.parametrize(
    ("call", "look"),
    [
        ("stat", lambda path: os.path.exists(path)),
        ("stat", lambda path: path.exists()),
        ("lstat", lambda path: os.path.islink(path)),
        ("listdir", lambda path: os.listdir(path.parent)),
        ("scandir", lambda path: list(path.parent.glob("*"))),
        ("open", lambda path: open(path).close()),
        ("open", lambda path: os.close(os.open(path, os.O_RDONLY))),
        ("open", lambda path: path.read_bytes()),
        ("readlink", lambda path: os.readlink(path.parent / "link")),
        ("stat", lambda path: os.stat(path.name, dir_fd=os.open(path.parent, os.O_RDONLY))),
        ("fstat", lambda path: os.fstat(os.open(path, os.O_RDONLY))),
        ("read", lambda path: os.read(os.open(path, os.O_RDONLY), 1)),
        ("preadv", lambda path: os.preadv(os.open(path, os.O_RDONLY), [bytearray(1)], 0)),
    ],
)
def test_each_way_to_look_is_seen(call: str, look, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A call that is not replaced would never fail, and then nothing is tried."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with FailingLooks(tmp_path, 0, 0) as looks:
        look(path)
    assert call in [name for name, _path in looks.calls]


def test_an_older_set_is_never_resumed_where_the_newest_has_no_permission(tmp_path: Path) -> None:
    """As ``chmod 000`` on its folder does for a user who is not root."""
    QUESTIONS["auto_resume"].prepare(tmp_path)
    newest = tmp_path / "run" / "checkpoints" / "sets" / "00000003_E3_U3_S3"
    real, paths = os.open, PathProvider(tmp_path, "run")

    def denied(path, *arguments, **options):  # type: ignore[no-untyped-def]
        if str(path).startswith(str(newest)):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    for config in ({"auto_resume": True}, {"auto_resume": True, "on_invalid": "previous"}, [{"kind": "resume"}]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", denied)
            with pytest.raises(CheckpointUnreachableError, match=r"00000003_E3_U3_S3.*Permission denied"):
                InitializerStack.from_config(config, path_provider=paths).start_checkpoint()
