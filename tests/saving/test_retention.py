"""Which sets stay: each rule, what no rule can take away, and both under random histories of saves and damages."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from support.damage import rewrite

from noether_init_core import (
    CheckpointError,
    CheckpointWriter,
    ConfigError,
    InitReport,
    PathProvider,
    Retention,
    TrainingIteration,
    bind,
    compose,
)
from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.saving.retention import Best, checked_metrics, superfluous_sets as decide
from noether_init_core.sets.checkpoint_set import CheckpointSet, check_files
from noether_init_core.sets.manifest import Manifest, ManifestFile
from noether_init_core.sets.selection import find_set
from noether_init_core.sets.snapshot import Snapshot


def model_with(name: str, weight: float) -> Any:
    module = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(module.weight, weight)
    return bind(module, name=name)


MODEL = model_with("mlp", 1.0)
#: Name -> finite and diverged.
MODELS = {name: (model_with(name, 1.0), model_with(name, float("nan"))) for name in ("gen", "disc")}


def at(epoch: int) -> TrainingIteration:
    return TrainingIteration(epoch, 10 * epoch, 100 * epoch)


def epochs(paths: PathProvider) -> list[int]:
    """The epochs of the sets that are there, in the order of their commits."""
    return [one.iteration.epoch or 0 for one in Snapshot(paths).sets() if one.iteration is not None]


def save_all(paths: PathProvider, rules: Any, losses: list[float | None]) -> None:
    """One set for each loss, at epochs from 1."""
    writer = CheckpointWriter(paths, retention=rules, flat_names=False)
    for epoch, loss in enumerate(losses, start=1):
        writer.save(MODEL, at(epoch), metrics=None if loss is None else {"loss.val": loss})


# The rules.


def test_without_rules_all_sets_stay(paths: PathProvider) -> None:
    """Nothing is removed that nobody asked to remove."""
    save_all(paths, None, [None] * 5)
    assert epochs(paths) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Retention(last=3), [6, 7, 8]),
        (Retention(last=1), [7, 8]),
        (Retention(every={"epoch": 3}), [3, 6, 7, 8]),
        (Retention(every={"update": 30}), [3, 6, 7, 8]),
        (Retention(every=TrainingIteration(sample=400)), [4, 7, 8]),
        (Retention(best={"loss.val": 2}), [2, 4, 7, 8]),
        (Retention(best={"metric": "loss.val", "mode": "max"}), [1, 7, 8]),
        (Retention(best=[{"loss.val": 1}, Best("loss.val", 2, "max")]), [1, 2, 7, 8]),
        (Retention(last=3, every={"epoch": 5}, best={"loss.val": 1}), [2, 5, 6, 7, 8]),
        ({"last": 2, "best": {"loss.val": 1}}, [2, 7, 8]),
        (Retention(best={"misspelt": 3}), [7, 8]),
    ],
)
def test_a_set_stays_if_any_rule_keeps_it(paths: PathProvider, rules: Any, expected: list[int]) -> None:
    """The newest two stay in any case."""
    save_all(paths, rules, [0.9, 0.2, 0.5, 0.4, 0.6, 0.7, 0.8, 0.85])
    assert epochs(paths) == expected


def test_periods_need_no_save_at_their_beginning(paths: PathProvider) -> None:
    """Of each period the first set that there is, and it does not change while the run goes on."""
    writer = CheckpointWriter(paths, retention=Retention(every={"update": 100}), flat_names=False)
    for update in range(30, 500, 40):
        writer.save(MODEL, TrainingIteration(0, update, update))
    updates = [one.iteration.update for one in Snapshot(paths).sets() if one.iteration]
    assert updates == [110, 230, 310, 430, 470]


def test_metrics_are_recorded_and_sets_without_them_are_never_the_best(paths: PathProvider) -> None:
    """NaN and infinities neither; numbers of any library are numbers."""
    values: list[Any] = [torch.tensor(0.5), np.float32(0.25), float("nan"), float("-inf"), 3, None, None]
    save_all(paths, Retention(best={"loss.val": 2}), values)
    assert epochs(paths) == [1, 2, 6, 7]
    manifest = json.loads((Snapshot(paths).sets()[0].folder / "manifest.json").read_text())
    assert manifest["metrics"] == {"loss.val": 0.5}
    assert checked_metrics({"a": float("nan"), "b": 1}) == {"a": None, "b": 1.0}


def test_of_equal_values_the_newer_set_is_better(paths: PathProvider) -> None:
    """It has seen more."""
    save_all(paths, Retention(best={"loss.val": 1}), [0.5, 0.5, 0.6, 0.7])
    assert epochs(paths) == [2, 3, 4]


def test_iteration_that_was_saved_twice_counts_once(paths: PathProvider) -> None:
    """Its older set is meant by nothing; the best are two different iterations."""
    writer = CheckpointWriter(paths, retention=Retention(best={"loss": 2}), flat_names=False)
    for epoch, loss in ((1, 0.3), (2, 0.1), (2, 0.1), (3, 0.5), (4, 0.6)):
        writer.save(MODEL, at(epoch), metrics={"loss": loss})
    assert [(one.sequence, one.name[:2]) for one in Snapshot(paths).sets()] == [
        (1, "E1"),
        (3, "E2"),
        (4, "E3"),
        (5, "E4"),
    ]


def test_rule_for_a_metric_that_is_not_given_is_a_warning(
    paths: PathProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise a misspelt name would show only when the best set is gone."""
    writer = CheckpointWriter(paths, retention=Retention(best={"loss.vla": 2}))
    writer.save(MODEL, at(1), metrics={"loss.val": 1})
    assert "retention needs the metric loss.vla, but this save has only loss.val" in caplog.text


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"last": 0}, "keep_last must be a whole number"),
        ({"last": True}, "keep_last must be a whole number"),
        ({"every": {"epoch": 0}}, "every must be a whole number"),
        ({"every": {"epochs": 2}}, "every must have one of epoch, update, sample"),
        ({"every": {"epoch": 2, "update": 3}}, "every must have one of"),
        ({"every": 5}, "every must have one of"),
        ({"best": "loss"}, "best must be like"),
        ({"best": {"loss": 0}}, "count of the best sets"),
        ({"best": {"metric": "loss", "mode": "lowest"}}, "must be min or max"),
        ({"best": {"metric": "loss", "number": 2}}, "unknown key number"),
        ({"best": {"": 2}}, "name of a metric"),
        ({"newest": 2}, "with last, every, best"),
        (3, "retention must be a Retention"),
    ],
)
def test_rules_that_are_none_are_refused(paths: PathProvider, rules: Any, message: str) -> None:
    """When the writer is made, not when the first set would be removed."""
    with pytest.raises(ConfigError, match=message):
        CheckpointWriter(paths, retention=rules)


