"""The picture of the demonstration: the losses of both runs, and which process made which updates."""

from __future__ import annotations

from pathlib import Path

import attrs
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

__all__ = ["Attempt", "draw"]

INK, BLUE, PALE, RED, AMBER = "#1b1f24", "#0b4f8a", "#9fcdf0", "#c62828", "#e8a33d"


@attrs.frozen
class Attempt:
    """One process.

    Attributes:
        lines: The updates that it made, with their losses.
        killed: Where its kill hit; None: it came to its end.
        torn: The set that the kill left uncommitted.
    """

    lines: list[dict[str, float]]
    killed: str | None
    torn: str | None = None

    @property
    def first(self) -> int:
        """The first update that it made."""
        return int(self.lines[0]["update"])

    @property
    def last(self) -> int:
        """The last update that it made."""
        return int(self.lines[-1]["update"])

    def __str__(self) -> str:
        torn = f", which left {self.torn} without manifest" if self.torn else ""
        outcome = f"killed {self.killed}{torn}" if self.killed else "to the end"
        return f"updates {self.first:>3} to {self.last:>3}, {outcome}"


def draw(path: Path, whole: list[dict[str, float]], attempts: list[Attempt], equal: int, total: int) -> None:
    """Write ``path`` as ``.png`` and ``.svg``."""
    with plt.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10.5,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": "#8a929c",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": "#4a525c",
            "ytick.color": "#4a525c",
            "svg.hashsalt": "noether-init-core",
        }
    ):
        figure, (losses, processes) = plt.subplots(
            2, 1, figsize=(10, 6.2), sharex=True, height_ratios=(3.4, 0.38 * len(attempts) + 0.25), layout="constrained"
        )
        kills = sum(attempt.killed is not None for attempt in attempts)
        times = {1: "once", 2: "twice"}.get(kills, f"{kills} times")
        figure.suptitle(
            f"Killed {times}, started again unedited: {equal} of {total} tensors equal",
            fontsize=15,
            fontweight="bold",
            x=0.012,
            ha="left",
            color=INK if equal == total else RED,
        )
        _draw_losses(losses, whole, attempts)
        _draw_processes(processes, attempts)
        for attempt in attempts:
            if attempt.killed:
                for axes in (losses, processes):
                    axes.axvline(attempt.last, color=RED, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        processes.set_xlabel("update")
        processes.set_xlim(-2, whole[-1]["update"] * 1.01)
        figure.savefig(path.with_suffix(".png"), dpi=150)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)


def _draw_losses(axes: Axes, whole: list[dict[str, float]], attempts: list[Attempt]) -> None:
    updates = [line["update"] for line in whole]
    low, high = min(line["loss"] for line in whole) * 0.85, max(line["loss"] for line in whole) * 1.15
    axes.plot(
        updates,
        [line["loss"] for line in whole],
        color=PALE,
        linewidth=5.5,
        solid_capstyle="round",
        label="never interrupted",
        zorder=2,
    )
    for number, attempt in enumerate(attempts):
        axes.plot(
            [line["update"] for line in attempt.lines],
            [line["loss"] for line in attempt.lines],
            color=BLUE,
            linewidth=1.1,
            label="killed and started again" if number == 0 else None,
            zorder=3,
        )
    killed = [attempt.lines[-1] for attempt in attempts if attempt.killed]
    axes.plot(
        [line["update"] for line in killed],
        [line["loss"] for line in killed],
        linestyle="none",
        marker="X",
        markersize=11,
        color=RED,
        markeredgecolor="white",
        label="SIGKILL",
        zorder=4,
    )
    axes.set_yscale("log")
    axes.set_yticks([value for value in (0.1, 0.2, 0.5, 1, 2, 5) if low <= value <= high])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(low, high)
    axes.set_ylabel("training loss (log scale)")
    axes.grid(axis="y", which="major", color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", frameon=False)


def _draw_processes(axes: Axes, attempts: list[Attempt]) -> None:
    reached, has_amber = 0, False
    for number, attempt in enumerate(attempts):
        made_again = max(0, min(reached, attempt.last) - attempt.first + 1)
        axes.barh(number, attempt.last - attempt.first + 1, left=attempt.first - 1, height=0.52, color=BLUE, zorder=2)
        if made_again:
            again = "made again: the same losses" if not has_amber else None
            axes.barh(number, made_again, left=attempt.first - 1, height=0.52, color=AMBER, zorder=3, label=again)
            has_amber = True
        if attempt.killed:
            axes.plot(attempt.last, number, marker="X", markersize=9, color=RED, markeredgecolor="white", zorder=4)
            axes.annotate(
                f"killed {attempt.killed}",
                (attempt.last, number),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                color=RED,
                zorder=4,
                bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"},
            )
        reached = max(reached, attempt.last)
    axes.set_yticks(range(len(attempts)), [f"process {number}" for number in range(1, len(attempts) + 1)])
    axes.set_ylim(len(attempts) - 0.5, -0.6)
    axes.tick_params(axis="y", length=0)
    if has_amber:
        axes.legend(loc="lower left", frameon=False)
    axes.spines["left"].set_visible(False)
