"""The content of a set: plain objects from models, optimizers and a trainer, and the training that the set belongs
to."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import attrs
import torch

from noether_init_core.errors import CheckpointFormatError, ConfigError, type_of
from noether_init_core.files.content import METADATA, state_dict_of
from noether_init_core.files.plain_data import plain
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import listed, logger_of
from noether_init_core.models import CompositeModelLike, ModelLike, leaf_models
from noether_init_core.sets.checkpoint_set import SETS_FOLDER
from noether_init_core.sets.file_names import CheckpointFileName, Part
from noether_init_core.sets.manifest import Manifest
from noether_init_core.sets.snapshot import Snapshot

Averages = Mapping[str, Any]
_logger = logger_of(__name__)


@attrs.frozen(eq=False)
class FileContent:
    """One file to write. ``buffers`` are the keys of weights that are not parameters; None for other files."""

    name: CheckpointFileName
    content: dict[str, Any]
    buffers: tuple[str, ...] | None = None


def iteration_for(iteration: Any, trainer: Any) -> TrainingIteration:
    """Return ``iteration``, or the iteration of the trainer; raise ``ConfigError`` unless all three fields are
    given."""
    given = getattr(trainer, "iteration", None) if iteration is None else iteration
    if isinstance(given, Mapping):
        given = TrainingIteration.from_mapping(given)
    fields = [getattr(given, name, None) for name in ("epoch", "update", "sample")]
    if None in fields:
        reason = "save() got no iteration, and the trainer has no iteration"
        reason = reason if given is None else f"iteration {given} lacks epoch, update or sample"
        raise ConfigError(
            f"{reason}. Next: save(model, TrainingIteration(epoch, update, sample)) or save(model, trainer=...)"
        )
    full = TrainingIteration(*fields)
    if TrainingIteration.in_text(str(full)) is None:
        raise ConfigError(f"iteration {full} has a number of more than 18 digits, too long for the name of a set")
    return full


def contents_of(
    model: Any, iteration: TrainingIteration, run_id: str, *, optimizer: bool, trainer: Any, averages: Averages | None
) -> list[FileContent]:
    """Return the files of a set: weights, averages and optimizer state of each single model, then trainer state.

    Raises ``ConfigError`` for objects that cannot be saved, ``InvalidNameError`` for invalid names of files,
    ``CheckpointFormatError`` for values that could not be read again.
    """
    leaves = _leaves(model)
    variants = _averages(averages, model, leaves)
    tag = str(iteration)
    common = {"checkpoint_tag": tag, "training_iteration": iteration.to_mapping(), "run_id": run_id}
    found = []

    def add(
        name: str, info: str | None, part: Part, content: dict[str, Any], buffers: tuple[str, ...] | None = None
    ) -> None:
        found.append(FileContent(CheckpointFileName(name, info, tag, part).checked(), content, buffers))

    for path, leaf in leaves.items():
        config = _model_config(path, leaf)
        state = plain(weights_of(path, leaf), f"{path}.state_dict")
        parameters = {name for name, _ in leaf.named_parameters(remove_duplicate=False)}
        buffers = tuple(
            key for key, value in state.items() if isinstance(value, torch.Tensor) and key not in parameters
        )
        add(path, None, "model", {"state_dict": state, **common, **config}, buffers)
        for info, average in variants.get(path, {}).items():
            CheckpointFileName(path, info, tag, "model").checked()
            _check_average(path, info, average, leaf)
            key, _, value = info.partition("=")
            # Noether stores the factor in its EMA files under this key. It must not replace a key of the format.
            factor = {key: _number(value)} if key not in ("state_dict", *common, *config) else {}
            state = plain(average, f"averages.{path}.{info}")
            add(path, info, "model", {"state_dict": state, **common, **factor, **config})
    for path, leaf in leaves.items() if optimizer else ():
        if leaf.optimizer is not None and not leaf.is_frozen:
            # load_state_dict of torch and Noether reads state and param_groups and ignores other keys.
            origin = {key: common[key] for key in ("training_iteration", "run_id")}
            add(path, None, "optim", {**_optimizer_content(path, leaf), **origin})
    add(str(model.name), None, "trainer", _trainer_content(trainer, iteration, run_id))
    return found


def weights_of(path: str, model: Any) -> Mapping[str, Any]:
    """The state dict without entries that are neither tensors nor extra state: they could not be loaded."""
    state: Mapping[str, Any] = model.state_dict()
    strangers = [
        key
        for key, value in state.items()
        if not isinstance(value, torch.Tensor) and str(key).rpartition(".")[2] != "_extra_state"
    ]
    if not strangers:
        return state
    _logger.warning(
        "%s: %s of state_dict() %s, not saved",
        path,
        listed(strangers),
        "is neither a tensor nor extra state" if len(strangers) == 1 else "are neither tensors nor extra state",
    )
    kept = OrderedDict((key, value) for key, value in state.items() if key not in strangers)
    if hasattr(state, METADATA):
        setattr(kept, METADATA, getattr(state, METADATA))
    return kept


def _leaves(model: Any) -> dict[str, Any]:
    hint = 'Next: bind(module, name="...", optimizer=...), or compose(name, {...}) for submodels'
    if not isinstance(model, ModelLike | CompositeModelLike) or not isinstance(model.name, str):
        raise ConfigError(f"{type_of(model)} is not a model: it lacks name, optimizer, is_frozen or device. {hint}")
    leaves: dict[str, Any] = {}
    for path, leaf in leaf_models(model):
        if not isinstance(leaf, ModelLike):
            raise ConfigError(
                f"{path}: {type_of(leaf)} is not a model: it lacks name, optimizer, is_frozen or device. {hint}"
            )
        if path in leaves:
            raise ConfigError(f"two submodels have the path {path}. Next: rename one")
        leaves[path] = leaf
    if not leaves:
        raise ConfigError(f"no single model was found in {model.name}: all its submodels are None. {hint}")
    return leaves


def _averages(averages: Averages | None, model: Any, leaves: Mapping[str, Any]) -> dict[str, Averages]:
    if not averages:
        return {}
    if not isinstance(model, CompositeModelLike):
        return {str(model.name): averages}
    found = {}
    for name, variants in averages.items():
        path = name if name in leaves else f"{model.name}.{name}"
        if path not in leaves or not isinstance(variants, Mapping):
            raise ConfigError(
                f"averages of the composite {model.name}: {name!r} is not a submodel with averages. "
                "Next: pass {submodel: {info: state dict}}; submodels: "
                + ", ".join(leaf.removeprefix(f"{model.name}.") for leaf in leaves)
            )
        found[path] = variants
    return found


def _check_average(path: str, info: str, average: Any, model: Any) -> None:
    """Refuse an average that could not be loaded into ``model``, because of its keys or shapes.

    One name of a tied parameter is enough, and buffers outside the state dict (non-persistent) are accepted.
    """
    place = f"averages of {path}, {info!r}"
    if not isinstance(average, Mapping):
        raise ConfigError(f"{place}: {type_of(average)} is not a state dict. Next: pass its state_dict()")
    own = weights_of(path, model)
    hidden = {name for name, _ in model.named_buffers()} if callable(getattr(model, "named_buffers", None)) else set()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    covered = {name for aliases in names.values() if any(alias in average for alias in aliases) for name in aliases}
    missing = [key for key in own if key not in average and key not in covered]
    strange = [key for key in average if key not in own and key not in hidden]
    unlike = [key for key in own if _shape(own[key]) != _shape(average.get(key, own[key]))]
    if not (missing or strange or unlike):
        return
    problems = [
        f"it lacks {listed(missing, 3)}" if missing else "",
        f"the model lacks {listed(strange, 3)}" if strange else "",
        f"{listed(unlike, 3)} has another shape" if unlike else "",
    ]
    inner = {key.removeprefix("module.") for key in average if str(key).startswith("module.")}
    if inner and inner >= {*own} - covered:
        # torch.optim.swa_utils.AveragedModel wraps the averaged copy in its attribute module.
        advice = f'averages={{"{info}": averaged.module.state_dict()}}'
    elif missing and not strange and not unlike:
        advice = f'averages={{"{info}": {{**model.state_dict(), **average}}}}'
    else:
        advice = "pass the state dict of an average of this model"
    raise ConfigError(f"{place}: {'; '.join(filter(None, problems))}, so it could not be loaded. Next: {advice}")


def _shape(value: Any) -> tuple[int, ...] | None:
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _model_config(path: str, model: Any) -> dict[str, Any]:
    """Return the ``model_config`` of the model as plain data, with the name of its class; empty without a config."""
    config = getattr(model, "model_config", None)
    if config is None:
        return {}
    place = f"{path}.model_config"
    if isinstance(config, Mapping):
        return {"model_config": plain(config, place)}
    if not hasattr(config, "model_dump"):
        return {}
    try:
        values = plain(config.model_dump(), place)
    except CheckpointFormatError:  # values such as dates: in JSON mode, pydantic converts them to strings and lists
        values = plain(config.model_dump(mode="json"), place)
    return {"model_config": values, "config_kind": f"{type(config).__module__}.{type(config).__qualname__}"}


def _optimizer_content(path: str, model: Any) -> dict[str, Any]:
    optimizer = model.optimizer
    state = dict(optimizer.state_dict())
    inner = getattr(optimizer, "torch_optim", optimizer)
    state["optimizer_class"] = f"{type(inner).__module__}.{type(inner).__qualname__}"
    names = state.pop("param_idx_to_name", None) or getattr(optimizer, "param_idx_to_name", None)
    if names is None:
        names = _names_of_parameters(path, model, optimizer)
    return {**plain(state, f"{path}.optimizer"), "param_idx_to_name": plain(names, f"{path}.param_idx_to_name")}


def _names_of_parameters(path: str, model: Any, optimizer: Any) -> dict[int, str]:
    """Return number -> name of the parameters of an optimizer, in torch's numbering.

    Parameters are matched by identity. A match by order or shape would not notice two swapped ones of equal shape.
    """
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise ConfigError(
            f"{path}.optimizer: {type_of(optimizer)} has neither param_groups nor param_idx_to_name, so its "
            "state could not be matched to parameters again. Next: add param_idx_to_name (index -> name)"
        )
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    names: dict[int, str] = {}
    for number, parameter in enumerate(parameter for group in groups for parameter in group["params"]):
        if id(parameter) not in own:
            raise ConfigError(
                f"{path}.optimizer: its parameter {number} with shape {list(parameter.shape)} does not belong to "
                f"{path}. Next: build the optimizer from {path}.parameters(), after the model has its final parameters"
            )
        names[number] = own[id(parameter)]
    return names


def _trainer_content(trainer: Any, iteration: TrainingIteration, run_id: str) -> dict[str, Any]:
    """Return the content of the trainer file; without a trainer, only the fields that a resume needs."""
    state = {} if trainer is None else trainer.state_dict()
    if not isinstance(state, Mapping):
        raise ConfigError(f"the trainer's state_dict() is {type_of(state)}, not a dict")
    own = state.get("training_iteration")
    if own is not None and iteration_for(own, None) != iteration:
        raise ConfigError(
            f"the trainer is at {iteration_for(own, None)}, but save() got the iteration {iteration}. "
            "Next: leave out the iteration, or advance the trainer first"
        )
    if state.get("run_id", run_id) != run_id:
        raise ConfigError(
            f"the trainer's state_dict() has the key run_id with {state['run_id']!r}, but the file stores its own run "
            f"{run_id!r} under this key. Next: rename the key"
        )
    content = plain({**state, "training_iteration": iteration.to_mapping(), "run_id": run_id}, "trainer")
    content.setdefault("callback_state_dicts", {})
    state_dict = state_dict_of(content, torch.Tensor)
    for key in state_dict or ():
        if not isinstance(key, str):
            raise CheckpointFormatError(
                f"trainer.state_dict: the key {key!r} is not a string, and the reader refuses such keys in an entry "
                "named state_dict. Next: use string keys, or rename the entry"
            )
    return dict(content)


# The training that a set belongs to, the set that the training was resumed from, and the sets that it passed over.
#
# One run id can have two trainings, if the script is started again without a resume. Their sets are in one folder, so
# each manifest records its training. A resumed training continues, also from an earlier set and in another process.


@attrs.frozen
class Start:
    """How the training of this process started, as far as it is known.

    Attributes:
        is_resumed: Whether the process resumed a set; None: unknown.
        iteration: The start iteration; None: unknown.
        folder: The folder of the resumed set.
        passed_over: Names of sets in the same folder that the resume passed over as damaged or refused.
        training: The id to use if this is a new training.
    """

    is_resumed: bool | None = None
    iteration: TrainingIteration | None = None
    folder: Path | None = None
    passed_over: tuple[str, ...] = ()
    training: str | None = None

    @classmethod
    def of(cls, report: Any, trainer: Any) -> Self:
        """Read it from the report, else from the report of the trainer (``init_report``), else from its lineage."""
        for one in (report, getattr(trainer, "init_report", None)):
            iteration = getattr(one, "start", None)
            if isinstance(iteration, TrainingIteration):
                parts = [part for part in getattr(one, "initializers", ()) if getattr(part, "resumed_set", None)]
                return cls(
                    is_resumed=bool(parts) or not iteration.is_zero,
                    iteration=iteration,
                    folder=Path(parts[0].resumed_set) if parts else None,
                    passed_over=tuple(name for part in parts[:1] for name, _reason in part.passed_over),
                    training=getattr(one, "training", None) or None,
                )
        for entry in getattr(trainer, "lineage", None) or ():
            said = dict(entry)
            if said.get("set") or said.get("kind") == "resume":
                folder = Path(str(said["set"])) if said.get("set") else None
                return cls(is_resumed=True, folder=folder, passed_over=_texts(said.get("passed_over")))
        return cls()


@attrs.frozen
class Descent:
    """The fields of a manifest about the training of its set; see ``Manifest``.

    ``others_up_to``: if this save starts a new training beside another one, the iteration of the newest other set.
    """

    training: str | None
    started_from: str | None = None
    passed_over: tuple[str, ...] = ()
    others_up_to: TrainingIteration | None = None


class Descents:
    """Determines for each save of one writer which training the set belongs to.

    - A process that resumed a set of this folder continues the training of that set.
    - A process that resumed another set, or no set, starts a new training, with the id of the report.
    - If the start is unknown, the process continues the training of the newest set, unless it is at an earlier
      iteration than that set.
    - If the iterations of one writer go back without a resume, a new training starts.

    Retention counts the sets of each training separately. So taking two trainings for one could remove sets, while
    taking one for two only needs space. A start that is known at one save holds for later saves without a trainer or
    report.
    """

    def __init__(self) -> None:
        self._training: str | None = None
        self._is_new = False
        self._start: Start | None = None
        self._last: TrainingIteration | None = None

    def of_save(self, snapshot: Snapshot, iteration: TrainingIteration, start: Start) -> Descent:
        """Return the fields for a save of ``iteration`` into the folder. The caller holds the lock of the folder."""
        newest = next(_manifests(snapshot), None)
        if start.is_resumed is None and self._start is not None:
            start = self._start
        started_from = _name_in(snapshot, start.folder)
        is_behind = start.iteration is not None and iteration < start.iteration
        goes_on = bool(start.is_resumed) and (start.folder is None or started_from is not None) and not is_behind
        if not goes_on:
            started_from = None
            self._choose(iteration, start, newest)
        elif start != self._start:
            resumed = (one for one in _manifests(snapshot) if one.folder_name == started_from)
            found = newest if started_from is None else next(resumed, newest)
            self._training = found.training if found is not None else start.training or uuid.uuid4().hex
            self._is_new = False
        self._start, self._last = start, iteration
        own = next((one for one in _manifests(snapshot) if one.training == self._training), None)
        passed_over = set(own.passed_over if own is not None else ())
        if started_from is not None:
            # A set that was passed over before and is now resumed counts again.
            passed_over = (passed_over | set(start.passed_over)) - {started_from}
        is_beside = newest is not None and newest.training != self._training and not goes_on
        return Descent(
            self._training,
            started_from,
            tuple(sorted(passed_over.intersection(folder.name for folder in snapshot.folders))) if passed_over else (),
            newest.training_iteration if is_beside and newest is not None else None,
        )

    def _choose(self, iteration: TrainingIteration, start: Start, newest: Manifest | None) -> None:
        before = self._start
        if before is not None and (start == before or (self._is_new and before.is_resumed is None)):
            if self._last is not None and iteration < self._last:
                self._training, self._is_new = uuid.uuid4().hex, True
        elif start.is_resumed is None and newest is not None and iteration >= newest.training_iteration:
            self._training, self._is_new = newest.training, False
        else:
            self._training, self._is_new = start.training or uuid.uuid4().hex, True


def _manifests(snapshot: Snapshot) -> Iterator[Manifest]:
    """Yield the manifests that can be read, newest first and lazily; retention keeps and logs the other sets."""
    return (found.manifest for found in snapshot.readable() if found.manifest is not None)


def _name_in(snapshot: Snapshot, folder: Path | None) -> str | None:
    """Return the name of the folder of a set if it is in this folder of checkpoints, else None."""
    resolve = snapshot.storage.resolve
    if folder is None or resolve(folder.parent) != resolve(snapshot.folder / SETS_FOLDER):
        return None
    return folder.name


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        return ()
    return tuple(str(item) for item in value)
