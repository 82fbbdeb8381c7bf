"""What is wrong with a config is said at its place; what does not fit the model is said before anything changes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import (
    ConfigError,
    ConfigFileError,
    InitializerStack,
    PartlyInitializedError,
    PlanError,
    bind,
    kinds,
)
from noether_init_random import FUNCTIONS, RandomConfig, RandomInitializer

WEIGHT = {"match": "weight"}


def stack(*rules: dict[str, Any], **fields: Any) -> InitializerStack:
    """A stack with this kind alone."""
    return InitializerStack.from_config([{"kind": "random", "rules": list(rules), **fields}])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {**WEIGHT, "init": "nromal_"},
            "rules.0: unknown function 'nromal_'; known are constant_, dirac_, eye_, kaiming_normal_, ",
        ),
        ({**WEIGHT, "init": "normal"}, "rules.0: unknown function 'normal'; known are "),
        ({**WEIGHT, "init": "_no_grad_zero_"}, "rules.0: unknown function '_no_grad_zero_'; known are "),
        ({**WEIGHT, "init": "sparse_", "sparsity": 0.5}, "rules.0: unknown function 'sparse_'; known are "),
        ({**WEIGHT, "init": "torch.nn.init.ones_"}, "rules.0: unknown function 'torch.nn.init.ones_'; known are "),
        ({**WEIGHT, "init": "os.system"}, "rules.0: unknown function 'os.system'; known are "),
        (WEIGHT, "rules.0.init: is missing"),
        ({"init": "ones_"}, "rules.0.match: is missing"),
        ({"match": "", "init": "ones_"}, "rules.0: is empty; a name or a glob was expected"),
        ({"match": "a..b", "init": "ones_"}, "rules.0: 'a..b' has an empty segment"),
        ({"match": "a**", "init": "ones_"}, "rules.0: 'a**': ** matches whole segments"),
        ({**WEIGHT, "init": "ones_", "std": 1}, "rules.0: unknown argument std of ones_; it takes no arguments"),
        ({**WEIGHT, "init": "normal_", "sdt": 1}, "rules.0: unknown argument sdt of normal_; it takes mean, std"),
        (
            {**WEIGHT, "init": "normal_", "generator": 1},
            "rules.0: unknown argument generator of normal_; it takes mean, std",
        ),
        (
            {**WEIGHT, "init": "normal_", "tensor": [1]},
            "rules.0: unknown argument tensor of normal_; it takes mean, std",
        ),
        ({**WEIGHT, "init": "normal_", "std": "wide"}, "rules.0.std: Input should be a valid number"),
        ({**WEIGHT, "init": "normal_", "std": "nan"}, "rules.0.std: Input should be a finite number"),
        ({**WEIGHT, "init": "dirac_", "groups": 1.5}, "rules.0.groups: Input should be a valid integer"),
        ({**WEIGHT, "init": "constant_"}, "rules.0.val: is missing"),
        (
            {**WEIGHT, "init": "kaiming_normal_", "mode": "fan_on"},
            "rules.0.mode: Input should be 'fan_in' or 'fan_out'",
        ),
        (
            {**WEIGHT, "init": "kaiming_normal_", "nonlinearity": "relo"},
            "rules.0.nonlinearity: Input should be 'linear'",
        ),
        ("weight", "rules.0: Input should be"),
    ],
)
def test_a_wrong_rule_is_refused_with_the_config(rule: Any, message: str) -> None:
    """Before there is a model; the message begins with the place."""
    with pytest.raises(ConfigError, match=re.escape(f"initializers.0.{message}")):
        stack(rule)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rules": []}, "rules: List should have at least 1 item"),
        ({"seed": "seven"}, "seed: Input should be a valid integer"),
        ({"on_leftover": "reset"}, "on_leftover: Input should be 'keep' or 'error'"),
        ({"sed": 1}, "sed: unknown key. Near: seed"),
    ],
)
def test_a_wrong_field_is_refused_with_the_config(fields: dict[str, Any], message: str) -> None:
    """Unknown keys, and values of another type."""
    config = {"kind": "random", "rules": [{"match": "weight", "init": "ones_"}], **fields}
    with pytest.raises(ConfigError, match=re.escape(f"initializers.0.{message}")):
        InitializerStack.from_config([config])


def test_errors_of_a_file_say_the_line(tmp_path: Path) -> None:
    """Of the argument that is wrong, or of the rule that has one too many."""
    path = tmp_path / "init.yaml"
    path.write_text(
        "initializers:\n"
        "  - kind: random\n"
        "    rules:\n"
        "      - {match: '**.weight', init: normal_, sdt: 1}\n"
        "      - match: '**.bias'\n"
        "        init: uniform_\n"
        "        a: low\n"
    )
    with pytest.raises(ConfigFileError) as caught:
        InitializerStack.from_file(path)
    assert str(caught.value).splitlines() == [
        "init.yaml:4 initializers.0.rules.0: unknown argument sdt of normal_; it takes mean, std",
        "init.yaml:7 initializers.0.rules.1.a: Input should be a valid number, unable to parse string as a number",
    ]


def test_scalars_of_a_file_get_the_types_of_the_signature(tmp_path: Path) -> None:
    """YAML scalars arrive as text; numbers become numbers, words stay words."""
    path = tmp_path / "init.yaml"
    path.write_text(
        "initializers:\n"
        "  - kind: random\n"
        "    seed: 12\n"
        "    rules:\n"
        "      - {match: weight, init: kaiming_normal_, a: .5, mode: fan_out}\n"
        "      - {match: bias, init: constant_, val: 1e-3}\n"
    )
    module = torch.nn.Linear(3, 2)
    (initializer,) = InitializerStack.from_file(path).initializers
    initializer.init_weights(bind(module, name="net"))
    again = RandomInitializer(
        RandomConfig(
            kind="random",
            seed=12,
            rules=[
                {"match": "weight", "init": "kaiming_normal_", "a": 0.5, "mode": "fan_out"},
                {"match": "bias", "init": "constant_", "val": 0.001},
            ],
        )
    )
    other = torch.nn.Linear(3, 2)
    again.init_weights(bind(other, name="net"))
    assert torch.equal(module.weight, other.weight)
    assert module.bias.tolist() == pytest.approx([0.001, 0.001])


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"init": "kaiming_normal_"}, "kaiming_normal_ cannot draw last: Fan in and fan out can not be computed"),
        ({"init": "xavier_uniform_"}, "xavier_uniform_ cannot draw last: Fan in and fan out can not be computed"),
        ({"init": "orthogonal_"}, "orthogonal_ cannot draw last: Only tensors with 2 or more dimensions"),
        ({"init": "eye_"}, "eye_ cannot draw last: Only tensors with 2 dimensions"),
        ({"init": "dirac_"}, "dirac_ cannot draw last: Only tensors with 3, 4, or 5 dimensions"),
        ({"init": "normal_", "std": -1}, "normal_ cannot draw last: normal expects std >= 0.0"),
        ({"init": "uniform_", "a": 1, "b": 0}, "uniform_ cannot draw last: uniform_ expects to return a [from, to)"),
        ({"init": "trunc_normal_", "std": 0}, "trunc_normal_ cannot draw last: float division by zero"),
        ({"init": "constant_", "val": 1e6}, "constant_ cannot draw last: torch.float16 cannot hold the values"),
        (
            {"init": "ones_", "match": "lest"},
            "lest matches no parameter, apart from those of earlier rules. Near: last",
        ),
        (
            {"init": "ones_", "match": "first"},
            "first matches no parameter, apart from those of earlier rules. Near: first",
        ),
    ],
)
@pytest.mark.parametrize("hook", ["initialize", "check", "init_weights"])
def test_what_does_not_fit_the_model_is_found_before_anything_changes(
    rule: dict[str, Any], problem: str, hook: str
) -> None:
    """Although the rule before it could be carried out; not even a version counter has moved."""
    module = torch.nn.Module()
    module.first = torch.nn.Parameter(torch.zeros(3, 3))
    module.last = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    asked = stack({"match": "first", "init": "ones_"}, {"match": "last", **rule})
    owner = asked if hook == "initialize" else asked.initializers[0]
    with pytest.raises(PlanError) as caught:
        getattr(owner, hook)(bind(module, name="net"))
    assert caught.value.problems[0].startswith(f"rules.1: {problem}")
    assert str(caught.value) == f"random:\n  {caught.value.problems[0]}\nNothing was changed."
    assert [(one.sum().item(), one._version) for one in module.parameters()] == [(0.0, 0), (0.0, 0)]


def test_groups_that_do_not_divide_a_kernel_are_found_beforehand() -> None:
    """The one refusal that depends on a size."""
    kernel = torch.nn.Conv2d(3, 4, 3, bias=False)
    fitting = stack({**WEIGHT, "init": "dirac_", "groups": 2})
    fitting.initialize(bind(kernel, name="net"))
    assert kernel.weight.sum() == 4
    with pytest.raises(PlanError, match="dirac_ cannot draw weight: dim 0 must be divisible by groups"):
        stack({**WEIGHT, "init": "dirac_", "groups": 3}).initialize(bind(kernel, name="net"))


def test_all_problems_are_told_at_once() -> None:
    """The first eight in the message, all of them on the exception."""
    module = torch.nn.Sequential(*(torch.nn.LayerNorm(2) for _ in range(5)))
    asked = stack({"match": "**", "init": "xavier_normal_"}, {"match": "head", "init": "ones_"})
    with pytest.raises(PlanError) as caught:
        asked.initialize(bind(module, name="net"))
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1].startswith(
        "rules.1: head matches no parameter, apart from those of earlier rules. Near: 0.weight"
    )
    assert str(caught.value).splitlines()[-2:] == ["  and 3 more", "Nothing was changed."]


def test_a_model_without_parameters_has_nothing_to_draw() -> None:
    """A rule that can match nothing is an error there, too."""
    with pytest.raises(
        PlanError, match=r"rules\.0: \* matches no parameter, apart from those of earlier rules. Near: no parameters"
    ):
        stack({"match": "*", "init": "ones_"}).initialize(bind(torch.nn.Identity(), name="net"))


def test_the_schema_says_what_a_rule_may_name() -> None:
    """For editors: the functions are a closed list; further keys of a rule are allowed, of the config not."""
    schema = json.loads(json.dumps(kinds.resolve("random").config_class.model_json_schema()))
    rule = schema["$defs"]["Rule"]
    assert rule["properties"]["init"]["enum"] == list(FUNCTIONS)
    assert (rule["additionalProperties"], schema["additionalProperties"]) == (True, False)
    # the core describes ``kind``, which every config has
    own = {name: field for name, field in schema["properties"].items() if name != "kind"}
    described = [*own.values(), *rule["properties"].values()]
    assert all(field["description"] for field in described)


def test_a_config_survives_being_dumped_and_validated_again() -> None:
    """As a sweep does that keeps configs as JSON."""
    (initializer,) = stack({**WEIGHT, "init": "normal_", "std": 0.5}, seed=3).initializers
    again = RandomConfig.model_validate_json(initializer.config.model_dump_json())
    assert again == initializer.config
    assert again.rules[0].model_extra == {"std": 0.5}


def test_values_that_a_narrow_dtype_cannot_hold_change_nothing() -> None:
    """The small trial of ``check`` does not draw the rare large ones; they are found before the first one changes."""
    module = torch.nn.Linear(1000, 1000).half()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    config = {
        "kind": "random",
        "rules": [{"match": "bias", "init": "ones_"}, {"match": "weight", "init": "normal_", "std": 14000}],
    }
    with pytest.raises(PartlyInitializedError, match=r"torch\.float16 cannot hold the values of normal_ for weight"):
        InitializerStack.from_config([config]).initialize(bind(module, "net"))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_parameters_whose_elements_share_memory_are_refused_beforehand() -> None:
    """Writing into them fails in the middle."""
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.zeros(3, 3))
    module.b = torch.nn.Parameter(torch.ones(1, 3).expand(4, 3))
    with pytest.raises(PlanError, match="several of its elements share memory"):
        InitializerStack.from_config([{"kind": "random", "rules": [{"match": "**", "init": "normal_"}]}]).initialize(
            bind(module, "net")
        )
    assert not module.a.any()
