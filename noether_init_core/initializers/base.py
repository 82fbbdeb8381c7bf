"""The base class of kinds, with its session, outcome and sources."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import attrs

from noether_init_core.config.base import KindConfig
from noether_init_core.errors import ConfigError, StartConflictError, type_of
from noether_init_core.files.checkpoint import Digests
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import logger_of
from noether_init_core.paths import PathProvider
from noether_init_core.sets.file_names import Part
from noether_init_core.sets.provenance import History
from noether_init_core.stopwatch import Stopwatch, Timing, summed
from noether_init_core.suggest.rules import Suggestion
from noether_init_core.surgery.plan import LoadPlan
from noether_init_core.uris import local_path


def dotted(*path: str | int) -> str:
    """The place of a key of a config that has no file."""
    return ".".join(map(str, path))


class Session:
    """The state of one initialization by one initializer.

    Attributes:
        where: Function that returns the place of a key of the config, with file and line if there is a file.
        key: The key whose whole value the config may be, ``auto_resume: true``, in place of a mapping; else empty.
        place: The place of the config for messages: ``initializers.0, init.yaml:2``; empty if unknown.
        is_followed: Whether a later initializer loads weights of the same model.
        loaded_before: Ids of the tensors that earlier initializers will have loaded.
        trains: Whether training follows; if not, the state of a trainer is not required.
        stopwatch: Measures the time of phases.
        restored: What was restored besides weights, in words for the report.
        not_restored: What the checkpoint has and no object was given for, in words for the report.
        on_written: Called with a single model and the names that were written in it, once they were; None if the stack
            does not compare them.
    """

    def __init__(self) -> None:
        self.where: Callable[..., str] = dotted
        self.key = ""
        self.place = ""
        self.is_followed = False
        self.trains = True
        self.loaded_before: frozenset[int] = frozenset()
        self.stopwatch = Stopwatch()
        self.restored: list[str] = []
        self.not_restored: list[str] = []
        self.on_written: Callable[[Any, list[str]], None] | None = None

    def close_files(self) -> None:
        """Close every file and drop what was read from it; the selection stays. May be called more than once."""


class InitializerBase:
    """One way to start a training run; registered as a kind by an entry point of ``noether_init.initializers``.

    A subclass names its ``config_class`` and implements ``init_weights`` and ``init_optimizer``, or delegates to other
    initializers. Methods with the names of hooks are hooks, no decorator needed. It is created by
    ``cls(config, path_provider=..., **kwargs)``, with the ``kwargs`` of the config where it has them.

    As in Noether, the config may be passed as ``initializer_config=...``. A subclass may pass only the path provider
    to ``super().__init__``, by position or by name; ``config`` is then the argument of the subclass.

    What an initializer finds out during an initialization belongs to ``session``, which the stack sets for the time of
    its calls. A hook that is called alone opens a session of its own and closes it at its end.

    Args:
        config: An instance of ``config_class``, or the path provider. Without a config, ``config_class`` with its
            defaults, and the name of the class as its kind.
        path_provider: A ``PathProvider``, or an object with ``output_root``, ``run_id`` and ``stage_name``.
        initializer_config: Noether's name for ``config``.

    Raises ``TypeError`` for a first argument of another type, for a config of another class, and for an argument
    that is given twice. Also without a config, if ``config_class`` has required fields.

    Attributes:
        config: The validated config, an instance of ``config_class``.
        path_provider: The folders of the run that is being started; None where none was given.
        logger: A logger named after the class.
        delegates: Initializers that do part of the work, fixed at construction. The stack plans, checks and reports
            them; a hook that the kind does not override calls theirs in order.
        session: What is known of the present initialization; None outside of one.
    """

    #: The pydantic model that validates this kind's config; unknown keys must be errors.
    config_class: ClassVar[type[KindConfig]] = KindConfig
    #: The version of the hook contract that the class was written for.
    contract: ClassVar[int] = 1

    delegates: tuple[InitializerBase, ...] = ()
    session: Any = None

    config: KindConfig

    def __new__(cls, *arguments: Any, **keywords: Any) -> Self:
        created = super().__new__(cls)
        # A subclass may pass only the path provider to __init__; without its config, the fields that the user wrote
        # (transforms, verify) would be replaced by their defaults without an error.
        named = (keywords.get("initializer_config"), keywords.get("config"), *arguments[:1])
        given = [one for one in named if isinstance(one, cls.config_class)]
        given = given or [one for one in (*arguments, *keywords.values()) if isinstance(one, cls.config_class)]
        # of several under other names none is chosen; __init__ then requires the config
        vars(created)["config"] = given[0] if len(given) == 1 else None
        return created

    def __init__(
        self,
        config: KindConfig | PathProvider | Any = None,
        *,
        path_provider: PathProvider | Any = None,
        initializer_config: KindConfig | None = None,
    ) -> None:
        cls = type(self)
        if not (config is None or isinstance(config, KindConfig)):
            if not PathProvider.is_provider(config):
                raise TypeError(
                    f"the first argument of {cls.__qualname__} must be a {cls.config_class.__qualname__} or a path "
                    f"provider, not {type_of(config)}. Next: kinds.create({{...}}) for a mapping"
                )
            if path_provider is not None:
                raise TypeError(f"{cls.__qualname__} got two path providers, by position and by name")
            config, path_provider = None, config
        if config is not None and initializer_config is not None:
            raise TypeError(f"{cls.__qualname__} got two configs: config and initializer_config")
        self.config = self._checked_config(next((one for one in (config, initializer_config) if one is not None), None))
        self.path_provider: PathProvider | None = None if path_provider is None else PathProvider.of(path_provider)
        self.logger = logger_of(f"{cls.__module__}.{cls.__qualname__}")

    def _checked_config(self, given: KindConfig | None) -> Any:
        """``given``, else the config of the constructor, else the defaults of ``config_class``."""
        cls = type(self)
        found = vars(self).get("config") if given is None else given
        if found is None:
            required = [name for name, field in cls.config_class.model_fields.items() if field.is_required()]
            if set(required) - {"kind"}:
                raise TypeError(f"{cls.__qualname__} needs a {cls.config_class.__qualname__}: config=...")
            return cls.config_class(**({"kind": cls.__qualname__} if required else {}))
        if not isinstance(found, cls.config_class):
            raise TypeError(f"{cls.__qualname__} takes a {cls.config_class.__qualname__}, not {type_of(found)}")
        return found

    def new_session(self) -> Session:
        """A session for one initialization."""
        return Session()

    def in_session(self) -> AbstractContextManager[Any]:
        """The present session, or a new one that is closed at the end of the block."""
        return self._in_own_session() if self.session is None else nullcontext(self.session)

    @contextmanager
    def _in_own_session(self) -> Iterator[Any]:
        self.session = self.new_session()
        try:
            yield self.session
        finally:
            session, self.session = self.session, None
            session.close_files()

    @property
    def stopwatch(self) -> Stopwatch:
        """Measures phases of the present initialization: ``with self.stopwatch.phase("read", nbytes):``."""
        return Stopwatch() if self.session is None else self.session.stopwatch

    @property
    def timings(self) -> tuple[Timing, ...]:
        """Seconds and bytes of each phase of the present initialization so far, for the report and for observers."""
        return self.stopwatch.timings

    @property
    def states_plan(self) -> bool:
        """Whether the kind provides a plan: by its own ``plan``, or by its delegates."""
        return type(self).plan is not InitializerBase.plan or (
            bool(self.delegates) and all(one.states_plan for one in self.delegates)
        )

    def plan(self, model: Any) -> LoadPlan | None:
        """The plan of ``init_weights(model)``; changes nothing, and may be called more than once.

        ``model`` may be on the meta device. Put problems into the plan; the stack raises them before the first change.

        Return None if the kind provides no plan. The stack then uses the plans of the delegates. Without delegates, and
        if an earlier initializer loaded weights, it compares the values before and after ``init_weights``.
        """
        return None

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Check everything that could fail, and change nothing. Not a hook; the stack calls it before any hook.

        Raise here whatever can be known before a change (files, bytes, keys, shapes, optimizer and callback state), so
        that a failed initialization changes nothing. Every rank calls it, and it may be called more than once.
        Delegates are checked before.
        """

    def fingerprint(self) -> tuple[str, ...]:
        """What was selected and opened, in words that are the same on every rank of a distributed run; no paths.

        The stack asks after ``check``, while the session is open, and compares the answers of all ranks. By default it
        is empty. Delegates are asked themselves.
        """
        return ()

    def outcome(self) -> Outcome:
        """What was done, for the report; the stack calls it after the last hook, while the session is open."""
        session = self.new_session() if self.session is None else self.session
        own = Outcome(restored=tuple(session.restored), not_restored=tuple(session.not_restored), timings=self.timings)
        return Outcome.merged([*(one.outcome() for one in self.delegates), own])

    def sources(self, model: Any) -> Mapping[str, Source]:
        """Path of a single model -> the file that its weights will be read from; opens no file."""
        return {path: source for one in self.delegates for path, source in one.sources(model).items()}

    def suggest_rules(self, model: Any) -> Mapping[str, Suggestion]:
        """Path of a single model -> suggested transforms for it and its file, from names and shapes."""
        return {path: found for one in self.delegates for path, found in one.suggest_rules(model).items()}

    @property
    def skipped_hooks(self) -> frozenset[str]:
        """The hooks that a stack does not call for this initializer. A direct call always works."""
        return frozenset()

    def start_checkpoint(self) -> TrainingIteration:
        """The iteration at which training starts: zero, or that of a delegate. May be called more than once."""
        starts = [(one.config.kind, start) for one, start in self._delegated("start_checkpoint")]
        return only_start(starts, "delegate", of=f" of {self.config.kind}")

    def init_trainer(self, trainer: Any) -> None:
        """Restore the state of the trainer; by default that of the delegates."""
        self._delegated("init_trainer", trainer=trainer)

    def init_weights(self, model: Any) -> None:
        """Write parameters and buffers of ``model`` in place; by default as the delegates do."""
        self._delegated("init_weights", model=model)

    def init_optimizer(self, model: Any) -> None:
        """Restore the state of the optimizer of ``model``; by default as the delegates do."""
        self._delegated("init_optimizer", model=model)

    def init_callbacks(self, callbacks: list[Any], model: Any) -> None:
        """Restore the state of the callbacks; by default as the delegates do."""
        self._delegated("init_callbacks", callbacks=callbacks, model=model)

    def _delegated(self, hook: str, **arguments: Any) -> list[tuple[InitializerBase, Any]]:
        """Call a hook of every delegate, with those of the arguments that it takes."""
        found = []
        for one in self.delegates:
            if hook not in one.skipped_hooks:
                method = getattr(one, hook)
                given = {**arguments, "initializer": one}
                taken = inspect.signature(method).parameters.keys() & given.keys()
                found.append((one, method(**{name: given[name] for name in taken})))
        return found


