"""InitReport: what an initialization did, as data that can be kept beside a run."""

from __future__ import annotations

import json
from typing import Any

import attrs

from noether_init_core.iteration import TrainingIteration

__all__ = ["InitReport", "InitializerReport"]

REPORT_VERSION = 1

#: Actions of a plan as things that were done.
_DONE = {"load": "loaded", "rename": "loaded by another name", "cast": "loaded and converted", "keep": "kept"}


@attrs.frozen
class InitializerReport:
    """What one initializer did.

    Attributes:
        kind: The kind, as the config names it.
        distribution: The distribution that offers it, with its version; empty for one registered in the process.
        hooks: The hooks that were called for it.
        origins: (model, origin in words, file) of each file that weights came from.
        counts: Number of tensors by action of the plan.
        coverage: Share of the bytes of parameters that came from the checkpoint, from 0 to 1; None without a plan.
        start: The iteration that it starts at; None for zero.
        restored: What was restored besides weights: optimizers, trainer, callbacks.
        passed_over: (set, why) of each broken set that was passed over on the way back to a good one, newest first.
        not_restored: What the checkpoint has and nobody was there to take, in words.
    """

    kind: str
    distribution: str = ""
    hooks: tuple[str, ...] = ()
    origins: tuple[tuple[str, str, str], ...] = ()
    counts: dict[str, int] = attrs.Factory(dict)
    coverage: float | None = None
    start: str | None = None
    restored: tuple[str, ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()
    not_restored: tuple[str, ...] = ()


@attrs.frozen
class InitReport:
    """What ``InitializerStack.initialize`` did.

    Attributes:
        start: The iteration at which training starts.
        initializers: One report each, in the order of the config.
        auto_resume: What ``auto_resume`` decided and why; empty where it was not asked for.
    """

    start: TrainingIteration
    initializers: tuple[InitializerReport, ...] = ()
    auto_resume: str = ""

    def lineage(self) -> list[dict[str, Any]]:
        """Where the weights came from, as plain data for the manifests of this run."""
        return [
            {"kind": report.kind, "model": model, "origin": origin, "file": file}
            for report in self.initializers
            for model, origin, file in report.origins
        ]

    def to_json(self) -> str:
        """The report as JSON; ``version`` changes when a field changes its meaning."""
        data = attrs.asdict(self)
        data["start"] = self.start.to_mapping()
        return json.dumps({"version": REPORT_VERSION, **data}, indent=1)

    def __str__(self) -> str:
        lines = [f"start {self.start}" + (f"  ({self.auto_resume})" if self.auto_resume else "")]
        for report in self.initializers:
            counts = ", ".join(f"{count} {_DONE.get(action, action)}" for action, count in report.counts.items())
            sources = "; ".join(f"{model} <- {origin}" for model, origin, _file in report.origins)
            said = "; ".join(filter(None, (counts, *report.restored)))
            lines.append(f"{report.kind}: {sources or 'no files'}" + (f" ({said})" if said else ""))
            lines.extend(f"  passed over {name}: {reason}" for name, reason in report.passed_over)
            lines.extend(f"  not restored: {what}" for what in report.not_restored)
        return "\n".join(lines)
