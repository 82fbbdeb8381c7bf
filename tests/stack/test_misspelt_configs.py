"""Keys of a config that would be read if they were spelt otherwise: an error, never a start from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.advice import executes

from noether_init_core import InitializerStack, PathProvider, bind
from noether_init_core.errors import ConfigError
from noether_init_core.stack.config_files import examine_config_file, load_config_mapping

ENTRY = {"kind": "file", "path": "w.pt"}
EARLIER = {"kind": "previous_run", "run_id": "earlier"}


def refused(config: Any, path: Path) -> str:
    """The only error, of the file and of the mapping alike."""
    path.write_text(yaml.safe_dump(config))
    (error,) = examine_config_file(path)[1]
    with pytest.raises(ConfigError) as other:
        InitializerStack.from_config(config)
    message = str(error).partition(": ")[2]
    assert message in str(other.value)
    return message


def renamed(config: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The config with another name for a key, wherever it is."""
    return {
        (new if key == old else key): renamed(value, old, new) if isinstance(value, dict) else value
        for key, value in config.items()
    }


@executes("stack/config_files.py", "Next: rename it to {}", "Next: rename it to {}.")
@pytest.mark.parametrize(
    ("config", "wrong", "entries"),
    [
        ({"initialiser": [ENTRY]}, "initialiser", 1),
        ({"Initialisers": [ENTRY]}, "Initialisers", 1),
        ({"initializer": [ENTRY], "auto_resume": True}, "initializer", 1),
        ({"initializers": [ENTRY], "auto_resum": True}, "auto_resum", 1),
        ({"model": {"initialisers": [EARLIER]}}, "initialisers", 1),
        ({"model": {"encoder": {"initializer": [EARLIER]}}}, "initializer", 1),
        ({"trainer": {"initialiser": EARLIER}}, "initialiser", 1),
        ({"model": {"name": "net"}, "auto-resume": True}, "auto-resume", 0),
        ({"model": {"name": "net"}, "resume_run_idd": "earlier"}, "resume_run_idd", 1),
    ],
)
def test_a_misspelt_key_is_renamed(config: dict[str, Any], wrong: str, entries: int, tmp_path: Path) -> None:
    """Then it is read."""
    message = refused(config, tmp_path / "init.yaml")
    right = message.partition("Next: rename it to ")[2].partition(".")[0]
    mended = load_config_mapping(renamed(config, wrong, right))
    assert len(mended.entries) == entries
    assert entries or mended.resume is not None


@executes("stack/config_files.py", "Next: move its items to model: {initializers: [...]}, or one of them to")
@pytest.mark.parametrize(
    "config",
    [
        {"model": {"name": "net"}, "initialiser": [EARLIER]},
        {"model": {"name": "net"}, "training": {"initializers": [EARLIER]}},
        {"model": {"name": "net"}, "trainer": {"initializers": [EARLIER]}},
    ],
)
@pytest.mark.parametrize("mended", [{"model": {"initializers": [EARLIER]}}, {"trainer": {"initializer": EARLIER}}])
def test_initializers_elsewhere_are_moved(config: dict[str, Any], mended: dict[str, Any], tmp_path: Path) -> None:
    """To where Noether reads them."""
    assert "is not read here. Next: move its items to " in refused(config, tmp_path / "init.yaml")
    assert len(load_config_mapping(mended).entries) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"initializer": {"kind": "normal"}, "initializer_range": 0.02, "part": {"initializer": "xavier"}}},
        {"model": {"initializers": None}, "trainer": {"initializer": None}, "run_id": "a", "stage_name": "b"},
        {"initializers": []},
        {"auto_resume": False},
        [],
    ],
)
def test_a_config_without_initializers_starts_from_scratch(config: Any, paths: PathProvider) -> None:
    """If it says so, or if what looks like initializers are functions that draw parameters."""
    stack = InitializerStack.from_config(config, path_provider=paths)
    assert str(stack.initialize(bind(torch.nn.Linear(2, 2), name="net"))).startswith("start E0_U0_S0")
