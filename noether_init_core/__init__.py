"""noether-init: start any PyTorch training run from any checkpoint, declared in the config.

This is the public front. Every name is imported from its module on first use, so that importing the package imports
neither torch nor pydantic nor a plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noether_init_core import kinds as kinds
    from noether_init_core.applying.targets import named_parameters as named_parameters
    from noether_init_core.config.base import InitializerConfig as InitializerConfig, KindConfig as KindConfig
    from noether_init_core.diff.compare import compare_checkpoints as compare_checkpoints
    from noether_init_core.diff.values import CheckpointDiff as CheckpointDiff
    from noether_init_core.errors import (
        AmbiguousCheckpointError as AmbiguousCheckpointError,
        CheckpointCorruptError as CheckpointCorruptError,
        CheckpointError as CheckpointError,
        CheckpointFormatError as CheckpointFormatError,
        CheckpointNotFoundError as CheckpointNotFoundError,
        CheckpointWriteError as CheckpointWriteError,
        ConfigError as ConfigError,
        ConfigFileError as ConfigFileError,
        IncompleteSetError as IncompleteSetError,
        InitError as InitError,
        InvalidNameError as InvalidNameError,
        KindBlockedError as KindBlockedError,
        KindConflictError as KindConflictError,
        KindContractError as KindContractError,
        KindError as KindError,
        KindImportError as KindImportError,
        NoGoodSetError as NoGoodSetError,
        PartlyInitializedError as PartlyInitializedError,
        PlanError as PlanError,
        ProbeMismatchError as ProbeMismatchError,
        StartConflictError as StartConflictError,
        StateMismatchError as StateMismatchError,
        TornSetError as TornSetError,
        UnknownKindError as UnknownKindError,
        UnsafeGlobalError as UnsafeGlobalError,
    )
    from noether_init_core.files.checkpoint import BaseCheckpoint as BaseCheckpoint, Checkpoint as Checkpoint
    from noether_init_core.files.opening import open_checkpoint as open_checkpoint
    from noether_init_core.files.storage.artifact_cache import ArtifactCache as ArtifactCache
    from noether_init_core.files.storage.handle import Storage as Storage
    from noether_init_core.initializers.base import (
        InitializerBase as InitializerBase,
        LoadedFile as LoadedFile,
        LocateQuery as LocateQuery,
        OptimizerStateConfig as OptimizerStateConfig,
        Outcome as Outcome,
        Source as Source,
        SourceInitializerConfig as SourceInitializerConfig,
    )
    from noether_init_core.initializers.source import (
        CheckpointInitializer as CheckpointInitializer,
        CheckpointInitializerConfig as CheckpointInitializerConfig,
        SourceInitializer as SourceInitializer,
    )
    from noether_init_core.iteration import TrainingIteration as TrainingIteration
    from noether_init_core.kinds.any_initializer import AnyInitializer as AnyInitializer
    from noether_init_core.kinds.hookspec import (
        CONTRACT_VERSION as CONTRACT_VERSION,
        hookimpl as hookimpl,
        hookspec as hookspec,
    )
    from noether_init_core.lineage.graph import Lineage as Lineage
    from noether_init_core.lineage.reading import lineage_of as lineage_of
    from noether_init_core.models import bind as bind, compose as compose, leaf_models as leaf_models
    from noether_init_core.paths import PathProvider as PathProvider
    from noether_init_core.saving.retention import Retention as Retention
    from noether_init_core.saving.writer import CheckpointWriter as CheckpointWriter
    from noether_init_core.sets.file_names import Part as Part
    from noether_init_core.sets.provenance import InitReport as InitReport
    from noether_init_core.sets.selection import find_set as find_set, newest_set as newest_set
    from noether_init_core.sets.snapshot import Snapshot as Snapshot
    from noether_init_core.stack.stack import InitializerStack as InitializerStack
    from noether_init_core.stopwatch import Timing as Timing
    from noether_init_core.surgery.patterns import NameGlobs as NameGlobs
    from noether_init_core.surgery.plan import (
        LoadPlan as LoadPlan,
        Origin as Origin,
        PlanRow as PlanRow,
        Problem as Problem,
    )
    from noether_init_core.training import TrainerState as TrainerState

    __version__: str

# Module -> the public names that it defines.
_HOMES = {
    "files.storage.artifact_cache": ("ArtifactCache",),
    "applying.targets": ("named_parameters",),
    "surgery.patterns": ("NameGlobs",),
    "files.checkpoint": ("BaseCheckpoint", "Checkpoint"),
    "files.opening": ("open_checkpoint",),
    "files.storage.handle": ("Storage",),
    "saving.retention": ("Retention",),
    "sets.selection": ("find_set", "newest_set"),
    "sets.snapshot": ("Snapshot",),
    "saving.writer": ("CheckpointWriter",),
    "diff.compare": ("compare_checkpoints",),
    "diff.values": ("CheckpointDiff",),
    "kinds.any_initializer": ("AnyInitializer",),
    "config.base": ("InitializerConfig", "KindConfig"),
    "errors": (
        "AmbiguousCheckpointError",
        "CheckpointCorruptError",
        "CheckpointError",
        "CheckpointFormatError",
        "CheckpointNotFoundError",
        "CheckpointWriteError",
        "ConfigError",
        "ConfigFileError",
        "IncompleteSetError",
        "InitError",
        "InvalidNameError",
        "KindBlockedError",
        "KindConflictError",
        "KindContractError",
        "KindError",
        "KindImportError",
        "NoGoodSetError",
        "PartlyInitializedError",
        "PlanError",
        "ProbeMismatchError",
        "StartConflictError",
        "StateMismatchError",
        "TornSetError",
        "UnknownKindError",
        "UnsafeGlobalError",
    ),
    "kinds.hookspec": ("CONTRACT_VERSION", "hookimpl", "hookspec"),
    "initializers.base": (
        "InitializerBase",
        "LoadedFile",
        "LocateQuery",
        "OptimizerStateConfig",
        "Outcome",
        "Source",
        "SourceInitializerConfig",
    ),
    "initializers.source": ("CheckpointInitializer", "CheckpointInitializerConfig", "SourceInitializer"),
    "iteration": ("TrainingIteration",),
    "lineage.graph": ("Lineage",),
    "lineage.reading": ("lineage_of",),
    "models": ("bind", "compose", "leaf_models"),
    "paths": ("PathProvider",),
    "sets.file_names": ("Part",),
    "sets.provenance": ("InitReport",),
    "stack.stack": ("InitializerStack",),
    "stopwatch": ("Timing",),
    "surgery.plan": ("LoadPlan", "Origin", "PlanRow", "Problem"),
    "training": ("TrainerState",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted((*_HOME_OF, "__version__", "kinds"))

# Hidden from type checkers, which would take it to mean that any name exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        import importlib

        if name == "__version__":
            import importlib.metadata

            value = importlib.metadata.version("noether-init-core")
        elif name == "kinds":
            value = importlib.import_module("noether_init_core.kinds")
        elif name in _HOME_OF:
            value = getattr(importlib.import_module(f"noether_init_core.{_HOME_OF[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
