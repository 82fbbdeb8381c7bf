"""TrainingLoader: batches in an order that a seed and an epoch determine, from the position that was consumed.

The order of epoch ``n`` is a pure function of ``(seed, n)``, and the randomness of a batch's samples one of
``(seed, n, number of the batch)``. So the position of a run in its data is two numbers, epoch and consumed batches;
neither prefetching nor the number of worker processes has a part in it, and nothing is read to be skipped.
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
    """How an epoch is cut into batches; part of every checkpoint, since a position means nothing without it."""

    length: int
    batch_size: int
    shuffle: bool
    drop_last: bool

    @classmethod
    def of(cls, dataset: Any, batch_size: int, *, shuffle: bool, drop_last: bool) -> Layout:
        """The layout of a dataset. Raises ``ConfigError`` for one without samples by number, or without a batch."""
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ConfigError(
                f"{type_of(dataset)} has no samples by number, so that its order cannot be resumed. "
                "Next: a dataset with __len__ and __getitem__"
            )
        check_whole("batch_size", batch_size, least=1)
        layout = cls(len(cast(Sized, dataset)), batch_size, bool(shuffle), bool(drop_last))
        if layout.batches == 0:
            raise ConfigError(
                f"{layout.length} samples in batches of {batch_size} with drop_last={drop_last} are no batch"
            )
        return layout

    @property
    def batches(self) -> int:
        """Batches of a full epoch."""
        full, rest = divmod(self.length, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def size_of(self, batch: int) -> int:
        """Samples in the batch with this number."""
        return min(self.batch_size, self.length - batch * self.batch_size)

    def indices(self, seed: int, epoch: int) -> torch.Tensor:
        """The order of an epoch: int64 ``[length]``."""
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        return torch.randperm(self.length, generator=generator)

    def differences(self, stored: Mapping[str, Any], batch: int) -> list[str]:
        """Why a run with this layout cannot continue after ``batch`` batches of an epoch of a ``stored`` one."""
        fields = ["length"] if batch == 0 else ["length", "batch_size", "shuffle", "drop_last"]
        shown = {"length": "samples in the dataset"}
        return [
            f"{shown.get(name, name)}: {stored.get(name)!r} when saved, {getattr(self, name)!r} now"
            for name in fields
            if stored.get(name) != getattr(self, name)
        ]


@attrs.define
class Position:
    """Where a run is in its data. ``batch`` counts consumed batches; handed out ones are consumed by ``advance``.

    Attributes:
        handed: Samples of each batch of this epoch that was handed out and not consumed.
        ahead: How many of these were fetched ahead at the last ``advance``: untouched, so that they may come again.
        carried: Samples of each batch at the end of earlier epochs that went into no step yet.
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
        """Samples of each batch that waits for its step, oldest first."""
        return [*self.carried, *self.handed]

    def move_to(self, seed: int, epoch: int, batch: int) -> None:
        """Another position, with which every pass that is under way ends."""
        self.seed, self.epoch, self.batch = seed, epoch, batch
        self.handed, self.ahead, self.carried, self.current_pass = [], 0, [], None

    def consume(self, number: int, batches: int) -> None:
        """The oldest ``number`` batches that wait are done with. ``batches``: those of an epoch."""
        of_earlier = min(number, len(self.carried))
        of_this = number - of_earlier
        del self.carried[:of_earlier], self.handed[:of_this]
        self.ahead = len(self.handed)
        self.batch += of_this
        if self.batch >= batches:
            self.epoch, self.batch = self.epoch + 1, 0

    def end_pass(self, accumulate: int) -> None:
        """The data of the epoch came to an end. Batches too few for another step wait for the next one."""
        if not self.handed:
            return
        waiting = len(self.waiting)
        if self.batch == 0 and waiting >= accumulate:
            raise StateMismatchError(
                f"epoch {self.epoch} ended without advance() after {waiting} batches. Next: call state.advance() "
                "after each optimizer step; where one step takes more batches than an epoch has, say how many: "
                f"state.loader(..., accumulate={waiting + 1})"
            )
        self.carried = self.waiting
        self.epoch, self.batch, self.handed, self.ahead = self.epoch + 1, 0, [], 0


#: What a worker process is told: the seed of everything that is random about a batch, and its samples.
_Batch = tuple[int, list[int]]


class _Batches(Sampler[_Batch]):
    """The batches from the current position to the end of its epoch."""

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
    """Reads and collates one whole batch with that batch's own seed; what runs in a worker process."""

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


def _as_it_is(batch: Any) -> Any:
    return batch


class TrainingLoader:
    """Batches of the training data; each ``for`` runs from the consumed position to the end of that epoch.

    Made by ``TrainerState.loader``. ``len()`` is the number of batches of a full epoch. A ``for`` that is left early
    is continued by the next one after the last batch that ``advance()`` marked as consumed.
    """

    def __init__(
        self, position: Position, dataset: Any, layout: Layout, *, accumulate: int, collate_fn: Any, **options: Any
    ) -> None:
        check_whole("accumulate", accumulate, least=1)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise ConfigError("loader() serves a single process; several ranks would all read the same samples")
        self.dataset = dataset
        self.layout = layout
        self._position = position
        self._accumulate = accumulate
        self._generator = torch.Generator()
        self._batches: DataLoader[Any] = DataLoader(
            _Fetcher(dataset, default_collate if collate_fn is None else collate_fn),
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
        # what an earlier pass handed out and nobody consumed is handed out again
        position.handed, position.ahead = [], 0
        mine = position.current_pass = object()
        # The seed that DataLoader draws for its workers, which worker_init_fn may use, is part of the run, too.
        self._generator.manual_seed(derive_seed(position.seed, "workers", position.epoch))
        number = position.batch
        try:
            for batch in self._batches:
                if position.current_pass is not mine:
                    raise StateMismatchError(
                        "this for over the loader is outdated: the state was loaded, or another for was begun, since. "
                        "Next: begin a new for"
                    )
                position.handed.append(self.layout.size_of(number))
                number += 1
                yield batch
            if position.current_pass is mine:
                position.end_pass(self._accumulate)
        finally:
            if position.current_pass is mine:
                position.current_pass = None
