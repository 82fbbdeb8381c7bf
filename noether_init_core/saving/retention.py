"""Retention: rules for the sets to keep, and the decision as a pure function; ``housekeeping`` carries it out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, Self

import attrs

from noether_init_core.errors import ConfigError, type_of
from noether_init_core.iteration import TrainingIteration, check_whole
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.manifest import Manifest

#: Number of newest good sets that always stay: the newest, and one older one as a fallback.
LEAST = 2
_FIELDS = ("epoch", "update", "sample")


@attrs.frozen
class Best:
    """Keep the ``count`` sets with the lowest value of ``metric``, or the highest with ``mode="max"``.

    Raises ``ConfigError`` for an invalid name, count or mode.
    """

    metric: str
    count: int = 1
    mode: Literal["min", "max"] = "min"

    def __attrs_post_init__(self) -> None:
        _check_metric_name(self.metric)
        check_whole("count of the best sets", self.count, least=1)
        if self.mode not in ("min", "max"):
            raise ConfigError(f"mode of the best sets must be min or max, not {self.mode!r}")


def _to_best(value: Any) -> tuple[Best, ...]:
    """Convert ``{"loss.val": 3}``, ``{"metric": "acc", "mode": "max", "count": 3}``, ``Best``, or a list of these."""
    if value is None:
        return ()
    if isinstance(value, Best):
        return (value,)
    if isinstance(value, Mapping):
        if isinstance(value.get("metric"), str):
            unknown = [str(key) for key in value if key not in ("metric", "mode", "count")]
            if unknown:
                raise ConfigError(f"unknown key {', '.join(unknown)} of best; the keys are metric, mode and count")
            return (Best(**value),)
        return tuple(Best(metric, count) for metric, count in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(rule for one in value for rule in _to_best(one))
    raise ConfigError(f'best must be like {{"loss.val": 3}} or {{"metric": "acc", "mode": "max"}}, not {value!r}')


def _to_every(value: Any) -> Mapping[str, int] | None:
    if value is None:
        return None
    if isinstance(value, TrainingIteration):
        value = value.to_mapping()
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in _FIELDS:
        raise ConfigError(f'every must have one of epoch, update, sample, like {{"epoch": 5}}, not {value!r}')
    return dict(value)


@attrs.frozen
class Retention:
    """Rules for the sets to keep. A set stays if any rule keeps it; without rules, all sets stay.

    The rules count good sets of the current training. Models that are saved separately are counted separately. A
    composite is one model, but its sets without some submodel are counted separately. A set is good if:

    - its files have the recorded sizes,
    - a resume accepts its values (no NaN; sets without recorded findings count as finite), and
    - no resume has passed over it to use an older set.

    If a training has no good set, all sets with files of the recorded sizes count as good.

    Independent of the rules, these sets stay:

    - the newest good set and one older good set, as a fallback,
    - the newest set,
    - for each model, the newest set of each tag that is not an iteration, such as ``latest``,
    - sets that cannot be read, and sets of another training,
    - the set that the training was last resumed from, until it has saved ``last`` good sets since (at least two),
    - sets that a resume passed over, until there are as many newer good sets.

    A writer remembers sets between saves. Before it removes sets, it reads again the sets that the decision relies on:
    the two newest good sets of each model, and those that ``best`` and ``every`` keep. Other remembered sets are used
    unchanged while no file in their folder is added or removed.

    Attributes:
        last: Keep this number of newest good sets.
        every: ``{"epoch": 5}``, ``{"update": 1000}`` or ``{"sample": n}``: keep the first good set of each period,
            except
            in the first period, which starts at zero. ``TrainingIteration(epoch=5)`` is the same.
        best: Keep the best good sets by a metric of ``save``. ``{"loss.val": 3}`` keeps the three lowest, ``{"metric":
            "acc", "mode": "max", "count": 3}`` the three highest; a list combines rules. If an iteration is saved again
            without the metric, the set that recorded it last and the newest set of the iteration both stay. The metric
            may also be recorded by sets of other models at that iteration.

    Raises ``ConfigError`` for invalid values.
    """

    last: int | None = None
    every: Mapping[str, int] | None = attrs.field(default=None, converter=_to_every)
    best: tuple[Best, ...] = attrs.field(default=(), converter=_to_best)

    def __attrs_post_init__(self) -> None:
        if self.last is not None:
            check_whole("keep_last", self.last, least=1)
        for step in (self.every or {}).values():
            check_whole("every", step, least=1)

    @classmethod
    def of(cls, value: Any) -> Self:
        """Return a ``Retention`` unchanged, or build one from a mapping with ``last``, ``every``, ``best``, or None.

        Raises ``ConfigError``.
        """
        if isinstance(value, cls):
            return value
        if value is None:
            return cls()
        known = [field.name for field in attrs.fields(cls)]
        if not isinstance(value, Mapping) or any(key not in known for key in value):
            raise ConfigError(f"retention must be a Retention or a mapping with {', '.join(known)}, not {value!r}")
        return cls(**value)

    @property
    def keeps_all(self) -> bool:
        """Whether there is no rule, so that all sets stay."""
        return self.last is None and self.every is None and not self.best


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Return metrics for the manifest: name -> number; None for NaN and infinities, which are never the best.

    Raises ``ConfigError`` for a name that is not a string or a value that is not a single number.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigError(f'metrics must be a mapping like {{"loss.val": 0.41}}, not {type_of(metrics)}')
    found: dict[str, float | None] = {}
    for name, value in metrics.items():
        _check_metric_name(name)
        try:
            # float() would accept these, though they are rarely meant as numbers. A tensor of one element converts.
            if isinstance(value, str | bytes | bool):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ConfigError(f"metric {name} must be a number, not {value!r}") from error
        found[name] = number if math.isfinite(number) else None
    return found


@attrs.frozen
class Decision:
    """The sets to remove, newest first, and the sets that must be unchanged for this decision to hold."""

    superfluous: list[CheckpointSet] = attrs.Factory(list)
    relied_on: list[CheckpointSet] = attrs.Factory(list)


def superfluous_sets(
    sets: Sequence[tuple[CheckpointSet, bool]], rules: Retention, training: str | None = None
) -> Decision:
    """Decide which sets to remove.

    A removal never makes a tag select an older set: either the set of the tag stays, or all sets of the tag are
    removed. A query for an iteration, such as ``E10``, is not a tag: it selects the newest set that matches.

    Args:
        sets: Every committed set with a readable manifest, newest first, and whether its files have the recorded sizes.
        rules: The rules.
        training: The training whose sets are counted and may be removed. Sets of other trainings stay.
    """
    if rules.keeps_all:
        return Decision()
    ours = [one for one, _is_whole in sets if _manifest(one).training == training]
    own = {_sequence(one) for one in ours}
    whole = {_sequence(one) for one, is_whole in sets if is_whole} & own
    passed_over = frozenset(_manifest(ours[0]).passed_over if ours else ())
    groups: dict[frozenset[str], list[CheckpointSet]] = {}
    for one in ours:
        groups.setdefault(one.weighed_models, []).append(one)
    recorded_by: dict[frozenset[str], list[CheckpointSet]] = {}
    if rules.best:
        recorded = [one for one in ours if one.place not in passed_over]
        for models in groups:
            # A metric that these models recorded themselves comes first; else one of other models at that iteration.
            recorded_by[models] = [*(one for one in recorded if one.weighed_models == models), *recorded]
    kept = {_sequence(one) for one, _is_whole in sets} - own
    relied_on: set[int] = set()
    firsts: dict[tuple[frozenset[str], int], int] = {}
    for models, group in groups.items():
        whole_group = [one for one in group if _sequence(one) in whole]
        good = _good(whole_group, passed_over)
        enough = max(rules.last or 0, LEAST)
        relied_on.update(_sequence(one) for one in good[:LEAST])
        kept |= {_sequence(one) for one in good[:enough]} | _kept_for_now(group, good, passed_over, enough)
        # Tags select a damaged newest set until the next complete save, so it stays until then.
        newest_whole = max(map(_sequence, whole_group), default=-1)
        kept.update(_sequence(one) for one in group if _sequence(one) >= newest_whole)
        if rules.every or rules.best:
            # If an iteration was saved more than once, its tag selects the last set.
            current: dict[str, CheckpointSet] = {}
            for one in good:
                current.setdefault(one.name, one)
            for period, one in _first_of_periods(current.values(), rules.every).items():
                firsts[models, period] = _sequence(one)
            for rule in rules.best:
                relied_on |= _best(current.values(), recorded_by[models], rule)
    kept |= _holders(sets) | relied_on | set(firsts.values())
    # Each rule below may keep a set that makes another one keep more, so they repeat until nothing is added.
    before = -1
    while before != len(kept):
        before = len(kept)
        kept |= _selected_by_name(sets, kept)
        for models in groups:
            for rule in rules.best:
                kept |= _recorded_last(recorded_by[models], kept, rule)
    superfluous = [one for one in ours if _sequence(one) not in kept]
    relied_on.update(firsts.get((one.weighed_models, _period(one, rules.every)), -1) for one in superfluous)
    return Decision(superfluous, [one for one in ours if _sequence(one) in relied_on])


def _selected_by_name(sets: Sequence[tuple[CheckpointSet, bool]], kept: Set[int]) -> set[int]:
    """Return the newest set of each iteration of which an older set stays, for the same models and for any models.

    Otherwise the tag of the iteration would select the older set, which may be of another training.
    """
    saved = Counter(one.name for one, _is_whole in sets)
    again = [one for one, _is_whole in sets if saved[one.name] > 1]
    latest: dict[tuple[str, frozenset[str] | None], int] = {}
    for one in again:
        for models_or_any in (one.weighed_models, None):
            latest.setdefault((one.name, models_or_any), _sequence(one))
    return {
        latest[one.name, models_or_any]
        for one in again
        if _sequence(one) in kept
        for models_or_any in (one.weighed_models, None)
    }


def _recorded_last(recorded: Sequence[CheckpointSet], kept: Set[int], rule: Best) -> set[int]:
    """Return the set that recorded the metric of an iteration last, if an earlier one with this metric stays.

    Otherwise the earlier value would count again, though the last record may have replaced it by None.
    """
    recorders: dict[str, list[int]] = {}
    for one in recorded:
        if rule.metric in _manifest(one).metrics:
            recorders.setdefault(one.name, []).append(_sequence(one))
    return {sequences[0] for sequences in recorders.values() if not kept.isdisjoint(sequences)}


def _holders(sets: Sequence[tuple[CheckpointSet, bool]]) -> set[int]:
    """Return the sets that tags other than iterations select, for each group of models."""
    kept = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    for one, _is_whole in sets:
        for tag in one.tags:
            if tag != one.name and (tag, one.weighed_models) not in seen:
                seen.add((tag, one.weighed_models))
                kept.add(_sequence(one))
    return kept


def _good(whole: Sequence[CheckpointSet], passed_over: Set[str]) -> Sequence[CheckpointSet]:
    """Return the sets that the rules count.

    If no set is finite, all complete ones count: a training that always has infinities, and loads them, needs sets too.
    """
    useful = [one for one in whole if one.place not in passed_over] if passed_over else whole
    finite = [one for one in useful if not one.is_refused]
    return finite or useful or whole


def _kept_for_now(
    group: Sequence[CheckpointSet], good: Sequence[CheckpointSet], passed_over: Set[str], enough: int
) -> set[int]:
    """Return the set that the training was last resumed from, and sets passed over, until enough newer sets are good.

    For the former, only sets that were saved after that resume count, not newer sets that the resume went back behind.
    """
    kept: set[int] = set()
    start = _manifest(group[0]).started_from
    if start is None and not passed_over:
        return kept
    for one in group:
        if one.place == start:
            newer = [other for other in good if _manifest(other).started_from == start]
        elif one.place in passed_over:
            newer = [other for other in good if _sequence(other) > _sequence(one)]
        else:
            continue
        if len(newer) < enough:
            kept.add(_sequence(one))
    return kept


def _period(one: CheckpointSet, every: Mapping[str, int] | None) -> int:
    """Return the number of the period of a set, from 0; 0 without the rule ``every``."""
    if every is None or one.iteration is None:
        return 0
    ((field, step),) = every.items()
    return int(getattr(one.iteration, field) // step)


def _first_of_periods(current: Iterable[CheckpointSet], every: Mapping[str, int] | None) -> dict[int, CheckpointSet]:
    first: dict[int, CheckpointSet] = {}
    for one in sorted(current, key=lambda one: one.iteration or TrainingIteration.zero()):
        period = _period(one, every)
        if period:
            first.setdefault(period, one)
    return first


def _best(current: Iterable[CheckpointSet], recorded: Sequence[CheckpointSet], rule: Best) -> set[int]:
    """Return the sets of the best iterations, and the sets that recorded their values, which would be lost otherwise.

    ``current`` is newest first, so the newer one of equal values is kept. The first set of an iteration in ``recorded``
    that has the metric counts.
    """
    values: dict[str, tuple[float | None, CheckpointSet]] = {}
    for one in recorded:
        if rule.metric in _manifest(one).metrics:
            values.setdefault(one.name, (_manifest(one).metrics[rule.metric], one))
    valued = []
    for one in current:
        value, recorder = values.get(one.name, (None, one))
        if value is not None:
            valued.append((value if rule.mode == "min" else -value, {_sequence(one), _sequence(recorder)}))
    valued.sort(key=lambda pair: pair[0])
    return set().union(*(sequences for _, sequences in valued[: rule.count]))


def _sequence(one: CheckpointSet) -> int:
    return one.sequence or 0


def _manifest(one: CheckpointSet) -> Manifest:
    assert one.manifest is not None  # callers pass committed sets only
    return one.manifest


def _check_metric_name(name: Any) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable():
        raise ConfigError(f"the name of a metric must be a printable string of 1 to 200 characters, not {name!r}")
