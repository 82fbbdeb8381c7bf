"""The pages of the demonstration: what the warm start will do and did, how far it moved, where it came from."""

from __future__ import annotations

from pathlib import Path

from digits import TASKS, Network

from noether_init_core import InitializerStack, PathProvider, bind, compare_checkpoints, lineage_of
from noether_init_pages import html_page

__all__ = ["write_pages"]


def write_pages(output: Path, config: Path) -> list[Path]:
    """Write four pages below ``output``; ``config`` warm-starts the second task, and its run is ``parity_warm``."""
    warm = PathProvider(output, "parity_warm")
    model = bind(Network(TASKS["parity"]), name="digits")
    # the run has sets by now, from which it would be continued: here it is started as it was at first
    stack = InitializerStack.from_file(config, path_provider=PathProvider(output, "parity_again"))
    plan = stack.plan(model)
    report = stack.initialize(model)
    pages = {
        "plan": html_page(plan, title=f"What {config.name} will do to the parity network"),
        "report": html_page(report, title="What the warm start did, and where its time went"),
        "diff": html_page(
            compare_checkpoints(output / "uninterrupted", output / warm.run_id), title="From digits to parity"
        ),
        "lineage": html_page(lineage_of(output)),
    }
    written = []
    for name, text in pages.items():
        written.append(output / f"{name}.html")
        written[-1].write_text(text, "utf-8")
    return written
