"""A kind in a distributed run: every rank makes the same calls, and must end with the same model."""

from __future__ import annotations

from pathlib import Path

import pytest

from noether_init_core import kinds
from noether_init_core.testing.checks.base import Checks, MakeConfig, NewCase
from noether_init_core.testing.processes import RankJob, run_rank

__all__ = ["RankChecks"]

_SEED = 5


class RankChecks(Checks):
    """Two processes."""

    def test_two_ranks_agree(self, new_case: NewCase, make_config: MakeConfig, tmp_path: Path) -> None:
        """Two ranks, each with another global generator, start at the same iteration with the same bits."""
        if not self.ranks.is_open:
            pytest.skip(f"closed: {self.ranks.reason}")
        if kinds.describe(self.kind).distribution is None:
            pytest.skip("registered in this process only: another process has no such kind")
        case = new_case("single")
        config = {"kind": self.kind, **make_config(case)}
        jobs = [
            RankJob(
                rank, 2, tmp_path / "meeting point", config, "single", _SEED, case.paths.output_root, case.paths.run_id
            )
            for rank in range(2)
        ]
        first, other = run_rank(jobs)
        assert first.start == other.start
        different = [name for name, digest in first.digests.items() if other.digests[name] != digest]
        assert not different, f"the ranks differ in {', '.join(different)}: a rank or a global generator was used"
