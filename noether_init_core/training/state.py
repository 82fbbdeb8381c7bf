"""TrainerState: the state of a plain training loop that a checkpoint needs besides the model and its optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs
import torch

from noether_init_core.errors import ConfigError, StateMismatchError
from noether_init_core.iteration import TrainingIteration, check_whole
from noether_init_core.messages import logger_of
from noether_init_core.restore import Restore, TrainerFindings, restore_line
from noether_init_core.training.loader import Layout, Position, TrainingLoader
from noether_init_core.training.members import Members, MembersPlan, other_version
from noether_init_core.training.randomness import check_rng, put_rng, same_rng, seed_everything, take_rng

_logger = logger_of(__name__)
_VERSION = 2
_OUR_KEY = "trainer_state"


class TrainerState:
    """The state of a training loop: iteration, data order, random generators, and any object with a state dict.

    ::

        state = TrainerState(seed=0, schedule=schedule, ema=ema)
        loader = state.loader(dataset, batch_size=32)
        stack.initialize(model, trainer=state)
        while state.epoch < 10:
            for inputs, targets in loader:
                ...                       # forward, backward, optimizer.step(), schedule.step()
                state.advance()
                if state.update % 100 == 0:
                    writer.save(model, trainer=state)

    A run that is killed at any point and resumed ends with the same bits as an uninterrupted run, on the same machine
    and software. There are two conditions. All state that the loop changes is in the model, its optimizer or an
    argument of ``TrainerState``. The randomness of samples comes from the global generators of torch, Python or NumPy.

    It is for a single process: with several ranks, ``loader`` raises. Methods are not thread-safe.

    Args:
        seed: Seeds torch, Python's ``random`` and NumPy in the constructor, and determines the order of the data. None:
            nothing is seeded, and the seed of the order is drawn from torch's generator, or restored by a resume.
        stateful: Schedulers, a gradient scaler, an average of weights, samplers, metrics: any objects with
            ``state_dict`` and ``load_state_dict``. The model and its optimizer do not belong here.

    Attributes:
        lineage: The origin of the run, oldest first; set by the stack, read by the writer.
        init_report: The report of the initialization, or None; set by the stack, read by the writer.

    Raises ``ConfigError`` for an invalid seed, a reserved name, or an object without ``state_dict``.
    """

    def __init__(self, seed: int | None = None, **stateful: Any) -> None:
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
            raise ConfigError(f"seed must be None or an integer from 0 to 2**63 - 1, not {seed!r}")
        self._members = Members(dict(stateful))
        if seed is not None:
            seed_everything(seed)
        self._seed_was_given = seed is not None
        drawn = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if seed is None else seed
        self._position = Position(drawn)
        self._updates = 0
        self._samples = 0
        self._loader: TrainingLoader | None = None
        self._stored_layout: Mapping[str, Any] | None = None
        self._stored_rng: dict[str, Any] | None = None
        self._plan = MembersPlan()
        self._given_rng: dict[str, Any] | None = None
        self._rng_is_own = False
        self.lineage: tuple[Mapping[str, Any], ...] = ()
        self.init_report: Any = None

    def __repr__(self) -> str:
        members = ", ".join(self._members) or "nothing else"
        lacks = ", no step with end_of_epoch=True yet" if self._counts_no_epochs else ""
        return f"TrainerState({self.iteration}{lacks}, seed={self.seed}, batch={self._position.batch}, {members})"

    @property
    def _counts_no_epochs(self) -> bool:
        """Whether there were steps, and neither a loader nor the loop has counted an epoch."""
        has_data = self._loader is not None or self._stored_layout is not None
        return not has_data and self._updates > 0 and self._position.epoch == 0

    @property
    def seed(self) -> int:
        """The seed of the data order."""
        return self._position.seed

    @property
    def iteration(self) -> TrainingIteration:
        """Completed epochs, updates and samples, with all three fields."""
        return TrainingIteration(self._position.epoch, self._updates, self._samples)

    @property
    def epoch(self) -> int:
        """Completed epochs: those after whose loop the code behind it has begun.

        After a resume from the last step of an epoch, the next loop returns no batch, and the epoch counts from its
        beginning on. So validation behind the loop runs. ``iteration`` counts the epoch already.
        """
        return self._position.epoch - int(self._position.pending)

    @property
    def update(self) -> int:
        """Completed optimizer updates."""
        return self._updates

    @property
    def sample(self) -> int:
        """Number of samples in all completed updates."""
        return self._samples

    def advance(self, samples: int | None = None, *, batches: int | None = None, end_of_epoch: bool = False) -> None:
        """Count an optimizer step: the batches that the loader returned since the last step are consumed.

        Call it once per optimizer step, at its end, after schedulers and averages, and before saving. With accumulated
        gradients, call it once per step, not once per batch. The last batch of an epoch completes the epoch. Batches at
        the end of an epoch that are too few for a step belong to the next step, unless ``discard`` is called.

        Args:
            samples: Number of samples of this step; None: those of the consumed batches.
            batches: Number of batches of this step, for loops that fetch the next batch before the step. Batches beyond
                it belong to later steps and are returned again after a resume. None: all returned batches.
            end_of_epoch: Whether this step completes an epoch; only for loops without ``loader``.

        Raises ``ConfigError`` if ``samples`` or the end of the epoch is unknown, or is given although the loader knows
        it. Raises ``StateMismatchError`` if the arguments contradict the returned batches, or if a position inside an
        epoch was resumed without calling ``loader``. After an error, the state is unchanged.
        """
        check_whole("samples", 0 if samples is None else samples, least=0)
        check_whole("batches", 0 if batches is None else batches, least=0)
        if self._loader is None:
            if samples is None or batches is not None:
                raise ConfigError(
                    "advance() cannot count batches without a loader. Next: advance(samples=len(batch)), and with "
                    "end_of_epoch=True for the last batch of an epoch"
                )
            if self._stored_layout is not None and self._position.batch > 0:
                raise StateMismatchError(
                    f"resumed after {self._position.batch} batches of epoch {self._position.epoch}, but loader() was "
                    "not called. Next: call state.loader(dataset, batch_size=...) as the saved run did"
                )
            counted = samples
            self._position.pending = False
            self._position.epoch += int(end_of_epoch)
        elif end_of_epoch:
            raise ConfigError("the loader detects the end of an epoch. Next: call advance() without end_of_epoch")
        else:
            counted = self._count(samples, batches)
            position, per_epoch = self._position, self._loader.batches_per_epoch
            used = len(position.waiting) if batches is None else batches
            position.is_ahead = position.is_ahead or batches is not None
            if batches is None:
                position.check_step(used, per_epoch)
            completed = position.epoch
            position.consume(used, per_epoch)
            position.count_step(used, is_last=position.epoch > completed)
        if self._stored_rng is not None:
            if not self._rng_is_own:
                _logger.warning(
                    "the random generators of the checkpoint were not restored before the first step, so this run "
                    "differs from the interrupted one. Next: call restore_rng() after everything is built"
                )
            self._stored_rng = None
        self._updates += 1
        self._samples += counted

    def _count(self, samples: int | None, batches: int | None) -> int:
        """Return the number of samples of a step; raise ``StateMismatchError`` if it contradicts the batches."""
        waiting = self._position.waiting
        if batches is not None:
            if batches > len(waiting):
                raise StateMismatchError(
                    f"advance(batches={batches}), but the loader returned {len(waiting)} batches since the last step"
                )
            return sum(waiting[:batches]) if samples is None else samples
        if samples is None and not waiting:
            raise StateMismatchError(
                "advance() was called without a new batch. Next: advance(batches=1) if the loop fetches the next "
                "batch before the step; advance(samples=0) for another step with the same batch"
            )
        if samples is not None and waiting and samples != sum(waiting):
            raise StateMismatchError(
                f"advance(samples={samples}), but the loader returned batches of {', '.join(map(str, waiting))} "
                "samples since the last step. Next: advance(batches=1) if the loop fetches the next batch before the "
                "step; state.discard() for batches without a step; "
                f"advance(samples={samples}, batches={len(waiting)}) for another count"
            )
        return sum(waiting) if samples is None else samples

    def discard(self) -> None:
        """Consume the batches since the last step without counting an update or samples.

        Call it after setting their gradients to zero, such as at the end of an epoch. A repeated call does nothing.
        """
        if self._loader is not None:
            self._position.consume(len(self._position.waiting), self._loader.batches_per_epoch)

    def loader(
        self,
        dataset: Any,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        accumulate: int = 1,
        across_epochs: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> TrainingLoader:
        """Create the loader of the training data, which continues at the consumed position.

        Call it once, before or after the state is loaded. Each ``for`` over it yields the rest of the current epoch.
        Randomness in ``dataset`` and ``collate_fn`` is seeded per batch, in workers as well, so changes of
        ``num_workers`` and ``prefetch_factor`` do not change results.

        Args:
            dataset: A map-style dataset, with ``__len__`` and ``__getitem__``.
            batch_size: Samples per batch.
            shuffle: Whether to shuffle each epoch, in an order that ``seed`` determines.
            drop_last: Whether to drop an incomplete last batch.
            accumulate: Batches per optimizer step. An epoch with at least so many batches needs a call of ``advance``.
            across_epochs: Whether a step may take batches of two epochs. Without it, batches at the end of a resumed
                epoch that are in no step are an error.
            collate_fn: Joins samples to a batch; None: the default of torch.
            options: Other arguments of ``torch.utils.data.DataLoader`` (``num_workers``, ``pin_memory``, ...), except
                ``sampler``, ``batch_sampler`` and ``generator``.

        For a resume, the number of samples must be the same. ``batch_size``, ``shuffle`` and ``drop_last`` must be the
        same unless the checkpoint was saved at the end of an epoch.

        Raises ``ConfigError`` for a second loader, a dataset without ``__getitem__``, or several ranks. Raises
        ``StateMismatchError``, with both values, if the loaded position belongs to other data.
        """
        if self._loader is not None:
            raise ConfigError(
                "this TrainerState already has a loader, and keeps one position only. Next: use a plain "
                "torch.utils.data.DataLoader for validation, or another TrainerState for another loop"
            )
        layout = Layout.of(dataset, batch_size, shuffle=shuffle, drop_last=drop_last)
        loader = TrainingLoader(
            self._position,
            dataset,
            layout,
            accumulate=accumulate,
            across_epochs=across_epochs,
            collate_fn=collate_fn,
            **options,
        )
        if self._stored_layout is not None:
            _raise_for(layout.differences(self._stored_layout, self._position.batch))
        self._loader = loader
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data and tensors, in the form of a trainer file. Tensors are not copied.

        Raises ``StateMismatchError`` between a batch and its ``advance()``, and after an epoch whose last batches are
        not in a step yet: their gradients are not in a checkpoint, so a resume could not be exact. Also raises it for
        state of a stateful object that a checkpoint cannot hold.
        """
        position = self._position
        if position.carried:
            raise StateMismatchError(
                f"the last {len(position.carried)} batches before epoch {position.epoch} are not in a step yet, and "
                "a checkpoint does not hold their gradients. Next: save right after advance(); or make a step with "
                "them at the end of the epoch; or set the gradients to zero and call state.discard()"
            )
        if len(position.handed) > position.ahead:
            if position.current_pass is not None:
                raise StateMismatchError(
                    f"the loader returned {len(position.handed)} batches since the last advance(), so the state is "
                    "between two iterations. Next: save right after advance()"
                )
            _logger.warning("%d batches after the last advance() will be returned again", len(position.handed))
        if self._counts_no_epochs:
            _logger.info(
                "%s: no epoch is counted without a loader. Next: advance(samples=..., end_of_epoch=True) for the last "
                "batch of each",
                self.iteration,
            )
        layout = self._stored_layout if self._loader is None else attrs.asdict(self._loader.layout)
        members = self._members.state()
        state: dict[str, Any] = {"callback_state_dicts": {}, "training_iteration": self.iteration.to_mapping()}
        if isinstance(self._members.named.get("grad_scaler"), torch.amp.GradScaler):
            state["grad_scaler"] = dict(members["stateful"]["grad_scaler"])
        state[_OUR_KEY] = {
            "version": _VERSION,
            "seed": position.seed,
            **members,
            "loader": {"layout": None if layout is None else dict(layout), **position.stored()},
            "rng": take_rng(),
        }
        # Kept, so that load_state_dict recognizes this state if a failed initialization restores it.
        self._given_rng = state[_OUR_KEY]["rng"]
        return state

    def check_state_dict(self, state_dict: Mapping[str, Any], restore: Restore | None = None) -> TrainerFindings:
        """Check a state without loading it, and return what differs from this loop; replayed schedules are put back.

        Raises the ``StateMismatchError`` that ``load_state_dict`` would raise.
        """
        restore = restore or Restore()
        parsed = self._parse(state_dict, restore)
        if parsed.ours is None:
            return TrainerFindings()
        layout = parsed.ours["loader"]["layout"] if restore.data else None
        found = () if self._loader is None or layout is None else self._loader.layout.changes(layout)
        return TrainerFindings((*parsed.plan.differences, *found), self._members.written_fields(parsed.plan))

    def load_state_dict(self, state_dict: Mapping[str, Any], restore: Restore | None = None) -> None:
        """Load the result of ``state_dict()``, or the pieces of it that ``restore`` names; or change nothing.

        May be called repeatedly. The states of random generators are stored until ``restore_rng()``, because objects
        that are built in between draw from the generators. The rates of replayed schedules wait for
        ``restore_rates()``. A trainer file of Noether holds only the iteration, so only that is loaded.

        Raises ``StateMismatchError`` for missing or unknown names of stateful objects, objects of another class,
        another seed, or other data. Raises it also if an object refuses its state: its error is the cause, and the
        other objects are restored.
        """
        restore = restore or Restore()
        parsed = self._parse(state_dict, restore)
        iteration, ours = parsed.iteration, parsed.ours
        if ours is None:
            _logger.warning(
                "the trainer state has only the iteration %s: the data starts with epoch %d; random generators and "
                "%s are unchanged",
                iteration,
                iteration.epoch,
                ", ".join(self._members) or "everything else",
            )
            self._move_to(iteration, self.seed, 0, None)
            return
        self._plan = self._members.load(parsed.plan)
        stored = ours["loader"]
        if not restore.data:
            self._move_to(iteration, self.seed, 0, None)
            self._position.pending = stored["open"] and restore.iteration
        else:
            if stored["layout"] is None and self._loader is not None and not iteration.is_zero:
                _logger.warning(
                    "the checkpoint has no position of a loader; the data starts at the beginning of the epoch"
                )
            self._move_to(iteration, ours["seed"], stored["batch"], stored["layout"])
            self._position.take(stored)
        if not restore.rng:
            self._stored_rng = None
            return
        self._stored_rng = copy.deepcopy(ours["rng"])
        # A state of this object that is loaded again after a failed initialization: if the generators have not changed
        # since it was taken, there is nothing to restore, and no reason for the warning in advance().
        given = self._given_rng
        self._rng_is_own = given is not None and same_rng(given, ours["rng"]) and same_rng(given, take_rng())

    @property
    def scheduled_fields(self) -> Mapping[int, frozenset[str]]:
        """Id of an optimizer -> the fields of its groups that ``restore_rates`` will write."""
        return self._members.written_fields(self._plan)

    def restore_rates(self, loaded: Collection[int] | None = None) -> None:
        """Write the learning rates of loaded schedules into the groups of optimizers that do not have them.

        Call it after the state of the optimizers was loaded. A second call does nothing. ``loaded``: ids of the groups
        that took their state; None: all did. Raises ``StateMismatchError`` if these rates are unknown.
        """
        self._members.put_rates(self._plan, loaded)
        self._plan = MembersPlan()

    def restore_rng(self) -> None:
        """Restore the random generators from the loaded state. Call it last, after everything is built.

        It does nothing if no state was loaded since the last call.
        """
        if self._stored_rng is not None:
            put_rng(self._stored_rng)
            self._stored_rng = None

    def _move_to(self, iteration: TrainingIteration, seed: int, batch: int, layout: Mapping[str, Any] | None) -> None:
        epoch, self._updates, self._samples = iteration.to_mapping().values()
        self._position.move_to(seed, epoch, batch)
        self._stored_layout = layout

    def _parse(self, state_dict: Mapping[str, Any], restore: Restore) -> _Parsed:
        """Check a state, and decide what each object takes."""
        if not isinstance(state_dict, Mapping) or "training_iteration" not in state_dict:
            raise StateMismatchError("this is not the state of a trainer: training_iteration not found")
        found = state_dict["training_iteration"]
        try:
            iteration = found if isinstance(found, TrainingIteration) else TrainingIteration.from_mapping(found)
        except (ConfigError, TypeError) as error:
            raise StateMismatchError(f"training_iteration is invalid: {error}") from error
        if not iteration.is_fully_specified:
            raise StateMismatchError(f"training_iteration is {iteration}; epoch, update and sample are needed")
        if not restore.iteration:
            iteration = TrainingIteration.zero()
        ours = state_dict.get(_OUR_KEY)
        if ours is None:
            return _Parsed(iteration)
        if not isinstance(ours, Mapping) or ours.get("version") != _VERSION:
            raise other_version(ours.get("version") if isinstance(ours, Mapping) else ours, _VERSION)
        parts = ("stateful", "types", "classes", "loader", "rng")
        problems = [f"no {key}" for key in parts if not isinstance(ours.get(key), Mapping)]
        _raise_for([*problems, *([] if isinstance(ours.get("seed"), int) else ["no seed"])])
        stored = ours["loader"]
        if not Position.is_stored(stored) or not isinstance(stored.get("layout"), Mapping | None):
            _raise_for([f"the position in the data is {dict(stored)!r}"])
        if not all(isinstance(ours["types"].get(name), list) for name in ours["stateful"]):
            _raise_for(["the types of its values are missing"])
        if restore.data:
            if self._seed_was_given and ours["seed"] != self.seed:
                problems.append(f"seed: {ours['seed']} when saved, {self.seed} now")
            if self._loader is not None and stored["layout"] is not None:
                problems += self._loader.layout.differences(stored["layout"], stored["batch"])
            if problems:
                problems[-1] += f". Next, to begin the epoch anew: {restore_line(data='skip')}"
        try:
            plan = self._members.plan(ours, restore)
        except StateMismatchError as error:
            _raise_for([*error.problems, *problems])
            raise
        _raise_for(problems)
        if restore.rng:
            # Checked now, because restore_rng runs after weights were loaded, too late for an error.
            check_rng(ours["rng"])
        return _Parsed(iteration, ours, plan)


@attrs.frozen(eq=False)
class _Parsed:
    """A state that was checked: its iteration, its own part (None if Noether wrote it), what each object takes."""

    iteration: TrainingIteration
    ours: Mapping[str, Any] | None = None
    plan: MembersPlan = attrs.Factory(MembersPlan)


def _raise_for(problems: list[str]) -> None:
    if problems:
        raise StateMismatchError("the trainer state does not fit: " + "; ".join(problems), problems=problems)
