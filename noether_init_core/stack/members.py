"""The members of a stack: initializers with their part of the model, planned, checked and called in order."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import pluggy

from noether_init_core import kinds
from noether_init_core.applying.targets import model_targets
from noether_init_core.config.document import Entry
from noether_init_core.errors import ConfigError, type_of
from noether_init_core.initializers.base import InitializerBase, LoadedFile, Outcome, Session, with_delegates
from noether_init_core.iteration import TrainingIteration
from noether_init_core.kinds import hookspec
from noether_init_core.kinds.hookspec import HOOK_NAMES, PROJECT_NAME, hookimpl
from noether_init_core.kinds.naming import name_of
from noether_init_core.models import leaf_models, submodel_of
from noether_init_core.sets.provenance import InitializerReport, InitReport, SourceRecord, TensorRecord
from noether_init_core.stack.changes import Written, entries_of
from noether_init_core.surgery.plan import LoadPlan, PlanRow
from noether_init_core.surgery.steps import described


@attrs.frozen(eq=False)
class Member:
    """An initializer, and the config entry that declares it.

    ``units`` are its delegates, depth first, and itself.
    """

    initializer: InitializerBase
    entry: Entry = attrs.Factory(lambda: Entry({}))
    units: tuple[InitializerBase, ...] = attrs.field(init=False)

    @units.default
    def _find_units(self) -> tuple[InitializerBase, ...]:
        return tuple(with_delegates(self.initializer)) if isinstance(self.initializer, InitializerBase) else ()

    @property
    def kind(self) -> str:
        """The kind, as named in the config; the class, if the kind is that of another class."""
        return name_of(self.initializer)

    @property
    def called(self) -> frozenset[str]:
        """The hooks that the stack calls for it."""
        return frozenset(HOOK_NAMES if self.entry.hooks is None else self.entry.hooks) - self.initializer.skipped_hooks

    def is_followed_by(self, others: Iterable[Member]) -> bool:
        """Whether one of ``others`` loads weights of the same submodel, of one above or of one below."""
        own = self.entry.submodel
        return any(
            "init_weights" in other.called and all(map(operator.eq, own, other.entry.submodel)) for other in others
        )

    def new_sessions(self, *, is_followed: bool) -> Iterator[tuple[InitializerBase, Session]]:
        """A session for each unit; ``is_followed``: whether a later member loads weights, too."""
        for one in self.units:
            session = one.new_session()
            session.where = self.entry.where
            session.key, session.place = self.entry.as_value, self.entry.shown_place
            session.is_followed = is_followed
            yield one, session

    def part(self, model: Any) -> Any:
        """The part of the model for this member. Raises ``ConfigError`` if the model does not have it."""
        return submodel_of(model, self.entry.submodel)


@attrs.frozen(eq=False)
class Prepared:
    """What one member will do.

    Attributes:
        member: The member.
        part: Its part of the model.
        plans: Each plan with its initializer; empty if the kind provides no plan.
    """

    member: Member
    part: Any
    plans: tuple[tuple[InitializerBase, LoadPlan], ...]


def prepare(
    members: Sequence[Member], model: Any, check: tuple[Any, list[Any] | None] | None = None
) -> Iterator[Prepared]:
    """The plans of every member, each with knowledge of what earlier members will have loaded.

    With ``check`` (trainer, callbacks) the checks run too, and problems of a plan are raised.
    """
    loaded: frozenset[int] = frozenset()
    for member in members:
        part = member.part(model)
        # only a later member needs to know what this one writes
        is_last = member is members[-1]
        plans, loaded = _prepare(member.initializer, member.called, part, loaded, check, is_last=is_last)
        yield Prepared(member, part, tuple(plans))


def _prepare(
    initializer: InitializerBase,
    hooks: frozenset[str],
    part: Any,
    loaded: frozenset[int],
    check: tuple[Any, list[Any] | None] | None,
    *,
    is_last: bool = False,
) -> tuple[list[tuple[InitializerBase, LoadPlan]], frozenset[int]]:
    """The plan of an initializer, or else those of its delegates, and the ids of tensors that are loaded after them."""
    loads = "init_weights" in hooks
    initializer.session.loaded_before = within = loaded
    found: list[tuple[InitializerBase, LoadPlan]] = []
    for one in initializer.delegates:
        plans, within = _prepare(one, hooks - one.skipped_hooks, part, within, check)
        found += plans
    if check is not None:
        trainer, callbacks = check
        has_trainer, has_callbacks = "init_trainer" in hooks, "init_callbacks" in hooks
        initializer.check(part, trainer if has_trainer else None, callbacks if has_callbacks else None)
    plan = initializer.plan(part) if loads else None
    if plan is None:
        return (found, within) if loads else ([], loaded)
    if check is not None:
        plan.raise_for_problems()
    return [(initializer, plan)], loaded if is_last else loaded | written_by(plan, part)


def written_by(plan: LoadPlan, model: Any) -> frozenset[int]:
    """Ids of the tensors of ``model`` that a plan writes."""
    tensors = {path: model_targets(leaf).tensors for path, leaf in leaf_models(model)}
    found = (tensors.get(row.model, {}).get(row.target or "") for row in plan.rows if row.writes)
    return frozenset(id(tensor) for tensor in found if tensor is not None)


class _PluginManager(pluggy.PluginManager):
    """Recognizes the hooks of an ``InitializerBase`` by their names; observers mark theirs with ``hookimpl``."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        if isinstance(plugin, InitializerBase):
            if name not in HOOK_NAMES:
                return None
            return pluggy.HookimplOpts(
                wrapper=False, hookwrapper=False, optionalhook=False, tryfirst=False, trylast=False, specname=None
            )
        return super().parse_hookimpl_opts(plugin, name)


