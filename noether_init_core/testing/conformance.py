"""InitializerConformance: every check of the kit, for one kind."""

from __future__ import annotations

from typing import ClassVar

from noether_init_core.testing.checks.config import ConfigChecks
from noether_init_core.testing.checks.registration import RegistrationChecks
from noether_init_core.testing.checks.safety import SafetyChecks
from noether_init_core.testing.checks.state import StateChecks
from noether_init_core.testing.checks.weights import WeightChecks


class InitializerConformance(RegistrationChecks, ConfigChecks, WeightChecks, SafetyChecks, StateChecks):
    """Derive a test class from this, and pytest runs every check on your kind.

    ::

        class TestNewestFile(InitializerConformance):
            kind = "newest_file"
            distribution = "noether-init-newest"
            composites = nested = closed("one file holds one model")

            @pytest.fixture
            def make_config(self):
                return lambda case: {"folder": str(case.source.file.parent)}

            @pytest.fixture
            def wrong_configs(self, tmp_path):
                return [Wrong("an empty folder", {"folder": str(tmp_path)}, CheckpointNotFoundError)]

    What a kind can do is answered by class attributes, ``open_()`` or ``closed("why")``; see ``Checks`` for each. A
    closed answer skips nothing but ``ranks``: the kit then looks whether the kind refuses, or leaves alone what it does
    not restore.
    The values that must arrive are those of ``case.source``, unless a fixture ``expected`` says others.

    A class that several of yours share says ``__test__ = False``. ``expected_failures`` names checks that fail at
    present, each with the reason; they are strict.
    """

    #: Not collected itself; classes that derive from it are.
    __test__: ClassVar[bool] = False

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        if "__test__" in vars(cls):  # what several test classes share says False, and need not be complete
            return
        cls.__test__ = True
        for name in ("kind", "distribution"):
            if not hasattr(cls, name):
                raise TypeError(f'{cls.__name__} does not say {name} = "..."')
        checks = {name for name in dir(cls) if name.startswith("test_")}
        for name, reason in cls.expected_failures.items():
            if name not in checks:
                raise TypeError(f"{cls.__name__}.expected_failures names {name}, which is no check of the kit")
            if not reason.strip():
                raise TypeError(f"{cls.__name__}.expected_failures[{name!r}] needs the reason")
