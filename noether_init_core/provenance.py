"""InitReport: what an initialization did, as data that can be kept beside a run."""

from __future__ import annotations

import json
import uuid
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
        resumed_set: The folder of the set that it goes on from; None where it resumes nothing.
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
    resumed_set: str | None = None


@attrs.frozen
class InitReport:
    """What ``InitializerStack.initialize`` did.

    Attributes:
        start: The iteration at which training starts.
        initializers: One report each, in the order of the config.
        auto_resume: What ``auto_resume`` decided and why; empty where it was not asked for.
        training: The id that the training gets if it is a new one: if the set that it goes on from is of another run
            or stage, or if there is none.
    """

    start: TrainingIteration
    initializers: tuple[InitializerReport, ...] = ()
    auto_resume: str = ""
    training: str = attrs.field(factory=lambda: uuid.uuid4().hex, eq=False)

    def lineage(self) -> list[dict[str, Any]]:
        """Where the weights came from, as plain data for the manifests of this run.

        What was resumed also says the set's folder, ``set``, and the names of the sets that were passed over.
        """
        return [
            {"kind": report.kind, "model": model, "origin": origin, "file": file, **_resumed(report)}
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
        return "\n".join(lines)


def _resumed(report: InitializerReport) -> dict[str, Any]:
    if report.resumed_set is None:
        return {}
    return {"set": report.resumed_set, "passed_over": [name for name, _reason in report.passed_over]}
