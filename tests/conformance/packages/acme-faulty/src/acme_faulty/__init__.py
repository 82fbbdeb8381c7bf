"""Kinds with one subtle fault each. Every one of them starts a single model with the right weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from acme_good import FolderConfig, FolderInitializer
from acme_good.plain import PlainInitializer
from pydantic import BaseModel, Field, SecretStr, field_validator

from noether_init_core import CheckpointNotFoundError, KindConfig, TrainingIteration, leaf_models


class Unregistered(FolderInitializer):
    """Registered by the tests of its author, and by nothing else."""

    contract = 1


class NoContract(FolderInitializer):
    """Does not say what contract it was written for."""


class _DriftingConfig(FolderConfig):
    percent: float = Field(default=50.0, description="A share, in percent.")

    @field_validator("percent")
    @classmethod
    def _share(cls, value: float) -> float:
        return value / 100


class DriftingConfig(FolderInitializer):
    """A value is converted each time the config is validated."""

    contract = 1
    config_class: ClassVar[type[KindConfig]] = _DriftingConfig


class _NoSchema(FolderConfig):
    translate: Callable[[str], str] | None = Field(default=None, description="For Python only.")


class NoSchema(FolderInitializer):
    """A field that no schema can describe."""

    contract = 1
    config_class: ClassVar[type[KindConfig]] = _NoSchema


class _Undescribed(FolderConfig):
    tries: int = 3


class Undescribed(FolderInitializer):
    """A field that nobody explains."""

    contract = 1
    config_class: ClassVar[type[KindConfig]] = _Undescribed


class _Options(BaseModel):
    depth: int = Field(default=1, description="How deep to look.")


class _Forgiving(FolderConfig):
    options: _Options = Field(default=_Options(), description="More options.")


class Forgiving(FolderInitializer):
    """Refuses unknown keys, but not those one level down."""

    contract = 1
    config_class: ClassVar[type[KindConfig]] = _Forgiving


def _made() -> type[FolderInitializer]:
    class Made(FolderInitializer):
        """A class that no other process can find by its name."""

        contract = 1

    return Made


Unpicklable = _made()


class Transposes(FolderInitializer):
    """Square matrices arrive the other way round."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        for _name, parameter in model.named_parameters() if hasattr(model, "named_parameters") else ():
            if parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1]:
                with torch.no_grad():
                    parameter.copy_(parameter.T.clone())


class ExpectsEverySubmodel(FolderInitializer):
    """A submodel may be None."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        names = [submodel.name for submodel in getattr(model, "submodels", {}).values()]
        self.logger.debug("%s", names)
        super().init_weights(model)


class OneLevelDeep(FolderInitializer):
    """Forgets composites within composites."""

    contract = 1

    def leaves(self, model: Any) -> Any:
        return tuple(leaf for leaf in super().leaves(model) if leaf.path.count(".") <= 1)


class SkipsFrozen(FolderInitializer):
    """Takes frozen to mean that weights must not be loaded."""

    contract = 1

    def leaves(self, model: Any) -> Any:
        return tuple(
            leaf for leaf in super().leaves(model) if not (leaf.model.is_frozen and list(leaf.model.named_parameters()))
        )


class SkipsMeta(FolderInitializer):
    """Leaves parameters without memory to somebody else."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        if any(one.is_meta for _name, one in model.named_parameters()) if hasattr(model, "named_parameters") else False:
            return
        super().init_weights(model)


class Unties(FolderInitializer):
    """Gives every module a parameter of its own."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        seen = set()
        for module in model.modules() if hasattr(model, "modules") else ():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in seen:
                    setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
                seen.add(id(parameter))


class SkipsBuffers(FolderInitializer):
    """Thinks that buffers are no weights."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        buffers = dict(model.named_buffers()) if hasattr(model, "named_buffers") else {}
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        super().init_weights(model)
        for name, buffer in before.items():
            buffers[name].copy_(buffer)


class Freezes(FolderInitializer):
    """Switches the gradients of what it has loaded off."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        for name, parameter in model.named_parameters() if hasattr(model, "named_parameters") else ():
            if name.startswith("embed."):
                parameter.requires_grad_(False)


class FillsWhatIsKept(FolderInitializer):
    """Fills with zeros what the file has not, whatever the plan says."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        kept = [row.target for row in self.plan(model).rows if row.action == "keep"]
        super().init_weights(model)
        for name, parameter in model.named_parameters() if kept else ():
            if name in kept:
                torch.nn.init.zeros_(parameter)


