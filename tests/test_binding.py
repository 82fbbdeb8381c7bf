"""bind and compose: plain modules as models."""

from __future__ import annotations

import copy

import pytest
import torch

from noether_init_core.errors import ConfigError, InvalidNameError
from noether_init_core.models import BoundModel, CompositeModelLike, ModelLike, bind, compose, leaf_models


class Named(torch.nn.Linear):
    """A module that has everything a model needs by itself."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.name = "own"
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.is_frozen = True
        self.device = torch.device("meta")


def test_view_is_a_model_with_the_modules_own_keys() -> None:
    """A bound module satisfies the protocol, and its keys carry no prefix."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model = bind(module, name="net")
    assert isinstance(model, ModelLike)
    assert not isinstance(model, CompositeModelLike)
    assert list(model.state_dict()) == list(module.state_dict())
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert model.state_dict(keep_vars=True)["0.weight"] is module[0].weight


def test_everything_else_is_the_modules() -> None:
    """Methods and attributes that a view has not are looked up in the module, and calling it runs the module."""
    module = torch.nn.Linear(2, 2)
    model = bind(module, name="net")
    other = torch.nn.Linear(2, 2).state_dict()
    model.load_state_dict(other)
    assert torch.equal(module.weight, other["weight"])
    assert list(model.modules()) == [module]
    assert model.in_features == 2
    assert torch.equal(model(torch.ones(1, 2)), module(torch.ones(1, 2)))
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018  # the access is what is tested


def test_defaults_follow_the_module() -> None:
    """Frozen means that no parameter requires a gradient, and the device is that of the first parameter, each now."""
    module = torch.nn.Linear(2, 2)
    model = bind(module, name="net")
    assert (model.optimizer, model.is_frozen, model.device) == (None, False, torch.device("cpu"))
    module.requires_grad_(False)
    assert model.is_frozen
    module.to("meta")
    assert model.device == torch.device("meta")


def test_attributes_of_the_module_are_taken() -> None:
    """A module that has a name, an optimizer and the rest needs no arguments."""
    module = Named()
    model = bind(module)
    assert (model.name, model.is_frozen, model.device) == ("own", True, torch.device("meta"))
    assert model.optimizer is module.optimizer


def test_arguments_beat_attributes() -> None:
    """What is given to bind wins over the module's own."""
    module = Named()
    optimizer = torch.optim.SGD([module.weight], lr=1.0)
    model = bind(module, name="other", optimizer=optimizer, is_frozen=False, device="cpu")
    assert (model.name, model.is_frozen, model.device) == ("other", False, torch.device("cpu"))
    assert model.optimizer is optimizer


def test_submodules_called_name_or_device_are_no_attributes() -> None:
    """A child module that happens to be called optimizer, device or is_frozen is a child, nothing more."""
    module = torch.nn.ModuleDict({"optimizer": torch.nn.Linear(1, 1), "device": torch.nn.Linear(1, 1)})
    model = bind(module, name="net")
    assert model.optimizer is None
    assert model.device == torch.device("cpu")


