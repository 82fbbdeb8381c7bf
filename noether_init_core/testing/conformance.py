"""InitializerConformance: every check of the kit, for one kind. No check depends on a particular kind."""

from __future__ import annotations

from typing import ClassVar

from noether_init_core.testing.config_checks import ConfigChecks
from noether_init_core.testing.file_checks import FileChecks
from noether_init_core.testing.state_checks import StateChecks


class InitializerConformance(ConfigChecks, FileChecks, StateChecks):
    """The conformance kit: derive a test class from it, and pytest runs every check on your kind.

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

    Class attributes declare what the kind can do: ``open_()`` or ``closed("why")``; ``Checks`` lists them. For a closed
    answer the kit checks that the kind refuses, or does not change what it does not restore; only ``ranks`` is skipped.
    The expected values are those of ``case.source``, unless a fixture ``expected`` returns others.

    A base class for several test classes declares ``__test__ = False``. ``expected_failures`` names checks that fail at
    present, each with the reason; they are strict.
    """

    #: Pytest collects derived classes only.
    __test__: ClassVar[bool] = False

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        if "__test__" in vars(cls):  # a base class of several test classes sets it to False, and may be incomplete
            return
        cls.__test__ = True
        for name in ("kind", "distribution"):
            if not hasattr(cls, name):
                raise TypeError(f'{cls.__name__} does not declare {name} = "..."')
        checks = {name for name in dir(cls) if name.startswith("test_")}
        for name in cls.expected_failures.keys() - checks:
            raise TypeError(f"{cls.__name__}.expected_failures names {name}, which is not a check of the kit")
