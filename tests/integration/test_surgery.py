"""Real surgeries, by config alone, against the truth; where they have an inverse also one step of AdamW later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    PlanError,
    TrainingIteration,
    bind,
)

Build = Callable[[], torch.nn.Module]
ITERATION = TrainingIteration(1, 3, 12)


def inputs(features: int) -> torch.Tensor:
    return torch.randn(4, 6, features, generator=torch.Generator().manual_seed(7))


def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> torch.Tensor:
    """One training step; returns the loss."""
    optimizer.zero_grad()
    loss = (module(batch) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def trained(build: Build, batch: torch.Tensor, seed: int = 0) -> tuple[Any, torch.optim.Optimizer]:
    """A module after three steps of AdamW."""
    torch.manual_seed(seed)
    module = build()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for _ in range(3):
        step(module, optimizer, batch)
    return module, optimizer


def operated(
    folder: Path, module: torch.nn.Module, optimizer: Any, build: Build, config: Mapping[str, Any]
) -> tuple[Any, torch.optim.Optimizer]:
    """Save ``module``, and start a fresh module of another kind from it by ``config``."""
    CheckpointWriter(PathProvider(folder, "before")).save(bind(module, name="net", optimizer=optimizer), ITERATION)
    torch.manual_seed(99)
    fresh = build()
    its = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    stack = InitializerStack.from_config(
        [{"kind": "previous_run", "run_id": "before", "load_optim": True, **config}],
        path_provider=PathProvider(folder, "after"),
    )
    stack.initialize(bind(fresh, name="net", optimizer=its))
    return fresh, its


class Fused(torch.nn.Module):
    """Attention with one projection for queries, keys and values."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.out(functional.scaled_dot_product_attention(*self.qkv(batch).chunk(3, -1)))


class Separate(torch.nn.Module):
    """The same with three projections."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(width, width) for _ in range(3))
        self.out = torch.nn.Linear(width, width)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.out(functional.scaled_dot_product_attention(self.q(batch), self.k(batch), self.v(batch)))


FUSE = {"transforms": [{"from": ["<x>.q.<leaf>", "<x>.k.<leaf>", "<x>.v.<leaf>"], "to": "<x>.qkv.<leaf>",
                        "do": [{"concat": 0}]}]}  # fmt: skip
SPLIT = {"transforms": [{"from": "<x>.qkv.<leaf>", "to": ["<x>.q.<leaf>", "<x>.k.<leaf>", "<x>.v.<leaf>"],
                         "do": [{"split": 0}]}]}  # fmt: skip


def two(kind: type[torch.nn.Module]) -> Build:
    return lambda: torch.nn.Sequential(kind(), kind())


@pytest.mark.parametrize(
    ("before", "after", "config"), [(Fused, Separate, SPLIT), (Separate, Fused, FUSE)], ids=["split", "fuse"]
)
def test_fused_and_separate_projections_go_on_alike(
    tmp_path: Path, before: type[torch.nn.Module], after: type[torch.nn.Module], config: dict[str, Any]
) -> None:
    """Either way the function is the same, and so is the next step, moments and all."""
    batch = inputs(8)
    module, optimizer = trained(two(before), batch)
    fresh, its = operated(tmp_path, module, optimizer, two(after), config)
    torch.testing.assert_close(fresh(batch), module(batch))
    for _ in range(3):
        torch.testing.assert_close(step(fresh, its, batch), step(module, optimizer, batch))
    torch.testing.assert_close(fresh(batch), module(batch))
    fused, separate = (module, fresh) if before is Fused else (fresh, module)
    for block, parts in zip(fused.children(), separate.children(), strict=True):
        joined = torch.cat([parts.q.weight, parts.k.weight, parts.v.weight])
        torch.testing.assert_close(block.qkv.weight, joined)
    moments = its.state[next(iter(its.state))]
    assert {key: value.is_contiguous() for key, value in moments.items()} == dict.fromkeys(moments, True)


class Patches(torch.nn.Module):
    """What a vision transformer has before its blocks: patches, a class token, a position embedding."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, 12))
        self.pos_embed = torch.nn.Parameter(torch.randn(1, 1 + grid * grid, 12))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.cls_token.expand(len(batch), -1, -1), batch], 1) + self.pos_embed


