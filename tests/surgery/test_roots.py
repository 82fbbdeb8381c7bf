"""Parts of a file that hold the entries of a model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from noether_init_core.surgery.fit import TargetSpec
from noether_init_core.surgery.roots import Root, fitting_roots, present_roots

Shapes = Mapping[str, tuple[int, ...]]
MODEL: Shapes = {"stem.weight": (4, 3), "blocks.0.weight": (4, 4), "blocks.1.weight": (4, 4), "head.weight": (2, 4)}


def specs(shapes: Shapes, before: str = "") -> dict[str, TargetSpec]:
    return {f"{before}{name}": TargetSpec(shape, "float32", 0) for name, shape in shapes.items()}


def names(file: Mapping[str, TargetSpec], model: Shapes = MODEL, asked: str = "") -> list[str]:
    return [root.name for root in fitting_roots(file, specs(model), asked=asked)]


def test_all_parts_that_fit_equally_well_are_named() -> None:
    """Averages of weights come last, whatever the order in the file."""
    other = specs({"0.exp_avg": (4, 3), "1.exp_avg": (4, 4)}, "optimizer.state.")
    assert names({**specs(MODEL, "ema."), **specs(MODEL, "model."), **other}) == ["model", "ema"]
    assert names({**specs(MODEL, "teacher.net."), **other}) == ["teacher.net"]
    assert names(specs(MODEL, "params_ema.")) == ["params_ema"]
    assert names(other) == []


def test_the_complete_file_comes_first() -> None:
    """A file whose own names fit needs no root, whatever copies it has beside them."""
    assert names({**specs(MODEL, "copy."), **specs(MODEL)}) == ["", "copy"]


def test_names_are_those_that_rules_see() -> None:
    """Prefixes of wrappers are no part of a root, wherever they stand."""
    for before in ("model.module.", "module.model.", "module.model._orig_mod."):
        assert names({**specs(MODEL, before), **specs(MODEL, before.replace("model.", "model_ema."))}) == [
            "model",
            "model_ema",
        ]


def test_shapes_count_besides_names() -> None:
    """A head of other classes leaves a root the right one, and of two the one that fits in more shapes is taken."""
    changed = {**MODEL, "head.weight": (10, 4)}
    assert fitting_roots(specs(changed, "model."), specs(MODEL)) == [Root("model", 4, 3)]
    assert names({**specs(changed, "old."), **specs(MODEL, "new.")}) == ["new"]
    wide = {name: (*shape, 2) for name, shape in MODEL.items()}
    assert names(specs(wide, "model.")) == []


def test_a_root_leaves_out_nothing_that_the_model_needs() -> None:
    """An encoder below a prefix is no root if the head lies beside it; less than half of a model is none either."""
    file = {**specs({name: MODEL[name] for name in list(MODEL)[:3]}, "encoder."), **specs({"head.weight": (2, 4)})}
    assert names(file) == []
    assert names(specs({"head.weight": (2, 4)}, "model.")) == []
    # the norm of a block is not the norm of the model
    norms = {**MODEL, "norm.weight": (4,)}
    assert names({**specs(MODEL, "model."), **specs({"norm.weight": (4,)}, "model.blocks.0.")}, norms) == ["model"]


def test_what_is_similar_to_the_asked_name_comes_first() -> None:
    """Even an average of weights."""
    file = {**specs(MODEL, "model."), **specs(MODEL, "model_ema.")}
    assert names(file, asked="modelema") == ["model_ema", "model"]
    assert names(file, asked="modle") == ["model", "model_ema"]
    similar, counts = present_roots(file, "model_ema.block")
    assert similar[0] == "model_ema.blocks"
    assert counts == {"model": 4, "model_ema": 4}


def test_many_parts_that_fit_name_none() -> None:
    """A model of one layer fits every layer of the file."""
    file = {**specs({f"layers.{number}.weight": (4, 4) for number in range(5)})}
    assert names(file, {"weight": (4, 4)}) == []


@pytest.mark.parametrize("name", ["a." * 5_000 + "stem.weight", "x" * 100_000 + ".stem.weight", "..stem.weight", "<a>"])
def test_strange_names_are_no_roots(name: str) -> None:
    """Neither deep, nor long ones, nor those that no config can write."""
    assert names({name: TargetSpec((4, 3), "float32", 0)}, {"stem.weight": (4, 3)}) == []
    assert present_roots([name], name[:50])[0] == []
