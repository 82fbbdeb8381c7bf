"""The contract changes, and what was written before goes on working: rehearsed on a contract of version 2."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.foreign import ForeignPackages

from noether_init_core import InitializerStack, bind, kinds
from noether_init_core.errors import KindContractError
from noether_init_core.kinds import contract
from noether_init_core.kinds import hookspec as hooks
from noether_init_core.kinds.hookspec import HookSpecs, hookspec

OLD = """
from noether_init_core import InitializerBase

class K(InitializerBase):
    contract = 1
    seen = []

    def init_weights(self, module):
        self.seen.append(module.name)

    def init_optimizer(self, model):
        self.seen.append(model.name)
"""
MESSAGE = "init_weights: module is now called model; write: def init_weights(self, model). It goes with contract 3"


class _NextSpecs(HookSpecs):
    """As it would look: contract 1 called the argument ``module``, contract 2 calls it ``model``."""

    @hookspec(warn_on_impl_args={"module": DeprecationWarning(MESSAGE)})
    def init_weights(self, model: Any, module: Any, initializer: Any) -> None:  # type: ignore[override]
        """Both names are there for one version."""


@pytest.fixture
def next_contract(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The core with contract 2, in which an argument of a hook has been renamed."""
    monkeypatch.setattr(hooks, "HookSpecs", _NextSpecs)
    monkeypatch.setattr(hooks, "CONTRACT_VERSION", 2)
    monkeypatch.setattr(hooks, "RENAMED_ARGUMENTS", {"module": "model"})
    return


def test_a_class_of_an_older_contract_is_used_and_warned_with_its_place(
    foreign: ForeignPackages, next_contract: None
) -> None:
    """It gets the value under the old name; the warning says what to write, and in which file and line."""
    foreign.install("old-init", offers={"old": "old_contract:K"}, modules={"old_contract": OLD})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stack = InitializerStack.from_config([{"kind": "old"}])
        stack.initialize(bind(torch.nn.Linear(2, 2), "net"))
    assert stack.initializers[0].seen == ["net", "net"]  # type: ignore[attr-defined]  # of the stranger's class
    (warning,) = [one for one in caught if one.category is DeprecationWarning]
    assert str(warning.message) == MESSAGE
    assert warning.filename.endswith("old_contract.py")
    assert "def init_weights(self, module):" in OLD.splitlines()[warning.lineno - 1]


def test_check_tells_the_author_before_a_user_sees_the_warning(foreign: ForeignPackages, next_contract: None) -> None:
    """A deprecated argument is advice with its fix, no breach."""
    foreign.install("old-init", offers={"old": "old_advice:K"}, modules={"old_advice": OLD})
    cls = kinds.resolve("old")
    assert contract.examine(cls) == ()
    (finding, *_others) = contract.advice(cls)
    assert finding.message == f"init_weights takes module, which is deprecated: {MESSAGE}"


def test_a_class_of_the_new_contract_is_not_warned(foreign: ForeignPackages, next_contract: None) -> None:
    """Warnings are errors in these tests."""
    new = OLD.replace("contract = 1", "contract = 2").replace("module", "model")
    foreign.install("new-init", offers={"new": "new_contract:K"}, modules={"new_contract": new})
    stack = InitializerStack.from_config([{"kind": "new"}])
    stack.initialize(bind(torch.nn.Linear(2, 2), "net"))
    assert stack.initializers[0].seen == ["net", "net"]  # type: ignore[attr-defined]  # of the stranger's class


def test_an_older_core_refuses_a_class_of_a_newer_contract(foreign: ForeignPackages) -> None:
    """The same class, on the core as it is: with the command that helps."""
    new = OLD.replace("contract = 1", "contract = 2").replace("module", "model")
    foreign.install("new-init", offers={"new": "newer_contract:K"}, modules={"newer_contract": new})
    with pytest.raises(KindContractError) as caught:
        kinds.resolve("new")
    assert str(caught.value).endswith("Next: pip install --upgrade noether-init-core")


def test_nothing_is_deprecated_at_present() -> None:
    """Contract 1 is the first one: the machinery rests."""
    assert hooks.RENAMED_ARGUMENTS == {}
    assert all(hooks.deprecated_arguments(hook) == {} for hook in hooks.HOOK_NAMES)
