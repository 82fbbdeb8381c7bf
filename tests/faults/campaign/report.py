"""The tables of the campaign as Markdown, what must be zero, and the picture of faults against formats."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from faults.campaign.crashes import ERRORS, SCENARIOS
from faults.campaign.damage import FAULTS
from faults.campaign.headers import TARGETS
from faults.campaign.kills import METHODS
from faults.campaign.looks import QUESTIONS, SERIES
from faults.campaign.readings import HOW
from faults.campaign.subjects import FORMATS

__all__ = ["draw", "problems", "tables", "write_page"]

Results = Mapping[str, Mapping[str, Any]]

FAULT_NAMES = {
    "flips": "one bit flipped",
    "truncations": "cut off, every length",
    "zeroed": "a 4 KiB block of zeros",
    "stale": "a 4 KiB block of an older file",
    "appended": "bytes appended",
    "replaced": "files of another set",
}
FORMAT_NAMES = {
    "set_previous_run": ("our set", "previous_run"),
    "set_resume": ("our set", "resume"),
    "manifest": ("manifest.json", "of our set"),
    "flat_resume": ("Noether's files", "resume"),
    "bare_file": ("a lone .th", "file"),
    "safetensors_digest": ("safetensors", "with digest"),
    "safetensors_alone": ("safetensors", "no digest"),
}
PEERS = {"safetensors_digest": "safetensors", "safetensors_alone": "safetensors"}
MUST_BE_ZERO = (
    "silent", "half changed", "foreign error", "torn", "unloadable", "lost", "from the future", "next save not found",
    "wrongly reported", "unnamed", "found", "crashed",
)  # fmt: skip
#: What the column "wrong" of a table adds up.
AFTER_A_CRASH = ("unloadable", "torn", "lost", "next save not found")
AFTER_A_FAILURE = ("wrongly reported", "half changed", *AFTER_A_CRASH)
GOOD, BAD, PALE, INK = "#1a7f4b", "#c62828", "#8a6d1a", "#1b1f24"


def cannot_be_known(fault: str, format_name: str) -> bool:
    """Where nothing on disk tells the fault from a good file.

    A whole other file without a digest to hold it against is a good file, and safetensors files carry no checksums.
    """
    return (fault, format_name) == ("replaced", "bare_file") or format_name == "safetensors_alone"


def _is_peer(name: str) -> bool:
    return name.endswith("/baseline") or (name.startswith("kills/") and name != "kills/ours")


def problems(results: Results) -> list[str]:
    """Everything of ours that is not zero and has to be."""
    found = []
    for name, state in results.items():
        group, *rest = name.split("/")
        if _is_peer(name):
            continue
        for key in MUST_BE_ZERO:
            count = state["counts"].get(key, 0)
            if count and not (key == "silent" and group == "bytes" and cannot_be_known(rest[0], rest[1])):
                found.append(f"{name}: {key} {count} of {state['counts']['tried']}")
        found += [f"{name}: {key}" for key in state["counts"] if key.startswith("place: ")]
    return found


def tables(results: Results) -> str:
    """All tables, each under its heading."""
    return "\n\n".join(text for text in _sections(results) if text)


def _sections(results: Results) -> Iterator[str]:
    yield "### Bytes\n\n" + _table(
        ("fault", "format", "tried", "detected", "harmless", "**wrong**", "half changed", "peer: wrong",
         "half changed"),
        _byte_rows(results),
    )  # fmt: skip
    yield "### Kills\n\n" + _table(
        ("save by", "kills", "during a save", "good", "unloadable", "torn", "lost"),
        [
            (method, *_numbers(state, "tried", "in flight", "good", "unloadable", "torn", "lost"))
            for method in METHODS
            if (state := results.get(f"kills/{method}"))
        ],
    )
    yield "### Crashes of the machine\n\n" + _table(
        ("save", "operations", "disks", "of these after a kill", "good", "wrong"),
        [
            (name, *_numbers(state, "operations", "tried", "process killed", "good"), _sum(state, AFTER_A_CRASH))
            for name in SCENARIOS
            if (state := results.get(f"crashes/{name}"))
        ],
    )
    yield "### Operations that fail\n\n" + _table(
        ("save", f"{' and '.join(ERRORS)}", "failed calls", "reported", "saved", "in doubt", "wrong"),
        _failure_rows(results),
    )
    yield "### Looks that fail\n\n" + _table(
        ("question", "failed looks", "refused, path named", "answered as without the fault", "wrong", "sets lost"),
        [
            (name, *_numbers(state, "tried", "refused", "same"), _sum(state, ("silent", "unnamed", "foreign error")),
             *_numbers(state, "lost"))
            for name in QUESTIONS
            if (state := _added(results, [f"looks/{name}/{code}/{mode}" for code, mode in SERIES]))
        ],
    )  # fmt: skip
    yield "### Reads that fail\n\n" + _table(
        ("format", "failed reads", "nothing changed", "read again", "after the first change", "wrong", "half changed"),
        [
            (" ".join(FORMAT_NAMES[one]),
             *_numbers(state, "tried", "detected", "harmless", "partly", "silent", "half changed"))
            for one in FORMATS
            if (state := _added(results, [f"reads/{one}/{how}" for how in HOW]))
        ],
    )  # fmt: skip
    yield "### Headers\n\n" + _table(
        ("reader", "seconds", "inputs", "accepted", "misbehaved"),
        [
            (target, *_numbers(state, "seconds", "tried", "accepted", "found"))
            for target in TARGETS
            if (state := results.get(f"headers/{target}"))
        ],
    )


def _byte_rows(results: Results) -> Iterator[Sequence[str]]:
    for fault in FAULTS:
        for one in FORMATS:
            state = results.get(f"bytes/{fault}/{one}/ours")
            if state is None:
                continue
            peer = results.get(f"bytes/{fault}/{one}/baseline")
            keys = ("detected", "harmless", "silent", "half changed")
            theirs = _numbers(peer, "silent", "half changed") if peer else ("",) * 2
            ours = list(_numbers(state, "tried", *keys))
            ours[3] = f"{ours[3]} (unknowable)" if cannot_be_known(fault, one) and ours[3] != "0" else ours[3]
            yield (FAULT_NAMES[fault], " ".join(FORMAT_NAMES[one]), *ours, *theirs)


def _failure_rows(results: Results) -> Iterator[Sequence[str]]:
    for name in SCENARIOS:
        for mode, words in (("once", "once"), ("lasting", "from then on")):
            state = _added(results, [f"failures/{name}/{error}/{mode}" for error in ERRORS])
            if state is not None:
                keys = ("tried", "reported", "returned", "in doubt")
                yield (name, words, *_numbers(state, *keys), _sum(state, AFTER_A_FAILURE))


def _added(results: Results, names: Sequence[str]) -> Mapping[str, Any] | None:
    """Several series as one."""
    found = [Counter[str](results[name]["counts"]) for name in names if name in results]
    return {"counts": sum(found, Counter[str]())} if found else None


def _numbers(state: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(f"{state['counts'].get(key, 0):,}" for key in keys)


def _sum(state: Mapping[str, Any], keys: Sequence[str]) -> str:
    return f"{sum(state['counts'].get(key, 0) for key in keys):,}"


def _table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def totals(results: Results) -> str:
    """What was tried, in one sentence."""
    tried = dict.fromkeys(("bytes", "kills", "crashes", "failures", "looks", "reads", "headers"), 0)
    for name, state in results.items():
        tried[name.partition("/")[0]] += 0 if _is_peer(name) else state["counts"].get("tried", 0)
    return (
        f"{tried['bytes']:,} damaged files, {tried['kills']:,} kills, {tried['crashes']:,} disk states after a crash, "
        f"{tried['failures']:,} failed operations, {tried['looks']:,} failed looks, {tried['reads']:,} failed reads, "
        f"{tried['headers']:,} headers"
    )


def write_page(page: Path, results: Results, day: str) -> None:
    """Replace what stands between the marks of the page, and draw the picture of the same name."""
    import torch

    begin, end = "<!-- campaign: begin -->", "<!-- campaign: end -->"
    minutes = sum(state["seconds"] for state in results.values()) / 60
    found = problems(results)
    verdict = "No unexpected result." if not found else "**To be fixed:** " + "; ".join(found) + "."
    text = (
        f"{begin}\n\nRun of {day}, {platform.system()}, Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}, {minutes:.0f} minutes. It tried {totals(results)}. "
        f"{verdict}\n\n{tables(results)}\n\n{end}"
    )
    source = page.read_text()
    page.write_text(re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: text, source, flags=re.DOTALL))
    draw(page.with_suffix(".svg"), results)


@attrs.frozen
class _Tile:
    text: str
    color: str
    tried: int


def _tile(state: Mapping[str, Any] | None, *, unknowable: bool = False) -> _Tile | None:
    if state is None or not state["counts"].get("tried"):
        return None
    silent, tried = state["counts"].get("silent", 0), state["counts"]["tried"]
    return _Tile(f"{silent:,}", GOOD if silent == 0 else PALE if unknowable else BAD, tried)


def draw(path: Path, results: Results) -> None:
    """Faults against formats: how often a load was silently wrong, ours above the peer's; below them the kills."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"font.family": "DejaVu Sans", "text.color": INK, "svg.hashsalt": "noether-init-core"}
    with plt.rc_context(style):
        figure, (grid, bars) = plt.subplots(2, 1, figsize=(13.5, 10.4), height_ratios=(8.1, 2), layout="constrained")
        figure.suptitle(
            "Silently wrong loads, of the faults tried: ours above, the usual way below",
            x=0.012, ha="left", fontsize=16, fontweight="bold",
        )  # fmt: skip
        _draw_grid(grid, results)
        _draw_kills(bars, results)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _draw_grid(axes: Any, results: Results) -> None:
    from matplotlib.patches import Rectangle

    axes.set_xlim(-1.76, len(FORMATS) - 0.44)
    axes.set_ylim(len(FAULTS) - 0.2, -1.05)
    axes.axis("off")
    for column, one in enumerate(FORMATS):
        axes.text(column, -0.83, FORMAT_NAMES[one][0], ha="center", fontsize=12, fontweight="bold")
        axes.text(column, -0.6, FORMAT_NAMES[one][1], ha="center", fontsize=10.5, color="#4a525c")
    for row, fault in enumerate(FAULTS):
        axes.text(-0.56, row, FAULT_NAMES[fault].replace(", ", ",\n"), ha="right", va="center", fontsize=11.5)
        for column, one in enumerate(FORMATS):
            ours = _tile(results.get(f"bytes/{fault}/{one}/ours"), unknowable=cannot_be_known(fault, one))
            peer = _tile(results.get(f"bytes/{fault}/{one}/baseline"))
            for place, tile in ((row - 0.44, ours), (row + 0.02, peer)):
                color = "#f1f3f5" if tile is None else tile.color
                axes.add_patch(Rectangle((column - 0.46, place), 0.92, 0.42, color=color))
                middle = {"va": "center_baseline", "y": place + 0.22}
                if tile is None:
                    axes.text(x=column, s="no peer", ha="center", fontsize=9.5, color="#8a929c", **middle)
                    continue
                white = {"color": "white", **middle}
                axes.text(x=column - 0.02, s=tile.text, ha="right", fontsize=13, fontweight="bold", **white)
                axes.text(x=column + 0.01, s=f"of {tile.tried:,}", ha="left", fontsize=9, **white)
    marks = ((GOOD, "none"), (BAD, "silently wrong"), (PALE, "cannot be known: nothing on disk to compare with"))
    for place, (color, words) in zip((-0.46, 0.62, 2.3), marks, strict=True):
        axes.add_patch(Rectangle((place, len(FAULTS) - 0.42), 0.12, 0.14, color=color))
        axes.text(place + 0.18, len(FAULTS) - 0.35, words, va="center", fontsize=10.5)


