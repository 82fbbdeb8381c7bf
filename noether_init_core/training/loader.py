"""TrainingLoader: batches in an order that a seed and an epoch determine, starting at the consumed position.

The order of epoch ``n`` is a pure function of ``(seed, n)``. The randomness of samples is a pure function of ``(seed,
n, number of the batch)``. So the position of a run in its data is two numbers, epoch and consumed batches. It does not
depend on prefetching or on the number of worker processes, and a resume reads no consumed samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, ClassVar, Self, cast

import attrs
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.dataloader import default_collate

from noether_init_core.errors import ConfigError, StateMismatchError, type_of
from noether_init_core.iteration import check_whole
from noether_init_core.messages import counted, logger_of
from noether_init_core.restore import Difference
from noether_init_core.training.randomness import derive_seed, seeded

_logger = logger_of(__name__)


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

    def changes(self, stored: Mapping[str, Any]) -> tuple[Difference, ...]:
        """Return what differs from a ``stored`` layout, as far as a resume allows it: the script's is used."""
        return tuple(
            Difference(name, repr(stored.get(name)), repr(getattr(self, name)), taken="config")
            for name in ("batch_size", "shuffle", "drop_last")
            if stored.get(name) != getattr(self, name)
        )


@attrs.define
class Position:
    """The position of a run in its data. ``batch`` counts consumed batches; ``advance`` consumes returned ones.

    A ``for`` over the loader is a pass. The last step of an epoch completes it (``epoch``), though the pass goes on
    until the loop asks for another batch: only then does the code behind the loop run.

    Attributes:
        handed: Number of samples of each batch of this epoch that was returned and not consumed.
        ahead: Number of these that were fetched ahead at the last ``advance``; unused, so they may be returned again.
        carried: Number of samples of each batch at the end of earlier epochs that is not in a step yet.
        current_pass: Identifies the running ``for``; None between two.
        first: The batch that the running pass began with, or the next one will begin with.
        is_behind: Whether the epoch of the running pass is completed.
        by_hand: Whether the loop calls ``next`` itself, so that its passes never end.
        pending: After a resume: whether the code behind the loop of the last epoch is still to run.
        was_resumed: Whether this run was resumed in the middle of an epoch.
        per_step: Batches of each step so far; 0 before the first one, None if they differ.
        across: Whether steps take batches of several epochs.
        is_ahead: Whether the loop fetches batches before the step, and says how many a step takes.
    """

    _STORED: ClassVar[tuple[str, ...]] = ("batch", "by_hand", "per_step", "across", "is_ahead")

    seed: int
    epoch: int = 0
    batch: int = 0
    handed: list[int] = attrs.Factory(list)
    ahead: int = 0
    carried: list[int] = attrs.Factory(list)
    current_pass: object | None = None
    first: int = 0
    is_behind: bool = False
    by_hand: bool = False
    pending: bool = False
    was_resumed: bool = False
    per_step: int | None = 0
    across: bool = False
    is_ahead: bool = False

    @property
    def waiting(self) -> list[int]:
        """The size, in samples, of each returned batch that no optimizer step has used yet; oldest batch first."""
        return [*self.carried, *self.handed]

    @property
    def is_open(self) -> bool:
        """Whether an epoch is completed and the code behind its loop is still to run."""
        return self.pending or (self.is_behind and self.current_pass is not None and not self.by_hand)

    def move_to(self, seed: int, epoch: int, batch: int) -> None:
        """Move to another position; a running ``for`` over the loader raises at its next batch."""
        self.seed, self.epoch, self.batch = seed, epoch, batch
        self.handed, self.ahead, self.carried, self.current_pass = [], 0, [], None
        self.first, self.is_behind, self.pending, self.was_resumed = batch, False, False, batch > 0

    def stored(self) -> dict[str, Any]:
        """Plain data for a checkpoint, without seed and epoch."""
        return {"open": self.is_open, **{name: getattr(self, name) for name in self._STORED}}

    @classmethod
    def is_stored(cls, found: Mapping[str, Any]) -> bool:
        """Whether this is a result of ``stored``."""
        return isinstance(found.get("batch"), int) and found.keys() >= {"open", *cls._STORED}

    def take(self, stored: Mapping[str, Any]) -> None:
        """Continue as the ``stored`` run would; the position itself is moved to before."""
        self.pending, self.by_hand, self.is_ahead = stored["open"], stored["by_hand"], stored["is_ahead"]
        self.per_step, self.across = stored["per_step"], self.across or stored["across"]
        self.was_resumed = self.was_resumed or self.pending

    def begin_pass(self) -> tuple[object, bool]:
        """Begin a pass at the consumed position; returns its identity, and whether it returns batches.

        Batches that an earlier pass returned and ``advance`` did not consume are returned again.
        """
        # a pass of a for loop has ended before the next one begins
        self.by_hand = self.by_hand or (self.current_pass is not None and self.is_behind)
        self.handed, self.ahead, self.first = [], 0, self.batch
        was_pending, self.pending, self.is_behind = self.pending, False, False
        self.current_pass = object()
        return self.current_pass, not was_pending

    def consume(self, number: int, batches: int) -> None:
        """Consume the oldest ``number`` waiting batches. ``batches``: number of batches of an epoch."""
        of_earlier = min(number, len(self.carried))
        of_this = number - of_earlier
        del self.carried[:of_earlier], self.handed[:of_this]
        self.ahead = len(self.handed)
        self.batch += of_this
        if self.batch >= batches:
            self.epoch, self.batch = self.epoch + 1, 0
            self.is_behind = True

    def check_step(self, number: int, batches: int) -> None:
        """Raise ``StateMismatchError`` if a step of a resumed epoch has another number of batches than all before.

        That is so where a loop counts batches against the length of a full epoch, or against one that it has kept.
        """
        is_last = self.batch + number - len(self.carried) >= batches
        if self.was_resumed and not self.across and self.per_step not in (0, None, number) and not is_last:
            raise StateMismatchError(
                f"this step has {counted(number, 'batch', 'batches')}, and each one before had {self.per_step}. This "
                "run was resumed within an epoch, where len(loader) is what remains and enumerate(loader) begins "
                "at 0. Next: for i, batch in loader.enumerate(), with loader.batches_per_epoch as the length"
            )

    def count_step(self, number: int, *, is_last: bool) -> None:
        """Remember how many batches a step has; the last one of an epoch may have fewer."""
        if self.per_step == 0:
            self.per_step = number
        elif number != self.per_step and not (is_last and self.per_step is not None and number < self.per_step):
            self.per_step = None

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
        if self.was_resumed and not self.across and not self.is_ahead:
            raise StateMismatchError(
                f"the last {counted(waiting, 'batch', 'batches')} of epoch {self.epoch} are in no step. This run was "
                "resumed within an epoch, where len(loader) is what remains and enumerate(loader) begins at "
                "0. Next: for i, batch in loader.enumerate(), with loader.batches_per_epoch as the length; "
                "state.discard() for batches without a step; state.loader(..., across_epochs=True) if the next epoch "
                "takes them"
            )
        self.across = self.across or not self.is_ahead
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


