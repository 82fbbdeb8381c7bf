"""TrainerState: everything of a plain training loop that must survive besides the model and its optimizer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from noether_init_core.errors import ConfigError, StateMismatchError, type_of
from noether_init_core.iteration import TrainingIteration, check_whole
from noether_init_core.messages import listed
from noether_init_core.training.loader import Layout, Position, TrainingLoader
from noether_init_core.training.plain_state import plain, restored
from noether_init_core.training.randomness import check_rng, put_rng, same_rng, seed_everything, take_rng

_logger = logging.getLogger(__name__)
_VERSION = 1
_RESERVED = frozenset({"callbacks", "init_report", "iteration", "lineage", "loader", "model", "rng", "version"})
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

    A run that is killed anywhere and resumed from what was saved ends with the same bits as one that was never
    interrupted, on the same machine and software, if all that the loop changes is in the model, its optimizer or an
    argument of TrainerState, and the randomness of samples comes from the global generators of torch, Python or NumPy.

    Args:
        seed: Seeds torch, Python's ``random`` and NumPy now, and determines the order of the data. None: nothing is
            seeded, and the order's own seed is drawn from torch's generator (on resume, the stored one is taken).
        stateful: Schedulers, a gradient scaler, an average of weights, samplers, metrics: any object with
            ``state_dict`` and ``load_state_dict``. Not the model and its optimizer, which are saved by themselves.

    Attributes:
        lineage: Where the run came from, oldest first; set by the stack, written by the writer.
        init_report: The report of the initialization; None before it. Set by the stack, read by the writer.

    Raises ``ConfigError`` for a seed that is none, a reserved name, or an object without a state.
    """

    def __init__(self, seed: int | None = None, **stateful: Any) -> None:
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
            raise ConfigError(f"seed must be None or a whole number from 0 to 2**63 - 1, not {seed!r}")
        for name, member in stateful.items():
            _check_member(name, member)
        if seed is not None:
            seed_everything(seed)
        self._seed_was_given = seed is not None
        drawn = int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed
        self._position = Position(drawn)
        self._stateful: dict[str, Any] = dict(stateful)
        self._updates = 0
        self._samples = 0
        self._loader: TrainingLoader | None = None
        self._stored_layout: Mapping[str, Any] | None = None
        self._stored_rng: dict[str, Any] | None = None
        self._given_rng: dict[str, Any] | None = None
        self._rng_is_own = False
        self.lineage: tuple[Mapping[str, Any], ...] = ()
        self.init_report: Any = None

    def __repr__(self) -> str:
        members = ", ".join(self._stateful) or "nothing else"
        return f"TrainerState({self.iteration}, seed={self.seed}, batch={self._position.batch}, {members})"

    @property
    def seed(self) -> int:
        """The seed of the data order."""
        return self._position.seed

    @property
    def iteration(self) -> TrainingIteration:
        """Completed epochs, updates and samples; always fully specified."""
        return TrainingIteration(self._position.epoch, self._updates, self._samples)

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self._position.epoch

    @property
    def update(self) -> int:
        """Completed optimizer updates."""
        return self._updates

    @property
    def sample(self) -> int:
        """Samples of the completed updates."""
        return self._samples

    def advance(self, samples: int | None = None, *, batches: int | None = None, end_of_epoch: bool = False) -> None:
        """Say that an optimizer step was made: the batches handed out since the last one are consumed.

        Call it last in a step, after schedulers and averages were stepped, and save after it. With accumulated
        gradients it is called once per step, not once per batch. The last batch of an epoch completes the epoch;
        batches at its end that were too few for a step belong to the next one (else: ``discard``).

        Args:
            samples: Samples of this step; None means those of the batches that ``loader`` handed out.
            batches: How many batches this step used, for loops that fetch the next batch before the step: the others
                are used later, and come again where a run is resumed from here. None: all that were handed out.
            end_of_epoch: This step completes an epoch. Only for loops that have their data from elsewhere.

        Raises ``ConfigError`` where ``samples`` or the end of the epoch cannot be known or are known already, and
        ``StateMismatchError`` where what is said does not fit what ``loader`` handed out, or where a position inside
        an epoch was resumed but ``loader`` was not called. Then nothing has changed.
        """
        check_whole("samples", 0 if samples is None else samples, least=0)
        check_whole("batches", 0 if batches is None else batches, least=0)
        if self._loader is None:
            if samples is None or batches is not None:
                raise ConfigError("advance() cannot count batches without a loader. Next: advance(samples=len(batch))")
            if self._stored_layout is not None and self._position.batch > 0:
                raise StateMismatchError(
                    f"resumed after {self._position.batch} batches of epoch {self._position.epoch}, but the data does "
                    "not come from loader(). Next: call state.loader(dataset, batch_size=...) as the saved run did"
                )
            counted = samples
            self._position.epoch += int(end_of_epoch)
        elif end_of_epoch:
            raise ConfigError("the loader knows the end of its epochs. Next: advance() without end_of_epoch")
        else:
            counted = self._count(samples, batches)
            used = len(self._position.waiting) if batches is None else batches
            self._position.consume(used, len(self._loader))
        if self._stored_rng is not None:
            if not self._rng_is_own:
                _logger.warning(
                    "the random generators of the checkpoint were not restored before the first step, which makes "
                    "other numbers than the interrupted run. Next: call restore_rng() after everything is built"
                )
            self._stored_rng = None
        self._updates += 1
        self._samples += counted

    def _count(self, samples: int | None, batches: int | None) -> int:
        """The samples of a step with the oldest ``batches`` batches; raises where that cannot be."""
        waiting = self._position.waiting
        if batches is not None:
            if batches > len(waiting):
                raise StateMismatchError(
                    f"advance(batches={batches}), but {len(waiting)} were handed out since the last step"
                )
            return sum(waiting[:batches]) if samples is None else samples
        if samples is None and not waiting:
            raise StateMismatchError(
                "advance() without a batch since the last one. Next: advance(batches=1) if the loop fetches the next "
                "batch before the step; advance(samples=0) for a further step with the same batch"
            )
        if samples is not None and waiting and samples != sum(waiting):
            raise StateMismatchError(
                f"advance(samples={samples}), but batches of {', '.join(map(str, waiting))} samples were handed out "
                "since the last step. Next: advance(batches=1) if the loop fetches the next batch before the step; "
                "state.discard() for batches that go into no step; "
                f"advance(samples={samples}, batches={len(waiting)}) to count otherwise"
            )
        return sum(waiting) if samples is None else samples

    def discard(self) -> None:
        """Say that the batches handed out since the last step go into none: their gradients were set to zero.

        They are consumed, and count neither as an update nor as samples.
        """
        if self._loader is not None:
            self._position.consume(len(self._position.waiting), len(self._loader))

    def loader(
        self,
        dataset: Any,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        accumulate: int = 1,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> TrainingLoader:
        """The training data, resumed at the consumed position. May be called before or after the state is loaded.

        Each ``for`` over it is the rest of the current epoch. What is random in ``dataset`` and ``collate_fn`` is
        seeded per batch, whether workers run it or not, so that ``num_workers`` and ``prefetch_factor`` may change at
        any time without changing a number. An epoch without ``advance()`` is an error, unless ``accumulate``, the
        number of batches that one step takes, is larger. Other options (``num_workers``, ``pin_memory``, ...) are
        those of ``torch.utils.data.DataLoader``, without ``sampler``, ``batch_sampler`` and ``generator``.

        Between save and resume the number of samples must stay the same; ``batch_size``, ``shuffle`` and
        ``drop_last`` must, too, unless the checkpoint was saved at the end of an epoch: from there on, changed ones
        are fine.

        Raises ``ConfigError`` for a second loader or a dataset without samples by number, and ``StateMismatchError``
        where the loaded position is one in other data; it names both values.
        """
        if self._loader is not None:
            raise ConfigError(
                "this TrainerState has its training loader already, and keeps one position only. "
                "Next: a plain torch.utils.data.DataLoader for validation, or another TrainerState for another loop"
            )
        layout = Layout.of(dataset, batch_size, shuffle=shuffle, drop_last=drop_last)
        loader = TrainingLoader(
            self._position, dataset, layout, accumulate=accumulate, collate_fn=collate_fn, **options
        )
        if self._stored_layout is not None:
            _raise_for(layout.differences(self._stored_layout, self._position.batch))
        self._loader = loader
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain data and tensors, in the form of a trainer file. Tensors are not copied.

        Raises ``StateMismatchError`` inside a ``for`` over the loader between a batch and its ``advance()``, and after
        one whose last batches went into no step yet: a resumed run could not be exact there, since gradients are in no
        checkpoint. Also where a stateful object has state that no checkpoint can hold.
        """
        position = self._position
        if position.carried:
            raise StateMismatchError(
                f"the last {len(position.carried)} batches before epoch {position.epoch} went into no step yet, and "
                "their gradients are in no checkpoint. Next: save right after advance(); or make a step with them at "
                "the end of the epoch; or set the gradients to zero and call state.discard()"
            )
        if len(position.handed) > position.ahead:
            if position.current_pass is not None:
                raise StateMismatchError(
                    f"{len(position.handed)} batches were handed out since the last advance(), so that this is the "
                    "state of no iteration. Next: save right after advance()"
                )
            _logger.warning("%d batches after the last advance() will be handed out again", len(position.handed))
        layout = self._stored_layout if self._loader is None else attrs.asdict(self._loader.layout)
        members = {name: plain(member.state_dict(), name) for name, member in self._stateful.items()}
        state: dict[str, Any] = {"callback_state_dicts": {}, "training_iteration": self.iteration.to_mapping()}
        if isinstance(self._stateful.get("grad_scaler"), torch.amp.GradScaler):
            state["grad_scaler"] = dict(members["grad_scaler"][0])
        state[_OUR_KEY] = {
            "version": _VERSION,
            "seed": position.seed,
            "stateful": {name: value for name, (value, _types) in members.items()},
            "types": {name: types for name, (_value, types) in members.items()},
            "loader": {"batch": position.batch, "layout": None if layout is None else dict(layout)},
            "rng": take_rng(),
        }
        self._given_rng = state[_OUR_KEY]["rng"]
        return state

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise what ``load_state_dict`` would raise before it changes anything: ``StateMismatchError``."""
        self._parse(state_dict)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state that ``state_dict()`` gave, or leave everything as it is.

        The random generators are kept aside until ``restore_rng()``, because whatever is built meanwhile draws from
        them. From a trainer file of Noether, which holds nothing else, only the iteration is taken.

        Raises ``StateMismatchError``: names of stateful objects that are missing or unknown, another seed, other
        data, or an object that refuses its state (its own error is the cause; the others are put back).
        """
        iteration, ours, stored = self._parse(state_dict)
        if ours is None:
            _logger.warning(
                "the trainer state holds no state of this loop besides the iteration %s: the data begins with epoch "
                "%d, random generators and %s stay as they are",
                iteration,
                iteration.epoch,
                ", ".join(self._stateful) or "everything else",
            )
            self._move_to(iteration, self.seed, 0, None)
            return
        self._load_members(stored)
        if ours["loader"]["layout"] is None and self._loader is not None and not iteration.is_zero:
            _logger.warning("the checkpoint holds no position of a loader; the data begins with its epoch")
        self._move_to(iteration, ours["seed"], ours["loader"]["batch"], ours["loader"]["layout"])
        self._stored_rng = copy.deepcopy(ours["rng"])
        # Put back after a failure: where the generators still are, there is nothing to restore.
        given = self._given_rng
        self._rng_is_own = given is not None and same_rng(given, ours["rng"]) and same_rng(given, take_rng())

    def restore_rng(self) -> None:
        """Put the random generators into the loaded state; to be called last, after everything is built.

        Does nothing where nothing was loaded since the last call.
        """
        if self._stored_rng is not None:
            put_rng(self._stored_rng)
            self._stored_rng = None

    def _move_to(self, iteration: TrainingIteration, seed: int, batch: int, layout: Mapping[str, Any] | None) -> None:
        epoch, self._updates, self._samples = iteration.to_mapping().values()
        self._position.move_to(seed, epoch, batch)
        self._stored_layout = layout

    def _parse(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[TrainingIteration, Mapping[str, Any] | None, dict[str, Any]]:
        """The iteration, what is ours of a state that fits (None where Noether wrote it), and that of each object."""
        if not isinstance(state_dict, Mapping) or "training_iteration" not in state_dict:
            raise StateMismatchError("this is not the state of a trainer: it has no training_iteration")
        found = state_dict["training_iteration"]
        try:
            iteration = found if isinstance(found, TrainingIteration) else TrainingIteration.from_mapping(found)
        except (ConfigError, TypeError) as error:
            raise StateMismatchError(f"training_iteration cannot be used: {error}") from error
        if not iteration.is_fully_specified:
            raise StateMismatchError(f"training_iteration says {iteration}; epoch, update and sample are needed")
        ours = state_dict.get(_OUR_KEY)
        if ours is None:
            return iteration, None, {}
        if not isinstance(ours, Mapping) or ours.get("version") != _VERSION:
            version = ours.get("version") if isinstance(ours, Mapping) else ours
            raise StateMismatchError(
                f"trainer_state has version {version!r}, this installation reads {_VERSION}. "
                "Next: pip install --upgrade noether-init-core"
            )
        problems = [f"no {key}" for key in ("stateful", "loader", "rng") if not isinstance(ours.get(key), Mapping)]
        problems += [] if isinstance(ours.get("seed"), int) else ["no seed"]
        _raise_for(problems)
        stored = ours["loader"]
        if not isinstance(stored.get("batch"), int) or not isinstance(stored.get("layout"), Mapping | None):
            _raise_for([f"the position in the data is {dict(stored)!r}"])
        _raise_for(self._member_problems(ours["stateful"]))
        if self._seed_was_given and ours["seed"] != self.seed:
            problems.append(f"seed: {ours['seed']} when saved, {self.seed} now")
        if self._loader is not None and stored["layout"] is not None:
            problems += self._loader.layout.differences(stored["layout"], stored["batch"])
        _raise_for(problems)
        check_rng(ours["rng"])
        states, types = ours["stateful"], ours.get("types", {})
        if not isinstance(types, Mapping) or not all(isinstance(types.get(name), list) for name in self._stateful):
            _raise_for(["the types of its values are missing"])
        members = self._stateful.items()
        return (
            iteration,
            ours,
            {name: restored(states[name], types[name], member.state_dict(), name) for name, member in members},
        )

    def _member_problems(self, stored: Mapping[str, Any]) -> list[str]:
        missing = [name for name in self._stateful if name not in stored]
        unknown = [name for name in stored if name not in self._stateful]
        problems = []
        if missing:
            problems.append(
                f"the checkpoint has no state of {', '.join(missing)}; it has {listed(stored, none='none')}"
            )
        if unknown:
            named = ", ".join(f"{name}=..." for name in unknown)
            problems.append(
                f"the checkpoint has state of {', '.join(unknown)}, which this run does not have; it has "
                f"{listed(self._stateful, none='none')}. Next: TrainerState(..., {named})"
            )
        return problems

    def _load_members(self, stored: Mapping[str, Any]) -> None:
        before = {name: copy.deepcopy(member.state_dict()) for name, member in self._stateful.items()}
        touched: list[str] = []
        try:
            for name, member in self._stateful.items():
                touched.append(name)
                member.load_state_dict(stored[name])
        except Exception as error:
            stuck = []
            for other in touched:
                try:
                    self._stateful[other].load_state_dict(before[other])
                except Exception:  # the one that refused a state may refuse its own: it is named below
                    _logger.exception("%s could not be put back into the state that it had", other)
                    stuck.append(other)
            outcome = f"{', '.join(stuck)} could not be put back" if stuck else "everything was put back"
            problem = f"{touched[-1]} refuses its state: {type(error).__name__}: {error}"
            raise StateMismatchError(f"{problem}. {outcome[0].upper()}{outcome[1:]}", problems=[problem]) from error


def _check_member(name: str, member: Any) -> None:
    if name in _RESERVED:
        raise ConfigError(f"{name!r} cannot name a stateful object; reserved are {', '.join(sorted(_RESERVED))}")
    if isinstance(member, type) or not all(
        callable(getattr(member, method, None)) for method in ("state_dict", "load_state_dict")
    ):
        raise ConfigError(
            f"{name} is {type_of(member)} without state_dict() and load_state_dict(); "
            "TrainerState takes objects that have both"
        )


def _raise_for(problems: list[str]) -> None:
    if problems:
        raise StateMismatchError("the trainer's state does not fit: " + "; ".join(problems), problems=problems)
