"""What faults are put into: checkpoints on disk, how each is loaded, and everything that loading may change.

Every subject is loaded into a fresh process state: a network, its optimizer, a trainer and a callback, filled with
values that no checkpoint holds. ``Loaded.digest`` is one number over all of it, so that "equal bit for bit" and
"nothing was changed" are each one comparison.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
import xxhash

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind

__all__ = ["BUILDERS", "FORMATS", "Loaded", "Process", "Subject", "build", "digest_of"]

PARTS = ("model", "optim", "trainer")
#: Three sets: one for walking back to, then one iteration saved twice, so that two sets have files of the same names.
ITERATIONS = (TrainingIteration(1, 10, 100), TrainingIteration(2, 20, 200), TrainingIteration(2, 20, 200))


class Network(torch.nn.Module):
    """Parameters, an integer buffer and a float buffer; about ``4 * width ** 2`` bytes of weights."""

    mean: torch.Tensor
    seen: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((width, width), -1.0))
        self.bias = torch.nn.Parameter(torch.full((width,), -2.0))
        self.register_buffer("mean", torch.full((width,), -3.0, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(-4))


class Stateful:
    """The least trainer or callback."""

    def __init__(self, **state: Any) -> None:
        self.state: dict[str, Any] = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.state = dict(state_dict)


class Trainer(Stateful):
    """Hands the states of callbacks to the trainer file."""


class Callback(Stateful):
    """A callback with state."""


class Process:
    """A network, its optimizer, a trainer and a callback, as a program has them before it loads anything."""

    def __init__(self, width: int) -> None:
        self.network = Network(width)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.5)
        self.model = bind(self.network, name="mlp", optimizer=self.optimizer)
        self.trainer = Trainer(value=torch.tensor([-5.0]), samples=-6)
        self.callback = Callback(best=-7.0)
        self.start: str | None = None

    def train(self, seed: int) -> None:
        """Random values everywhere, as after some training."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.network.mean.copy_(torch.randn(self.network.mean.shape, generator=generator))
            self.network.seen.fill_(seed)
        self.optimizer.step()
        self.callback.state = {"best": float(seed)}
        self.trainer.state = {
            "value": torch.full((64,), float(seed)),
            "samples": seed,
            "callback_state_dicts": {"Callback": dict(self.callback.state)},
        }

    def digest(self) -> str:
        """One number over everything that loading may change."""
        return digest_of(
            {
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "trainer": self.trainer.state,
                "callback": self.callback.state,
                "start": self.start,
            }
        )