class PlansInEvalMode(FolderInitializer):
    """Leaves the model in evaluation mode after a plan."""

    contract = 1

    def plan(self, model: Any) -> Any:
        if hasattr(model, "eval"):
            model.eval()
        return super().plan(model)

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        if hasattr(model, "train"):
            model.train()


class OnceOnly(FolderInitializer):
    """Initializes the first model that comes."""

    contract = 1
    _done = False

    def init_weights(self, model: Any) -> None:
        if not self._done:
            super().init_weights(model)
        self._done = True


class ClearsFirst(FolderInitializer):
    """Clears the weights before it looks whether it can load any."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        for name, parameter in model.named_parameters() if hasattr(model, "named_parameters") else ():
            if name == "embed.weight":
                torch.nn.init.zeros_(parameter)
        super().init_weights(model)


class LooksAtFilesOnly(PlainInitializer):
    """Checks that the file is there and is not damaged, and not whether it fits the model."""

    contract = 1

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        for path, _leaf in leaf_models(model):
            self.read(self.path_of(path))


class HopesForTheFile(PlainInitializer):
    """Leaves it to ``init_weights`` to find out that the file is not there."""

    contract = 1

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        try:
            super().check(model, trainer, callbacks)
        except CheckpointNotFoundError:
            self.logger.info("the file may still come")


class PlainErrors(FolderInitializer):
    """Raises what Python raises."""

    contract = 1

    def locate(self, query: Any) -> Any:
        try:
            return super().locate(query)
        except CheckpointNotFoundError as error:
            raise KeyError(query.model_name) from error


class ChecksByDoing(FolderInitializer):
    """Loads the weights in ``check`` already: then it certainly works."""

    contract = 1

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        super().check(model, trainer, callbacks)
        super().init_weights(model)


class StartsLater(FolderInitializer):
    """Says the iteration of the source, although it restores weights only."""

    contract = 1

    def start_checkpoint(self) -> TrainingIteration:
        return TrainingIteration(2, 8, 64)


class ForgetsItsStart(FolderInitializer):
    """Says another start when it is asked again."""

    contract = 1
    _asked = 0

    def start_checkpoint(self) -> TrainingIteration:
        self._asked += 1
        return TrainingIteration(0, self._asked - 1, 0)


class NeedsARun(FolderInitializer):
    """Uses the run that is started, which may be nobody's business."""

    contract = 1

    def locate(self, query: Any) -> Any:
        self.logger.debug("for run %s", self.path_provider.run_id)
        return super().locate(query)


class ClearsTheOptimizer(FolderInitializer):
    """Throws away the state of the optimizer."""

    contract = 1

    def init_optimizer(self, model: Any) -> None:
        if getattr(model, "optimizer", None) is not None:
            model.optimizer.state.clear()


class ResetsTheTrainer(FolderInitializer):
    """Puts the trainer back to the beginning."""

    contract = 1

    def init_trainer(self, trainer: Any) -> None:
        trainer.load_state_dict({"number": 0})


class ResetsCallbacks(FolderInitializer):
    """Puts callbacks back to the beginning."""

    contract = 1

    def init_callbacks(self, callbacks: list[Any], model: Any) -> None:
        for callback in callbacks:
            callback.load_state_dict({"number": 0})


class SeedsTheProcess(FolderInitializer):
    """Seeds the generator that everybody uses."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        torch.manual_seed(0)
        super().init_weights(model)


class LeavesAMark(FolderInitializer):
    """Writes beside the weights when they were used last."""

    contract = 1

    def locate(self, query: Any) -> Any:
        found = super().locate(query)
        if found is not None:
            found.location.with_suffix(".used").touch()
        return found


class KeepsFilesOpen(FolderInitializer):
    """Holds the file for as long as the process lives."""

    contract = 1
    _held: ClassVar[list[Any]] = []

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        self._held += [file.path.open("rb") for file in self.outcome().files.values()]


class _TokenConfig(FolderConfig):
    token: SecretStr = Field(default=SecretStr(""), description="Lets you in.")


class TellsTheToken(FolderInitializer):
    """Writes the token into the origin, where the report shows it."""

    contract = 1
    config_class: ClassVar[type[KindConfig]] = _TokenConfig
    config: _TokenConfig

    def locate(self, query: Any) -> Any:
        found = super().locate(query)
        if found is None:
            return None
        return type(found)(found.location, origin={"run_id": f"token={self.config.token.get_secret_value()}"})


class DependsOnTheRank(FolderInitializer):
    """Gives every rank a little noise of its own."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        rank = int(os.environ.get("RANK", "0"))
        with torch.no_grad():
            for _name, parameter in model.named_parameters() if rank else ():
                parameter.mul_(1 + 0.001 * rank)