def test_keep_last_is_short_for_a_rule(paths: PathProvider) -> None:
    """Both at once could contradict each other."""
    assert CheckpointWriter(paths, keep_last=3).retention == Retention(last=3)
    with pytest.raises(ConfigError, match="keep_last and retention cannot be combined"):
        CheckpointWriter(paths, keep_last=3, retention=Retention(last=3))


@pytest.mark.parametrize("metrics", [{"loss": "0.1"}, {"loss": [1]}, {"loss": True}, {1: 2.0}, {"": 1.0}, [0.1]])
def test_metrics_that_are_no_numbers_are_refused(paths: PathProvider, metrics: Any) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match="metric"):
        CheckpointWriter(paths).save(MODEL, at(1), metrics=metrics)
    assert not paths.checkpoint_path.exists()


# What no rule takes away.


def test_damaged_sets_are_no_good_sets(paths: PathProvider) -> None:
    """The newest good set and one before it stay, however many damaged ones are newer."""
    writer = CheckpointWriter(paths, keep_last=1, flat_names=False)
    for epoch in (1, 2, 3):
        writer.save(MODEL, at(epoch))
    newest = Snapshot(paths).sets()[-1]
    (file,) = [one.path for one in newest.files if one.part == "model"]
    rewrite(file, file.read_bytes()[:-1])
    saved = writer.save(MODEL, at(4))
    assert epochs(paths) == [2, 4]
    assert find_set(Snapshot(paths), "latest").found == saved


def test_set_that_cannot_be_read_stays(paths: PathProvider) -> None:
    """Somebody will want to look at it, and it may hold the only good weights."""
    writer = CheckpointWriter(paths, keep_last=1, flat_names=False)
    first = writer.save(MODEL, at(1))
    rewrite(first.folder / "manifest.json", b"{")
    for epoch in (2, 3, 4):
        writer.save(MODEL, at(epoch))
    assert epochs(paths) == [3, 4]
    assert first.folder.exists()


def test_older_set_of_an_iteration_never_takes_over_its_tag(paths: PathProvider) -> None:
    """While a named tag holds the older set, the newer one stays, too."""
    writer = CheckpointWriter(paths, keep_last=1, flat_names=False)
    writer.save(MODEL, at(1), tags=("mine",))
    later = writer.save(MODEL, at(1))
    for epoch in (2, 3, 4):
        writer.save(MODEL, at(epoch))
    assert find_set(Snapshot(paths), "E1_U10_S100").found == later
    assert [one.sequence for one in Snapshot(paths).sets()] == [1, 2, 4, 5]


# Random histories.