def test_a_position_embedding_is_resampled(tmp_path: Path) -> None:
    """From 14 x 14 to 16 x 16: the class token's stays, the rest is what torch's bicubic interpolation makes."""
    batch = torch.randn(2, 196, 12)
    module, optimizer = trained(lambda: Patches(14), batch)
    rule = {"from": "pos_embed", "do": [{"interpolate": {"grid": [14, 14], "to_grid": [16, 16], "prefix_tokens": 1}}]}
    fresh, its = operated(tmp_path, module, optimizer, lambda: Patches(16), {"transforms": [rule]})
    old, new = module.pos_embed.detach(), fresh.pos_embed.detach()
    assert torch.equal(new[:, :1], old[:, :1])
    image = old[:, 1:].reshape(1, 14, 14, 12).permute(0, 3, 1, 2)
    truth = functional.interpolate(image, size=(16, 16), mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(new[:, 1:], truth.permute(0, 2, 3, 1).reshape(1, 256, 12))
    assert fresh.pos_embed not in its.state, "its moments belong to no value that is there now"
    assert torch.equal(its.state[fresh.cls_token]["exp_avg"], optimizer.state[module.cls_token]["exp_avg"])


def classifier(classes: int) -> Build:
    return lambda: torch.nn.ModuleDict(
        {"body": torch.nn.Linear(6, 8), "norm": torch.nn.LayerNorm(8), "head": torch.nn.Linear(8, classes)}
    )


class Classifier(torch.nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body, self.norm = torch.nn.Linear(6, 8), torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, classes)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(batch)).relu())


def test_a_fresh_head_begins_anew_and_the_body_goes_on(tmp_path: Path) -> None:
    """Without the rule the error shows the line to add; with it the body's step is that of an unsurgeried twin."""
    batch = inputs(6)
    module, optimizer = trained(lambda: Classifier(10), batch)
    with pytest.raises(PlanError) as caught:
        operated(tmp_path / "a", module, optimizer, lambda: Classifier(4), {"transforms": [{"from": "body."}]})
    assert "head.weight: file [10, 8], model [4, 8]; head.bias too." in str(caught.value)
    assert "- keep_model: head." in str(caught.value)
    torch.manual_seed(99)
    own = Classifier(4).head.weight.detach().clone()
    fresh, its = operated(
        tmp_path / "b", module, optimizer, lambda: Classifier(4), {"transforms": [{"keep_model": "head."}]}
    )
    assert torch.equal(fresh.head.weight, own)
    assert fresh.head.weight not in its.state
    # the twin: the very module, with the very optimizer, under the other head
    state = {name: optimizer.state[parameter] for name, parameter in module.named_parameters() if "head" not in name}
    twin = Classifier(4)
    twin.load_state_dict({**module.state_dict(), **{f"head.{leaf}": getattr(fresh.head, leaf).detach().clone()
                                                    for leaf in ("weight", "bias")}})  # fmt: skip
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for name, parameter in twin.named_parameters():
        if name in state:
            twin_optimizer.state[parameter] = {key: value.clone() for key, value in state[name].items()}
    step(fresh, its, batch)
    step(twin, twin_optimizer, batch)
    for mine, theirs in zip(fresh.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Pair(torch.nn.Module):
    def __init__(self, *, swapped: bool = False) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.swapped = swapped

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        one, other = (self.second, self.first) if self.swapped else (self.first, self.second)
        return other(one(batch).relu())


def test_two_submodules_are_swapped(tmp_path: Path) -> None:
    """Two rules that exchange names; the network with its use of them exchanged goes on bit for bit."""
    batch = inputs(6)
    module, optimizer = trained(Pair, batch)
    rules = [{"from": "first.", "to": "second."}, {"from": "second.", "to": "first."}]
    fresh, its = operated(tmp_path, module, optimizer, lambda: Pair(swapped=True), {"transforms": rules})
    assert torch.equal(fresh.first.weight, module.second.weight)
    assert torch.equal(fresh.second.weight, module.first.weight)
    assert not torch.equal(fresh.first.weight, fresh.second.weight)
    for _ in range(2):
        assert torch.equal(step(fresh, its, batch), step(module, optimizer, batch))
    assert torch.equal(fresh.first.weight, module.second.weight)


def test_a_wrapped_and_compiled_checkpoint_fits_a_bare_model(tmp_path: Path) -> None:
    """Prefixes of DistributedDataParallel and torch.compile are looked through, before rules look, nested too."""
    module = Pair()
    wrapped = {f"module._orig_mod.{key}": value for key, value in module.state_dict().items()}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    for transforms in ([], [{"from": "first.", "to": "second."}, {"from": "second.", "to": "first."}]):
        fresh = Pair()
        config = {"kind": "file", "path": str(tmp_path / "wrapped.pt"), "transforms": transforms}
        InitializerStack.from_config([config]).initialize(bind(fresh, name="net"))
        assert torch.equal(fresh.first.weight, (module.second if transforms else module.first).weight)


GPT2 = [
    {"from": "wte.", "to": "embed."},
    {"from": "wpe.", "to": "positions."},
    {"from": "h.<i>.ln_<n>.", "to": "blocks.<i>.norm<n>."},
    {
        "from": "h.<i>.attn.c_attn.<leaf>",
        "to": ["blocks.<i>.attn.q.<leaf>", "blocks.<i>.attn.k.<leaf>", "blocks.<i>.attn.v.<leaf>"],
        "do": ["transpose", {"split": 0}],
    },
    {"from": "h.<i>.<part>.c_<n>.<leaf>", "to": "blocks.<i>.<part>.<n>.<leaf>", "do": ["transpose"]},
    {"from": "ln_f.", "to": "norm."},
]


class Attention(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (torch.nn.Linear(width, width) for _ in range(4))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        split = [part(batch).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)]
        query, key, value = split
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(-2))


