"""Kinds that derive from ``InitializerBase``: with files and without, and one that delegates."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from noether_init_core import (
    CheckpointNotFoundError,
    ConfigError,
    InitializerBase,
    KindConfig,
    LoadedFile,
    LoadPlan,
    LocateQuery,
    Origin,
    Outcome,
    PlanError,
    PlanRow,
    Source,
    SourceInitializer,
    SourceInitializerConfig,
    kinds,
    leaf_models,
    open_checkpoint,
)


class PlainConfig(KindConfig):
    """The config of ``plain``."""

    folder: Path = Field(description="Where the files are.")


class PlainInitializer(InitializerBase):
    """Reads ``<folder>/<path of the single model>.pt`` with code of its own, and has no plan."""

    config_class: ClassVar[type[KindConfig]] = PlainConfig
    contract: ClassVar[int] = 1
    config: PlainConfig

    def path_of(self, path: str) -> Path:
        """The file of a single model. Raises ``CheckpointNotFoundError``."""
        found = self.config.folder / f"{path}.pt"
        if not found.is_file():
            raise CheckpointNotFoundError(f"{self.config.folder} has no {found.name}", path=found)
        return found

    def read(self, path: Path) -> dict[str, torch.Tensor]:
        """Every tensor of a file, verified."""
        with open_checkpoint(path) as reader:
            reader.verify()
            return {name: reader.read(name) for name in reader.tensors()}

    def compare(self, path: str, own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        """Raise ``PlanError`` unless the file has exactly the entries of the model, and finite values."""
        problems = [f"{path}: {name} is in one of model and file only" for name in sorted(own.keys() ^ state.keys())]
        for name in own.keys() & state.keys():
            value, target = state[name], own[name]
            if target.is_meta:
                problems.append(f"{path}: {name} has no memory")
            if (value.shape, value.dtype) != (target.shape, target.dtype):
                problems.append(f"{path}: {name} is {value.dtype} {tuple(value.shape)} in the file")
            if value.isnan().any() or (isinstance(target, torch.nn.Parameter) and not value.isfinite().all()):
                problems.append(f"{path}: {name} is not finite")
        if problems:
            raise PlanError("\n".join(problems), problems=problems)

    def states(self, model: Any) -> dict[str, dict[str, torch.Tensor]]:
        """Path of a single model -> what its file holds, read and compared before anything changes."""
        found = {}
        for path, leaf in leaf_models(model):
            found[path] = self.read(self.path_of(path))
            self.compare(path, leaf.state_dict(keep_vars=True), found[path])
        return found

    def write(self, leaf: Any, state: dict[str, torch.Tensor]) -> None:
        """Copy every entry in place."""
        with torch.no_grad():
            for name, target in leaf.state_dict(keep_vars=True).items():
                target.copy_(state[name])

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        self.states(model)

    def init_weights(self, model: Any) -> None:
        states = self.states(model)
        for path, leaf in leaf_models(model):
            self.write(leaf, states[path])

    def init_optimizer(self, model: Any) -> None:
        """Nothing: a fresh optimizer has no state."""


class StatedInitializer(PlainInitializer):
    """States a plan of its own; its config has no field ``on_missing``."""

    contract: ClassVar[int] = 1

    def plan(self, model: Any) -> LoadPlan:
        rows, origins = [], []
        for number, (path, leaf) in enumerate(leaf_models(model)):
            file = self.path_of(path)
            origins.append(Origin("stated", path, description=str(file.parent), files=(file.name,)))
            parameters = dict(leaf.named_parameters(remove_duplicate=False))
            for name, value in leaf.state_dict().items():
                dtype = str(value.dtype).removeprefix("torch.")
                rows.append(
                    PlanRow(
                        path,
                        name,
                        (name,),
                        "load",
                        tuple(value.shape),
                        dtype,
                        value.nbytes,
                        source_dtype=dtype,
                        source_shapes=(tuple(value.shape),),
                        is_parameter=name in parameters,
                        origin=number,
                    )
                )
        return LoadPlan("stated", tuple(rows), origins=tuple(origins))

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        self._files = {path: LoadedFile(self.path_of(path)) for path, _leaf in leaf_models(model)}

    def outcome(self) -> Outcome:
        return Outcome(files=getattr(self, "_files", {}))


class Float32Initializer(PlainInitializer):
    """Refuses half precision, as a kind whose format has none."""

    contract: ClassVar[int] = 1

    def compare(self, path: str, own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        if any(value.dtype == torch.bfloat16 for value in (*own.values(), *state.values())):
            raise PlanError(f"{path}: bfloat16 is not supported", problems=["bfloat16"])
        super().compare(path, own, state)


class OfRunInitializer(SourceInitializer):
    """Reads from a folder beside the runs, so that it needs to know where they are."""

    class Config(SourceInitializerConfig):
        beside: str = Field(description="The folder, from the root of the runs.")

    config_class: ClassVar[type[KindConfig]] = Config
    contract: ClassVar[int] = 1
    config: Config

    def locate(self, query: LocateQuery) -> Source | None:
        if self.path_provider is None:
            raise ConfigError("of_run needs to know the output root")
        path = Path(self.path_provider.output_root, self.config.beside, f"{query.model_name}.pt")
        return Source(path) if path.is_file() else None


class NoiseInitializer(InitializerBase):
    """Draws every parameter from the global generator, as ``torch.nn.init`` does."""

    contract: ClassVar[int] = 1

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        for path, leaf in leaf_models(model):
            parameters = dict(leaf.named_parameters())
            wrong = [name for name, one in parameters.items() if one.is_meta or not one.is_floating_point()]
            if wrong or not parameters:
                raise PlanError(f"{path}: nothing can be drawn for {wrong}", problems=wrong)

    def init_weights(self, model: Any) -> None:
        self.check(model)
        for _path, leaf in leaf_models(model):
            for parameter in leaf.parameters():
                torch.nn.init.normal_(parameter)

    def init_optimizer(self, model: Any) -> None:
        """Nothing."""


class WrappingInitializer(InitializerBase):
    """Delegates to ``file``, so that everything is planned, verified and reported."""

    config_class: ClassVar[type[KindConfig]] = PlainConfig
    contract: ClassVar[int] = 1
    config: PlainConfig

    def __init__(self, config: KindConfig, *, path_provider: Any = None) -> None:
        super().__init__(config, path_provider=path_provider)
        path = str(self.config.folder / "net.pt")
        self.delegates = (kinds.create({"kind": "file", "path": path}, path_provider=path_provider),)
