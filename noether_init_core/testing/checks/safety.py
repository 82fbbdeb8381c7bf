"""All or nothing: everything that can be known is found out beforehand, and looking changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from noether_init_core.errors import ConfigError, InitError, PartlyInitializedError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.stack.stack import InitializerStack
from noether_init_core.testing.cases import Wrong
from noether_init_core.testing.checks.base import Checks, MakeConfig, NewCase
from noether_init_core.testing.snapshots import differences, unchanged


class SafetyChecks(Checks):
    """Check, errors, start."""

    def test_check_finds_wrong_configs(
        self, new_case: NewCase, make_config: MakeConfig, wrong_configs: Sequence[Wrong]
    ) -> None:
        """Each wrong config raises in ``check``, or before it, and nothing has changed by then."""
        if not self.can_be_wrong.is_open:
            assert not wrong_configs, f"can_be_wrong is closed ({self.can_be_wrong.reason}), but wrong_configs has some"
            return
        assert wrong_configs, (
            "wrong_configs is empty. Give the kit configs that are wrong in a way that only a look at files or at the "
            'model shows, or answer can_be_wrong = closed("why")'
        )
        for wrong in wrong_configs:
            case = new_case("single")
            before = self.everything(case)
            with pytest.raises(Exception):  # noqa: B017 - of which class it is, another check says
                self.one(case, wrong.config).check(case.model, case.trainer, case.callbacks)
                pytest.fail(f"{wrong.what}: check() has not found it")
            changed = differences(before, self.everything(case))
            assert not changed, f"{wrong.what}: check() raised, after it had changed {', '.join(changed[:5])}"

    def test_errors_are_of_the_right_classes(self, new_case: NewCase, wrong_configs: Sequence[Wrong]) -> None:
        """What a user did wrong is an ``InitError`` of the class that the author says, with a message."""
        for wrong in wrong_configs:
            case = new_case("single")
            with pytest.raises(Exception) as caught:
                self.make(case, wrong.config).initialize(case.model, trainer=case.trainer, callbacks=case.callbacks)
                pytest.fail(f"{wrong.what}: nothing was raised")
            error: BaseException = caught.value
            if isinstance(error, PartlyInitializedError) and error.__cause__ is not None:
                error = error.__cause__  # that it comes too late, another check says
            assert isinstance(error, InitError), (
                f"{wrong.what}: {type(error).__name__}: {error}: derive it from InitError (ConfigError, "
                "CheckpointNotFoundError, ...), so that callers can tell it from a bug"
            )
            assert isinstance(error, wrong.error), f"{wrong.what}: {error!r} is no {wrong.error.__name__}"
            assert wrong.message in str(error), f"{wrong.what}: the message lacks {wrong.message!r}: {error}"

    def test_check_changes_nothing(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """``check`` is a look, and may be made twice."""
        case = new_case("single")
        initializer = self.one(case, make_config(case))
        with unchanged(lambda: self.everything(case), "check()"):
            for _time in range(2):
                initializer.check(case.model, case.trainer, case.callbacks)

    def test_start_iteration(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """Zero, or where the source ended, as the author says."""
        case = new_case("single")
        start = self.initialize(case, make_config(case)).start
        right = case.source.iteration if self.continues.is_open else TrainingIteration.zero()
        assert start == right, f"training starts at {start}, not at {right}"

    def test_start_is_the_same_when_asked_again(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """``start_checkpoint`` may be called before ``initialize``, and more than once."""
        case = new_case("single")
        initializer = self.one(case, make_config(case))
        first, again = initializer.start_checkpoint(), initializer.start_checkpoint()
        assert first == again, f"first {first}, then {again}"

    def test_path_provider(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """Without one, a kind that needs it says so, and another one works."""
        case = new_case("single")
        config = {"kind": self.kind, **make_config(case)}
        if not self.needs_path_provider.is_open:
            InitializerStack.from_config([config]).initialize(case.model)
            return
        with pytest.raises(ConfigError, match="path_provider"):
            InitializerStack.from_config([config]).initialize(case.model)
            pytest.fail("without a path_provider nothing was raised")
