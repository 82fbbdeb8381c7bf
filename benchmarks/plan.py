"""The plan over very many names: seconds, and whether they grow in proportion.

``make bench`` runs it after the loading. Headers are taken as read: names, shapes and dtypes are made up.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from pathlib import Path

import rich.box
import rich.console
import rich.table

from noether_init_core.config.source import TransformConfig, rule_of
from noether_init_core.surgery.fit import PlanPart, TargetSpec
from noether_init_core.surgery.name_rules import Transforms
from noether_init_core.surgery.planner import plan_load

RULES = 50


def part_of(keys: int) -> PlanPart:
    """A model of layers with 50 tensors each, and a file with other names."""
    spec = TargetSpec((4, 4), "float32", 64)
    places = [(layer, number) for layer in range(keys // RULES) for number in range(RULES)]
    sources = {f"model.layers.{layer}.part{number}.old.weight": spec for layer, number in places}
    targets = {f"blocks.{layer}.p{number}.new.weight": spec for layer, number in places}
    return PlanPart("net", "made up", ("a.pt",), sources, targets)


def rules() -> list[TransformConfig]:
    """A rule for each tensor of a layer; every tenth transposes."""
    return [
        TransformConfig.model_validate(
            {
                "from": f"model.layers.<i>.part{number}.old.<leaf>",
                "to": f"blocks.<i>.p{number}.new.<leaf>",
                "do": [] if number % 10 else ["transpose"],
            }
        )
        for number in range(RULES)
    ]


def measure(keys: int, rounds: int) -> tuple[float, float, float]:
    """Median and least seconds, and MiB of memory at the most."""
    part = part_of(keys)
    configs = rules()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        plan = plan_load("file", [part], Transforms([rule_of(one, f"rule {n}") for n, one in enumerate(configs)]))
        seconds.append(time.perf_counter() - began)
        assert plan.is_fine
        assert plan.coverage() == 1.0
    tracemalloc.start()
    plan_load("file", [part], Transforms([rule_of(one, f"rule {n}") for n, one in enumerate(configs)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return statistics.median(seconds), min(seconds), peak / 2**20


def main() -> None:
    """Measure, print, and write as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    header = ("keys", "median", "least", "memory")
    rows = []
    for keys in (25_000, 50_000, 100_000, 200_000):
        median, least, peak = measure(keys, options.rounds)
        rows.append((f"{keys:,}", f"{median:.2f} s", f"{least:.2f} s", f"{peak:.0f} MiB"))
    table = rich.table.Table(*header, title=f"A plan with {RULES} rules", box=rich.box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    options.out.write_text(f"# A plan with {RULES} rules, once headers are read\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