def digest_of(value: Any) -> str:
    """A digest of plain data with tensors in it: types, keys, values, shapes and every byte."""
    hasher = xxhash.xxh3_128()
    _feed(hasher, value)
    return str(hasher.hexdigest())


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found = value.detach().contiguous()
        hasher.update(f"tensor {found.dtype} {tuple(found.shape)} ".encode())
        hasher.update(found.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        hasher.update(f"mapping {len(value)} ".encode())
        for key, child in sorted(value.items(), key=lambda item: str(item[0])):
            hasher.update(f"{key!r}: ".encode())
            _feed(hasher, child)
    elif isinstance(value, list | tuple):
        hasher.update(f"sequence {len(value)} ".encode())
        for child in value:
            _feed(hasher, child)
    else:
        hasher.update(f"{value!r} ".encode())


@attrs.frozen
class Loaded:
    """Digests of a process before and after an attempt to load, and the error that ended it.

    ``states_kept``: whether trainer and callback are as they were.
    """

    before: str
    after: str
    error: Exception | None
    states_kept: bool


@attrs.frozen(eq=False)
class Subject:
    """Files on disk, and how ours and the baseline load them.

    Attributes:
        name: The format.
        files: What faults are put into.
        others: For each of ``files`` another one of the same name, from another set.
        load: Our public way.
        baseline: The peer's way, with its name; None where there is none.
        width: Of the network.
    """

    name: str
    files: tuple[Path, ...]
    others: tuple[Path, ...]
    load: Callable[[Process], None]
    baseline: Callable[[Process], None] | None
    baseline_name: str
    width: int

    def attempt(self, load: Callable[[Process], None]) -> Loaded:
        """Load into a fresh process."""
        process = Process(self.width)
        before, states = process.digest(), digest_of([process.trainer.state, process.callback.state])
        error = None
        try:
            load(process)
        except Exception as caught:  # which errors are allowed is for the caller to say
            error = caught
        kept = digest_of([process.trainer.state, process.callback.state]) == states
        return Loaded(before, process.digest(), error, kept)

    def truth(self, load: Callable[[Process], None]) -> str:
        """The digest after loading undamaged files."""
        found = self.attempt(load)
        if found.error is not None:
            raise found.error
        if found.after == found.before:
            raise AssertionError(f"{self.name}: loading changed nothing")
        return found.after


def _initialize(process: Process, configs: list[dict[str, Any]], paths: PathProvider | None) -> None:
    stack = InitializerStack.from_config(configs, path_provider=paths)
    report = stack.initialize(process.model, trainer=process.trainer, callbacks=[process.callback])
    process.start = str(report.start)


def _save_sets(root: Path, width: int) -> list[Path]:
    """The folders of the three sets."""
    process, folders = Process(width), []
    writer = CheckpointWriter(PathProvider(root, "run"), flat_names=False)
    for seed, iteration in enumerate(ITERATIONS, 1):
        process.train(seed)
        folders.append(writer.save(process.model, iteration, trainer=process.trainer).folder)
    for file in root.rglob("*"):  # faults are put in under the same names
        if file.is_file():
            file.chmod(file.stat().st_mode | stat.S_IWUSR)
    return folders


def _named(folder: Path, part: str) -> Path:
    return next(folder.glob(f"*_{part}.th"))


def _torch_load(process: Process, parts: Mapping[str, Path]) -> None:
    """Weights, optimizer and trainer as most scripts load them."""
    found = {part: torch.load(path, weights_only=True) for part, path in parts.items()}
    if "trainer" in found:
        process.start = str(found["trainer"]["training_iteration"])
    process.network.load_state_dict(found["model"]["state_dict"])
    if "optim" in found:
        process.optimizer.load_state_dict(
            {key: value for key, value in found["optim"].items() if key in ("state", "param_groups")}
        )
    if "trainer" in found:
        process.trainer.load_state_dict(found["trainer"])
        process.callback.load_state_dict(found["trainer"]["callback_state_dicts"]["Callback"])


def _set_subject(root: Path, width: int, name: str, config: dict[str, Any], parts: tuple[str, ...]) -> Subject:
    folders = _save_sets(root, width)
    paths = PathProvider(root, "new" if config["kind"] == "previous_run" else "run")
    files = {part: _named(folders[-1], part) for part in parts}
    return Subject(
        name,
        tuple(files.values()),
        tuple(_named(folders[-2], part) for part in parts),
        lambda process: _initialize(process, [config], paths),
        lambda process: _torch_load(process, files),
        "torch.load",
        width,
    )


def set_previous_run(root: Path, width: int) -> Subject:
    """Weights and optimizer of a committed set."""
    config = {"kind": "previous_run", "run_id": "run", "load_optim": True}
    return _set_subject(root, width, "set, previous_run", config, ("model", "optim"))


def set_resume(root: Path, width: int) -> Subject:
    """Everything of a committed set."""
    return _set_subject(root, width, "set, resume", {"kind": "resume"}, PARTS)


def set_manifest(root: Path, width: int) -> Subject:
    """The manifest of a committed set; no peer has one."""
    folders = _save_sets(root, width)
    return Subject(
        "manifest.json",
        (folders[-1] / "manifest.json",),
        (folders[-2] / "manifest.json",),
        lambda process: _initialize(process, [{"kind": "resume"}], PathProvider(root, "run")),
        None,
        "",
        width,
    )


def flat_resume(root: Path, width: int) -> Subject:
    """Files without a manifest, as Noether writes them: the names of one tag, and those of an older iteration."""
    folders = _save_sets(root / "made", width)
    folder, older = root / "runs" / "run" / "checkpoints", root / "older"
    folder.mkdir(parents=True)
    older.mkdir()
    for part in PARTS:
        shutil.copyfile(_named(folders[-1], part), folder / f"mlp_cp=latest_{part}.th")
        shutil.copyfile(_named(folders[0], part), older / f"mlp_cp=latest_{part}.th")
    files = {part: folder / f"mlp_cp=latest_{part}.th" for part in PARTS}
    return Subject(
        "Noether's files, resume",
        tuple(files.values()),
        tuple(older / path.name for path in files.values()),
        lambda process: _initialize(process, [{"kind": "resume"}], PathProvider(root / "runs", "run")),
        lambda process: _torch_load(process, files),
        "torch.load",
        width,
    )


def bare_file(root: Path, width: int) -> Subject:
    """One ``.th`` without anything beside it."""
    folders = _save_sets(root / "made", width)
    path, other = root / "weights.th", root / "other.th"
    shutil.copyfile(_named(folders[-1], "model"), path)
    shutil.copyfile(_named(folders[-2], "model"), other)
    return Subject(
        "bare .th, file",
        (path,),
        (other,),
        lambda process: _initialize(process, [{"kind": "file", "path": str(path)}], None),
        lambda process: _torch_load(process, {"model": path}),
        "torch.load",
        width,
    )


def _safetensors(root: Path, width: int, name: str, *, with_digest: bool) -> Subject:
    import safetensors.torch

    root.mkdir(parents=True, exist_ok=True)
    path, other = root / "weights.safetensors", root / "other.safetensors"
    for seed, file in ((3, path), (2, other)):
        process = Process(width)
        process.train(seed)
        safetensors.torch.save_model(process.network, str(file))
    config: dict[str, Any] = {"kind": "file", "path": str(path)}
    if with_digest:
        config["digest"] = f"xxh3_128:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"

    def load_model(process: Process) -> None:
        safetensors.torch.load_model(process.network, str(path))

    return Subject(
        name,
        (path,),
        (other,),
        lambda process: _initialize(process, [config], None),
        load_model,
        "safetensors",
        width,
    )


def safetensors_with_digest(root: Path, width: int) -> Subject:
    """A safetensors file whose digest the config says."""
    return _safetensors(root, width, "safetensors + digest, file", with_digest=True)


def safetensors_alone(root: Path, width: int) -> Subject:
    """A safetensors file, which carries no checksums: its structure is all that can be checked."""
    return _safetensors(root, width, "safetensors without digest, file", with_digest=False)


BUILDERS: Mapping[str, Callable[[Path, int], Subject]] = {
    "set_previous_run": set_previous_run,
    "set_resume": set_resume,
    "manifest": set_manifest,
    "flat_resume": flat_resume,
    "bare_file": bare_file,
    "safetensors_digest": safetensors_with_digest,
    "safetensors_alone": safetensors_alone,
}
FORMATS = tuple(BUILDERS)


def build(name: str, root: Path, width: int) -> Subject:
    """The subject in a fresh folder."""
    root.mkdir(parents=True)
    return BUILDERS[name](root, width)
