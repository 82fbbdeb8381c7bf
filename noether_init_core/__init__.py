"""noether-init: start any PyTorch training run from any checkpoint, declared in the config.

This is the public front. Every name is imported from its module on first use, so that importing the package imports
neither torch nor pydantic nor a plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noether_init_core import kinds
    from noether_init_core.config.base import InitializerConfig, KindConfig
    from noether_init_core.diff.compare import compare_checkpoints
    from noether_init_core.diff.values import CheckpointDiff
    from noether_init_core.errors import (
        AmbiguousCheckpointError,
        CheckpointCorruptError,
        CheckpointError,
        CheckpointFormatError,
        CheckpointNotFoundError,
        CheckpointWriteError,
        ConfigError,
        ConfigFileError,
        IncompleteSetError,
        InitError,
        InvalidNameError,
        KindBlockedError,
        KindConflictError,
        KindContractError,
        KindError,
        KindImportError,
        NoGoodSetError,
        PartlyInitializedError,
        PlanError,
        ProbeMismatchError,
        StartConflictError,
        StateMismatchError,
        TornSetError,
        UnknownKindError,
        UnsafeGlobalError,
    )
    from noether_init_core.files.checkpoint import BaseCheckpoint, Checkpoint
    from noether_init_core.files.opening import open_checkpoint
    from noether_init_core.files.storage.artifact_cache import ArtifactCache
    from noether_init_core.files.storage.handle import Storage
    from noether_init_core.initializers.base import (
        InitializerBase,
        LoadedFile,
        LocateQuery,
        OptimizerStateConfig,
        Outcome,
        Source,
        SourceInitializerConfig,
    )
    from noether_init_core.initializers.parameters import NameGlobs, named_parameters
    from noether_init_core.initializers.source import (
        CheckpointInitializer,
        CheckpointInitializerConfig,
        SourceInitializer,
    )
    from noether_init_core.iteration import TrainingIteration
    from noether_init_core.kinds.any_initializer import AnyInitializer
    from noether_init_core.kinds.hookspec import CONTRACT_VERSION, hookimpl, hookspec
    from noether_init_core.lineage.graph import Lineage
    from noether_init_core.lineage.reading import lineage_of
    from noether_init_core.models import bind, compose, leaf_models
    from noether_init_core.paths import PathProvider
    from noether_init_core.saving.retention import Retention
    from noether_init_core.saving.writer import CheckpointWriter
    from noether_init_core.sets.file_names import Part
    from noether_init_core.sets.provenance import InitReport
    from noether_init_core.sets.selection import find_set, newest_set
    from noether_init_core.sets.snapshot import Snapshot
    from noether_init_core.stack.stack import InitializerStack
    from noether_init_core.stopwatch import Timing
    from noether_init_core.surgery.plan import LoadPlan, Origin, PlanRow, Problem
    from noether_init_core.training import TrainerState

    __version__: str

__all__ = [
    "CONTRACT_VERSION",
    "AmbiguousCheckpointError",
    "AnyInitializer",
    "ArtifactCache",
    "BaseCheckpoint",
    "Checkpoint",
    "CheckpointCorruptError",
    "CheckpointDiff",
    "CheckpointError",
    "CheckpointFormatError",
    "CheckpointInitializer",
    "CheckpointInitializerConfig",
    "CheckpointNotFoundError",
    "CheckpointWriteError",
    "CheckpointWriter",
    "ConfigError",
    "ConfigFileError",
    "IncompleteSetError",
    "InitError",
    "InitReport",
    "InitializerBase",
    "InitializerConfig",
    "InitializerStack",
    "InvalidNameError",
    "KindBlockedError",
    "KindConfig",
    "KindConflictError",
    "KindContractError",
    "KindError",
    "KindImportError",
    "Lineage",
    "LoadPlan",
    "LoadedFile",
    "LocateQuery",
    "NameGlobs",
    "NoGoodSetError",
    "OptimizerStateConfig",
    "Origin",
    "Outcome",
    "Part",
    "PartlyInitializedError",
    "PathProvider",
    "PlanError",
    "PlanRow",
    "ProbeMismatchError",
    "Problem",
    "Retention",
    "Snapshot",
    "Source",
    "SourceInitializer",
    "SourceInitializerConfig",
    "StartConflictError",
    "StateMismatchError",
    "Storage",
    "Timing",
    "TornSetError",
    "TrainerState",
    "TrainingIteration",
    "UnknownKindError",
    "UnsafeGlobalError",
    "__version__",
    "bind",
    "compare_checkpoints",
    "compose",
    "find_set",
    "hookimpl",
    "hookspec",
    "kinds",
    "leaf_models",
    "lineage_of",
    "named_parameters",
    "newest_set",
    "open_checkpoint",
]

# Module -> the public names that it defines.
_HOMES = {
    "files.storage.artifact_cache": ("ArtifactCache",),
    "initializers.parameters": ("NameGlobs", "named_parameters"),
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
