"""The conformance kit for authors of kinds: a pytest plugin that checks one kind.

In the package of a kind, ``tests/conftest.py`` has ``pytest_plugins = ["noether_init_core.testing"]``. A test class
derives from ``InitializerConformance``: it names the kind and the distribution, declares what the kind can do, and has
a ``make_config`` fixture. Pytest then runs every check of the kit on it. Nothing else in the core imports this package.
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
