"""Kinds with code of their own, with one fault each: how they read, compare, write, plan and share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from acme_good import FolderInitializer
from acme_good.plain import NoiseInitializer, PlainInitializer, StatedInitializer

from noether_init_core import (
    CheckpointNotFoundError,
    InitializerBase,
    LoadPlan,
    PlanError,
    kinds,
    leaf_models,
    open_checkpoint,
)

State = dict[str, torch.Tensor]


class TrustsTheBytes(PlainInitializer):
    """Reads with torch.load, which ignores the checksums of the file."""

    contract = 1

    def read(self, path: Path) -> State:
        return torch.load(path, weights_only=True)


class VerifiesAfterwards(PlainInitializer):
    """Verifies what it has loaded already."""

    contract = 1

    def read(self, path: Path) -> State:
        with open_checkpoint(path) as reader:
            return {name: reader.read(name) for name in reader.tensors()}

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        for path, _leaf in leaf_models(model):
            with open_checkpoint(self.path_of(path)) as reader:
                reader.verify()


class VerifiesInCheckOnly(PlainInitializer):
    """Reads the file a second time without looking at its checksums."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        for path, leaf in leaf_models(model):
            state = torch.load(self.path_of(path), weights_only=True)
            self.compare(path, leaf.state_dict(keep_vars=True), state)
            self.write(leaf, state)


class OverlooksNan(PlainInitializer):
    """Takes every value as it is."""

    contract = 1

    def compare(self, path: str, own: State, state: State) -> None:
        super().compare(path, own, {name: torch.zeros_like(value) for name, value in state.items()})


class CastsEverything(PlainInitializer):
    """Converts to whatever dtype the model has."""

    contract = 1

    def compare(self, path: str, own: State, state: State) -> None:
        super().compare(
            path, own, {name: value.to(own[name].dtype) if name in own else value for name, value in state.items()}
        )


class ThroughFloat32(PlainInitializer):
    """Averages in float32, also where there is nothing to average."""

    contract = 1

    def write(self, leaf: Any, state: State) -> None:
        real = {name: value.float() if not value.is_complex() else value for name, value in state.items()}
        super().write(leaf, real)


class Unpickles(PlainInitializer):
    """Looks for a note in the file with torch.load, and lets the file run."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        for path, _leaf in leaf_models(model):
            self.logger.debug("%s", len(torch.load(self.path_of(path), weights_only=False)))


class ByPosition(PlainInitializer):
    """Takes the entries of the file in the order of the model."""

    contract = 1

    def write(self, leaf: Any, state: State) -> None:
        by_shape = {}
        for value in state.values():
            by_shape.setdefault((value.shape, value.dtype), []).append(value)
        with torch.no_grad():
            for target in leaf.state_dict(keep_vars=True).values():
                values = by_shape[target.shape, target.dtype]
                target.copy_(values.pop(0) if len(values) > 1 else values[0])


class WritesTheBlock(PlainInitializer):
    """Fills the memory of a parameter from its beginning."""

    contract = 1

    def write(self, leaf: Any, state: State) -> None:
        super().write(leaf, state)
        for name, one in leaf.named_parameters():
            if one.untyped_storage().nbytes() > one.nbytes and one.storage_offset() == 0:
                with torch.no_grad():
                    torch.empty(0).set_(one.untyped_storage()).fill_(1.0)
                super().write(leaf, state)
                self.logger.debug("filled the block of %s", name)


class DropsAbsentParts(PlainInitializer):
    """Starts a submodel afresh if its file is not there."""

    contract = 1

    def states(self, model: Any) -> dict[str, State]:
        found = {}
        for path, leaf in leaf_models(model):
            try:
                found[path] = self.read(self.path_of(path))
            except CheckpointNotFoundError:
                if "." not in path:
                    raise
                found[path] = {name: value.clone() for name, value in leaf.state_dict().items()}
            self.compare(path, leaf.state_dict(keep_vars=True), found[path])
        return found


class ReadsInInit(PlainInitializer):
    """Lists the folder in the constructor."""

    contract = 1

    def __init__(self, config: Any, *, path_provider: Any = None) -> None:
        super().__init__(config, path_provider=path_provider)
        self.names = sorted(os.listdir(self.config.folder)) if self.config.folder.is_dir() else []


class LooksInInit(PlainInitializer):
    """Notes in the constructor whether the folder is there."""

    contract = 1

    def __init__(self, config: Any, *, path_provider: Any = None) -> None:
        super().__init__(config, path_provider=path_provider)
        self.is_there = self.config.folder.is_dir()

    def path_of(self, path: str) -> Path:
        if not self.is_there:
            raise CheckpointNotFoundError(f"{self.config.folder} is not there")
        return super().path_of(path)


class CachesForEver(PlainInitializer):
    """Reads each path once in the life of the process."""

    contract = 1

    def states(self, model: Any) -> dict[str, State]:
        found = super().states(model)
        return {path: _cached(str(self.path_of(path)), lambda path=path: found[path]) for path in found}


_CACHE: dict[str, State] = {}


def _cached(path: str, read: Any) -> State:
    if path not in _CACHE:
        _CACHE[path] = read()
    return _CACHE[path]


class SharesItsFolder(PlainInitializer):
    """Keeps its folder on the class."""

    contract = 1
    folder: ClassVar[Path] = Path()

    def __init__(self, config: Any, *, path_provider: Any = None) -> None:
        super().__init__(config, path_provider=path_provider)
        type(self).folder = self.config.folder

    def path_of(self, path: str) -> Path:
        super().path_of(path)
        return type(self).folder / f"{path}.pt"


class WakesTheModel(PlainInitializer):
    """Puts every module into training mode."""

    contract = 1

    def write(self, leaf: Any, state: State) -> None:
        super().write(leaf, state)
        leaf.train()


class ClearsGradients(PlainInitializer):
    """Removes gradients, which may be accumulating."""

    contract = 1

    def write(self, leaf: Any, state: State) -> None:
        super().write(leaf, state)
        leaf.zero_grad()


class LeavesAHook(PlainInitializer):
    """Watches the first forward pass, and every other one."""

    contract = 1

    def write(self, leaf: Any, state: State) -> None:
        super().write(leaf, state)
        leaf.register_forward_hook(_nothing)


def _nothing(*_arguments: object) -> None:
    """A hook."""


class Tags(PlainInitializer):
    """Leaves an attribute on the module."""

    contract = 1

    def write(self, leaf: Any, state: State) -> None:
        super().write(leaf, state)
        leaf.module.initialized_by = "tags"


class PlansByDoing(FolderInitializer):
    """Loads the weights to see what the plan would be."""

    contract = 1

    def plan(self, model: Any) -> Any:
        plan = super().plan(model)
        if plan.is_fine and hasattr(model, "named_parameters"):
            with torch.no_grad():
                for _name, parameter in model.named_parameters():
                    parameter.add_(0 if parameter.is_meta else 1)
        return plan


class InferenceTensors(FolderInitializer):
    """Gives memory to a model in inference mode."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        is_meta = hasattr(model, "parameters") and any(one.is_meta for one in model.parameters())
        with torch.inference_mode(is_meta):
            super().init_weights(model)


