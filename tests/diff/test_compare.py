"""Comparing checkpoints: the numbers are those of plain torch in float64, whatever the dtype, layout or size."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file
from support.pages import ROOT

from noether_init_core import (
    CheckpointCorruptError,
    CheckpointDiff,
    CheckpointNotFoundError,
    CheckpointWriter,
    InitError,
    PathProvider,
    TrainingIteration,
    bind,
    compare_checkpoints,
    compose,
)
from noether_init_core.diff.compare import DiffRow, compare_sides, prefix_note
from noether_init_core.diff.sides import side_at

State = dict[str, Any]


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., CheckpointDiff]:
    """Compare two state dicts through files."""

    def call(a: State, b: State, **options: Any) -> CheckpointDiff:
        torch.save(a, tmp_path / "a.pt")
        torch.save(b, tmp_path / "b.pt")
        found = compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt", **options)
        schema = json.loads((ROOT / "docs" / "schemas" / "diff.schema.json").read_text())
        jsonschema.validate(json.loads(found.to_json()), schema)
        return found

    return call


Compare = Callable[..., CheckpointDiff]


def only(found: CheckpointDiff) -> DiffRow:
    """The only row."""
    (row,) = found.rows
    return row


def expected(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, float]:
    """Relative norm, cosine and largest difference by plain torch."""
    first, second = a.double().flatten(), b.double().flatten()
    difference = second - first
    cosine = torch.dot(first, second) / first.norm() / second.norm()
    return float(difference.norm() / first.norm()), float(cosine), float(difference.abs().max())


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8],
)
def test_drift_is_that_of_plain_torch(compare: Compare, dtype: torch.dtype) -> None:
    """Over several pieces, for every kind of numbers."""
    torch.manual_seed(0)
    first = (8 * torch.rand(700, 801) + 1).to(dtype)
    second = (8 * torch.rand(700, 801) + 1).to(dtype)
    row = only(compare({"w": first}, {"w": second}))
    wide = (first.float(), second.float()) if dtype.itemsize == 1 else (first, second)
    relative, cosine, largest = expected(*wide)
    assert row.state == "changed"
    assert row.relative_norm == pytest.approx(relative, rel=1e-12)
    assert row.cosine == pytest.approx(cosine, rel=1e-12)
    assert row.max_abs == pytest.approx(largest, rel=1e-12)
    assert (row.elements, row.dtype_a) == (700 * 801, str(dtype).removeprefix("torch."))


def test_the_layout_of_the_file_does_not_matter(compare: Compare) -> None:
    """Transposed, strided and shared storages are compared element by element."""
    torch.manual_seed(0)
    plain, other = torch.randn(600, 900), torch.randn(600, 900)
    views = {
        "transposed": other.t().contiguous().t(),
        "strided": torch.stack([other, other], dim=-1)[..., 0],
        "row": other[None].transpose(0, 1).contiguous().transpose(0, 1)[0],
    }
    relative, cosine, _largest = expected(plain, other)
    for name, view in views.items():
        row = only(compare({"w": plain}, {"w": view}))
        assert row.relative_norm == pytest.approx(relative), name
        assert row.cosine == pytest.approx(cosine), name
    assert only(compare({"w": other}, {"w": views["transposed"]})).state == "equal"
    turned = torch.randn(3, 40, 50, 60).permute(2, 0, 3, 1)
    relative, cosine, _largest = expected(turned, 2 * turned.flip(0))
    row = only(compare({"w": turned}, {"w": (2 * turned.flip(0)).contiguous()}))
    assert row.relative_norm == pytest.approx(relative)
    assert row.cosine == pytest.approx(cosine)
    column = torch.randn(300_000, 8)[:, 3]
    assert only(compare({"w": column}, {"w": column.clone()})).state == "equal"


def test_all_tensors_together_are_one_vector(compare: Compare) -> None:
    """Totals are not the mean of the rows."""
    torch.manual_seed(0)
    a = {name: torch.randn(size) * size for name, size in (("x", 3), ("y", 5000), ("z", 70))}
    b = {name: value + 0.1 * torch.randn_like(value) for name, value in a.items()}
    found = compare(a, b)
    relative, cosine, _largest = expected(torch.cat(list(a.values())), torch.cat(list(b.values())))
    assert found.relative_norm == pytest.approx(relative)
    assert found.cosine == pytest.approx(cosine)
    assert (found.elements, found.elements_compared) == (5073, 5073)


def test_names_shapes_and_dtypes_that_differ_are_told_apart(compare: Compare) -> None:
    """In the order of A, then those of B alone; nothing is compared that cannot be."""
    a = {"same": torch.ones(2), "shape": torch.ones(2, 3), "dtype": torch.ones(4), "gone": torch.ones(1)}
    b = {"new": torch.ones(3), "dtype": torch.ones(4).half(), "shape": torch.ones(3, 2), "same": torch.ones(2)}
    found = compare(a, b)
    assert [(row.key, row.state) for row in found.rows] == [
        ("same", "equal"),
        ("shape", "shape"),
        ("dtype", "dtype"),
        ("gone", "only_a"),
        ("new", "only_b"),
    ]
    shape, dtype = found.rows[1], found.rows[2]
    assert (shape.shape_a, shape.shape_b, shape.relative_norm) == ((2, 3), (3, 2), None)
    assert (dtype.dtype_a, dtype.dtype_b, dtype.relative_norm, dtype.cosine) == ("float32", "float16", 0.0, 1.0)
    assert found.counts() == {"dtype": 1, "equal": 1, "only_a": 1, "only_b": 1, "shape": 1}
    assert not found.is_same_form
    assert found.elements_compared == 6


def test_equal_means_the_same_bits(compare: Compare) -> None:
    """Minus zero is not zero, though no number moved."""
    row = only(compare({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([-0.0, 1.0])}))
    assert (row.state, row.relative_norm, row.max_abs) == ("changed", 0.0, 0.0)
    assert row.note == "other bits; no difference in float64"
    last = only(compare({"n": torch.tensor([2**62])}, {"n": torch.tensor([2**62 + 1])}))
    assert (last.state, last.relative_norm) == ("changed", 0.0)
    same = compare({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([0.0, 1.0])})
    assert (only(same).state, same.is_equal) == ("equal", True)


def test_nan_and_infinities_are_counted_and_not_compared(compare: Compare) -> None:
    """They make no numbers, on either side, and totals leave them out; the same bits are equal all the same."""
    broken = torch.tensor([1.0, math.nan, math.inf])
    found = compare({"w": broken, "x": torch.ones(2)}, {"w": torch.ones(3), "x": torch.ones(2)})
    row = found.rows[0]
    assert (row.state, row.nonfinite_a, row.nonfinite_b) == ("nonfinite", 2, 0)
    assert (row.relative_norm, row.cosine, row.norm_a) == (None, None, None)
    assert (found.relative_norm, found.elements_compared, found.is_same_form) == (0.0, 2, False)
    both = only(compare({"w": broken}, {"w": broken.clone()}))
    assert (both.state, both.nonfinite_a, both.nonfinite_b, both.note) == ("equal", 2, 2, "not all finite")
    assert compare({"mask": broken}, {"mask": broken.clone()}).is_same_form
    parts = only(compare({"w": torch.tensor([complex(math.nan, math.inf), 1])}, {"w": torch.ones(2) + 0j}))
    assert (parts.state, parts.nonfinite_a, parts.nonfinite_b) == ("nonfinite", 1, 0)


@pytest.mark.parametrize("exponent", [-300, -170, 0, 170, 300])
def test_squares_that_no_float_holds_are_scaled(compare: Compare, exponent: int) -> None:
    """The numbers do not depend on the size of the values."""
    torch.manual_seed(0)
    first = torch.randn(1000, dtype=torch.float64)
    second = first + 0.1 * torch.randn(1000, dtype=torch.float64)
    relative, cosine, _largest = expected(first, second)
    row = only(compare({"w": first * 10.0**exponent}, {"w": second * 10.0**exponent}))
    assert row.relative_norm == pytest.approx(relative)
    assert row.cosine == pytest.approx(cosine)
    assert row.norm_a == pytest.approx(float(first.norm()) * 10.0**exponent)


def test_sides_of_very_different_size_have_scales_of_their_own(compare: Compare) -> None:
    """A tiny, B huge; differences far smaller than the numbers; what is larger than any float is told, not guessed."""
    wide: Any = {"dtype": torch.float64}
    a = {
        "far": torch.full((3,), 1e-200, **wide),
        "near": torch.tensor([1.0, 1e-200], **wide),
        "opposite": torch.full((3,), 1.7e308, **wide),
        "subnormal": torch.full((3,), 5e-324, **wide),
    }
    b = {
        "far": torch.full((3,), 1e200, **wide),
        "near": torch.tensor([1.0, 3e-200], **wide),
        "opposite": torch.full((3,), -1.7e308, **wide),
        "subnormal": torch.full((3,), 1e-323, **wide),
    }
    rows = {row.key: row for row in compare(a, b).rows}
    assert rows["far"].relative_norm is None
    assert rows["far"].cosine == pytest.approx(1.0)
    assert rows["far"].note == "beyond the range of float64"
    assert rows["near"].relative_norm == pytest.approx(2e-200)
    assert (rows["opposite"].relative_norm, rows["opposite"].cosine) == (None, None)
    assert rows["opposite"].note == "beyond the range of float64"
    assert (rows["opposite"].norm_a, rows["opposite"].max_abs) == (None, None)
    assert rows["subnormal"].relative_norm == pytest.approx(1.0)
    tiny = compare({"w": a["far"], "zero": torch.zeros(2)}, {"w": 2 * a["far"], "zero": torch.zeros(2)})
    assert [tiny.relative_norm, tiny.cosine] == pytest.approx([1.0, 1.0])
    half = compare({"w": 3 * a["far"], "v": torch.ones(1)}, {"w": a["far"], "v": torch.zeros(1)})
    assert half.relative_norm == pytest.approx(1.0)


def test_zero_and_nothing_have_no_direction(compare: Compare) -> None:
    """No division by zero, and a note where the drift is not known."""
    found = compare(
        {"from zero": torch.zeros(3), "to zero": torch.ones(3), "both": torch.zeros(2), "empty": torch.empty(0, 4)},
        {"from zero": torch.ones(3), "to zero": torch.zeros(3), "both": torch.zeros(2), "empty": torch.empty(0, 4)},
    )
    rows = {row.key: row for row in found.rows}
    assert (rows["from zero"].relative_norm, rows["from zero"].note) == (None, "A is all zero")
    assert (rows["to zero"].relative_norm, rows["to zero"].cosine) == (1.0, None)
    assert (rows["both"].state, rows["both"].relative_norm, rows["both"].cosine) == ("equal", 0.0, None)
    assert (rows["empty"].state, rows["empty"].elements) == ("equal", 0)


def test_complex_numbers_bools_scalars_and_other_entries(compare: Compare) -> None:
    """Complex ones by both parts; what is no tensor is equal or changed."""
    a = {
        "c": torch.tensor([1 + 1j, 2j]),
        "b": torch.tensor([True, False]),
        "s": torch.tensor(2.0),
        "o": {"n": [1, 2.5]},
    }
    b = {"c": torch.tensor([1 + 1j, 3j]), "b": torch.tensor([True, True]), "s": torch.tensor(3.0), "o": {"n": [1, 2]}}
    rows = {row.key: row for row in compare({"state_dict": a}, {"state_dict": b}).rows}
    assert rows["c"].relative_norm == pytest.approx(1 / math.sqrt(6))
    assert rows["b"].relative_norm == 1.0
    assert (rows["s"].relative_norm, rows["s"].shape_a) == (0.5, ())
    assert (rows["o"].state, rows["o"].dtype_a, rows["o"].note) == ("changed", "object", "not a tensor")
    assert {row.state for row in compare({"state_dict": a}, {"state_dict": a}).rows} == {"equal"}


def test_prefixes_of_wrappers_are_named_and_can_be_taken_off(compare: Compare) -> None:
    """Where nearly no name is common, the note says what to type."""
    plain = {f"blocks.{number}.weight": torch.ones(2) for number in range(4)}
    wrapped = {f"module.{name}": value for name, value in plain.items()}
    found = compare(plain, wrapped)
    assert found.notes == ("0 of 4 names are on both sides; B has the prefix 'module.'. Next: --strip module.",)
    assert compare(plain, wrapped, strip=["module."]).is_equal
    assert compare(wrapped, plain).notes[0].startswith("0 of 4 names are on both sides; A has")


@pytest.mark.parametrize("prefixes", [["module.", "_orig_mod."], ["_orig_mod.", "module."]])
def test_prefixes_are_taken_off_in_any_order(compare: Compare, prefixes: list[str]) -> None:
    """Each once; names that become the same are told."""
    wrapped = {"_orig_mod.module.w": torch.ones(2), "module.module.v": torch.ones(1)}
    assert compare({"w": torch.ones(2), "module.v": torch.ones(1)}, wrapped, strip=prefixes).counts() == {
        "equal": 1,
        "only_a": 1,
        "only_b": 1,
    }
    twice = compare({"w": torch.ones(2)}, {"w": torch.ones(2), "module.w": torch.zeros(2)}, strip=prefixes)
    assert [(row.key, row.state) for row in twice.rows] == [("w", "equal"), ("module.w", "only_b")]
    assert "without prefixes, w would occur twice" in twice.notes[0]


def test_two_kinds_of_wrappers_are_both_named(compare: Compare) -> None:
    """Where either side has something in front; nothing is said where names differ otherwise."""
    plain = {f"blocks.{number}.weight": torch.ones(2) for number in range(4)}
    a, b = ({f"{prefix}{name}": value for name, value in plain.items()} for prefix in ("model.", "a b."))
    (note,) = compare(a, b).notes
    assert note.endswith("A has the prefix 'model.' and B has the prefix 'a b.'. Next: --strip model. --strip 'a b.'")
    assert compare(a, b, strip=["model.", "a b."]).is_equal
    assert compare({"x.w": torch.ones(1)}, {"y.v": torch.ones(1)}).notes == ()


def test_names_that_end_alike_by_the_thousand_do_not_take_long() -> None:
    """The search for a prefix looks at every name a few times, whatever they are."""
    names = [f"a{number}.w" for number in range(100_000)]
    assert prefix_note(["w", *names], [f"b{name}" for name in names]) == ""


def test_plain_values_are_compared_as_they_are(compare: Compare) -> None:
    """NaN is itself, minus zero is not zero, tensors within are compared by bits; types count."""
    entries = {"nan": math.nan, "set": {1, 2}, "none": None, "tuple": (1, torch.ones(2)), "map": {"t": torch.ones(1)}}
    state = {"w": torch.ones(1), **entries}
    assert compare({"state_dict": state}, {"state_dict": state}).is_equal
    other = {**state, "nan": 0.0, "tuple": (1, torch.tensor([1.0, -1.0])), "map": {"t": torch.ones(1).half()}}
    changed = compare({"state_dict": {**state, "nan": -0.0}}, {"state_dict": other})
    assert {row.key for row in changed.rows if row.state == "changed"} == {"nan", "tuple", "map"}
    assert (
        only(compare({"state_dict": {"e": 1}}, {"state_dict": {"e": torch.ones(1)}})).note
        == "a tensor on one side only"
    )


def test_dtypes_without_arithmetic_are_compared_by_bits(compare: Compare) -> None:
    """Equal or changed, with a note, and no numbers."""
    one, two = (torch.tensor(value, dtype=torch.uint8).view(torch.float8_e8m0fnu) for value in ([1, 2], [1, 3]))
    row = only(compare({"w": one}, {"w": two}))
    assert (row.state, row.relative_norm, row.note) == ("changed", None, "numbers of this dtype are not compared")
    assert only(compare({"w": one}, {"w": one})).state == "equal"


def test_torch_has_its_threads_again(compare: Compare) -> None:
    """After a comparison, and after one that fails."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compare({"w": torch.ones(2)}, {"w": torch.zeros(2)})
        assert torch.get_num_threads() == 2
        with pytest.raises(InitError):
            compare({"w": torch.eye(2).to_sparse_coo()}, {"w": torch.ones(2)})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_other_formats_are_compared_with_each_other(tmp_path: Path) -> None:
    """A safetensors file against one of torch.save."""
    state = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    save_file(state, tmp_path / "b.safetensors")
    assert compare_checkpoints(tmp_path / "a.ckpt", tmp_path / "b.safetensors").is_equal


