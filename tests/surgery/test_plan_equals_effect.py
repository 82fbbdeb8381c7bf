"""The plan equals what happens: random models, random surgery, tensor by tensor; a failing plan changes nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from noether_init_core import InitializerStack, PlanError, bind
from noether_init_core.surgery.plan import LoadPlan, PlanRow

Arrays = dict[str, np.ndarray[Any, Any]]


@attrs.frozen
class Piece:
    """A part of a model with its part of the file and the rules between them."""

    sources: dict[str, tuple[int, ...]]
    targets: dict[str, tuple[int, ...]]
    rules: tuple[dict[str, Any], ...] = ()


SIZES = st.integers(1, 4)
KINDS = [
    *("same", "rename", "below", "regex", "swap", "drop", "keep"),
    *("transpose", "split", "sizes", "concat", "stack", "unstack", "reshape", "chain", "slice", "pad", "keep_pad"),
]


@st.composite
def pieces(draw: st.DrawFn, number: int) -> Piece:
    """One of the things that rules can do, for layers 0 and 1 of a part called ``a<number>``."""
    rows, columns, parts = draw(SIZES), draw(SIZES), draw(st.integers(2, 3))
    kind = draw(st.sampled_from(KINDS))
    old, new = f"old{number}", f"new{number}"
    layers = range(draw(st.integers(1, 2)))

    def named(prefix: str, leaf: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}.{layer}.{leaf}": shape for layer in layers}

    many = [f"p{part}" for part in range(parts)]
    sources: dict[str, tuple[int, ...]]
    targets: dict[str, tuple[int, ...]]
    rules: list[dict[str, Any]] = []
    move = {"from": f"{old}.<i>.w", "to": f"{new}.<i>.w"}
    sources, targets = named(old, "w", (rows, columns)), named(new, "w", (rows, columns))
    if kind == "same":
        targets = named(old, "w", (rows, columns))
    elif kind == "rename":
        rules = [move]
    elif kind == "below":
        rules = [{"from": f"{old}.", "to": f"{new}."}]
    elif kind == "regex":
        rules = [{"from_regex": rf"old{number}\.(?P<layer>\d)\.w", "to": f"{new}.<layer>.w"}]
    elif kind == "transpose":
        targets, rules = named(new, "w", (columns, rows)), [{**move, "do": ["transpose"]}]
    elif kind == "reshape":
        targets, rules = named(new, "w", (rows * columns,)), [{**move, "do": [{"reshape": [-1]}]}]
    elif kind == "slice":
        sources = named(old, "w", (rows + 2, columns))
        rules = [{**move, "do": [{"slice": {"start": 1, "stop": rows + 1}}]}]
    elif kind in ("pad", "keep_pad"):
        value = {"value": 0.5} if kind == "pad" else {}
        targets = named(new, "w", (rows, columns + 2))
        rules = [{**move, "do": [{"pad": {"dim": 1, "size": columns + 2, **value}}]}]
    elif kind in ("split", "sizes"):
        sizes = [rows] * parts if kind == "split" else [rows + part for part in range(parts)]
        sources = named(old, "w", (columns, sum(sizes)))
        targets = {}
        for name, size in zip(many, sizes, strict=True):
            targets |= named(new, name, (size, columns))
        how = 0 if kind == "split" else {"dim": 0, "sizes": sizes}
        rules = [
            {"from": f"{old}.<i>.w", "to": [f"{new}.<i>.{name}" for name in many], "do": ["transpose", {"split": how}]}
        ]
    elif kind in ("concat", "stack", "chain"):
        sources = {}
        for part, name in enumerate(many):
            sources |= named(old, name, (rows + part if kind == "concat" else rows, columns))
        total = sum(rows + part for part in range(parts))
        shapes = {"concat": (total, columns), "stack": (parts, rows, columns), "chain": (columns, parts, rows)}
        steps: dict[str, list[Any]] = {
            "concat": [{"concat": 0}],
            "stack": [{"stack": 0}],
            "chain": [{"concat": 0}, "transpose", {"reshape": [columns, parts, rows]}],
        }
        targets = named(new, "w", shapes[kind])
        rules = [{"from": [f"{old}.<i>.{name}" for name in many], "to": f"{new}.<i>.w", "do": steps[kind]}]
    elif kind == "unstack":
        sources, targets = named(old, "w", (rows, parts, columns)), {}
        for name in many:
            targets |= named(new, name, (rows, columns))
        rules = [{"from": f"{old}.<i>.w", "to": [f"{new}.<i>.{name}" for name in many], "do": [{"unstack": 1}]}]
    elif kind == "swap":
        sources = {**named(old, "w", (rows, columns)), **named(new, "w", (rows, columns))}
        targets = dict(sources)
        rules = [{"from": f"{old}.", "to": f"{new}."}, {"from": f"{new}.", "to": f"{old}."}]
    elif kind == "drop":
        targets, rules = {}, [{"drop": draw(st.sampled_from([f"{old}.", f"{old}.*.w", f"**.{old}.**"]))}]
    elif kind == "keep":
        sources = {} if draw(st.booleans()) else named(new, "w", (rows, 7))
        rules = [{"keep_model": f"{new}."}]
    return Piece(sources, targets, tuple(rules))


@st.composite
def surgeries(draw: st.DrawFn) -> dict[str, Any]:
    """File, model, rules and policies; sometimes with something that does not fit."""
    drawn = [draw(pieces(number)) for number in range(draw(st.integers(1, 4)))]
    sources = {name: shape for piece in drawn for name, shape in piece.sources.items()}
    targets = {name: shape for piece in drawn for name, shape in piece.targets.items()}
    rules = draw(st.permutations([rule for piece in drawn for rule in piece.rules]))
    policies: dict[str, Any] = {}
    fault = draw(st.sampled_from(["none", "none", "missing", "unexpected", "shape", "rule", "twice"]))
    if fault == "missing" and sources:
        del sources[draw(st.sampled_from(sorted(sources)))]
        policies["on_missing"] = draw(st.sampled_from(["error", "keep"]))
    elif fault == "unexpected":
        sources["surplus"] = (2,)
        policies["on_unexpected"] = draw(st.sampled_from(["error", "ignore"]))
    elif fault == "shape" and sources:
        name = draw(st.sampled_from(sorted(sources)))
        sources[name] = (*sources[name][:-1], sources[name][-1] + 1)
        policies["on_mismatch"] = draw(st.sampled_from(["error", "keep", "slice", "pad"]))
    elif fault == "rule":
        rules = [*rules, {"from": "nothing.", "to": "anything."}]
        policies["on_unmatched_rule"] = draw(st.sampled_from(["error", "warn"]))
    elif fault == "twice" and targets:
        rules = [*rules, {"from": "surplus", "to": draw(st.sampled_from(sorted(targets)))}]
        sources["surplus"] = (1,)
    return {
        "sources": sources,
        "targets": targets,
        "config": {"transforms": rules, **policies},
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "wrap": draw(st.sampled_from(["", "module.", "module._orig_mod."])),
    }


def module_of(shapes: dict[str, tuple[int, ...]]) -> torch.nn.Module:
    """A module with parameters of these names."""
    root = torch.nn.Module()
    for number, (name, shape) in enumerate(shapes.items()):
        *path, leaf = name.split(".")
        owner = root
        for segment in path:
            if segment not in dict(owner.named_children()):
                owner.add_module(segment, torch.nn.Module())
            owner = owner.get_submodule(segment)
        owner.register_parameter(leaf, torch.nn.Parameter(-torch.rand(shape) - number))
    return root


def expected(row: PlanRow, file: Arrays, before: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What a row says, by NumPy and the plain data of the plan."""
    if not row.writes:
        return before
    values = [file[source] for source in row.sources]
    for step in LoadPlan("", (row,)).to_dict()["rows"][0]["steps"]:
        match step["step"]:
            case "transpose":
                values = [value if value.ndim < 2 else np.swapaxes(value, -1, -2) for value in values]
            case "split":
                values = np.split(values[0], np.cumsum(step["sizes"])[:-1], step["dim"])
            case "concat":
                values = [np.concatenate(values, step["dim"])]
            case "stack":
                values = [np.stack(values, step["dim"])]
            case "unstack":
                values = list(np.moveaxis(values[0], step["dim"], 0))
            case "reshape":
                values = [value.reshape(step["shape"]) for value in values]
            case "slice":
                values = [value.take(range(step["start"], step["stop"]), step["dim"]) for value in values]
            case "pad":
                padded = []
                for value in values:
                    shape = list(value.shape)
                    shape[step["dim"]] = step["size"]
                    fill = np.nan if step["value"] is None else step["value"]
                    new = np.full(shape, fill, value.dtype)
                    new[tuple(slice(size) for size in value.shape)] = value
                    padded.append(new)
                values = padded
            case other:
                raise AssertionError(other)
    made = values[row.part]
    return np.where(np.isnan(made), before, made)


