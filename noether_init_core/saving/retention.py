"""Which committed sets stay: rules as values, the decision as a pure function; ``housekeeping`` carries it out."""

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

#: The newest good set, and one superseded good set to walk back to, stay whatever the rules say.
LEAST = 2
_FIELDS = ("epoch", "update", "sample")


@attrs.frozen
class Best:
    """Keep the ``count`` sets with the lowest (``mode="max"``: highest) value of ``metric``."""

    metric: str
    count: int = 1
    mode: Literal["min", "max"] = "min"

    def __attrs_post_init__(self) -> None:
        _check_metric_name(self.metric)
        check_whole("count of the best sets", self.count, least=1)
        if self.mode not in ("min", "max"):
            raise ConfigError(f"mode of the best sets must be min or max, not {self.mode!r}")


def _to_best(value: Any) -> tuple[Best, ...]:
    """``{"loss.val": 3}``, ``{"metric": "acc", "mode": "max", "count": 3}``, a ``Best``, or a list of these."""
    if value is None:
        return ()
    if isinstance(value, Best):
        return (value,)
    if isinstance(value, Mapping):
        if isinstance(value.get("metric"), str):
            unknown = [str(key) for key in value if key not in ("metric", "mode", "count")]
            if unknown:
                raise ConfigError(f"best has the unknown key {', '.join(unknown)}; it has metric, mode and count")
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
        raise ConfigError(f'every must say one of epoch, update, sample, like {{"epoch": 5}}, not {value!r}')
    return dict(value)


@attrs.frozen
class Retention:
    """Which sets stay. A set stays if any rule keeps it; without any rule all stay.

    The rules count good sets of the training that saves. Where several models are saved separately each is counted by
    itself; a composite is one model, but its sets that lack a submodel are counted apart. A set is good if its files
    are as written, it holds no values that a resume refuses (NaN; sets of releases that did not look count as finite),
    and the training has not passed over it in going back to an older one. Where a training has no good set at all,
    those that are as written count.

    Before sets go, a writer looks again at those whose goodness that relies on, of the ones that it knows from earlier
    saves: the two newest good ones of each model, and those that ``best`` and ``every`` keep. The others count as they
    were when it last looked, while no file is added to their folders or removed.

    Whatever the rules say, these stay: the newest good set and one good set before it, to walk back to; the newest set;
    for each model the set that a tag other than that of an iteration means; sets that cannot be read; sets of another
    training. Until there are ``last`` newer good sets (at least two), so do the set that the training last started
    from, counting those that it saved since, and sets that it has passed over.

    Attributes:
        last: The newest so many good sets.
        every: ``{"epoch": 5}``, ``{"update": 1000}`` or ``{"sample": n}``: of each such period, counted from zero, the
            first good set in it; none of the first period. ``TrainingIteration(epoch=5)`` says the same.
        best: The best good sets by a metric that was given to ``save``: ``{"loss.val": 3}`` keeps the three lowest,
            ``{"metric": "acc", "mode": "max", "count": 3}`` the three highest; a list of these keeps what any keeps.
            An iteration that is saved again without the metric still has it: the set that recorded it last stays, and
            so does the one that the iteration means now. Sets of other models of the iteration may have recorded it.
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
        """Itself, or built from a mapping with ``last``, ``every``, ``best``. Raises ``ConfigError``."""
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
        """There is no rule."""
        return self.last is None and self.every is None and not self.best


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Metrics as a manifest holds them: numbers by name; None for NaN and infinities, which are never the best.

    Raises ``ConfigError`` for a name that is no text or a value that is no single number.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigError(f'metrics must be a mapping like {{"loss.val": 0.41}}, not {type_of(metrics)}')
    found: dict[str, float | None] = {}
    for name, value in metrics.items():
        _check_metric_name(name)
        try:
            if isinstance(value, str | bytes | bool):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ConfigError(f"metric {name} must be a number, not {value!r}") from error
        found[name] = number if math.isfinite(number) else None
    return found


@attrs.frozen
class Decision:
    """Which sets may go, newest first, and which must be as they were taken to be for that."""

    superfluous: list[CheckpointSet] = attrs.Factory(list)
    relied_on: list[CheckpointSet] = attrs.Factory(list)


def superfluous_sets(
    sets: Sequence[tuple[CheckpointSet, bool]], rules: Retention, training: str | None = None
) -> Decision:
    """The sets that may go.

    Args:
        sets: Every committed set whose manifest can be read, newest first, and whether its files are as written.
        rules: What to keep.
        training: The training whose sets are counted and may go; those of others stay, and need not be looked at.

    What a tag means never changes through it to an older set: the tag keeps its set, or it is gone with it. A question
    for an iteration, such as ``E10``, is no tag: it means the newest set that matches and is there.
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
            # the metric of an iteration is most likely that of these models, but says something of the others as well
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
        # a damaged set is what its tags mean until the next save that is whole
        newest_whole = max(map(_sequence, whole_group), default=-1)
        kept.update(_sequence(one) for one in group if _sequence(one) >= newest_whole)
        if rules.every or rules.best:
            # Of an iteration that was saved more than once only the last is meant by its tag.
            meant: dict[str, CheckpointSet] = {}
            for one in good:
                meant.setdefault(one.name, one)
            for period, one in _first_of_periods(meant.values(), rules.every).items():
                firsts[models, period] = _sequence(one)
            for rule in rules.best:
                relied_on |= _best(meant.values(), recorded_by[models], rule)
    kept |= _holders(sets) | relied_on | set(firsts.values())
    before = -1
    while before != len(kept):
        before = len(kept)
        kept |= _meant_by_name(sets, kept)
        for models in groups:
            for rule in rules.best:
                kept |= _said_last(recorded_by[models], kept, rule)
    superfluous = [one for one in ours if _sequence(one) not in kept]
    relied_on.update(firsts.get((one.weighed_models, _period(one, rules.every)), -1) for one in superfluous)
    return Decision(superfluous, [one for one in ours if _sequence(one) in relied_on])


