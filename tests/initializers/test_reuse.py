"""An initializer that is used again, or somewhere else, means what its config and its arguments say."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from noether_init_core import (
    InitializerStack,
    KindConfig,
    LocateQuery,
    PlanError,
    Source,
    SourceInitializer,
    SourceInitializerConfig,
    bind,
)


def _net() -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)})


class Chosen(SourceInitializer):
    """Its constructor is told a file by hand."""

    config_class: ClassVar[type[KindConfig]] = SourceInitializerConfig
    contract: ClassVar[int] = 1

    def __init__(self, config: KindConfig, *, path_provider: Any = None, file: Path = Path("none")) -> None:
        super().__init__(config, path_provider=path_provider)
        self.file = file

    def locate(self, query: LocateQuery) -> Source | None:
        return Source(self.file) if query.part == "model" else None


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A file with everything, and one without the head."""
    state = _net().state_dict()
    torch.save(state, tmp_path / "full.pt")
    torch.save({name: value for name, value in state.items() if name.startswith("body")}, tmp_path / "body.pt")
    return tmp_path / "full.pt", tmp_path / "body.pt"


def test_what_another_initializer_had_loaded_is_forgotten_with_the_stack(files: tuple[Path, Path]) -> None:
    """By itself, the second one has no head, also for the very model that the first one had filled."""
    stack = InitializerStack.from_config([{"kind": "file", "path": str(path)} for path in files])
    model = bind(_net(), "m")
    stack.initialize(model)
    stack.plan(model)
    with pytest.raises(PlanError, match=r"head\.weight"):
        stack.initializers[1].init_weights(model)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_keeps_what_the_constructor_was_told(again: Any, files: tuple[Path, Path]) -> None:
    """Also where it stands in no config; open files and what was found out stay behind."""
    original = Chosen(SourceInitializerConfig(kind="chosen"), file=files[0])
    original.check(bind(_net(), "m"))
    copied = again(original)
    assert copied.file == files[0]
    module = _net()
    copied.init_weights(bind(module, "m"))
    assert all(torch.equal(value, torch.load(files[0])[name]) for name, value in module.state_dict().items())