def test_runs_tags_and_sets_can_be_named(tmp_path: Path) -> None:
    """A run means its newest set; a tag another one; averages are models of their own."""
    paths = PathProvider(tmp_path, "run")
    model = bind(torch.nn.Linear(2, 2), name="net")
    writer = CheckpointWriter(paths)
    first = writer.save(model, TrainingIteration(1, 4, 32), tags=["best_model.loss"])
    with torch.no_grad():
        model.module.weight.add_(1)
    average = {"ema=0.9": {name: value.clone() for name, value in model.state_dict().items()}}
    writer.save(model, TrainingIteration(2, 8, 64), averages=average)
    found = compare_checkpoints(f"{tmp_path / 'run'}@best_model.loss", tmp_path / "run")
    assert (found.a.origin, found.a.iteration) == ("run @ best_model.loss = E1_U4_S32", "E1_U4_S32")
    assert (found.b.origin, found.b.run_id, found.b.tag) == ("run @ latest = E2_U8_S64", "run", "latest")
    states = {(row.model, row.key): row.state for row in found.rows}
    assert states[("net", "weight")] == "changed"
    assert states[("net (ema=0.9)", "weight")] == "only_b"
    assert compare_checkpoints(first.folder, f"{tmp_path / 'run'}@E1_U4_S32").is_equal