def _meant_by_name(sets: Sequence[tuple[CheckpointSet, bool]], kept: Set[int]) -> set[int]:
    """While an older set of an iteration stays, also one of another training, so must the one that the tag of the
    iteration means, of the same models and of any.
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


def _said_last(recorded: Sequence[CheckpointSet], kept: Set[int], rule: Best) -> set[int]:
    """While a set stays that said the metric of an iteration before, so must the one that said it last: it may have
    said that there is none any more.
    """
    said: dict[str, list[int]] = {}
    for one in recorded:
        if rule.metric in _manifest(one).metrics:
            said.setdefault(one.name, []).append(_sequence(one))
    return {sequences[0] for sequences in said.values() if not kept.isdisjoint(sequences)}


def _holders(sets: Sequence[tuple[CheckpointSet, bool]]) -> set[int]:
    """The sets that a tag other than that of an iteration means, for each set of models."""
    kept = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    for one, _is_whole in sets:
        for tag in one.tags:
            if tag != one.name and (tag, one.weighed_models) not in seen:
                seen.add((tag, one.weighed_models))
                kept.add(_sequence(one))
    return kept


def _good(whole: Sequence[CheckpointSet], passed_over: Set[str]) -> Sequence[CheckpointSet]:
    """The sets that the rules count. Who trains with infinities all along, and loads them, has sets to keep as well."""
    useful = [one for one in whole if one.place not in passed_over] if passed_over else whole
    finite = [one for one in useful if not one.is_refused]
    return finite or useful or whole


def _kept_for_now(
    group: Sequence[CheckpointSet], good: Sequence[CheckpointSet], passed_over: Set[str], enough: int
) -> set[int]:
    """The set that the training last started from, and sets that it has passed over, until enough newer ones are good.

    Of newer sets than the one started from only those count that were saved since: the others were left behind.
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
    """The number of the period that the set is of; 0, the first one, where there are none."""
    if every is None or one.iteration is None:
        return 0
    ((field, step),) = every.items()
    return int(getattr(one.iteration, field) // step)


def _first_of_periods(meant: Iterable[CheckpointSet], every: Mapping[str, int] | None) -> dict[int, CheckpointSet]:
    first: dict[int, CheckpointSet] = {}
    for one in sorted(meant, key=lambda one: one.iteration or TrainingIteration.zero()):
        period = _period(one, every)
        if period:
            first.setdefault(period, one)
    return first


def _best(meant: Iterable[CheckpointSet], recorded: Sequence[CheckpointSet], rule: Best) -> set[int]:
    """The sets of the best iterations, and those that recorded their values: without these they would be forgotten.

    ``meant`` is newest first: of equal values the newer one is kept. Of ``recorded`` the first of an iteration counts
    that says the metric at all.
    """
    values: dict[str, tuple[float | None, CheckpointSet]] = {}
    for one in recorded:
        if rule.metric in _manifest(one).metrics:
            values.setdefault(one.name, (_manifest(one).metrics[rule.metric], one))
    valued = []
    for one in meant:
        value, said_by = values.get(one.name, (None, one))
        if value is not None:
            valued.append((value if rule.mode == "min" else -value, {_sequence(one), _sequence(said_by)}))
    valued.sort(key=lambda pair: pair[0])
    return set().union(*(sequences for _, sequences in valued[: rule.count]))


def _sequence(one: CheckpointSet) -> int:
    return one.sequence or 0


def _manifest(one: CheckpointSet) -> Manifest:
    assert one.manifest is not None  # the sets that are judged are committed
    return one.manifest


def _check_metric_name(name: Any) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable():
        raise ConfigError(f"the name of a metric must be a printable text of 1 to 200 characters, not {name!r}")