SEEN = {"fine": 0, "failed": 0}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(surgeries())
def what_happens_is_what_the_plan_says(surgery: dict[str, Any]) -> None:
    """Every tensor afterwards is what its row says of the file; with a problem, none has changed."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        file = {name: torch.rand(shape, dtype=surgery["dtype"]) for name, shape in surgery["sources"].items()}
        path = Path(folder) / "a.pt"
        torch.save({f"{surgery['wrap']}{name}": value for name, value in file.items()}, path)
        module = module_of(surgery["targets"])
        before = {name: value.detach().clone().numpy() for name, value in module.state_dict().items()}
        stack = InitializerStack.from_config([{"kind": "file", "path": str(path), **surgery["config"]}])
        plan = stack.plan(bind(module, name="net"))
        assert {row.target for row in plan.rows if row.target is not None} == set(before)
        used = [source for row in plan.rows for source in row.sources]
        assert {source.removeprefix(surgery["wrap"]) for source in used} == set(file)
        if plan.is_fine:
            SEEN["fine"] += 1
            report = stack.initialize(bind(module, name="net"))
            arrays = {f"{surgery['wrap']}{name}": value.numpy() for name, value in file.items()}
            rows = {str(row.target): row for row in plan.rows if row.target is not None}
            for name, value in module.state_dict().items():
                wanted = expected(rows[name], arrays, before[name])
                np.testing.assert_array_equal(value.numpy(), wanted.astype(np.float32), err_msg=name)
            whole = {
                name for name, row in rows.items() if row.writes and not any(step.keeps_model for step in row.steps)
            }
            assert set(report.loaded_parameters()) == whole
            assert set(report.fresh_parameters()) == set(rows) - whole
        else:
            SEEN["failed"] += 1
            with pytest.raises(PlanError):
                stack.initialize(bind(module, name="net"))
            after = {name: value.numpy() for name, value in module.state_dict().items()}
            assert all(np.array_equal(after[name], before[name]) for name in before)


def test_what_happens_is_what_the_plan_says() -> None:
    """Of random surgeries; plans that are fine and plans that are not are both among them."""
    what_happens_is_what_the_plan_says()
    assert min(SEEN.values()) > 20