def test_a_name_is_needed() -> None:
    """Without a name anywhere the error says how to give one."""
    with pytest.raises(ConfigError, match=r"a Linear has no name.*bind\(module, name="):
        bind(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a=b", "mlp_ema=0.9", "x" * 300, "a\0b", "C:net"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    """A name becomes part of a file name, so that separators, dots in front and '=' are refused."""
    with pytest.raises(InvalidNameError):
        bind(torch.nn.Linear(1, 1), name=name)


def test_only_modules_are_bound() -> None:
    """A state dict or a class is refused by its type."""
    with pytest.raises(ConfigError, match="not a dict"):
        bind({}, name="net")  # type: ignore[arg-type]  # the mistake that is tested
    with pytest.raises(ConfigError, match="not the class Linear"):
        bind(torch.nn.Linear, name="net")  # type: ignore[arg-type]  # the mistake that is tested


@pytest.mark.parametrize("optimizer", [3, {}, torch.optim.AdamW, lambda parameters: parameters])
def test_an_optimizer_without_state_is_refused(optimizer: object) -> None:
    """A number, a class that was not called, a function that would make one."""
    with pytest.raises(
        ConfigError, match=r"the optimizer of net is .*, not an optimizer with a state_dict\(\)\. Next: bind\(module"
    ):
        bind(torch.nn.Linear(1, 1), name="net", optimizer=optimizer)


def test_an_optimizer_of_another_module_is_refused() -> None:
    """Also if only some of its parameters are another's; one over a part of the module is fine."""
    module, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    for parameters, first in (([*other.parameters()], 0), ([module.weight, other.bias], 1)):
        message = rf"the optimizer of net holds .* do not belong to the module.*number {first} with"
        with pytest.raises(ConfigError, match=message):
            bind(module, name="net", optimizer=torch.optim.SGD(parameters, lr=0.1))
    part = torch.optim.SGD([module.bias], lr=0.1)
    assert bind(module, name="net", optimizer=part).optimizer is part


class Wrapper:
    """Like Noether's: the optimizer is inside, and built later; or it says the names of its parameters."""

    def __init__(self, torch_optim: object = None, param_idx_to_name: object = None) -> None:
        self.torch_optim, self.param_idx_to_name = torch_optim, param_idx_to_name

    def state_dict(self) -> dict[str, object]:
        """Nothing yet."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Nothing."""


def test_an_optimizer_in_a_wrapper_is_looked_at_where_it_can_be() -> None:
    """One that is not built yet, or that says its names, passes; a wrapped one of another module does not."""
    module, strange = torch.nn.Linear(2, 3), torch.optim.SGD(torch.nn.Linear(2, 3).parameters(), lr=0.1)
    for wrapper in (Wrapper(), Wrapper(strange, {0: "weight", 1: "bias"})):
        assert bind(module, name="net", optimizer=wrapper).optimizer is wrapper
    with pytest.raises(ConfigError, match="holds 2 parameters that do not belong to the module"):
        bind(module, name="net", optimizer=Wrapper(strange))


def test_views_can_be_copied() -> None:
    """A deep copy has its own module."""
    model = bind(torch.nn.Linear(1, 1), name="net")
    other = copy.deepcopy(model)
    assert other.name == "net"
    assert other.module is not model.module
    assert torch.equal(other.weight, model.weight)


def test_half_built_views_and_special_methods_are_not_the_modules() -> None:
    """A view without its module has no attributes, and copying one does not copy the module in its place."""
    with pytest.raises(AttributeError, match="module"):
        BoundModel.__new__(BoundModel).weight  # noqa: B018  # the access is what is tested

    class Copying(torch.nn.Linear):
        def __deepcopy__(self, memo: dict[int, object]) -> Copying:
            return Copying(1, 1)

    assert copy.deepcopy(bind(Copying(1, 1), name="net")).name == "net"


def test_composites_nest_and_leave_out_what_is_none() -> None:
    """A composite's single models are found under their path of names, in declared order."""
    encoder, stem = bind(torch.nn.Linear(1, 1), name="enc"), bind(torch.nn.Linear(1, 1), name="stem")
    model = compose("autoenc", {"encoder": encoder, "decoder": None, "rest": compose("rest", {"stem": stem})})
    assert isinstance(model, CompositeModelLike)
    assert list(leaf_models(model)) == [("autoenc.encoder", encoder), ("autoenc.rest.stem", stem)]
    with pytest.raises(TypeError):
        model.submodels["other"] = encoder  # it is read-only


@pytest.mark.parametrize(
    ("name", "submodels", "message"),
    [
        ("net", {}, "no submodels"),
        ("net", {"encoder": torch.nn.Linear(1, 1)}, r"'encoder' of 'net' is a Linear.*bind\("),
        ("a=b", {"encoder": None}, "holds '='"),
        ("net", {"a=b": None}, "holds '='"),
        ("net", {"a.b": None}, "holds a dot"),
        ("net", {"../b": None}, "separator"),
    ],
)
def test_composites_of_something_else_are_refused(name: str, submodels: dict[str, object], message: str) -> None:
    """A plain module, an empty composite and names that are no names each get their own message."""
    with pytest.raises(ConfigError, match=message):
        compose(name, submodels)
