"""The checks of files: damaged, missing and changed ones, NaN, code in files, what stays behind.

The messages are complete without the details that pytest adds and cuts: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from noether_init_core import kinds
from noether_init_core.errors import PartlyInitializedError
from noether_init_core.files.storage.artifact_cache import CACHE_VARIABLE
from noether_init_core.kinds.hookspec import hookimpl
from noether_init_core.messages import listed
from noether_init_core.models import leaf_models
from noether_init_core.stack.stack import InitializerStack
from noether_init_core.testing.cases import MODEL_SEED, Case, Wrong, add_extra_parameter, changed_model, saved_run
from noether_init_core.testing.checks import Config, Expected, MakeConfig, NewCase, NewRun, explained
from noether_init_core.testing.damage import Damage, absences, bit_flips, cuts, files_below
from noether_init_core.testing.snapshots import (
    descriptors_of_process,
    differences,
    open_files,
    said,
    state_of_files,
    told,
    unchanged,
)
from noether_init_core.testing.watching import watched
from noether_init_core.testing.weight_checks import WeightChecks

_UNDO = "with statements and try: ... finally: around what is switched, changed or opened"
_CLOSE = "with open(...) as file, with open_checkpoint(...) as reader; also on the way out of an error"


class FileChecks(WeightChecks):
    """Files that are damaged, missing or changed, and files that stay open or are left behind."""

    def assert_refused_or_right(
        self, case: Case, config: Config, damage: Damage, right: Mapping[str, Any], change: str, *, late: bool = False
    ) -> None:
        """Initialize with damaged files: an early ``InitError``, or the same result as without the damage.

        With ``late``, the files are damaged after the checks, before the first hook that changes something.
        """
        case = self.again(case)
        before = self.everything(case)
        when = ", after check() had read it" if late else ""
        try:
            if late:
                with _Late(damage) as observer:
                    self.initialize(case, config, observers=[observer])
            else:
                with damage.applied():
                    self.initialize(case, config)
        except Exception as caught:
            changed = differences(before, self.everything(case))
            is_early = late and isinstance(caught, PartlyInitializedError) and not changed
            if not is_early:
                self.assert_early(caught, f"{damage.what}{when}", changed)
            return
        wrong = differences(right, self.results(case))
        assert not wrong, told(
            f"{damage.what}{when}, and it was loaded without an error: {listed(wrong)} differ from the source",
            "disks, networks and copies that were cut do this, and the training would start from wrong weights",
            change,
        )

    def files_of(self, case: Case, tmp_path: Path) -> list[Path]:
        """The files that the kind may read: those of the case, and those that the author's fixtures made."""
        return files_below(case.folder.parent, tmp_path)

    def test_damaged_bytes_are_refused(self, new_case: NewCase, make_config: MakeConfig, tmp_path: Path) -> None:
        """A flipped bit in any tensor or file, and files that were cut: refused early, or the right result."""
        case = new_case("single")
        config = make_config(case)
        report = self.initialize(case, config)
        right, files = self.results(case), self.files_of(case, tmp_path)
        if not self.verifies.is_open:
            claimed = [one.verified for one in report.sources if one.verified not in ("", "unverifiable")]
            assert not claimed, told(
                f"verifies is closed ({self.verifies.reason}), but the report says verified by {listed(claimed)}",
                "users rely on the report",
                "LoadedFile(verified='unverifiable'), or verifies = open_()",
            )
        change = (
            "verify every byte in check(): derive from SourceInitializer, or read with open_checkpoint(...) and call "
            "its verify(); compare a digest for other formats"
        )
        for damage in bit_flips(files, case.source) if self.verifies.is_open else ():
            self.assert_refused_or_right(case, config, damage, right, change)
        for damage in cuts(files):
            self.assert_refused_or_right(case, config, damage, right, change)

    def test_checked_bytes_are_the_loaded_bytes(
        self, new_case: NewCase, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        """Bits that are flipped after ``check`` are refused, or the bytes of ``check`` are loaded."""
        if not self.verifies.is_open:
            pytest.skip(f"closed: {self.verifies.reason}")
        case = new_case("single")
        config = make_config(case)
        self.initialize(case, config)
        right, files = self.results(case), self.files_of(case, tmp_path)
        change = "keep the file open from check() to init_weights(), as SourceInitializer does, or verify at each read"
        for damage in bit_flips(files, case.source):
            self.assert_refused_or_right(case, config, damage, right, change, late=True)

    def test_missing_files_are_refused(self, new_case: NewCase, make_config: MakeConfig, tmp_path: Path) -> None:
        """Each file that the kind may read is missing in turn: refused before a change, or the right result."""
        for shape in ("single", *(["composite"] if self.composites.is_open else [])):
            case = new_case(shape)
            config = make_config(case)
            self.initialize(case, config)
            right = self.results(case)
            for damage in absences(self.files_of(case, tmp_path)):
                change = "require every shard and every submodel in check(): raise CheckpointNotFoundError"
                self.assert_refused_or_right(case, config, damage, right, change)

    def test_values_that_are_not_finite_are_refused(
        self, new_case: NewCase, source_run: NewRun, make_config: MakeConfig
    ) -> None:
        """NaN in a parameter or a buffer, and an infinite parameter: an early ``InitError``."""
        nan, infinite = float("nan"), float("inf")
        places = [("single", "embed.weight", nan), ("single", "norm.bias", infinite)]
        places += [("single", "coarse", nan)] if self.half_precision.is_open else []
        places += [("buffers", "norm.running_mean", nan)] if self.buffers.is_open else []
        for shape, name, value in places:

            def spoil(model: Any, name: str = name, value: float = value) -> None:
                model.state_dict()[name].view(-1)[-1] = value

            case = new_case(shape, source=source_run(self.real_shape(shape), change=spoil))
            config = make_config(case)
            before = self.everything(case)
            what = f"{name} has {value} in the source"
            try:
                self.initialize(case, config)
            except Exception as caught:
                self.assert_early(caught, what, differences(before, self.everything(case)))
                continue
            loaded = dict(leaf_models(case.model))["net"].state_dict()[name]
            assert loaded.isfinite().all(), told(
                f"{what}, and it was loaded without an error",
                "the loss is NaN from the first step on, or the run starts from a checkpoint of a diverged one",
                "SourceInitializer refuses it; else raise an InitError in check() unless value.isfinite().all()",
            )

    def test_files_are_not_unpickled(self, single: Case, single_config: Config) -> None:
        """No pickle that may name code is read: what such a file says would run."""
        with watched() as events:
            stack = self.make(single, single_config)
            stack.start_checkpoint()
            stack.plan(single.model)
            self.start(stack, single)
        found = [one for one in events if one.what == "unpickles"]
        assert not found, told(
            f"a pickle was read that named {listed(dict.fromkeys(one.about for one in found), 3)}, at "
            f"{found[0].place if found else ''}",
            "whoever wrote the file decides what runs here: torch.load(weights_only=False), pickle.load and "
            "np.load(allow_pickle=True) call what it names",
            "open_checkpoint(path) reads files of torch.save without running anything",
        )

    def test_making_it_reads_nothing(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """It can be made while its files are not there, and loads what is there later."""
        case = new_case("single")
        config = kinds.validate({"kind": self.kind, **make_config(case)})
        root = case.folder.parent
        with watched() as events:
            kinds.create(config, path_provider=case.paths)
        away = root.with_name(f"{root.name}.away")
        root.rename(away)
        why = "ninit validate and the processes that launch a training make it on machines without the files"
        change = "keep the config in __init__; look at the disk in check() and in the hooks"
        try:
            with watched() as others:
                initializer = kinds.create(config, path_provider=case.paths)
        except Exception as error:
            raise AssertionError(told(f"without its files it cannot be made: {said(error)}", why, change)) from error
        finally:
            away.rename(root)
        found = [one for one in (*events, *others) if one.what == "opens" and Path(one.about).is_relative_to(root)]
        assert not found, told(
            f"__init__ looks at {listed(dict.fromkeys(one.about for one in found), 3)}, at "
            f"{found[0].place if found else ''}",
            why,
            change,
        )
        with explained("made before its files were there", why, change):
            self.start(InitializerStack([initializer]), case)
            self.assert_right(case, expected)

    def test_a_changed_source_is_read_again(
        self, new_case: NewCase, make_config: MakeConfig, expected: Expected
    ) -> None:
        """Other weights under the same names, as a later run writes them, are what the next initialization loads."""
        case = new_case("single")
        self.initialize(case, make_config(case))
        root = case.folder.parent
        shutil.rmtree(root)
        root.mkdir()
        other = new_case("single", source=saved_run(root, self.real_shape("single"), seeds=(31, 32)))
        with explained(
            "other weights under the same names, as a later run writes them",
            "a long-lived process (a notebook, a sweep) would start from old weights, without an error",
            "keep nothing that was read beyond the session: no functools.cache, no attribute of a class or module",
        ):
            self.initialize(other, make_config(other))
            self.assert_right(other, expected)

    def failing(
        self, new_case: NewCase, make_config: MakeConfig, wrong_configs: Sequence[Wrong], tmp_path: Path
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is wrong, and a function that checks and initializes with that, and ignores the error."""

        def attempt(case: Case, config: Config, damage: Damage | None = None) -> None:
            with damage.applied() if damage else contextlib.nullcontext():
                with contextlib.suppress(Exception):  # other checks look at the errors
                    self.check(self.one(case, config), case)
                with contextlib.suppress(Exception):
                    self.initialize(case, config)

        for wrong in wrong_configs:
            yield wrong.what, partial(attempt, new_case("single"), wrong.config)
        if self.compares_models.is_open:
            model = changed_model(self.real_shape("single"), MODEL_SEED, add_extra_parameter)
            case = new_case("single", model=model)
            yield "a model that does not fit", partial(attempt, case, make_config(case))
        case = new_case("single")
        config, files = make_config(case), self.files_of(case, tmp_path)
        for damage in (*cuts(files), *absences(files)):
            yield damage.what, partial(attempt, self.again(case), config, damage)

    def test_a_failure_leaves_nothing_behind(
        self,
        new_case: NewCase,
        case_folder: Path,
        make_config: MakeConfig,
        wrong_configs: Sequence[Wrong],
        tmp_path: Path,
    ) -> None:
        """After wrong configs, misfits, cut and missing files the process and the disk are as before."""
        why = "the caller catches the error and goes on: with the next config, or the next test"
        for what, run in self.failing(new_case, make_config, wrong_configs, tmp_path):
            with (
                unchanged(self.process, f"with {what}, the kind", why=why, change=_UNDO),
                unchanged(partial(state_of_files, case_folder), f"with {what}, the kind", why=why, change=_UNDO),
            ):
                run()
            left = open_files(case_folder)
            assert not left, told(f"with {what}, these files stay open: {listed(left or ())}", why, _CLOSE)

    def test_disk_is_left_as_it_was(
        self, single: Case, single_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No checkpoint changes or disappears, and no file is created: in the runs, beside the files of the config, in
        the working folder and in the folder of temporary files.
        """
        here, temporary = tmp_path / "working folder of this check", tmp_path / "temporary files of this check"
        here.mkdir()
        temporary.mkdir()
        monkeypatch.chdir(here)
        monkeypatch.setenv("TMPDIR", str(temporary))
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        folders = single.folder.parent, single.source.paths.output_root, single.source.file.parent, here, temporary
        with unchanged(
            lambda: state_of_files(*folders),
            "the kind",
            why="checkpoints are the user's, and what eight ranks leave at every start fills a disk",
            change="write only what the config names, keep downloads in an ArtifactCache, and use "
            "tempfile.TemporaryDirectory() in a with statement",
        ):
            self.initialize(single, single_config)

    def test_files_are_closed(self, single: Case, single_config: Config) -> None:
        """After the initialization no file is open or mapped: a long training would run out of descriptors."""
        folders = single.source.paths.output_root, single.folder.parent, Path(os.environ[CACHE_VARIABLE])
        if open_files(*folders) is None:
            pytest.skip("this system does not list open files")
        why = "a long training runs out of descriptors, and a file that is mapped may change below the weights"
        stack = self.make(single, single_config)
        self.start(stack, single)
        left = open_files(*folders)
        assert not left, told(f"still open or mapped: {listed(left or ())}", why, _CLOSE)
        for _time in range(2):
            before = descriptors_of_process()
            self.start(stack, self.again(single))
        more = Counter(descriptors_of_process()) - Counter(before)
        assert not more, told(f"each initialization leaves one more descriptor open: {listed(more)}", why, _CLOSE)


class _Late:
    """An observer that damages files after the checks; a context manager that puts them back."""

    def __init__(self, damage: Damage) -> None:
        self._damage = damage
        self._applied = contextlib.ExitStack()
        self._is_done = False

    @hookimpl(wrapper=True)
    def init_trainer(self) -> Generator[None, Any, Any]:
        if not self._is_done:
            self._is_done = True
            self._applied.enter_context(self._damage.applied())
        return (yield)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._applied.close()