RULES = st.builds(
    Retention,
    last=st.none() | st.integers(1, 4),
    every=st.none() | st.builds(dict, epoch=st.integers(1, 4)) | st.builds(dict, update=st.integers(1, 40)),
    best=st.just(()) | st.builds(Best, st.sampled_from("ab"), st.integers(1, 3), st.sampled_from(["min", "max"])),
)
METRICS = st.dictionaries(st.sampled_from("ab"), st.none() | st.integers(0, 3).map(float))
TAGS = st.sets(st.sampled_from(["latest", "mine", "best_model.a"])).map(lambda tags: tuple(sorted(tags)))


def a_set(
    sequence: int,
    epoch: int,
    tags: tuple[str, ...],
    metrics: Mapping[str, float | None],
    *,
    holds: Any = None,
    model: str = "mlp",
    **descent: Any,
) -> CheckpointSet:
    """As it would be read; ``holds`` is what the manifest says of the values of a parameter."""
    iteration = at(epoch)
    own = (str(iteration), *tags)
    refused = {} if holds in (None, "finite") else {"weight": holds}
    digest = f"xxh3_128:{0:032x}"
    files = tuple(
        ManifestFile(
            name=f"{model}_cp={iteration}_{part}.th",
            model=model,
            part=part,
            size=0,
            digest=digest,
            records=digest,
            refused=refused if part == "model" else {},
        )
        for part in ("model", "trainer")
    )
    manifest = Manifest(
        sequence=sequence,
        iteration=iteration.to_mapping(),
        tags=own,
        run_id="run",
        created="",
        seen=(),
        files=files,
        metrics=dict(metrics),
        digests=digest,
        digests_size=0,
        **descent,
    )
    return CheckpointSet(Path(f"{sequence:08d}"), str(iteration), own, iteration, sequence, True, (), manifest=manifest)


def meanings(sets: list[CheckpointSet]) -> dict[str, int]:
    """Tag -> sequence of the set that it means."""
    found: dict[str, int] = {}
    for one in sorted(sets, key=lambda one: one.sequence or 0):
        found |= dict.fromkeys(one.tags, one.sequence or 0)
    return found


def superfluous_sets(*arguments: Any) -> list[CheckpointSet]:
    """The sets that may go."""
    return decide(*arguments).superfluous


def test_damaged_set_stays_only_while_it_is_newer_than_every_good_one() -> None:
    """Until the next good save it is what ``E3`` means, and must not silently be nothing."""
    sets = [(a_set(3, 3, (), {}), False), (a_set(2, 2, (), {}), True), (a_set(1, 1, (), {}), True)]
    assert superfluous_sets(sets, Retention(last=1)) == []
    later = [(a_set(4, 4, (), {}), True), *sets]
    assert [one.sequence for one in superfluous_sets(later, Retention(last=1))] == [3, 1]


@settings(max_examples=200, deadline=None)
@given(
    history=st.lists(st.tuples(st.integers(1, 8), TAGS, METRICS, st.booleans()), min_size=1, max_size=12), rules=RULES
)
def test_rules_never_take_the_newest_good_set_nor_move_a_tag(
    history: list[tuple[int, tuple[str, ...], dict[str, float | None], bool]], rules: Retention
) -> None:
    """Decided at once for a history, and again: what stays does not depend on how often it is asked."""
    sets = [(a_set(number, *what[:3]), what[3]) for number, what in enumerate(history, start=1)][::-1]
    gone = superfluous_sets(sets, rules)
    kept = [one for one, _ in sets if one not in gone]
    good = [one for one, is_good in sets if is_good]
    assert all(one in kept for one in good[:2])
    before, after = meanings([one for one, _ in sets]), meanings(kept)
    assert all(before[tag] == sequence for tag, sequence in after.items())
    assert all(tag in after for tag in before if not tag.startswith("E"))
    if rules.keeps_all:
        assert gone == []
    kept_good = [one for one, is_good in sets if is_good and one in kept]
    assert kept_good[: rules.last or 0] == good[: rules.last or 0]
    for rule in rules.best:
        best = best_values([one for one, _ in sets], good, rule)
        assert best_values(kept, [one for one in kept_good if one in meant_of(good)], rule) == best
    assert superfluous_sets([pair for pair in sets if pair[0] in kept], rules) == []


def meant_of(good: list[CheckpointSet]) -> list[CheckpointSet]:
    """Of each iteration the newest good set; ``good`` is newest first."""
    return list({one.iteration: one for one in reversed(good)}.values())


def best_values(sets: list[CheckpointSet], good: list[CheckpointSet], rule: Best) -> list[float]:
    """The best values of iterations with a good set; the newest set of an iteration that says the metric counts."""
    said: dict[Any, float | None] = {}
    for one in sorted(sets, key=lambda one: one.sequence or 0):
        if one.manifest is not None and rule.metric in one.manifest.metrics:
            said[one.iteration] = one.manifest.metrics[rule.metric]
    sign = 1 if rule.mode == "min" else -1
    values = [said.get(one.iteration) for one in meant_of(good)]
    return sorted(sign * value for value in values if value is not None)[: rule.count]


