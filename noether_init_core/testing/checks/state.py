"""What a kind restores besides weights, and what it must leave alone: optimizer, trainer, callbacks, process, disk."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from noether_init_core import kinds
from noether_init_core.testing.checks.base import Checks, MakeConfig, NewCase
from noether_init_core.testing.checks.config import secret_fields
from noether_init_core.testing.snapshots import (
    differences,
    open_files,
    state_of_files,
    state_of_optimizer,
    state_of_process,
    unchanged,
)


class StateChecks(Checks):
    """Restored as said, or as it was."""

    def test_optimizer(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """The state of the source's optimizer, if the kind restores it; else the optimizer is not touched."""
        case = new_case("single")
        optimizer = case.model.optimizer
        if not self.restores_optimizer.is_open:
            with unchanged(lambda: state_of_optimizer("net", optimizer), "restores_optimizer is closed, but the kind"):
                self.initialize(case, make_config(case))
            return
        self.initialize(case, make_config(case))
        rates = [group["lr"] for group in case.source.optimizer["net"]["param_groups"]]
        assert [group["lr"] for group in optimizer.param_groups] == rates, "the learning rates are not the source's"
        wanted = {
            f"optimizer of net: {index} {name}": value
            for index, values in case.source.optimizer["net"]["state"].items()
            for name, value in values.items()
        }
        assert wanted
        after = state_of_optimizer("net", optimizer)
        wrong = differences(wanted, {name: value for name, value in after.items() if name in wanted})
        assert not wrong, f"not the source's: {', '.join(wrong[:5])}"

    def test_trainer(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """The source's number, if the kind restores trainers; else the trainer's own."""
        case = new_case("single")
        own = case.trainer.number
        self.initialize(case, make_config(case))
        assert case.trainer.number == (case.source.number if self.restores_trainer.is_open else own)

    def test_callbacks(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """The source's number, if the kind restores callbacks; else the callback's own."""
        case = new_case("single")
        own = case.callbacks[0].number
        self.initialize(case, make_config(case))
        assert case.callbacks[0].number == (case.source.number if self.restores_callbacks.is_open else own)

    def test_process_is_left_as_it_was(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """Generators, default dtype, threads, working folder, environment, import path, logging: others use them."""
        case = new_case("single")
        config = make_config(case)
        kinds.resolve(self.kind)  # what the import does, another check looks at
        # not where a seed leads to: an earlier test may have been left there
        torch.rand(()), np.random.random(), random.random()
        with unchanged(state_of_process, "the kind", "Use a torch.Generator of your own, and context managers"):
            self.initialize(case, config)

    def test_disk_is_left_as_it_was(
        self, new_case: NewCase, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No checkpoint changes or disappears, and reading creates nothing: in the runs, and in the working folder."""
        case = new_case("single")
        config = make_config(case)
        here = tmp_path / "working folder of this check"
        here.mkdir()
        monkeypatch.chdir(here)
        folders = case.source.paths.output_root, case.source.file.parent, here
        with unchanged(lambda: state_of_files(*folders), "the kind"):
            self.initialize(case, config)

    def test_files_are_closed(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """After the initialization no file of the source is held open, of which long trainings run out."""
        case = new_case("single")
        folders = case.source.paths.output_root, case.source.file.parent
        if open_files(*folders) is None:
            pytest.skip("this system does not tell which files are open")
        stack = self.make(case, make_config(case))
        stack.initialize(case.model, trainer=case.trainer, callbacks=case.callbacks)
        left = open_files(*folders)
        assert not left, f"still open: {', '.join(left or ())}. Close them in release()"

    def test_secrets_are_not_told(
        self,
        new_case: NewCase,
        make_config: MakeConfig,
        secrets: Sequence[str],
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """No secret stands in a report, a representation, a dump, the log or on the terminal."""
        hidden = list(secret_fields(kinds.resolve(self.kind).config_class))
        assert secrets or not hidden, (
            f"{', '.join(hidden)} is secret. Give the kit a fixture secrets: the texts that nobody may read"
        )
        case = new_case("single")
        with caplog.at_level(logging.DEBUG):
            stack = self.make(case, make_config(case))
            report = stack.initialize(case.model, trainer=case.trainer, callbacks=case.callbacks)
        config = stack.initializers[0].config
        printed = capfd.readouterr()
        told = {
            "the report": f"{report}{report.to_json()}{report.provenance()}",
            "the config": f"{config!r}{config}{config.model_dump_json()}",
            "the initializer": repr(stack.initializers[0]),
            "the log": caplog.text,
            "the terminal": printed.out + printed.err,
        }
        for secret in secrets:
            places = [place for place, text in told.items() if secret in text]
            assert not places, f"a secret stands in {' and '.join(places)}. Use pydantic.SecretStr, and leave it out"
