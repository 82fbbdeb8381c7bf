"""A kind is registered by a distribution, and being installed costs nobody anything."""

from __future__ import annotations

import importlib.metadata

import pytest

from noether_init_core import kinds
from noether_init_core.kinds import contract
from noether_init_core.kinds.hookspec import CONTRACT_VERSION
from noether_init_core.kinds.lookup import normalized
from noether_init_core.testing.checks.base import Checks
from noether_init_core.testing.processes import work_at_import


class RegistrationChecks(Checks):
    """Entry point, contract, import."""

    def test_is_registered_by_its_distribution(self) -> None:
        """One installed distribution offers the kind by an entry point: the one that the author says."""
        info = kinds.describe(self.kind)
        if self.distribution is None:
            assert info.distribution is None, f"{self.kind} is offered by {info.source}; say distribution = ..."
            return
        assert info.distribution is not None, (
            f"{self.kind} is registered in this process only, so that users will not have it. Add to pyproject.toml:\n"
            f'[project.entry-points."{kinds.GROUP}"]\n{self.kind} = "{info.target}"'
        )
        assert normalized(info.distribution) == normalized(self.distribution), f"offered by {info.source}"
        assert info.version == importlib.metadata.version(self.distribution)

    def test_says_the_contract_it_was_written_for(self) -> None:
        """The class itself says ``contract``, which the next release of the core can rely on."""
        cls = kinds.resolve(self.kind)
        assert "contract" in vars(cls), (
            f"{cls.__qualname__} does not say the contract that it was written for. Add: contract: ClassVar[int] = "
            f"{CONTRACT_VERSION}"
        )
        assert not contract.examine(cls)

    def test_import_does_no_work(self) -> None:
        """Importing the module opens no file for writing, no connection and no process, prints and changes nothing."""
        info = kinds.describe(self.kind)
        if info.distribution is None:
            pytest.skip("registered in this process only: another process cannot import it")
        assert work_at_import(info.target.partition(":")[0].strip(), info.distribution) == []
