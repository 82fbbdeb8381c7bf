"""Text that others chose (names, paths, texts of exceptions) is escaped wherever this project prints it."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
import yaml

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind, kinds
from noether_init_core.errors import CheckpointNotFoundError, InitError, PlanError, UnknownKindError
from noether_init_core.messages import logger_of, yaml_field, yaml_line

HOSTILE = (
    "a\nx forged line",
    "b\x1b[2Jgone",
    "c\x07bell",
    "d\u202eturned",
    "e\rx forged line",
    "f\"quoted'",
    "h #comment: value",
    "j\u2028x forged line",
    "k\x00null",
    "l\ud800alone",
    "m\u2066isolated",
    "n\x9b2J",
    "- o",
    "{p: q}",
    "null",
    "0x1F",
)


def check(text: str) -> None:
    """Nothing in it acts on a terminal, and no line begins with what a name holds after a line break."""
    lines = text.split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert [line for line in lines if line.lstrip(" -").startswith("x forged")] == []


@pytest.mark.parametrize("name", HOSTILE)
def test_yaml_to_paste_is_read_back_as_it_was(name: str) -> None:
    """As a value, a key and in a list; on one line that can be printed."""
    for value in (name, [name, name], {"k": {"deep": [name]}}):
        line = yaml_field("field", value)
        check(line)
        assert "\n" not in line
        if "\ud800" not in name:  # YAML has no form for half a character
            assert yaml.safe_load(line) == {"field": value}
    check(yaml_line({name: name}))


@pytest.mark.parametrize("name", HOSTILE)
def test_an_error_is_safe_and_its_data_is_raw(name: str) -> None:
    """In its text, its repr, its args and after pickling; attributes have the name as it was found."""
    error = CheckpointNotFoundError(f"{name} not found", path=Path("a") / name, asked=name, candidates=[name])
    error.add(f"; {name.replace(chr(10), ' ')}")
    for one in (error, pickle.loads(pickle.dumps(error))):
        for text in (str(one), repr(one), *map(str, one.args)):
            check(text)
        assert (one.asked, one.candidates) == (name, (name,))
    found = UnknownKindError(f"no kind {name}", kind=name)
    check(str(found))
    assert found.kind == name


@pytest.mark.parametrize("name", HOSTILE)
def test_a_record_of_a_log_is_safe(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whether the text is an argument, a path, an exception or a part of the message."""
    logger = logger_of("noether_init_core.tests.foreign")
    assert logger_of("noether_init_core.tests.foreign") is logger
    with caplog.at_level(logging.INFO, "noether_init_core.tests.foreign"):
        logger.info("%s at %s: %s %d", name, Path(name), InitError(name.replace("\n", " ")), 3)
        logger.info(name.replace("\n", " "))
    assert len(caplog.messages) == 2
    for message in caplog.messages:
        check(message)


def test_every_logger_escapes() -> None:
    """No module makes a logger of its own."""
    root = Path(kinds.__file__).parents[1]
    found = [path.name for path in root.rglob("*.py") if "logging.getLogger(" in path.read_text(encoding="utf-8")]
    assert found == ["messages.py"]


def network(names: tuple[str, ...]) -> torch.nn.Module:
    module = torch.nn.Module()
    for name in names:
        module.register_parameter(name.replace(".", ""), torch.nn.Parameter(torch.zeros(2)))
    return module


def test_a_refused_plan_and_its_fix(tmp_path: Path) -> None:
    """The text of the error has every problem on a line of its own; the fix names exactly the keys."""
    path = tmp_path / "a\nx forged line.pt"
    torch.save({name.replace(".", ""): torch.ones(2) for name in HOSTILE}, path)
    stack = InitializerStack.from_config([{"kind": "file", "path": str(path)}])
    model = bind(network(HOSTILE[:3]), "net")
    plan = stack.plan(model)
    with pytest.raises(PlanError) as refused:
        stack.initialize(model)
    check(str(refused.value))
    for text in (str(plan), repr(plan)):
        check(text)
    assert {row["sources"][0] for row in json.loads(plan.to_json())["rows"]} == {n.replace(".", "") for n in HOSTILE}
    html = plan._repr_html_()
    assert "\u202e" not in html
    assert "<script" not in html


def test_a_run_id_of_a_manifest_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that was copied from a run of another name."""
    module = torch.nn.Linear(2, 2)
    CheckpointWriter(PathProvider(tmp_path, "bad \u202e id"[:3] + "x")).save(
        bind(module, "net"), TrainingIteration(1, 1, 1)
    )
    (tmp_path / "badx").rename(tmp_path / "other")
    with caplog.at_level(logging.INFO):
        InitializerStack.from_config(
            [{"kind": "previous_run", "run_id": "other"}], path_provider=PathProvider(tmp_path, "new")
        ).initialize(bind(module, "net"))
    assert any("was written by run badx" in message for message in caplog.messages)
    for message in caplog.messages:
        check(message)