def test_a_file_goes_with_the_only_weights_of_a_run(tmp_path: Path) -> None:
    """Whatever its name; averages beside them are on one side only, and it says which run wrote it."""
    model = bind(torch.nn.Linear(2, 2), name="net")
    average = {"ema=0.9": {name: value + 1 for name, value in model.state_dict().items()}}
    written = CheckpointWriter(PathProvider(tmp_path, "run")).save(model, TrainingIteration(2, 8, 64), averages=average)
    torch.save(model.state_dict(), tmp_path / "export.pt")
    for a, b, alone in (("export.pt", "run", "only_b"), ("run", "export.pt", "only_a")):
        found = compare_checkpoints(tmp_path / a, tmp_path / b)
        assert found.counts() == {"equal": 2, alone: 2}
        assert {row.model for row in found.rows if row.state == alone} == {"net (ema=0.9)"}
    (weights,) = written.folder.glob("net_cp=*_model.th")
    side = compare_checkpoints(weights, tmp_path / "export.pt").a
    assert (side.origin, side.run_id, side.iteration) == (None, "run", "E2_U8_S64")


def test_models_of_no_common_name_are_listed(tmp_path: Path) -> None:
    """One file for two submodels can only be guessed, so it is not."""
    both = compose("both", {name: bind(torch.nn.Linear(1, 1), name=name) for name in ("encoder", "decoder")})
    CheckpointWriter(PathProvider(tmp_path, "run")).save(both, TrainingIteration(1, 4, 32), optimizer=False)
    torch.save({"weight": torch.ones(1, 1)}, tmp_path / "a.pt")
    found = compare_checkpoints(tmp_path / "a.pt", tmp_path / "run")
    assert found.notes == (
        "no model is on both sides: A has no name; B has both.decoder, both.encoder. Next: give two files",
    )
    assert found.counts() == {"only_a": 1, "only_b": 4}


