"""The checks of refusals, of the start, of state besides weights, of the process, and of secrets.

The messages are complete without the details that pytest adds and cuts: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from noether_init_core import kinds
from noether_init_core.errors import InitError, PartlyInitializedError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import listed
from noether_init_core.stack.stack import InitializerStack
from noether_init_core.testing.cases import Case, Wrong
from noether_init_core.testing.checks import Checks, Config, NewCase
from noether_init_core.testing.config_checks import secret_fields
from noether_init_core.testing.snapshots import differences, said, state_of_optimizer, told, unchanged


class StateChecks(Checks):
    """Checks that everything is refused before the first change, of the start, and of state besides weights."""

    def test_check_finds_wrong_configs(self, new_case: NewCase, wrong_configs: Sequence[Wrong]) -> None:
        """Each wrong config raises in ``check`` or before it, and nothing has changed."""
        if not self.can_be_wrong.is_open:
            assert not wrong_configs, told(
                f"can_be_wrong is closed ({self.can_be_wrong.reason}), but wrong_configs is not empty",
                "the kit would not try them",
                "can_be_wrong = open_()",
            )
            return
        assert wrong_configs, told(
            "wrong_configs is empty",
            "nobody has tried what users will see after a mistake",
            "return configs that only files or the model show to be wrong, or declare can_be_wrong = closed('why')",
        )
        for wrong in wrong_configs:
            case = new_case("single")
            before, raised = self.everything(case), False
            try:
                self.check(self.one(case, wrong.config), case)
            except Exception:  # the next check looks at the class
                raised = True
            assert raised, told(
                f"{wrong.what}: check() did not raise",
                "the error comes only after other initializers of the stack have changed the model, or never",
                "find it out in check(), and let errors pass",
            )
            changed = differences(before, self.everything(case))
            assert not changed, told(
                f"{wrong.what}: check() raised after it had changed {listed(changed)}",
                "a failed initialization must leave everything as it was",
                "change nothing in check()",
            )

    def test_errors_are_of_the_right_classes(self, new_case: NewCase, wrong_configs: Sequence[Wrong]) -> None:
        """A user error raises an ``InitError`` of the declared class, with the declared message."""
        for wrong in wrong_configs:
            error: BaseException | None = None
            try:
                self.initialize(new_case("single"), wrong.config)
            except BaseException as caught:
                if isinstance(caught, KeyboardInterrupt):
                    raise
                error = caught
            assert error is not None, told(
                f"{wrong.what}: nothing was raised", "the training starts all the same", "raise it in check()"
            )
            if isinstance(error, PartlyInitializedError) and error.__cause__ is not None:
                error = error.__cause__  # another check refuses that it comes too late
            assert isinstance(error, InitError), told(
                f"{wrong.what}: {said(error)}",
                "callers cannot tell it from a bug",
                "derive it from InitError (ConfigError, CheckpointNotFoundError, ...)",
            )
            assert isinstance(error, wrong.error), told(
                f"{wrong.what}: {said(error)} is not a {wrong.error.__name__}",
                "callers that catch this class would miss it",
                "raise the declared class, or declare the one that is raised",
            )
            assert wrong.message in str(error), told(
                f"{wrong.what}: {wrong.message!r} not found in the message: {error}",
                "users need to see what is wrong",
                "name what was asked for and what was found",
            )
            try:
                copied: object = pickle.loads(pickle.dumps(error))
            except Exception as failure:
                copied = failure
            assert (type(copied), str(copied)) == (type(error), str(error)), told(
                f"{wrong.what}: {type(error).__name__} does not survive pickling: {copied!r}",
                "a process pool hangs or shows another error",
                "pass all arguments to super().__init__(), and define the class at the top of a module",
            )

    def test_check_changes_nothing(self, single: Case, single_config: Config) -> None:
        """``check`` changes nothing, and may be called twice."""
        initializer = self.one(single, single_config)
        why, change = "the checks of later initializers may still fail", "only read in check()"
        with unchanged(lambda: self.everything(single), "check()", why=why, change=change):
            for _time in range(2):
                self.check(initializer, single)

    def test_start_iteration(self, single: Case, single_config: Config) -> None:
        """The start is zero, or the iteration of the source, as the author declares."""
        start = self.initialize(single, single_config).start
        right = single.source.iteration if self.continues.is_open else TrainingIteration.zero()
        assert start == right, told(
            f"training starts at {start}, not at {right}",
            "schedules, samplers and names of checkpoints depend on it",
            "return the iteration of the source only if its optimizer and trainer are restored: continues = open_()",
        )

    def test_start_is_the_same_when_asked_again(self, single: Case, single_config: Config) -> None:
        """``start_checkpoint`` may be called before ``initialize``, and more than once."""
        initializer = self.one(single, single_config)
        first, again = initializer.start_checkpoint(), initializer.start_checkpoint()
        assert first == again, told(
            f"the first answer is {first}, the second {again}", "scripts ask before initialize()", "keep the answer"
        )

    def test_path_provider(self, single: Case, single_config: Config) -> None:
        """Without a path provider, a kind that needs one raises, and another kind works."""
        config = {"kind": self.kind, **single_config}
        before = self.everything(single)
        try:
            InitializerStack.from_config([config]).initialize(single.model)
        except Exception as caught:
            reason = self.needs_path_provider.reason
            self.assert_early(caught, "without a path provider", differences(before, self.everything(single)))
            if not self.needs_path_provider.is_open:
                raise AssertionError(
                    told(
                        f"needs_path_provider is closed ({reason}), and without one: {said(caught)}",
                        "users without a run could not use it",
                        "use self.path_provider only if it is there, or declare needs_path_provider = open_()",
                    )
                ) from caught
            return
        assert not self.needs_path_provider.is_open, told(
            "needs_path_provider is open, and without one nothing was raised",
            "it would read another run, or none",
            "raise ConfigError in __init__ or check() if self.path_provider is None",
        )

    def test_optimizer(self, single: Case, single_config: Config) -> None:
        """The optimizer gets the state of the source if the kind restores it; else it is not changed."""
        optimizer = single.model.optimizer
        if not self.restores_optimizer.is_open:
            with unchanged(
                lambda: state_of_optimizer("net", optimizer),
                "restores_optimizer is closed, but the kind",
                why="another initializer, or the user, has set it",
                change="leave optimizers alone, or declare restores_optimizer = open_()",
            ):
                self.initialize(single, single_config)
            return
        self.initialize(single, single_config)
        why, change = "the next step would be another one", "load it by parameter name, in init_optimizer()"
        rates = [group["lr"] for group in single.source.optimizer["net"]["param_groups"]]
        own = [group["lr"] for group in optimizer.param_groups]
        assert own == rates, told(f"the learning rates are {own}, those of the source {rates}", why, change)
        wanted = {
            f"optimizer of net: {index} {name}": value
            for index, values in single.source.optimizer["net"]["state"].items()
            for name, value in values.items()
        }
        after = state_of_optimizer("net", optimizer)
        wrong = differences(wanted, {name: value for name, value in after.items() if name in wanted})
        assert not wrong, told(f"not as in the source: {listed(wrong)}", why, change)

    def test_trainer(self, single: Case, single_config: Config) -> None:
        """The trainer gets the number of the source if the kind restores trainers; else it keeps its own."""
        own = single.trainer.number
        self.initialize(single, single_config)
        self.assert_number(
            "trainer", single.trainer.number, single.source.number if self.restores_trainer.is_open else own
        )

    def test_callbacks(self, single: Case, single_config: Config) -> None:
        """The callback gets the number of the source if the kind restores callbacks; else it keeps its own."""
        own = single.callbacks[0].number
        self.initialize(single, single_config)
        self.assert_number(
            "callbacks", single.callbacks[0].number, single.source.number if self.restores_callbacks.is_open else own
        )

    def assert_number(self, what: str, found: int, right: int) -> None:
        """Assert that a trainer or callback has the right state."""
        assert found == right, told(
            f"the state of {what} is {found}, and {right} is right",
            "training would go on from another state than weights and optimizer",
            f"restore it in init_{what}() with restores_{what} = open_(), else leave it alone",
        )

    def test_process_is_left_as_it_was(
        self, single: Case, single_config: Config, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Generators, default dtype, switches of torch, threads, working folder, environment, import path, logging.

        They stay the same from the constructor to the report, and nothing is printed on standard output.
        """
        kinds.resolve(self.kind)  # another check covers the import
        capfd.readouterr()
        steps: dict[str, Callable[[], Any]] = {
            "the constructor": lambda: self.one(single, single_config),
            "start_checkpoint()": lambda: self.one(single, single_config).start_checkpoint(),
            "plan()": lambda: self.one(single, single_config).plan(single.model),
            "check()": lambda: self.check(self.one(single, single_config), single),
            "initialize()": lambda: self.initialize(single, single_config),
        }
        for name, step in steps.items():
            # leave the state that a fixed seed gives: a kind that seeds a generator must be seen to change it
            torch.rand(()), np.random.random(), random.random()
            with unchanged(
                self.process,
                name,
                why="the user's seeds, switches and handlers apply to the whole training",
                change="use a torch.Generator of your own, and context managers for what must be switched",
            ):
                step()
        printed = capfd.readouterr().out
        assert not printed, told(
            f"{printed[:80]!r} was printed on standard output",
            "programs read it: ninit plan --json",
            "self.logger.info(...)",
        )

    def test_secrets_are_not_told(
        self,
        single: Case,
        single_config: Config,
        secrets: Sequence[str],
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """No secret occurs in a report, a representation, a dump, the log or on the terminal."""
        hidden = list(secret_fields(kinds.resolve(self.kind).config_class))
        assert secrets or not hidden, told(
            f"{listed(hidden)} is secret, and the fixture secrets returns nothing",
            "the kit looks for the secret texts in what is stored and shown",
            "a fixture secrets, which returns them",
        )
        with caplog.at_level(logging.DEBUG):
            stack = self.make(single, single_config)
            report = self.start(stack, single)
        config = stack.initializers[0].config
        printed = capfd.readouterr()
        outputs = {
            "the report": f"{report}{report.to_json()}{report.provenance()}",
            "the config": f"{config!r}{config}{config.model_dump_json()}",
            "the initializer": repr(stack.initializers[0]),
            "the log": caplog.text,
            "the terminal": printed.out + printed.err,
        }
        for secret in secrets:
            places = [place for place, text in outputs.items() if secret in text]
            assert not places, told(
                f"a secret occurs in {' and '.join(places)}",
                "reports are stored beside checkpoints and sent to trackers",
                "use pydantic.SecretStr, and leave it out",
            )