class _Recorder:
    """The innermost wrapper: records what the initializer returned or raised, before observers see it."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.error: BaseException | None = None

    @hookimpl(wrapper=True, trylast=True)
    def start_checkpoint(self) -> Generator[None, list[Any], list[Any]]:
        self.results, self.error = [], None
        try:
            self.results = yield
        except BaseException as error:
            self.error = error
            raise
        return self.results

    init_trainer = init_weights = init_optimizer = init_callbacks = start_checkpoint


class HookCaller:
    """Calls hooks of the initializers and observers of one stack, through a plugin manager of its own.

    Raises ``ConfigError`` for an object that is not an initializer, an object that is given twice, and an observer that
    is not a wrapper.
    """

    def __init__(self, initializers: Sequence[Any], observers: Iterable[Any]) -> None:
        self._initializers = tuple(initializers)
        self._manager = _PluginManager(PROJECT_NAME)
        self._manager.add_hookspecs(hookspec.HookSpecs)
        for number, initializer in enumerate(self._initializers):
            if not isinstance(initializer, InitializerBase):
                raise ConfigError(
                    f"initializers.{number} is {type_of(initializer)}, not an initializer. "
                    "Next: InitializerStack.from_config([...]) for configs"
                )
            if type(initializer).init_weights is InitializerBase.init_weights and not initializer.delegates:
                raise ConfigError(
                    f"{initializer.config.kind} ({type(initializer).__name__}) implements no init_weights and has no "
                    "delegates, so that it would load nothing. Next: def init_weights(self, model): ..."
                )
            self._register(initializer, f"{number}:{initializer.config.kind}")
        observers = tuple(observers)
        for observer in observers:
            self._register(observer, None)
        for hook in HOOK_NAMES:
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin in observers and not (implementation.wrapper or implementation.hookwrapper):
                    raise ConfigError(
                        f"{hook} of the observer {type(implementation.plugin).__name__} is not a wrapper, so that it "
                        "would replace an initializer. Next: mark it with hookimpl(wrapper=True) and yield"
                    )
        # pluggy calls the wrapper that was registered last innermost
        self._recorder = _Recorder()
        self._register(self._recorder, None)

    def call(self, hook: str, initializer: InitializerBase, **arguments: Any) -> Any:
        """Call ``hook`` of ``initializer`` and return its result.

        Raises what the initializer raised, or an observer around it.
        """
        others = [other for other in self._initializers if other is not initializer]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        caller(initializer=initializer, **arguments)
        if self._recorder.error is not None:
            raise self._recorder.error
        for result in self._recorder.results:
            if inspect.isawaitable(result) or inspect.isgenerator(result) or hasattr(result, "__exit__"):
                if inspect.iscoroutine(result):
                    result.close()  # else Python warns that it was never awaited
                raise ConfigError(
                    f"{hook} of {initializer.config.kind} returned {type_of(result)}, so that nothing was done: it is "
                    "async, a generator or a context manager behind a decorator. "
                    f"Next: ninit check {initializer.config.kind}"
                )
        return next(iter(self._recorder.results), None)

    def _register(self, plugin: Any, name: str | None) -> None:
        try:
            self._manager.register(plugin, name=name)
            self._manager.check_pending()
        except ValueError as error:
            raise ConfigError(f"{type(plugin).__name__} is in the stack twice. Next: a second instance") from error
        except pluggy.PluginValidationError as error:
            hooks = ", ".join(HOOK_NAMES)
            raise ConfigError(f"{type(plugin).__name__} cannot be called: {error}. The hooks are {hooks}") from error


@attrs.frozen
class Carried:
    """A plan that one initializer carried out on a part of the model.

    Attributes:
        kind: The kind of the initializer.
        plan: The plan.
        outcome: What the initializer did.
        path: Path of the part in the whole model.
        name: Name of the part; the paths in the plan begin with it.
    """

    kind: str
    plan: LoadPlan
    outcome: Outcome
    path: str
    name: str

    def source_of(self, row: PlanRow) -> tuple[SourceRecord, LoadedFile]:
        """The file that a row was loaded from; from the plan if the outcome does not record it."""
        file = self.outcome.files.get(row.model)
        if file is None:
            files = self.plan.origins[row.origin].files
            file = LoadedFile(files[0] if files else self.kind)
        record = SourceRecord(
            self.kind,
            self.full(row.model),
            file.path.name,
            # a relative path would be useless to readers in another working folder
            str(file.path.absolute()),
            file.digest,
            tuple(sorted(file.origin.items())),
            self.outcome.continues,
            file.verified,
        )
        return record, file

    def full(self, model: str) -> str:
        """Return the path, in the whole model, of the single model that the plan calls ``model``.

        The plan was made for a part of the model, so its paths begin with the name of the part.
        """
        return self.path + model.removeprefix(self.name)


def trace(
    model: Any, carried: Iterable[Carried | Written]
) -> tuple[tuple[SourceRecord, ...], tuple[TensorRecord, ...]]:
    """The files that values came from, and one record for every parameter and buffer of ``model``.

    If several initializers wrote a tensor, the last one is recorded.
    """
    sources: dict[SourceRecord, int] = {}
    found: dict[tuple[str, str], TensorRecord] = {}
    for one in carried:
        if isinstance(one, Written):
            _forget(found, one)
            continue
        files: dict[tuple[int, str], tuple[int, LoadedFile]] = {}
        paths = {model: one.full(model) for model in dict.fromkeys(row.model for row in one.plan.rows)}
        for row in one.plan.rows:
            if row.target is None:
                continue
            path = paths[row.model]
            place = path, row.target
            if not row.writes:
                if place not in found or row.action == "reset":
                    found[place] = TensorRecord(path, row.target, row.is_parameter, rule=row.rule, tied_to=row.tied_to)
                continue
            if (row.origin, row.model) not in files:
                record, file = one.source_of(row)
                files[row.origin, row.model] = sources.setdefault(record, len(sources)), file
            number, file = files[row.origin, row.model]
            found[place] = TensorRecord(
                path,
                row.target,
                row.is_parameter,
                number,
                row.sources,
                tuple([file.tensors.get(key) for key in row.sources]),
                row.rule,
                tuple(map(described, row.steps)) if row.steps else (),
                _ancestors(file.history, row.sources, sources) if file.history else (),
                bool(row.steps) and row.is_partial,
                row.tied_to,
            )
    firsts: dict[int, tuple[str, str]] = {}
    for place, tensor, is_parameter in entries_of(model):
        # submodels that share a tensor share its origin
        first = firsts.setdefault(id(tensor), place)
        if first != place and {first, place} <= found.keys():
            _share(found, first, place)
        found.setdefault(place, TensorRecord(*place, is_parameter))
    return tuple(sources), tuple(found.values())


def _forget(found: dict[tuple[str, str], TensorRecord], written: Written) -> None:
    """Record that an initializer changed the values, so that they no longer come from a file."""
    rule = f"{written.how} {written.kind}"
    for place in written.entries & found.keys():
        old = found[place]
        found[place] = TensorRecord(old.model, old.name, old.is_parameter, rule=rule, tied_to=old.tied_to)


def _share(found: dict[tuple[str, str], TensorRecord], first: tuple[str, str], other: tuple[str, str]) -> None:
    loaded, fresh = (first, other) if found[first].source is not None else (other, first)
    if found[loaded].source is not None and found[fresh].source is None:
        rule = f"the same tensor as {loaded[1]} of {loaded[0]}"
        found[fresh] = attrs.evolve(found[loaded], model=fresh[0], name=fresh[1], rule=rule)


def _ancestors(
    history: Mapping[str, tuple[tuple[SourceRecord, tuple[str, ...]], ...]],
    keys: Iterable[str],
    sources: dict[SourceRecord, int],
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """The earlier origins of the values under ``keys`` of a file; an origin of several values is listed once."""
    chain = dict.fromkeys(step for key in keys for step in history.get(key, ()))
    return tuple((sources.setdefault(record, len(sources)), names) for record, names in chain)


def _distribution(info: kinds.KindInfo | None) -> str:
    """Distribution and version, and the imported file where that is not the distribution's; empty without one."""
    if info is None or info.distribution is None:
        return ""
    other = kinds.imported_from(info)
    return f"{info.source}{f', imported from {other}' if other else ''}"


