"""The conformance kit for authors of kinds: a pytest plugin that tells whether a kind is right.

In a package with a kind, ``tests/conftest.py`` has ``pytest_plugins = ["noether_init_core.testing"]``, and a test
derives from ``InitializerConformance``: it names the kind and the distribution, answers what the kind can do, and gives
a ``make_config`` fixture. Every check of the kit then runs on it. Nothing here is imported by the rest of the core.
"""

from noether_init_core.testing.cases import (
    SHAPES as SHAPES,
    Answer as Answer,
    Case as Case,
    Counter as Counter,
    NumberedTrainer as NumberedTrainer,
    SavedRun as SavedRun,
    Wrong as Wrong,
    closed as closed,
    new_model as new_model,
    open_ as open_,
    saved_run as saved_run,
)
from noether_init_core.testing.conformance import InitializerConformance as InitializerConformance
from noether_init_core.testing.plugin import (
    _saved_once as _saved_once,
    broken_runs as broken_runs,
    case_folder as case_folder,
    isolated_kinds as isolated_kinds,
    new_case as new_case,
    pytest_collection_modifyitems as pytest_collection_modifyitems,
    source_run as source_run,
    temporary_kind as temporary_kind,
)
