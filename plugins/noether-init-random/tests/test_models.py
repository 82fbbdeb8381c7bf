"""Which parameters are written: in place, tied ones once, in models of every shape; everything else stays."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

from noether_init_core import ConfigError, InitializerStack, PlanError, bind, compose
from noether_init_random import seed_of

ONES = {"match": "**", "init": "ones_"}
NORMAL = {"match": "**", "init": "normal_"}


class Net(torch.nn.Module):
    """Matrices, vectors, a scalar; buffers of numbers and of counts; a parameter of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        self.head = torch.nn.Linear(4, 2)
        self.scale = torch.nn.Parameter(torch.tensor(5.0))
        self.codes = torch.nn.Parameter(torch.arange(3), requires_grad=False)


def start(model: Any, *rules: dict[str, Any], **fields: Any) -> Any:
    """Initialize the model; the report."""
    return InitializerStack.from_config([{"kind": "random", "rules": list(rules), **fields}]).initialize(model)


def drawn(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """What ``normal_`` draws for the parameter ``name``."""
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed_of(seed, name)))


def versions(module: torch.nn.Module) -> dict[str, int]:
    """How often each tensor has been written to, the same values included."""
    return {name: one._version for name, one in [*module.named_parameters(), *module.named_buffers()]}


def test_parameters_are_written_in_place() -> None:
    """The same objects, with their dtype, device, flags and memory, and new values."""
    module = Net()
    before = {name: (one, one.data_ptr(), one.dtype, one.requires_grad) for name, one in module.named_parameters()}
    start(bind(module, name="net"), NORMAL)
    after = dict(module.named_parameters())
    assert before == {name: (one, one.data_ptr(), one.dtype, one.requires_grad) for name, one in after.items()}
    assert torch.equal(after["encoder.0.weight"], drawn("encoder.0.weight", 4, 3, 3, 3))
    assert torch.equal(after["scale"], drawn("scale"))


def test_buffers_and_whole_numbers_are_never_touched() -> None:
    """Not even where the glob of a rule would match their names."""
    module = Net()
    kept = {"codes", "encoder.1.running_mean", "encoder.1.running_var", "encoder.1.num_batches_tracked"}
    before, values = versions(module), {name: one.clone() for name, one in module.state_dict().items()}
    start(bind(module, name="net"), NORMAL)
    after = versions(module)
    assert {name for name in before if after[name] == before[name]} == kept
    assert all(torch.equal(module.state_dict()[name], values[name]) for name in kept)
    with pytest.raises(
        PlanError, match=r"rules.0: codes matches no parameter, apart from those of earlier rules. Near:"
    ):
        start(bind(module, name="net"), {"match": "codes", "init": "ones_"})


def test_a_tied_parameter_is_drawn_once_under_its_first_name() -> None:
    """The rule of the other name does not count, and the parameter stays one."""
    module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    module["head"].weight = module["embed"].weight
    version = module["embed"].weight._version
    report = start(bind(module, name="net"), NORMAL)
    assert module["head"].weight is module["embed"].weight
    assert torch.equal(module["head"].weight, drawn("embed.weight", 5, 3))
    assert module["embed"].weight._version == version + 1
    assert report.initializers[0].restored == ("1 drawn with seed 0",)
    with pytest.raises(
        PlanError, match=r"head.weight matches no parameter, apart from those of earlier rules. Near: embed.weight"
    ):
        start(bind(module, name="net"), {"match": "head.weight", "init": "ones_"})


def test_a_parameter_of_two_submodels_is_drawn_under_its_name_in_the_first() -> None:
    """Ties across submodels of a composite are ties, too."""
    encoder, decoder = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
    decoder.weight = encoder.weight
    model = compose("pair", {"encoder": bind(encoder, "encoder"), "decoder": bind(decoder, "decoder")})
    report = start(model, NORMAL)
    assert torch.equal(decoder.weight, drawn("encoder.weight", 3, 3))
    assert report.initializers[0].restored == ("1 drawn with seed 0",)


def test_frozen_parameters_are_drawn_and_stay_frozen() -> None:
    """A frozen feature extractor may be random."""
    module = Net().requires_grad_(False)
    start(bind(module, name="net", is_frozen=True), ONES)
    assert torch.equal(module.head.weight, torch.ones(2, 4))
    assert not any(one.requires_grad for one in module.parameters())


def test_names_of_composites_begin_with_the_path_below_them() -> None:
    """Nested ones as well; a submodel that is None has none, and the name of the whole is no part of them."""
    stem, norm, head = torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 1)
    inner = compose("inner.v2", {"stem": bind(stem, "stem"), "norm": bind(norm, "norm"), "extra": None})
    model = compose("a.b", {"encoder": inner, "decoder": bind(head, "head")})
    start(
        model,
        {"match": "encoder.stem.weight", "init": "normal_"},
        {"match": "encoder.**.weight", "init": "constant_", "val": 3},
        {"match": "decoder.", "init": "zeros_"},
        {"match": "**.bias", "init": "ones_"},
    )
    assert torch.equal(stem.weight, drawn("encoder.stem.weight", 2, 2))
    assert norm.weight.tolist() == [3.0, 3.0]
    assert (head.weight.tolist(), head.bias.tolist()) == ([[0.0, 0.0]], [0.0])
    assert (stem.bias.tolist(), norm.bias.tolist()) == ([1.0, 1.0], [1.0, 1.0])