def kept_of(sets: list[CheckpointSet], rules: Retention, training: str | None = None) -> list[int]:
    """Sequences that stay; the files of all are as written."""
    gone = superfluous_sets([(one, True) for one in sets[::-1]], rules, training)
    return [one.sequence or 0 for one in sets if one not in gone]


@pytest.mark.parametrize("holds", ["NaN", "infinities"])
def test_sets_that_a_resume_refuses_do_not_count(holds: str) -> None:
    """Of a run that has diverged its newest set stays, and as many finite ones before as were asked for."""
    sets = [a_set(number, number, (), {}, holds=holds if number > 4 else "finite") for number in range(1, 9)]
    assert kept_of(sets, Retention(last=3)) == [2, 3, 4, 8]
    assert kept_of(sets[:5], Retention(last=1)) == [3, 4, 5]
    named = [*sets[:5], a_set(6, 6, ("mine",), {}, holds=holds), *sets[6:]]
    assert kept_of(named, Retention(last=2)) == [3, 4, 6, 8]


def test_without_any_finite_set_all_that_are_as_written_count() -> None:
    """Who keeps infinities in a parameter, and loads them, still has sets to go back to."""
    sets = [a_set(number, number, (), {}, holds="infinities") for number in range(1, 6)]
    assert kept_of(sets, Retention(last=3)) == [3, 4, 5]


def test_without_any_finite_set_those_that_were_passed_over_still_do_not_count() -> None:
    """The damaged one of them least of all."""
    sets = [a_set(number, number, (), {}, holds="infinities") for number in range(1, 5)]
    sets += [a_set(n, n, (), {}, holds="infinities", passed_over=("00000004",)) for n in (5, 6)]
    assert kept_of(sets[:5], Retention(last=2)) == [3, 4, 5]
    assert kept_of(sets, Retention(last=3)) == [3, 4, 5, 6]


def test_periods_and_best_are_chosen_among_finite_sets() -> None:
    """A metric that is not the loss may be best where the weights are of no use."""
    sets = [a_set(n, n, (), {"a": float(n)}, holds="NaN" if n in (4, 6) else "finite") for n in range(1, 10)]
    assert kept_of(sets, Retention(every={"epoch": 2}, best=Best("a", 1, "max"))) == [2, 5, 7, 8, 9]
    assert kept_of(sets[:7], Retention(best=Best("a", 2, "max"))) == [5, 7]


def test_sets_that_were_passed_over_do_not_count_and_go_last() -> None:
    """Two usable sets are two; the damaged one goes when there are two newer ones."""
    sets = [a_set(number, number, (), {}) for number in (5, 6)]
    resumed = [a_set(number, number, (), {}, passed_over=("00000006",), started_from="00000005") for number in (7, 8)]
    assert kept_of([*sets, *resumed[:1]], Retention(last=2)) == [5, 6, 7]
    assert kept_of([*sets, *resumed], Retention(last=2)) == [7, 8]
    assert kept_of([*sets, *resumed], Retention(last=3)) == [5, 6, 7, 8]


def test_set_that_a_run_started_from_stays_until_enough_were_saved_since() -> None:
    """Sets that were left behind are newer, and no way back from where the run is now."""
    sets = [a_set(number, number, (), {}) for number in (3, 4, 5)]
    since = [a_set(number, number - 2, (), {}, started_from="00000003") for number in (6, 7)]
    assert kept_of([*sets, *since[:1]], Retention(last=2)) == [3, 5, 6]
    assert kept_of([*sets, since[0], a_set(7, 7, (), {}, started_from="00000003")], Retention(last=2)) == [6, 7]


def test_a_set_goes_only_while_the_first_of_its_period_is_relied_on() -> None:
    """So that the first of a period is looked at again before others of that period go, and no other first is."""
    sets = [(a_set(number, number, (), {}), True) for number in range(8, 0, -1)]
    decision = decide(sets, Retention(every={"epoch": 4}))
    assert [one.sequence for one in decision.superfluous] == [6, 5, 3, 2, 1]
    assert [one.sequence for one in decision.relied_on] == [8, 7, 4]
    assert [one.sequence for one in decide(sets[4:], Retention(every={"epoch": 2})).relied_on] == [4, 3]


