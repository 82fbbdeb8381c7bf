"""What the ranks of a distributed run exchange before the first hook, so that none starts alone or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
import xxhash

from noether_init_core.errors import ConfigError, RankError, text_of, type_of
from noether_init_core.iteration import TrainingIteration
from noether_init_core.kinds.naming import name_of
from noether_init_core.stack.members import Member

_Ready = TypeVar("_Ready")


def agreed(
    prepare: Callable[[], _Ready],
    describe: Callable[[_Ready], Iterable[str]],
    *,
    group: Any = None,
    timeout_s: float = 300.0,
) -> _Ready:
    """The result of ``prepare``, once every rank of ``group`` has one that ``describe`` puts into the same words.

    With one process nothing is exchanged. Every rank calls it; it may be called again.

    Args:
        prepare: Finds out what will be done, and changes nothing.
        describe: What of it must be the same on every rank, one line for each fact.
        group: A process group; None: all ranks.
        timeout_s: Seconds to wait for the others.

    Raises ``ConfigError`` on a rank that is not in ``group``. Raises ``RankError`` on every rank if the words differ,
    if ``prepare`` failed on some ranks only, and if a rank does not answer in time. If it failed in the same way on all
    of them, each raises its own error.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return prepare()
    size = dist.get_world_size(group)
    if size < 1:  # torch says -1
        raise ConfigError(
            f"initialize(group=...) was called by rank {dist.get_rank()}, which is not in that group. "
            "Next: give each rank the group that it is in, or none"
        )
    if size == 1:
        return prepare()
    ready: list[_Ready] = []
    failure: Exception | None = None
    try:
        ready.append(prepare())
        lines = tuple(describe(ready[0]))
    except Exception as error:  # whatever failed, the other ranks must be told, since they wait for this one
        failure, lines = error, (f"{type(error).__name__}: {text_of(error)}",)
    found = _exchanged(lines, group, timeout_s)
    if len(set(found.values())) > 1:
        raise RankError(_told(found), found=found) from failure
    if failure is not None:
        raise failure
    return ready[0]


def facts(auto_resume: str, members: Iterable[Member], start: TrainingIteration) -> Iterator[str]:
    """What every rank must have found: the initializers, their settings, what each of them reads, and the start."""
    yield auto_resume or "no auto_resume"
    units = [one for member in members for one in member.units]
    yield f"initializers {', '.join(name_of(one) for one in units) or 'none'}"
    for number, one in enumerate(units):
        # a digest, since settings may hold secrets; where a file lies may differ between nodes
        settings = one.config.model_dump_json(exclude={"path", "output_path", "digest"}, fallback=type_of)
        yield f"{number}: {name_of(one)} has the settings {xxhash.xxh3_64_hexdigest(settings.encode())}"
        for line in one.fingerprint():
            yield f"{number}: {name_of(one)} reads {line}"
    yield f"start {start}"


def _exchanged(lines: tuple[str, ...], group: Any, timeout_s: float) -> dict[int, tuple[str, ...]]:
    """Rank -> its lines. Over gloo, since NCCL waits for a dead rank without end."""
    ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    own = None
    try:
        own = dist.new_group(
            ranks, timeout=timedelta(seconds=timeout_s), backend="gloo", use_local_synchronization=group is not None
        )
        answers: list[Any] = [None] * len(ranks)
        dist.all_gather_object(answers, lines, group=own)
    except RuntimeError as error:  # torch has no narrower class for a rank that is gone or late
        raise RankError(
            f"not all of the {len(ranks)} ranks answered within {timeout_s:g} s: one has failed, or does not call "
            "initialize(). Nothing was changed. Next: read the output of the other ranks, and start all of them again; "
            f"every rank calls initialize(), a rank that starts by itself with group=. torch says: {error}"
        ) from error
    finally:
        if own is not None:
            dist.destroy_process_group(own)
    return dict(zip(ranks, answers, strict=True))


def _told(found: Mapping[int, Sequence[str]]) -> str:
    """The message: what each rank found and not all of them did."""
    common = set.intersection(*(set(lines) for lines in found.values()))
    by_words: dict[tuple[str, ...], list[int]] = {}
    for rank, lines in found.items():
        by_words.setdefault(tuple(line for line in lines if line not in common), []).append(rank)
    told = [
        f"\n  rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)}: {'; '.join(words) or 'nothing beside that'}"
        for words, ranks in by_words.items()
    ]
    return (
        f"the ranks do not agree on what to start from, and nothing was changed on any of them:{''.join(told)}\n"
        "Next: give every rank the same config, and a folder that all of them see"
    )


def _ranges(ranks: Sequence[int]) -> str:
    """``0-3, 6`` for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