def test_the_optimizer_keeps_its_state() -> None:
    """Its parameters have new values; its moments and steps are its own."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    start(bind(module, name="net", optimizer=optimizer), ONES)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert {name: torch.equal(value, after["state"][index][name]) for name, value in state.items()} == {
            "step": True,
            "exp_avg": True,
            "exp_avg_sq": True,
        }


def test_leftovers_keep_their_values_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """In the report the first eight, in the log all; the numbers of the report count parameters."""
    module = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(5)))
    before = {name: one.clone() for name, one in module.named_parameters()}
    with caplog.at_level(logging.INFO, logger="noether_init_random"):
        report = start(bind(module, name="net"), {"match": "0.*", "init": "ones_"}, seed=7)
    left = ["1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias", "4.weight", "4.bias"]
    assert str(report) == (
        "start E0_U0_S0\nrandom: no files (2 drawn with seed 7; not changed: " + ", ".join(left) + ")"
    )
    assert caplog.messages == ["random: 2 drawn with seed 7; not changed: " + ", ".join(left)]
    assert all(torch.equal(before[name], one) for name, one in module.named_parameters() if name in left)
    assert module[0].weight.item() == 1.0
    module.append(torch.nn.Linear(1, 1))
    report = start(bind(module, name="net"), {"match": "0.*", "init": "ones_"}, seed=7)
    assert str(report).endswith("4.weight, 4.bias, and 2 more)")


def test_leftovers_can_be_an_error() -> None:
    """Every one is named, and nothing has changed."""
    module = torch.nn.Linear(3, 2)
    before = versions(module)
    with pytest.raises(PlanError, match=r"no rule matches bias \(on_leftover: error\)"):
        start(bind(module, name="net"), {"match": "weight", "init": "ones_"}, on_leftover="error")
    assert versions(module) == before
    start(bind(module, name="net"), ONES, on_leftover="error")
    assert module.bias.tolist() == [1.0, 1.0]


def test_a_fresh_head_on_weights_from_a_file(tmp_path: Any) -> None:
    """Beside a kind of the core: what that one leaves to the model, this one draws."""
    saved, module = torch.nn.Linear(3, 3), torch.nn.ModuleDict()
    torch.save({"body.weight": saved.weight, "body.bias": saved.bias}, tmp_path / "body.pt")
    module["body"], module["head"] = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
    report = InitializerStack.from_config(
        [
            {"kind": "file", "path": str(tmp_path / "body.pt"), "transforms": [{"keep_model": "head."}]},
            {"kind": "random", "rules": [{"match": "head.*", "init": "normal_"}]},
        ]
    ).initialize(bind(module, name="net"))
    assert torch.equal(module["body"].weight, saved.weight)
    assert torch.equal(module["head"].weight, drawn("head.weight", 2, 3))
    assert report.fresh_parameters() == ("head.weight", "head.bias")
    assert [one.kind for one in report.initializers] == ["file", "random"]
    assert report.initializers[1].restored[1] == "not changed: body.weight, body.bias"


def refused(module: torch.nn.Module, message: str) -> None:
    """Every way in refuses the module with an error that says ``message``, and writes to nothing."""
    before = versions(module)
    for hook in ("check", "init_weights"):
        (initializer,) = InitializerStack.from_config([{"kind": "random", "rules": [NORMAL]}]).initializers
        with pytest.raises(PlanError, match=message) as caught:
            getattr(initializer, hook)(bind(module, name="net"))
        assert str(caught.value).endswith("\nNothing was changed.")
    assert versions(module) == before


def test_a_model_on_the_meta_device_is_told_how_it_gets_memory() -> None:
    """Also one of which only the last tensor is there; after to_empty it works."""
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    refused(module, r"normal_ cannot draw weight: it has no memory\. Next: module\.to_empty\(device='cpu'\)")
    module.to_empty(device="cpu")
    start(bind(module, name="net"), NORMAL)
    assert torch.equal(module.weight, drawn("weight", 2, 3))
    partly = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, device="meta"))
    refused(partly, r"normal_ cannot draw 1\.bias: it has no memory")


def test_a_lazy_module_is_told_to_see_a_batch() -> None:
    """Its parameters have no shape before."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LazyLinear(2))
    with pytest.raises(PlanError, match=r"cannot draw 1\.weight: it has no memory\. .*pass one batch through it"):
        start(bind(module, name="net"), ONES)
    assert not torch.equal(module[0].weight, torch.ones(3, 3))


def test_parameters_of_inference_mode_are_refused_beforehand() -> None:
    """Torch itself would refuse them only when others had been written."""
    with torch.inference_mode():
        module = torch.nn.Linear(3, 2)
    with pytest.raises(PlanError, match="it is sharded, quantized or an inference tensor"):
        start(bind(module, name="net"), ONES)


def test_sharded_parameters_are_refused_beforehand() -> None:
    """A DTensor, as fully_shard makes it, on a mesh of one process."""
    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        module = torch.nn.Linear(3, 2)
        mesh = init_device_mesh("cpu", (1,))
        module.bias = torch.nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Shard(0)]))
        before = module.weight.clone()
        with pytest.raises(PlanError, match="cannot draw bias: it is sharded, quantized or an inference tensor"):
            start(bind(module, name="net"), ONES)
        assert torch.equal(module.weight, before)
    finally:
        torch.distributed.destroy_process_group()


def test_a_plain_module_is_told_to_be_bound() -> None:
    """The hook called alone on what is no model."""
    (initializer,) = InitializerStack.from_config([{"kind": "random", "rules": [ONES]}]).initializers
    with pytest.raises(ConfigError, match=r"a Linear is not a model.*Next: bind\(module"):
        initializer.init_weights(torch.nn.Linear(1, 1))