# What inspect, help() and editors show; else they would show the arguments of __new__.
InitializerBase.__new__.__signature__ = inspect.signature(InitializerBase.__init__)  # type: ignore[attr-defined]


def only_start(starts: Iterable[tuple[str, TrainingIteration | None]], noun: str, of: str = "") -> TrainingIteration:
    """The only start after iteration zero, of (kind, start) of each. Raises ``StartConflictError`` for several."""
    named = {f"{number}: {kind}": start for number, (kind, start) in enumerate(starts)}
    others = {name: start for name, start in named.items() if start is not None and not start.is_zero}
    if len(others) > 1:
        listed = ", ".join(f"{noun}s.{name} at {start}" for name, start in others.items())
        raise StartConflictError(
            f"more than one {noun}{of} continues a run: {listed}. Keep one; the others can be previous_run",
            starts={name: str(start) for name, start in others.items()},
        )
    return next(iter(others.values()), TrainingIteration.zero())


def with_delegates(initializer: InitializerBase, above: tuple[InitializerBase, ...] = ()) -> Iterator[InitializerBase]:
    """Every delegate of ``initializer``, depth first, then itself. Raises ``ConfigError`` for a cycle."""
    if any(one is initializer for one in above):
        cycle = " -> ".join(one.config.kind for one in (*above, initializer))
        raise ConfigError(f"initializers delegate to one another in a circle: {cycle}")
    for one in initializer.delegates:
        if not isinstance(one, InitializerBase):
            raise ConfigError(f"{initializer.config.kind}: delegates must be initializers, not {type(one).__name__}")
        yield from with_delegates(one, (*above, initializer))
    yield initializer


