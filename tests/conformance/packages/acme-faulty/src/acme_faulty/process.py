"""Kinds that load the right weights and leave something behind in the process, on the disk, or after a failure."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from acme_good.plain import PlainInitializer

State = dict[str, torch.Tensor]


class SwitchesKernels(PlainInitializer):
    """Lets cuDNN look for fast kernels."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark


class UsesTf32(PlainInitializer):
    """Makes every matrix product of the training less precise."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        torch.backends.cuda.matmul.allow_tf32 = True


class LowersPrecision(PlainInitializer):
    """The same by another name."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        torch.set_float32_matmul_precision("medium")


class BeDeterministic(PlainInitializer):
    """Switches deterministic algorithms on for a product of its own."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        torch.use_deterministic_algorithms(True, warn_only=True)


class OneThread(PlainInitializer):
    """Makes the training slow."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        torch.set_num_threads(torch.get_num_threads() + 1)


class DefaultDtype(PlainInitializer):
    """Wants to compute in float64."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        torch.set_default_dtype(torch.float64)


class AllowsClasses(PlainInitializer):
    """Makes torch.load accept more in the whole process."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        torch.serialization.add_safe_globals([Path])


class DrawsInPlan(PlainInitializer):
    """Tries a forward pass when it is asked for a plan."""

    contract = 1

    def plan(self, model: Any) -> None:
        torch.randn(3)


class IgnoresSignals(PlainInitializer):
    """Must not be interrupted, now and for ever."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        super().init_weights(model)


class FiltersWarnings(PlainInitializer):
    """Does not like warnings."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        warnings.simplefilter("ignore")
        super().init_weights(model)


class Quiet(PlainInitializer):
    """Silences a library that it uses."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        super().init_weights(model)


class SetsTheEnvironment(PlainInitializer):
    """Sets a variable that other libraries read."""

    contract = 1

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        super().check(model, trainer, callbacks)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


class ReplacesFunctions(PlainInitializer):
    """Wraps torch.load for everybody."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        original = torch.load
        torch.load = lambda *arguments, **keywords: original(*arguments, **keywords)


class LeavesAThread(PlainInitializer):
    """Reports its progress, without an end."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class Prints(PlainInitializer):
    """Tells what it does on standard output."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        print("loading", self.config.folder)
        super().init_weights(model)


class StaysInTheFolder(PlainInitializer):
    """Reads with relative paths, and comes back only if all went well."""

    contract = 1

    def read(self, path: Path) -> State:
        here = os.getcwd()
        os.chdir(path.parent)
        found = super().read(Path(path.name).absolute())
        os.chdir(here)
        return found


class SwitchesUntilItIsDone(PlainInitializer):
    """Switches a generator of warnings off, and on again only if all went well."""

    contract = 1

    def read(self, path: Path) -> State:
        torch.backends.cudnn.enabled = False
        found = super().read(path)
        torch.backends.cudnn.enabled = True
        return found


class OpensBesides(PlainInitializer):
    """Keeps a file of the config open."""

    contract = 1
    _held: ClassVar[list[Any]] = []

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        self._held += [path.open("rb") for path in self.config.folder.glob("*.pt")]


class MapsTheFile(PlainInitializer):
    """Maps the file into memory for as long as the process lives."""

    contract = 1
    _held: ClassVar[list[Any]] = []

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        for path in self.config.folder.glob("*.pt"):
            with path.open("rb") as file:
                self._held.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class LeaksDescriptors(PlainInitializer):
    """Opens something each time and never closes it."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        os.open(os.devnull, os.O_RDONLY)


class LeavesTemporaryFiles(PlainInitializer):
    """Unpacks into a folder that nobody removes."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        Path(tempfile.mkdtemp(), "unpacked").write_text("weights")


class WritesBesideTheConfig(PlainInitializer):
    """Leaves an index beside the files of the config."""

    contract = 1

    def init_weights(self, model: Any) -> None:
        super().init_weights(model)
        (self.config.folder / "index.json").write_text("{}")