def test_metric_of_an_iteration_stays_with_it_when_it_is_saved_again() -> None:
    """Both its sets stay: the one that was measured, and the one that its tag means; the next save changes nothing."""
    losses: list[dict[str, float | None]] = [{"loss": 0.9}, {"loss": 0.1}, {}, {"loss": 0.5}, {"loss": 0.6}, {}]
    sets = [
        a_set(n, epoch, (), loss) for n, (epoch, loss) in enumerate(zip((1, 2, 2, 3, 4, 5), losses, strict=True), 1)
    ]
    rules = Retention(best={"loss": 1})
    assert kept_of(sets, rules) == [2, 3, 5, 6]
    assert kept_of(sets[1:3] + sets[4:], rules) == [2, 3, 5, 6]
    assert kept_of(sets, Retention(best={"loss": 2})) == [2, 3, 4, 5, 6]


def test_later_value_of_a_metric_replaces_the_one_before() -> None:
    """Also one that is no number: the iteration was measured anew, and is not the best."""
    rules = Retention(best={"loss": 1})
    for later, expected in ((0.8, [3, 4, 5]), (None, [3, 4, 5]), (0.05, [2, 4, 5])):
        losses: list[float | None] = [0.1, later, 0.3, 0.4, 0.5]
        epochs_of = (1, 1, 2, 3, 4)
        sets = [a_set(n, epochs_of[n - 1], (), {"loss": loss}) for n, loss in enumerate(losses, start=1)]
        assert kept_of(sets, rules) == expected


def test_damaged_set_that_recorded_the_best_value_stays_with_the_good_one_of_its_iteration() -> None:
    """Without its manifest nobody would know that the good one is the best."""
    losses: list[dict[str, float | None]] = [{"loss": 0.1}, {}, {"loss": 0.5}, {"loss": 0.6}, {"loss": 0.7}]
    sets = [(a_set(n, max(n - 1, 1), (), loss), n != 1) for n, loss in enumerate(losses, start=1)][::-1]
    gone = superfluous_sets(sets, Retention(best={"loss": 1}))
    assert [one.sequence for one in gone] == [3]
    # the one in the middle is the only good one of its iteration
    sets = [(a_set(n, max(n - 2, 1), (), losses[n - 1] if n < 3 else {}), n not in (1, 3)) for n in range(1, 7)][::-1]
    gone = superfluous_sets(sets, Retention(best={"loss": 1}))
    assert [one.sequence for one in gone] == [4]


def test_metric_of_a_set_that_was_passed_over_is_not_that_of_the_one_that_replaced_it() -> None:
    """The iteration was trained anew; what is said of it now is nothing."""
    sets = [a_set(1, 1, (), {"loss": 0.5}), a_set(2, 2, (), {"loss": 0.1})]
    sets += [a_set(n, n - 1, (), {}, passed_over=("00000002",), started_from="00000001") for n in (3, 4, 5)]
    assert kept_of(sets, Retention(best={"loss": 1})) == [1, 4, 5]


def test_metric_that_was_taken_back_does_not_come_back() -> None:
    """The iteration was saved again with NaN: the set that says so stays while the one from before does."""
    sets = [(a_set(1, 1, (), {"a": 0.0}), True), (a_set(2, 1, (), {"a": None}), False), (a_set(3, 1, (), {}), True)]
    gone = superfluous_sets(list(reversed(sets)), Retention(best={"a": 1}))
    assert gone == []


def test_what_one_reason_keeps_can_be_the_reason_for_another_set() -> None:
    """The best of g keeps the value that d recorded at that iteration, which keeps what the iteration means for d."""
    sets = [
        a_set(1, 1, (), {"a": 0.0}, model="g"),
        a_set(2, 1, (), {"a": 9.0}, model="d"),
        a_set(3, 1, (), {}, model="d"),
        a_set(4, 1, (), {}, model="g"),
        *(a_set(number, number, (), {"a": 1.0}, model="gd"[number % 2]) for number in range(5, 9)),
    ]
    # the best of d is the newest with 1.0; without the chain, 3 would go and E1 of d would mean 2 again
    assert kept_of(sets, Retention(best={"a": 1})) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert kept_of(sets[1:], Retention(best={"a": 1})) == [5, 6, 7, 8]