def test_paths_that_mean_nothing_say_what_there_is(tmp_path: Path) -> None:
    """Several runs, an unknown tag, nothing at all."""
    for name in ("one", "two"):
        model = bind(torch.nn.Linear(2, 2), name="net")
        CheckpointWriter(PathProvider(tmp_path, name)).save(model, TrainingIteration(1, 4, 32))
    with pytest.raises(CheckpointNotFoundError, match=r"has 2 runs or stages. Next: give one of .*one, .*two"):
        compare_checkpoints(tmp_path, tmp_path / "one")
    with pytest.raises(CheckpointNotFoundError, match=r'has no checkpoint "nix"'):
        compare_checkpoints(f"{tmp_path / 'one'}@nix", tmp_path / "one")
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"a.pt is a file, but @latest selects a set of a run"):
        compare_checkpoints(f"{tmp_path / 'a.pt'}@latest", tmp_path / "one")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"no run found at .*empty: .* Next: ninit verify"):
        compare_checkpoints(tmp_path / "empty", tmp_path / "one")
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        compare_checkpoints(tmp_path / "absent", tmp_path / "one")


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    """Half of one file and half of another would be no comparison."""
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(4), "v": torch.ones(1 << 20)}, tmp_path / name)
    sides = side_at(tmp_path / "a.pt"), side_at(tmp_path / "b.pt")
    with pytest.raises(CheckpointCorruptError, match=r"b\.pt changed while"):
        compare_sides(*sides, advance=lambda _bytes: os.utime(tmp_path / "b.pt", ns=(1, 1)))
    with pytest.raises(CheckpointCorruptError, match=r"b\.pt ends at byte"):
        compare_sides(*sides, advance=lambda _bytes: os.truncate(tmp_path / "b.pt", 0))


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """192 MiB on each side are compared in a quarter of one of them, the interpreter's own memory apart."""
    size = 48 << 20
    for name, fill in (("a.pt", 1.0), ("b.pt", 1.5)):
        torch.save({"w": torch.full((size,), fill)}, tmp_path / name)
    peak, done = [0], threading.Event()

    def anonymous() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0])

    before = anonymous()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    row = only(compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt"))
    done.set()
    watcher.join()
    assert row.relative_norm == pytest.approx(0.5)
    assert peak[0] > 0
    assert peak[0] - before < 48 << 10


shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text("ab.0", min_size=1, max_size=4), shapes, max_size=5), st.data())
def test_every_name_has_one_row_and_the_other_way_round_is_its_mirror(
    compare: Compare, form: dict[str, list[int]], data: st.DataObject
) -> None:
    """Whatever is on which side."""
    state = {name: torch.randn(shape) for name, shape in form.items()}
    a = {name: value for name, value in state.items() if data.draw(st.booleans())}
    b = {name: value + data.draw(st.sampled_from([0, 1])) for name, value in state.items() if data.draw(st.booleans())}
    there, back = compare(a, b), compare(b, a)
    assert sorted(row.key for row in there.rows) == sorted({*a, *b})
    mirrored = {"only_a": "only_b", "only_b": "only_a"}
    rows = {row.key: row for row in back.rows}
    for row in there.rows:
        assert rows[row.key].state == mirrored.get(row.state, row.state)
        assert rows[row.key].cosine == (None if row.cosine is None else pytest.approx(row.cosine))