class _EndedPass:
    """A pass without batches. It ends when it is asked for one, or when the loop drops it."""

    def __init__(self, position: Position, mine: object) -> None:
        self._position, self._mine = position, mine

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        self._end()
        raise StopIteration

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._position.current_pass is self._mine:
            self._position.current_pass, self._position.first = None, self._position.batch


class TrainingLoader:
    """Batches of the training data; each ``for`` runs from the consumed position to the end of that epoch.

    It is created by ``TrainerState.loader``. After a ``for`` that was left early, the next ``for`` continues after the
    last batch that ``advance()`` consumed.

    ``len()`` is the number of batches of the running ``for``, or of the next one: after a resume, what remains of the
    epoch. So ``i + 1 == len(loader)`` is the last batch of ``enumerate(loader)``. It must be asked anew in each epoch.
    Positions in a whole epoch come from ``enumerate()`` and ``batches_per_epoch``.
    """

    def __init__(
        self,
        position: Position,
        dataset: Any,
        layout: Layout,
        *,
        accumulate: int,
        across_epochs: bool,
        collate_fn: Any,
        **options: Any,
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
        position.across = position.across or across_epochs
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

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches of a full epoch."""
        return self.layout.batches

    @property
    def is_last(self) -> bool:
        """Whether the batch that was returned last is the last one of its epoch."""
        position = self._position
        return position.is_behind or position.batch + len(position.handed) == self.layout.batches

    def __len__(self) -> int:
        position = self._position
        if position.current_pass is None:
            return 0 if position.pending else self.layout.batches - position.batch
        return 0 if position.first < 0 else self.layout.batches - position.first

    def enumerate(self) -> Iterator[tuple[int, Any]]:
        """Yield (number of the batch in its epoch, batch); numbers go on after a resume."""
        batches = iter(self)
        number = self._position.first
        for batch in batches:
            yield number, batch
            number += 1

    def __iter__(self) -> Iterator[Any]:
        mine, has_batches = self._position.begin_pass()
        if has_batches:
            return self._pass(mine)
        _logger.warning(
            "this run was saved at the last step of an epoch: the loop returns no batch, and the code behind it runs "
            "now. Next, if that code uses variables of the loop: set them before the loop"
        )
        # The loop may also count to len(), which is then 0.
        self._position.first = -1
        return _EndedPass(self._position, mine)

    def _pass(self, mine: object) -> Iterator[Any]:
        position = self._position
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
                position.current_pass, position.first, position.is_behind = None, position.batch, False
