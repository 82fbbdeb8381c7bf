"""Classes that were written for another contract than that of the installed core."""

from __future__ import annotations

import pytest
from support.foreign import ForeignPackages

from noether_init_core import kinds
from noether_init_core.errors import KindContractError
from noether_init_core.kinds.hookspec import CONTRACT_VERSION

NEWER = f"""
from noether_init_core import InitializerBase

class K(InitializerBase):
    contract = {CONTRACT_VERSION + 1}

    def init_weights(self, model): pass
    def init_optimizer(self, model): pass
"""


def test_an_older_core_refuses_a_class_of_a_newer_contract(foreign: ForeignPackages) -> None:
    """The error ends with the command that installs a core of that contract."""
    foreign.install("new-init", offers={"new": "newer_contract:K"}, modules={"newer_contract": NEWER})
    with pytest.raises(KindContractError) as caught:
        kinds.resolve("new")
    assert str(caught.value).endswith("Next: pip install --upgrade noether-init-core")