def _draw_kills(axes: Any, results: Results) -> None:
    """What is found after a kill, as parts of a bar for each way of saving."""
    colors = {"good": GOOD, "torn": BAD, "unloadable": "#7b1e3a", "lost": "#4a525c"}
    labels = {"good": "good", "torn": "torn, loads all the same", "unloadable": "does not load", "lost": "lost"}
    methods = [method for method in METHODS if f"kills/{method}" in results]
    total = max((results[f"kills/{method}"]["counts"]["tried"] for method in methods), default=1)
    for row, method in enumerate(methods):
        counts, left = results[f"kills/{method}"]["counts"], 0
        axes.text(-0.012 * total, row, method, ha="right", va="center", fontsize=11.5)
        for key, color in colors.items():
            width = counts.get(key, 0) - (counts.get("lost", 0) if key == "good" else 0)
            if width:
                axes.barh(row, width, left=left, height=0.66, color=color)
                axes.text(left + width / 2, row, f"{width:,}", ha="center", va="center", color="white", fontsize=11.5)
                left += width
    for key, color in colors.items():
        axes.bar(0, 0, color=color, label=labels[key])  # for the legend only
    axes.text(0, -0.85, "SIGKILL at random points of saves: what is found afterwards", fontsize=13, fontweight="bold")
    # the bars begin and end where the grid above does
    axes.set_xlim(-0.19 * total, 1.014 * total)
    axes.set_ylim(len(methods) - 0.5, -1.1)
    axes.axis("off")
    axes.legend(loc="upper center", bbox_to_anchor=(0.57, 0.02), ncols=4, frameon=False, fontsize=10.5)