def _path_of(model: Any, one: Prepared) -> str:
    return ".".join((str(model.name), *one.member.entry.submodel))


def full_paths(model: Any, one: Prepared) -> Callable[[str], str]:
    """The function from the path of a single model, in the plans of a part, to its path in the whole ``model``."""
    path, name = _path_of(model, one), str(one.part.name)
    return lambda found: path + found.removeprefix(name)


def _achieved(plan: LoadPlan, changed: Written | None, full: Callable[[str], str]) -> tuple[float, dict[str, int]]:
    """Coverage and counts of a plan that was carried out, without entries that the kind changed afterwards."""
    places = changed.entries if changed is not None else ()
    is_changed = [row.writes and (full(row.model), row.target) in places for row in plan.rows]
    if not any(is_changed):
        return plan.coverage(), plan.counts()
    rows = zip(plan.rows, is_changed, strict=True)
    done = attrs.evolve(plan, rows=tuple([attrs.evolve(row, action="keep") if is_it else row for row, is_it in rows]))
    counts = {**done.counts(), "changed": sum(is_changed)}
    counts["keep"] -= counts["changed"]
    return done.coverage(), {action: count for action, count in counts.items() if count}


def reported(
    model: Any,
    prepared: Sequence[Prepared],
    start: TrainingIteration,
    starts: Sequence[TrainingIteration | None],
    called: Sequence[str],
    written: Mapping[int, Written],
    decision: str,
) -> InitReport:
    """The report of an initialization.

    Args:
        model: The whole model, initialized.
        prepared: The plans that were carried out, one entry per member; its initializer is asked for its outcome.
        start: The iteration at which training starts.
        starts: What each member returned as its start.
        called: The hooks that were called.
        written: Number of a member -> the entries whose values it changed besides its plan.
        decision: What ``auto_resume`` decided.
    """
    providers = {info.name: info for info in kinds.installed()}
    reports = []
    carried: list[Carried | Written] = []
    for number, (one, own_start) in enumerate(zip(prepared, starts, strict=True)):
        member = one.member
        path, name = _path_of(model, one), str(one.part.name)
        planned = LoadPlan.merged([plan for _unit, plan in one.plans])
        coverage, counts = _achieved(planned, written.get(number), full_paths(model, one))
        outcome = member.initializer.outcome()
        reports.append(
            InitializerReport(
                kind=member.kind,
                distribution=_distribution(providers.get(member.kind)),
                hooks=tuple(hook for hook in called if hook in member.called),
                origins=tuple((one.model, one.description, ", ".join(one.files)) for one in planned.origins),
                counts=counts,
                coverage=coverage if one.plans else None,
                start=str(own_start) if own_start is not None and not own_start.is_zero else None,
                restored=outcome.restored,
                passed_over=outcome.passed_over,
                not_restored=outcome.not_restored,
                resumed_set=outcome.resumed_set,
                timings=outcome.timings,
            )
        )
        for unit, plan in one.plans:
            own = outcome if unit is member.initializer else unit.outcome()
            carried.append(Carried(name_of(unit), plan, own, path, name))
        if number in written:
            carried.append(written[number])
    sources, tensors = trace(model, carried)
    return InitReport(start, tuple(reports), decision, sources, tensors)