def test_models_that_are_saved_separately_are_counted_separately() -> None:
    """Each has its last sets and one to walk back to, its tags, its periods, and its best."""
    alternating = [a_set(n, (n + 1) // 2, ("latest",), {}, model="gd"[n % 2]) for n in range(1, 11)]
    assert kept_of(alternating, Retention(last=1)) == [7, 8, 9, 10]
    assert kept_of(alternating, Retention(last=3)) == [5, 6, 7, 8, 9, 10]
    assert kept_of(alternating, Retention(every={"epoch": 2})) == [3, 4, 7, 8, 9, 10]
    one_by_one = [a_set(n, n, ("latest",), {}, model="g" if n < 4 else "d") for n in range(1, 8)]
    assert kept_of(one_by_one, Retention(last=1)) == [2, 3, 6, 7]
    diverged = [a_set(n, n, (), {}, model="g" if n < 4 else "d", holds="NaN" if n > 3 else None) for n in range(1, 8)]
    assert kept_of(diverged, Retention(last=1)) == [2, 3, 6, 7]


def test_best_of_each_model_goes_by_its_own_metric_or_by_that_of_the_iteration() -> None:
    """The metric is given with one of the two saves, or with both."""
    losses = [0.4, 0.1, 0.5, 0.6, 0.7]
    sets = []
    for epoch, loss in enumerate(losses, start=1):
        sets.append(a_set(2 * epoch - 1, epoch, (), {"loss": loss}, model="g"))
        sets.append(a_set(2 * epoch, epoch, (), {}, model="d"))
    assert kept_of(sets, Retention(best={"loss": 1})) == [3, 4, 7, 8, 9, 10]
    swapped = [
        a_set(n, (n + 1) // 2, (), {} if n % 2 else {"loss": losses[n // 2 - 1]}, model="gd"[n % 2])
        for n in range(1, 11)
    ]
    assert kept_of(swapped, Retention(best={"loss": 1})) == [3, 4, 7, 8, 9, 10]
    own = [a_set(2 * e, e, (), {"loss": -loss}, model="d") for e, loss in enumerate(losses, start=1)]
    both = sorted([*sets[::2], *own], key=lambda one: one.sequence or 0)
    # the tag of the second epoch means the set of d, also for who names no model
    assert kept_of(both, Retention(best={"loss": 1})) == [3, 4, 7, 8, 9, 10]
    worst = [a_set(2 * e, e, (), {"loss": loss}, model="d") for e, loss in enumerate(reversed(losses), start=1)]
    both = sorted([*sets[::2], *worst], key=lambda one: one.sequence or 0)
    assert kept_of(both, Retention(best={"loss": 1})) == [3, 4, 7, 8, 9, 10]


def test_sets_of_a_whole_with_fewer_models_do_not_push_out_those_with_all(paths: PathProvider) -> None:
    """On the disk, with composites: the sets with both are no more than before."""
    parts = {name: bind(torch.nn.Linear(1, 1), name=name) for name in ("encoder", "decoder")}
    writer = CheckpointWriter(paths, keep_last=1, flat_names=False)
    for epoch in range(1, 4):
        writer.save(compose("autoenc", parts), at(epoch))
    for epoch in range(4, 7):
        writer.save(compose("autoenc", {"decoder": parts["decoder"]}), at(epoch))
    assert epochs(paths) == [2, 3, 5, 6]


def test_sets_of_another_training_stay_and_do_not_count() -> None:
    """Nor does a tag of theirs come to life again: while their set of an iteration stays, so does ours."""
    theirs = [a_set(number, number, ("latest",), {}, training="a") for number in (1, 2)]
    ours = [a_set(number + 2, number, ("latest",), {}, training="b") for number in range(1, 6)]
    assert kept_of([*theirs, *ours], Retention(last=2), "b") == [1, 2, 3, 4, 6, 7]
    assert kept_of([*theirs, *ours], Retention(last=2), "a") == [1, 2, 3, 4, 5, 6, 7]


SAVED = st.fixed_dictionaries(
    {
        "epoch": st.integers(1, 8),
        "model": st.sampled_from("ggd"),
        "tags": TAGS,
        "metrics": METRICS,
        "is_whole": st.booleans(),
        "holds": st.sampled_from([None, "finite", "finite", "NaN", "infinities"]),
        "training": st.sampled_from("aab"),
        "started_from": st.none() | st.integers(1, 12).map("{:08d}".format),
        "passed_over": st.sets(st.integers(1, 12).map("{:08d}".format), max_size=4).map(tuple),
    }
)


@settings(max_examples=300, deadline=None)
@given(history=st.lists(SAVED, min_size=1, max_size=12), rules=RULES, training=st.sampled_from("ab"))
def test_usable_sets_of_the_training_stay_whatever_else_is_there(
    history: list[dict[str, Any]], rules: Retention, training: str
) -> None:
    """Among NaN, passed over, damaged and foreign sets: as many usable ones as asked, and nobody else's set goes."""
    sets, holds = list[tuple[CheckpointSet, bool]](), dict[int | None, Any]()
    for number, what in enumerate(history, start=1):
        is_whole, epoch, tags, metrics = (what.pop(name) for name in ("is_whole", "epoch", "tags", "metrics"))
        holds[number] = what["holds"]
        sets.insert(0, (a_set(number, epoch, tags, metrics, **what), is_whole))
    gone = superfluous_sets(sets, rules, training)
    kept = [one for one, _ in sets if one not in gone]
    ours: list[Any] = [(one, is_whole) for one, is_whole in sets if one.manifest.training == training]
    assert all(one in [our for our, _ in ours] for one in gone)
    before, after = meanings([one for one, _ in sets]), meanings(kept)
    assert all(before[tag] == sequence for tag, sequence in after.items())
    assert all(tag in after for tag in before if not tag.startswith("E"))
    assert superfluous_sets([pair for pair in sets if pair[0] in kept], rules, training) == []
    if rules.keeps_all or not ours:
        assert gone == []
        return
    newest = ours[0][0].manifest
    passed = newest.passed_over
    enough = max(rules.last or 0, 2)
    recorded = [one for one, _ in ours if one.folder.name not in passed]
    for model in {model_of(one) for one, _ in ours}:
        own = [(one, is_whole) for one, is_whole in ours if model_of(one) == model]
        of_model = [one for one, _ in sets if model_of(one) == model]
        tags_before, tags_after = meanings(of_model), meanings([one for one in kept if one in of_model])
        assert all(tags_before[tag] == sequence for tag, sequence in tags_after.items())
        assert all(tag in tags_after for tag in tags_before if not tag.startswith("E"))
        usable = [
            one
            for one, is_whole in own
            if is_whole and holds[one.sequence] in (None, "finite") and one.folder.name not in passed
        ]
        assert all(one in kept for one in usable[:enough])
        start = own[0][0].manifest.started_from
        for one, _ in own:
            since = [other for other in usable if other.manifest.started_from == one.folder.name]
            if one.folder.name == start and usable and len(since) < enough:
                assert one in kept
        for rule in rules.best if usable else ():
            # a value that other models recorded counts where these did not
            of_all = best_values([*recorded_first(recorded, model)], usable, rule)
            left = [one for one in recorded if one in kept]
            still = [one for one in usable if one in kept and one in meant_of(usable)]
            assert best_values([*recorded_first(left, model)], still, rule) == of_all
        # what is of no use stays for a reason only
        whole = [one for one, is_whole in own if is_whole]
        for one, _ in own if usable else ():
            is_newest = not whole or one.sequence >= whole[0].sequence
            is_older_there = any(other.name == one.name and other.sequence < one.sequence for other in kept)
            is_named = any(tags_before[tag] == one.sequence for tag in one.tags if tag != one.name)
            is_kept_for_now = one.folder.name in (*passed, start)
            is_record = any(rule.metric in one.manifest.metrics for rule in rules.best)
            if one not in usable and not (is_newest or is_older_there or is_named or is_kept_for_now or is_record):
                assert one in gone


def model_of(one: CheckpointSet) -> str:
    assert one.manifest is not None
    return one.manifest.files[0].model


def recorded_first(sets: list[CheckpointSet], model: str) -> list[CheckpointSet]:
    """With new sequences, so that those of ``model`` are the newest: what they say of a metric goes first."""
    chosen = sorted(sets, key=lambda one: (model_of(one) == model, one.sequence or 0))
    return [attrs.evolve(one, sequence=number) for number, one in enumerate(chosen)]


DAMAGE = st.sampled_from(["shorten", "remove", "manifest", "uncommit"])
ACTIONS = st.one_of(
    st.tuples(st.just("save"), st.integers(1, 6), TAGS, METRICS, st.booleans(), st.sampled_from(["gen", "disc"])),
    st.tuples(st.just("start anew")),
    st.tuples(st.just("damage"), st.integers(0, 5), DAMAGE),
)


@attrs.define
class History:
    """A folder of checkpoints, and what is known of the sets that were acknowledged."""

    paths: PathProvider
    report: InitReport = attrs.Factory(lambda: InitReport(TrainingIteration.zero()))
    trainings: dict[int, str] = attrs.Factory(dict)
    models: dict[int, str] = attrs.Factory(dict)
    tags: dict[int, tuple[str, ...]] = attrs.Factory(dict)
    good: set[int] = attrs.Factory(set)
    readable: set[int] = attrs.Factory(set)

    def start_anew(self) -> None:
        self.report = InitReport(TrainingIteration.zero())

    def save(
        self,
        rules: Retention,
        epoch: int,
        tags: tuple[str, ...],
        metrics: dict[str, float | None],
        is_finite: bool = True,
        model: str = "gen",
    ) -> None:
        given = {name: float("nan") if value is None else value for name, value in metrics.items()}
        writer = CheckpointWriter(self.paths, report=self.report, retention=rules, flat_names=False)
        there = [one.sequence or 0 for one in Snapshot(self.paths).sets()]
        saved = writer.save(MODELS[model][0 if is_finite else 1], at(epoch), tags=tags, metrics=given)
        sequence = saved.sequence or 0
        assert sequence > max(there, default=0)
        self.trainings[sequence] = self.report.training
        self.models[sequence] = model
        others = {one for one in there if self.trainings[one] != self.report.training}
        assert others <= {one.sequence for one in Snapshot(self.paths).sets()}
        self.tags[sequence] = saved.tags
        self.readable.add(sequence)
        if is_finite:
            self.good.add(sequence)

    def damage(self, which: int, how: str) -> None:
        sets = [one for one in Snapshot(self.paths).sets() if one.sequence in self.readable]
        if not sets:
            return
        victim = sets[which % len(sets)]
        sequence = victim.sequence or 0
        file = victim.files[which % len(victim.files)].path
        self.good.discard(sequence)
        if how == "shorten" and file.exists():
            rewrite(file, file.read_bytes()[:-1])
        elif how == "remove":
            file.unlink(missing_ok=True)
        elif how == "manifest":
            rewrite(victim.folder / "manifest.json", b"{")
            self.readable.discard(sequence)
        elif how == "uncommit":
            (victim.folder / "manifest.json").unlink()
            self.readable.discard(sequence)
            del self.tags[sequence]

    def check(self) -> None:
        there = {one.sequence: one for one in Snapshot(self.paths).sets()}
        ours = sorted(one for one in self.good if self.trainings[one] == self.report.training)
        for model in MODELS:
            for sequence in [one for one in ours if self.models[one] == model][-2:]:
                check_files(there[sequence])
        known = {sequence: tags for sequence, tags in self.tags.items() if sequence in self.readable}
        for models in ({"gen"}, {"disc"}, {"gen", "disc"}):
            meant: dict[str, int] = {}
            for sequence in sorted(one for one in known if self.models[one] in models):
                meant |= dict.fromkeys(known[sequence], sequence)
            left = {sequence: one for sequence, one in there.items() if self.models[sequence or 0] in models}
            for tag in {tag for one in left.values() for tag in one.tags}:
                holders = [sequence for sequence, one in left.items() if tag in one.tags]
                assert max(one or 0 for one in holders) == meant[tag], tag
            for tag, sequence in meant.items():
                assert tag.startswith("E") or sequence in there
        # sets that retention removed are forgotten
        for sequence in set(self.readable) - set(there):
            self.readable.discard(sequence)
            self.good.discard(sequence)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(ACTIONS, min_size=2, max_size=9), rules=st.lists(RULES, min_size=1, max_size=3))
def test_good_sets_survive_random_saves_and_damages(actions: list[tuple[Any, ...]], rules: list[Retention]) -> None:
    """On the disk, with changing rules and new trainings: the newest two finite sets of each model of the training are
    there, all of the others, and no tag moves to an older set.
    """
    root = Path(tempfile.mkdtemp())
    try:
        history = History(PathProvider(root, "run"))
        for action, rule in zip(actions, itertools.cycle(rules), strict=False):
            if action[0] == "save":
                history.save(rule, *action[1:])
                history.check()
            elif action[0] == "start anew":
                history.start_anew()
            else:
                history.damage(*action[1:])
        leftovers = Snapshot(history.paths).uncommitted()
        history.save(rules[0], 9, ("latest",), {})
        history.check()
        assert Snapshot(history.paths).uncommitted() == ()
        assert len(leftovers) <= len(actions)
    except CheckpointError as error:
        raise AssertionError(str(error)) from error
    finally:
        shutil.rmtree(root)


# What was read of a manifest in an earlier save.


def test_a_manifest_that_was_damaged_since_it_was_read_is_no_way_back(paths: PathProvider) -> None:
    """Size and time of change need not tell: before anything goes, what stays to walk back to is read anew."""
    writer = CheckpointWriter(paths, keep_last=1)
    writer.save(MODEL, at(1))
    second = writer.save(MODEL, at(2)).folder / "manifest.json"
    known = second.stat()
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    with second.open("r+b") as file:
        file.write(content)
    os.utime(second, ns=(known.st_atime_ns, known.st_mtime_ns))
    writer.save(MODEL, at(3))
    assert sorted(one.name[:8] for one in (paths.checkpoint_path / "sets").iterdir()) == [
        "00000001",
        "00000002",
        "00000003",
    ]


def test_a_writer_goes_on_after_an_interrupt_while_it_read_a_manifest(
    paths: PathProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops a run by hand saves once more before the end."""
    CheckpointWriter(paths).save(MODEL, at(1))
    writer = CheckpointWriter(paths, keep_last=3)
    with monkeypatch.context() as patch:
        read_bytes = FileSystem.read_bytes

        def interrupted(self: FileSystem, path: Path, limit: int) -> bytes:
            if path.name == "manifest.json":
                raise KeyboardInterrupt
            return read_bytes(self, path, limit)

        patch.setattr(FileSystem, "read_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.save(MODEL, at(2))
    writer.save(MODEL, at(3))
    assert epochs(paths)[-1] == 3
