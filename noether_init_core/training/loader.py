"""TrainingLoader: batches in an order that a seed and an epoch determine, starting at the consumed position.

The order of epoch ``n`` is a pure function of ``(seed, n)``. The randomness of samples is a pure function of ``(seed,
n, number of the batch)``. So the position of a run in its data is two numbers, epoch and consumed batches. It does not
depend on prefetching or on the number of worker processes, and a resume reads no consumed samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, cast

import attrs
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.dataloader import default_collate

from noether_init_core.errors import ConfigError, StateMismatchError, type_of
from noether_init_core.iteration import check_whole
from noether_init_core.training.randomness import derive_seed, seeded


@attrs.frozen
class Layout:
    """How an epoch is split into batches; saved in every checkpoint, because a position depends on it."""

    length: int
    batch_size: int
    shuffle: bool
    drop_last: bool

    @classmethod
    def of(cls, dataset: Any, batch_size: int, *, shuffle: bool, drop_last: bool) -> Layout:
        """Return the layout of a dataset. Raises ``ConfigError`` for an iterable dataset, or one without a batch."""
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ConfigError(
                f"{type_of(dataset)} is not a map-style dataset, so its order cannot be resumed. "
                "Next: use a dataset with __len__ and __getitem__"
            )
        check_whole("batch_size", batch_size, least=1)
        layout = cls(len(cast(Sized, dataset)), batch_size, bool(shuffle), bool(drop_last))
        if layout.batches == 0:
            raise ConfigError(
                f"{layout.length} samples in batches of {batch_size} with drop_last={drop_last} give no batch. "
                "Next: set a smaller batch_size, or drop_last=False"
            )
        return layout

    @property
    def batches(self) -> int:
        """Number of batches of a full epoch."""
        full, rest = divmod(self.length, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def size_of(self, batch: int) -> int:
        """Return the number of samples in the batch with this number."""
        return min(self.batch_size, self.length - batch * self.batch_size)

    def indices(self, seed: int, epoch: int) -> torch.Tensor:
        """Return the order of an epoch: indices, int64 ``[length]``."""
        if not self.shuffle:
            return torch.arange(self.length, device="cpu")
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "order", epoch))
        return torch.randperm(self.length, generator=generator, device="cpu")

    def differences(self, stored: Mapping[str, Any], batch: int) -> list[str]:
        """Return the reasons why this layout cannot continue after ``batch`` batches of an epoch of a ``stored``
        one."""
        fields = ["length"] if batch == 0 else ["length", "batch_size", "shuffle", "drop_last"]
        shown = {"length": "samples in the dataset"}
        return [
            f"{shown.get(name, name)}: {stored.get(name)!r} when saved, {getattr(self, name)!r} now"
            for name in fields
            if stored.get(name) != getattr(self, name)
        ]


@attrs.define
class Position:
    """The position of a run in its data. ``batch`` counts consumed batches; ``advance`` consumes returned ones.

    Attributes:
        handed: Number of samples of each batch of this epoch that was returned and not consumed.
        ahead: Number of these that were fetched ahead at the last ``advance``; unused, so they may be returned again.
        carried: Number of samples of each batch at the end of earlier epochs that is not in a step yet.
        current_pass: Identifies the running ``for``; None between two.
    """

    seed: int
    epoch: int = 0
    batch: int = 0
    handed: list[int] = attrs.Factory(list)
    ahead: int = 0
    carried: list[int] = attrs.Factory(list)
    current_pass: object | None = None

    @property
    def waiting(self) -> list[int]:
        """The size, in samples, of each returned batch that no optimizer step has used yet; oldest batch first."""
        return [*self.carried, *self.handed]

    def move_to(self, seed: int, epoch: int, batch: int) -> None:
        """Move to another position; a running ``for`` over the loader raises at its next batch."""
        self.seed, self.epoch, self.batch = seed, epoch, batch
        self.handed, self.ahead, self.carried, self.current_pass = [], 0, [], None

    def consume(self, number: int, batches: int) -> None:
        """Consume the oldest ``number`` waiting batches. ``batches``: number of batches of an epoch."""
        of_earlier = min(number, len(self.carried))
        of_this = number - of_earlier
        del self.carried[:of_earlier], self.handed[:of_this]
        self.ahead = len(self.handed)
        self.batch += of_this
        if self.batch >= batches:
            self.epoch, self.batch = self.epoch + 1, 0

    def end_pass(self, accumulate: int) -> None:
        """Handle the end of an epoch: batches too few for a step wait for the next epoch."""
        if not self.handed:
            return
        waiting = len(self.waiting)
        if self.batch == 0 and waiting >= accumulate:
            raise StateMismatchError(
                f"epoch {self.epoch} ended after {waiting} batches without advance(). Next: call state.advance() "
                "after each optimizer step; if one step needs more batches than an epoch has, pass their number: "
                f"state.loader(..., accumulate={waiting + 1})"
            )
        self.carried = self.waiting
        self.epoch, self.batch, self.handed, self.ahead = self.epoch + 1, 0, [], 0


#: The task of a worker process: the seed for the randomness of a batch, and the indices of its samples.
_Batch = tuple[int, list[int]]


class _Batches(Sampler[_Batch]):
    """Yields the batches from the current position to the end of its epoch."""

    def __init__(self, layout: Layout, position: Position) -> None:
        self.layout = layout
        self.position = position

    def __iter__(self) -> Iterator[_Batch]:
        seed, epoch, size = self.position.seed, self.position.epoch, self.layout.batch_size
        order = self.layout.indices(seed, epoch)
        for number in range(self.position.batch, self.layout.batches):
            chosen: list[int] = order[number * size : (number + 1) * size].tolist()
            yield derive_seed(seed, "batch", epoch, number), chosen

    def __len__(self) -> int:
        return self.layout.batches


class _Fetcher(Dataset[Any]):
    """Reads and collates one batch, with the seed of the batch; runs in worker processes."""

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn

    def __getitem__(self, batch: _Batch) -> Any:
        seed, indices = batch
        with seeded(seed):
            if getattr(self.dataset, "__getitems__", None):
                samples = self.dataset.__getitems__(indices)
            else:
                samples = [self.dataset[index] for index in indices]
            return self.collate_fn(samples)


# The fetcher has already collated; a lambda would not be picklable for workers.
def _as_it_is(batch: Any) -> Any:
    return batch


class TrainingLoader:
    """Batches of the training data; each ``for`` runs from the consumed position to the end of that epoch.

    It is created by ``TrainerState.loader``. ``len()`` is the number of batches of a full epoch. After a ``for`` that
    was left early, the next ``for`` continues after the last batch that ``advance()`` consumed.
    """

    def __init__(
        self, position: Position, dataset: Any, layout: Layout, *, accumulate: int, collate_fn: Any, **options: Any
    ) -> None:
        check_whole("accumulate", accumulate, least=1)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise ConfigError(
                "loader() works in a single process only: several ranks would all read the same samples. Next: use a "
                "torch.utils.data.DataLoader with a DistributedSampler"
            )
        self.dataset = dataset
        self.layout = layout
        self._position = position
        self._accumulate = accumulate
        self._generator = torch.Generator("cpu")
        self._batches: DataLoader[Any] = DataLoader(
            _Fetcher(dataset, default_collate if collate_fn is None else collate_fn),
            # The sampler yields complete batches, so that a worker reads one batch at a time, with the seed of the
            # batch.
            batch_size=None,
            sampler=_Batches(layout, position),
            collate_fn=_as_it_is,
            generator=self._generator,
            **options,
        )

    def __len__(self) -> int:
        return self.layout.batches

    def __iter__(self) -> Iterator[Any]:
        position = self._position
        # Batches that an earlier pass returned and advance() did not consume are returned again.
        position.handed, position.ahead = [], 0
        mine = position.current_pass = object()
        # DataLoader draws a base seed for its workers from this generator, and worker_init_fn may use it. Seeding by
        # epoch makes it the same after a resume.
        self._generator.manual_seed(derive_seed(position.seed, "workers", position.epoch))
        number = position.batch
        # DataLoader draws that seed on the default device, which may not be that of its generator
        with torch.device("cpu"):
            batches = iter(self._batches)
        try:
            for batch in batches:
                if position.current_pass is not mine:
                    raise StateMismatchError(
                        "this for over the loader is outdated: a state was loaded, or another for was started. "
                        "Next: start a new for"
                    )
                position.handed.append(self.layout.size_of(number))
                number += 1
                yield batch
            if position.current_pass is mine:
                position.end_pass(self._accumulate)
        finally:
            if position.current_pass is mine:
                position.current_pass = None