@attrs.frozen(eq=False)
class LoadedFile:
    """A file that the weights of a single model came from.

    Attributes:
        path: The file.
        digest: Of the whole file, if known: ``xxh3_128:...`` or ``sha256:...``.
        origin: Origin of the file: run_id, stage_name, tag, iteration.
        tensors: Name in the file -> digest of the tensor's bytes, if a manifest records it.
        history: Name in the file -> earlier origins of its values.
        verified: The digest that verified its bytes: ``xxh3_128``, ``sha256``, ``crc32``; ``unverifiable`` without any;
            empty if verification was switched off. A reader class outside this package only claims it: ``sha256,
            claimed by package.Class``.
    """

    path: Path = attrs.field(converter=Path)
    digest: str | None = None
    origin: Mapping[str, str] = attrs.Factory(dict)
    tensors: Mapping[str, str] = attrs.Factory(dict)
    history: History = attrs.Factory(dict)
    verified: str = ""


@attrs.frozen(eq=False)
class Outcome:
    """What one initializer did in one initialization. The stack asks for it after the last hook.

    Attributes:
        files: Path of a single model -> the file that its weights came from.
        restored: What was restored besides weights, in words.
        not_restored: What the checkpoint has and no object was given for, in words.
        passed_over: (set, reason) of each broken set that was passed over, newest first.
        resumed_set: The folder of the set that was resumed, or None.
        continues: Whether the weights come from the run that is started.
        timings: Seconds and bytes of each phase.
    """

    files: Mapping[str, LoadedFile] = attrs.Factory(dict)
    restored: tuple[str, ...] = ()
    not_restored: tuple[str, ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()
    resumed_set: str | None = None
    continues: bool = False
    timings: tuple[Timing, ...] = ()

    @classmethod
    def merged(cls, outcomes: Iterable[Outcome]) -> Outcome:
        """Several outcomes as one; of two files for one model, the later one counts."""
        each = tuple(outcomes)
        return cls(
            {model: file for one in each for model, file in one.files.items()},
            tuple(what for one in each for what in one.restored),
            tuple(what for one in each for what in one.not_restored),
            tuple(passed for one in each for passed in one.passed_over),
            next((one.resumed_set for one in each if one.resumed_set is not None), None),
            any(one.continues for one in each),
            summed([timing for one in each for timing in one.timings]),
        )


@attrs.frozen(eq=False)
class LocateQuery:
    """The question that ``SourceInitializer.locate`` answers.

    Attributes:
        model_name: The name in the files; for a submodel the path of names, such as ``autoenc.encoder``.
        path: The path of names of the single model in the model that is initialized.
        part: ``model`` for weights, ``optim`` for optimizer state with ``load_optim: true``. A kind that reads the
            state of a trainer asks its own ``locate`` for ``trainer``.
        model: The single model; None if it is not known yet.
    """

    model_name: str
    path: str = ""
    part: Part = "model"
    model: Any = None


@attrs.frozen
class Source:
    """A location of weights or state.

    Attributes:
        location: The file.
        digests: The digest of the whole file, as ``xxh3_128:...`` or ``sha256:...``, or all known digests; with
            ``verify: full`` the bytes are compared with them on the handle that they are read from.
        entry: The tree of the file to use; None for the state dict.
        origin: Its origin, for messages and reports: run_id, stage_name, tag, iteration.
    """

    location: Path = attrs.field(converter=local_path)
    digests: Digests | str | None = attrs.field(default=None, repr=lambda found: repr(found)[:80])
    entry: str | None = None
    origin: Mapping[str, str] = attrs.Factory(dict)

    @property
    def digest(self) -> str | None:
        """The digest of the whole file, or None."""
        return self.digests.file if isinstance(self.digests, Digests) else self.digests

    def describe(self) -> str:
        """The origin in words, with every key of it."""
        origin = dict(self.origin)
        run = "/".join(origin.pop(key) for key in ("run_id", "stage_name") if key in origin) or str(self.location)
        tag, iteration = origin.pop("tag", None), origin.pop("iteration", None)
        words = [run, f"@ {tag}" if tag else "", f"= {iteration}" if iteration and iteration != tag else ""]
        words += [f"({', '.join(f'{key} {value}' for key, value in origin.items())})"] if origin else []
        return " ".join(word for word in words if word)
