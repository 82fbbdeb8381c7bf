"""What a message about a model advises is called here, and leads on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.advice import executes
from support.following import advised

from noether_init_core import InitializerStack, bind, compose
from noether_init_core.models import check_model


def module_and_parts() -> dict[str, Any]:
    """What the advised expressions speak of."""
    module = torch.nn.Linear(3, 2)
    return {"bind": bind, "compose": compose, "torch": torch, "module": module}


def called(expression: str) -> Any:
    """The value of an advised expression, with values of a user in place of the dots."""
    for dots, value in (
        ('name="..."', 'name="net"'),
        ("bind(...)", 'bind(module, "encoder")'),
        ("module, ..., ", 'module, "net", '),
        ("optimizer=...", "optimizer=torch.optim.SGD(module.parameters())"),
    ):
        expression = expression.replace(dots, value)
    assert "..." not in expression
    return eval(expression, module_and_parts())


@executes("models.py", 'Next: bind(module, name="...")', 'bind(module, name="{}", optimizer=...)')
@executes("models.py", 'compose({}, {"encoder": bind(...)})', "optimizer=torch.optim.AdamW(module.parameters()))")
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("bind(module)", 'bind(module, name="...")'),
        ("compose('net', {})", "compose('net', {\"encoder\": bind(...)})"),
        ("compose('net', {'encoder': module})", 'bind(module, name="encoder", optimizer=...)'),
        (
            "bind(module, 'net', torch.optim.AdamW)",
            "bind(module, ..., optimizer=torch.optim.AdamW(module.parameters()))",
        ),
        ("bind(module, 'net', 'adamw')", "bind(module, ..., optimizer=torch.optim.AdamW(module.parameters()))"),
    ],
)
def test_the_advised_call_makes_a_model(wrong: str, expected: str) -> None:
    """In place of the wrong one; a submodel is put back into its composite."""
    said = advised(lambda: eval(wrong, module_and_parts()))
    assert said == expected
    model = called(said)
    if wrong.startswith("compose('net', {'encoder'"):
        model = compose("net", {"encoder": model})
    check_model(model)
    InitializerStack.from_config([]).initialize(model)


@executes("models.py", 'bind(module, name="...", optimizer=...), or compose(name, {...}) for submodels')
def test_a_module_is_bound_or_composed_as_advised() -> None:
    """A stack takes both."""
    stack = InitializerStack.from_config([])
    module = torch.nn.Linear(3, 2)
    said = advised(lambda: stack.initialize(module))
    first, _, second = said.partition(", or ")
    stack.initialize(called(first))
    written = second.partition(" for submodels")[0].replace("name, {...}", '"net", {"encoder": bind(...)}')
    stack.initialize(called(written))


@executes("models.py", "build the optimizer from module.parameters(), after the module was moved")
@pytest.mark.parametrize("change", ["other module", "replaced parameter", "moved"])
def test_an_optimizer_is_built_again_as_advised(change: str) -> None:
    """From the parameters that the module has now."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    if change == "other module":
        module = torch.nn.Linear(3, 2)
    elif change == "moved":
        module.to_empty(device="meta")
    else:
        module.weight = torch.nn.Parameter(torch.zeros(2, 3))
    said = advised(lambda: bind(module, "net", optimizer))
    assert said.startswith("build the optimizer from module.parameters(), after the module was moved")
    assert bind(module, "net", torch.optim.AdamW(module.parameters())).optimizer is not None