class Mlp(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc, self.proj = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.proj(functional.gelu(self.fc(batch), approximate="tanh"))


class Block(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), Mlp(width)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch + self.attn(self.norm1(batch))
        return batch + self.mlp(self.norm2(batch))


class PlainGpt(torch.nn.Module):
    """GPT-2 with Linear instead of Conv1D and three projections instead of one."""

    def __init__(self, width: int = 16, layers: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.positions = torch.nn.Embedding(40, width), torch.nn.Embedding(12, width)
        self.blocks = torch.nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            batch = block(batch)
        return self.norm(batch)


def huggingface_gpt2() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model: torch.nn.Module = transformers.GPT2Model(config)
    return model


def test_gpt2_as_transformers_saved_it_fits_a_plain_model(tmp_path: Path) -> None:
    """The file that the library wrote gives the function that the library computes."""
    library = huggingface_gpt2().eval()
    library.save_pretrained(tmp_path / "gpt2")
    plain = PlainGpt()
    config = {"kind": "file", "path": str(tmp_path / "gpt2" / "model.safetensors"), "transforms": GPT2}
    stack = InitializerStack.from_config([config])
    plan = stack.plan(bind(plain, name="gpt"))
    assert plan.coverage() == 1.0
    stack.initialize(bind(plain, name="gpt"))
    tokens = torch.randint(40, (3, 9))
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens), library(tokens).last_hidden_state)


def test_moments_of_gpt2_follow_into_the_plain_model(tmp_path: Path) -> None:
    """Transposed and split with their weights: the next step is the step of the library's own model."""
    library = huggingface_gpt2().train()
    optimizer = torch.optim.AdamW(library.parameters(), lr=0.01)
    tokens = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(2))

    def train(model: torch.nn.Module, its: torch.optim.Optimizer) -> None:
        its.zero_grad()
        found = model(tokens)
        ((found if isinstance(found, torch.Tensor) else found.last_hidden_state) * weights).mean().backward()
        its.step()

    for _ in range(3):
        train(library, optimizer)
    fresh, its = operated(tmp_path, library, optimizer, PlainGpt, {"transforms": GPT2})
    train(library, optimizer)
    train(fresh, its)
    with torch.no_grad():
        torch.testing.assert_close(fresh(tokens), library(tokens).last_hidden_state)
    torch.testing.assert_close(fresh.blocks[1].attn.k.weight, library.h[1].attn.c_attn.weight[:, 16:32].T)
    torch.testing.assert_close(fresh.blocks[0].mlp.fc.weight, library.h[0].mlp.c_fc.weight.T)
