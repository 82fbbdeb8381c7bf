"""Suggesting rules for models of ten thousand entries; prints a table. Pure computation, so one run is enough."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping

from noether_init_core.suggest.suggest import suggest
from noether_init_core.surgery.fit import TargetSpec

BLOCKS = 830
ENTRIES = 10_000
GPT2 = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
TIMM = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
Specs = dict[str, TargetSpec]


def specs(shapes: Mapping[str, tuple[int, ...]]) -> Specs:
    return {name: TargetSpec(shape, "float32", 4 * math.prod(shape)) for name, shape in shapes.items()}


def blocks(prefix: str, parts: tuple[str, ...]) -> Specs:
    return specs(
        {
            f"{prefix}.{block}.{part}.{leaf}": (20 + number, 50) if leaf == "weight" else (20 + number,)
            for block in range(BLOCKS)
            for number, part in enumerate(parts)
            for leaf in ("weight", "bias")
        }
    )


def words(generator: random.Random) -> list[str]:
    def word() -> str:
        return "".join(generator.choices("abcdefghij", k=6))

    return [f"{word()}.{word()}.weight" for _ in range(ENTRIES)]


def main() -> None:
    generator = random.Random(0)
    one, other = words(generator), words(generator)
    cases = {
        "blocks, all segments renamed": (blocks("transformer.h", GPT2), blocks("blocks", TIMM)),
        "the same names": (blocks("h", GPT2), blocks("h", GPT2)),
        "names without pattern, one shape, behind a prefix": (
            specs(dict.fromkeys(one, (8, 8))),
            specs(dict.fromkeys([f"x.{name}" for name in one], (8, 8))),
        ),
        "names without pattern, one shape, unrelated": (
            specs(dict.fromkeys(one, (8, 8))),
            specs(dict.fromkeys(other, (8, 8))),
        ),
        "names without pattern, each a shape of its own, unrelated": (
            specs({name: (8, 9 + number) for number, name in enumerate(one)}),
            specs({name: (8, 9 + number) for number, name in enumerate(other)}),
        ),
    }
    print("| case | entries | rules | coverage | seconds |\n|---|---|---|---|---|")
    for case, (sources, targets) in cases.items():
        began = time.perf_counter()
        found = suggest(sources, targets)
        took = time.perf_counter() - began
        print(f"| {case} | {len(sources)} | {len(found.rules)} | {100 * found.plan.coverage():.0f} % | {took:.2f} |")


if __name__ == "__main__":
    main()
