"""What an error about a run id, a folder of a run or an iteration advises is done here, and leads on."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.advice import executes
from support.following import advised

from noether_init_core import PathProvider, TrainingIteration
from noether_init_core.paths import check_run_id


@executes("paths.py", 'Next: write the text in quotes, for example {}: "{}"', 'Next: {}: "..."')
@pytest.mark.parametrize("value", [20260219, 1.5, True, datetime.date(2026, 2, 19), [1]])
def test_a_run_id_is_written_in_quotes(value: Any) -> None:
    """The line of the message is YAML of a text that is accepted."""
    advice = advised(lambda: check_run_id(value))
    line = advice.removeprefix("write the text in quotes, for example ").replace("...", "run")
    found = yaml.safe_load(line)
    assert isinstance(check_run_id(found["run_id"]), str)


@executes("paths.py", "Next: choose another run_id, or set debug: true to use that folder")
@executes("paths.py", "Next: PathProvider(output_root, run_id, stage_name)")
def test_a_provider_is_made_as_advised(tmp_path: Path) -> None:
    """By the call of the message; the folder of debug runs by its own field."""
    call = advised(lambda: PathProvider.of(object()))
    made = eval(call, {"PathProvider": PathProvider, "output_root": tmp_path, "run_id": "run", "stage_name": None})
    assert PathProvider.of(made) is made
    reserved = PathProvider(tmp_path, "run", debug=True).run_output_path.parent.name
    advice = advised(lambda: PathProvider(tmp_path, reserved))
    field = re.search(r"or set (debug: true) to use that folder", advice)
    assert field is not None
    inside = PathProvider(tmp_path, "run", **yaml.safe_load(field[1]))
    assert inside.run_output_path == tmp_path / reserved / "run"
    assert PathProvider(tmp_path, f"{reserved}2").run_id == f"{reserved}2"


@executes("iteration.py", "Next: write E10_U100_S200 or a part of it, such as E10 or U100")
def test_an_iteration_is_written_in_each_form() -> None:
    """All that the message shows."""
    advice = advised(lambda: TrainingIteration.from_string("epoch 10"))
    texts = re.findall(r"\b[EUS]\d\w*", advice)
    assert texts == ["E10_U100_S200", "E10", "U100"]
    assert [str(TrainingIteration.from_string(text)) for text in texts] == texts