class WrapsSecretly(InitializerBase):
    """Lets ``file`` do everything, without saying so."""

    config_class = FolderInitializer.config_class
    contract = 1

    def _inner(self) -> InitializerBase:
        return kinds.create({"kind": "file", "path": str(self.config.folder / "net.pt")})

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        self._inner().check(model, trainer, callbacks)

    def init_weights(self, model: Any) -> None:
        self._inner().init_weights(model)

    def init_optimizer(self, model: Any) -> None:
        """Nothing."""


class DelegatesLater(PlainInitializer):
    """Finds out in ``check`` to whom it delegates."""

    contract = 1

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        super().check(model, trainer, callbacks)
        self.delegates = (kinds.create({"kind": "file", "path": str(self.config.folder / "net.pt")}),)


class SeedsByHash(NoiseInitializer):
    """Draws with a seed that is another one in each process."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        self.check(model)
        for path, leaf in leaf_models(model):
            for name, parameter in leaf.named_parameters():
                generator = torch.Generator().manual_seed(hash(f"{path}.{name}") & 0xFFFF)
                torch.nn.init.normal_(parameter, generator=generator)


class _TwoPartsError(PlanError):
    """An error with another constructor than its base class."""

    def __init__(self, path: str, names: list[str]) -> None:
        super().__init__(f"{path} has no {', '.join(names)}", problems=names)


class UnpicklableError(PlainInitializer):
    """Its error cannot be sent to another process."""

    contract = 1

    def path_of(self, path: str) -> Path:
        try:
            return super().path_of(path)
        except CheckpointNotFoundError as error:
            raise _TwoPartsError(str(self.config.folder), [path]) from error


class Exits(PlainInitializer):
    """Ends the process if something is wrong."""

    contract = 1

    def path_of(self, path: str) -> Path:
        try:
            return super().path_of(path)
        except CheckpointNotFoundError as error:
            raise SystemExit(str(error)) from error


class StatesTooLittle(StatedInitializer):
    """Leaves the last entry out of its plan, and writes it."""

    contract = 1

    def plan(self, model: Any) -> LoadPlan:
        plan = super().plan(model)
        return LoadPlan(plan.kind, plan.rows[:-1], origins=plan.origins)
