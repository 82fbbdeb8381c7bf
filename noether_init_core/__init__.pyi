"""The names of the public front, each written once, for type checkers and for ``__init__.py``."""

from noether_init_core import kinds as kinds
from noether_init_core.applying.targets import named_parameters as named_parameters
from noether_init_core.builtin.file import (
    FileInitializer as FileInitializer,
    FileInitializerConfig as FileInitializerConfig,
)
from noether_init_core.builtin.previous_run import (
    PreviousRunInitializer as PreviousRunInitializer,
    PreviousRunInitializerConfig as PreviousRunInitializerConfig,
)
from noether_init_core.builtin.resume import (
    ResumeInitializer as ResumeInitializer,
    ResumeInitializerConfig as ResumeInitializerConfig,
)
from noether_init_core.config.base import InitializerConfig as InitializerConfig, KindConfig as KindConfig
from noether_init_core.config.source import (
    CheckpointInitializerConfig as CheckpointInitializerConfig,
    OptimizerStateConfig as OptimizerStateConfig,
    SourceInitializerConfig as SourceInitializerConfig,
)
from noether_init_core.diff.compare import CheckpointDiff as CheckpointDiff, compare_checkpoints as compare_checkpoints
from noether_init_core.errors import (
    AmbiguousCheckpointError as AmbiguousCheckpointError,
    CheckpointCorruptError as CheckpointCorruptError,
    CheckpointError as CheckpointError,
    CheckpointFormatError as CheckpointFormatError,
    CheckpointNotFoundError as CheckpointNotFoundError,
    CheckpointUnreachableError as CheckpointUnreachableError,
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
    RankError as RankError,
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
    Outcome as Outcome,
    Source as Source,
)
from noether_init_core.initializers.checkpoint import CheckpointInitializer as CheckpointInitializer
from noether_init_core.initializers.source import SourceInitializer as SourceInitializer
from noether_init_core.iteration import TrainingIteration as TrainingIteration
from noether_init_core.kinds.any_initializer import AnyInitializer as AnyInitializer
from noether_init_core.kinds.hookspec import (
    CONTRACT_VERSION as CONTRACT_VERSION,
    hookimpl as hookimpl,
    hookspec as hookspec,
)
from noether_init_core.lineage import Lineage as Lineage, lineage_of as lineage_of
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

__all__: list[str]
__version__: str
