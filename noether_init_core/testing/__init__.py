"""The conformance kit for authors of kinds: a pytest plugin that tells whether a kind is right.

In a package with a kind, ``tests/conftest.py`` has ``pytest_plugins = ["noether_init_core.testing"]``, and a test
derives from ``InitializerConformance``: it names the kind and the distribution, answers what the kind can do, and gives
a ``make_config`` fixture. Every check of the kit then runs on it. Nothing here is imported by the rest of the core.
"""

from noether_init_core.testing.cases import (
    SHAPES,
    Answer,
    Case,
    Counter,
    NumberedTrainer,
    SavedRun,
    Wrong,
    closed,
    new_model,
    open_,
    saved_run,
)
from noether_init_core.testing.conformance import InitializerConformance
from noether_init_core.testing.plugin import (
    _saved_once as _saved_once,
    broken_runs,
    case_folder,
    isolated_kinds,
    new_case,
    pytest_collection_modifyitems,
    source_run,
    temporary_kind,
    tiny_models,
)

__all__ = [
    "SHAPES",
    "Answer",
    "Case",
    "Counter",
    "InitializerConformance",
    "NumberedTrainer",
    "SavedRun",
    "Wrong",
    "broken_runs",
    "case_folder",
    "closed",
    "isolated_kinds",
    "new_case",
    "new_model",
    "open_",
    "pytest_collection_modifyitems",
    "saved_run",
    "source_run",
    "temporary_kind",
    "tiny_models",
]
