"""The page of a report, opened in a real browser: the waterfall and the tensors say what the JSON says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from support.browser import opened

from noether_init_core import CheckpointWriter, InitializerStack, InitReport, PathProvider, TrainingIteration, bind
from noether_init_pages import html_page

SCREENS = Path(__file__).resolve().parents[3] / "build" / "screens"


def network(classes: int) -> torch.nn.Sequential:
    """Two layers."""
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, classes))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> InitReport:
    """A run that warm-started from one that warm-started: two initializers, a fresh head, ancestors."""
    root = tmp_path_factory.mktemp("runs")
    CheckpointWriter(PathProvider(root, "first")).save(bind(network(10), name="mlp"), TrainingIteration(1, 4, 32))
    fresh_head = {"transforms": [{"keep_model": "1."}]}
    for earlier, later in (("first", "second"), ("second", "third")):
        model = bind(network(4), name="mlp")
        configs = [{"kind": "previous_run", "run_id": earlier, **fresh_head}] * (2 if later == "third" else 1)
        made = InitializerStack.from_config(configs, path_provider=PathProvider(root, later)).initialize(model)
        CheckpointWriter(PathProvider(root, later), report=made).save(model, TrainingIteration(2, 8, 64))
    return made


@pytest.fixture(scope="module")
def page_file(report: InitReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its page."""
    file = tmp_path_factory.mktemp("pages") / "report.html"
    file.write_text(html_page(report), "utf-8")
    return file


def test_the_waterfall_has_every_phase_with_its_seconds_and_bytes(
    chromium: Any, page_file: Path, report: InitReport
) -> None:
    """In order, and one begins where the one before ended; together they are the figure at the top."""
    timings = [one for initializer in report.initializers for one in initializer.timings]
    with opened(chromium, page_file) as page:
        rows = page.locator("[data-seconds]").evaluate_all("all => all.map(one => +one.dataset.seconds)")
        sizes = page.locator("details td:nth-child(3)").evaluate_all("all => all.map(one => one.dataset.bytes ?? null)")
        drawn = page.evaluate(
            """() => {
                const [before, bars] = document.querySelector('.chart').svgChart.getOption().series;
                return bars.data.map((bar, at) => [before.data[at], bar.value]);
            }"""
        )
        total = float(page.locator('[data-figure="measured"]').get_attribute("data-value"))
        SCREENS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENS / "report.png", full_page=True)
    assert len(timings) > 6
    assert rows == [one.seconds for one in timings] == [seconds for _begin, seconds in drawn]
    assert [None if size is None else int(size) for size in sizes] == [one.nbytes for one in timings]
    assert total == pytest.approx(sum(rows))
    ends = [begin + seconds for begin, seconds in drawn]
    assert [begin for begin, _seconds in drawn][1:] == pytest.approx(ends[:-1])


def test_every_tensor_is_shown_with_where_it_came_from(chromium: Any, page_file: Path, report: InitReport) -> None:
    """Loaded or fresh, the file of the run, and the runs before it."""
    with opened(chromium, page_file) as page:
        section = page.locator("section", has=page.get_by_role("heading", name="Every tensor"))
        cells = section.locator("tbody tr").evaluate_all(
            "all => all.map(row => [...row.cells].map(one => one.innerText))"
        )
        loaded = int(page.locator('[data-figure="parameter tensors loaded"]').get_attribute("data-value"))
        section.locator('[data-chip="fresh"]').click()
        fresh = int(section.locator(".count[role=status]").get_attribute("data-found"))
    assert [row[0] for row in cells] == [record.name for record in report.tensors]
    assert loaded == len(report.loaded_parameters()) == 2
    assert fresh == len(report.fresh_parameters()) == 2
    by_name = {row[0]: row for row in cells}
    assert by_name["0.weight"][1].split() == ["=", "loaded"]
    assert "second" in by_name["0.weight"][2]
    assert by_name["0.weight"][3].startswith("first")
    assert by_name["1.weight"][1:4] == ["o fresh", "", ""]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wrong_for_screen_readers(chromium: Any, page_file: Path, scheme: str) -> None:
    """axe-core finds nothing."""
    with opened(chromium, page_file, color_scheme=scheme) as page:
        results = Axe().run(page)
        assert [one["id"] for one in results.response["violations"]] == [], results.generate_report()


def test_a_report_of_nothing_is_a_page_too(chromium: Any, tmp_path: Path) -> None:
    """A fresh start has no initializers, no tensors, no phases."""
    empty = tmp_path / "empty.html"
    empty.write_text(html_page(InitReport(TrainingIteration(0, 0, 0), auto_resume="no set yet")), "utf-8")
    with opened(chromium, empty) as page:
        assert "no set yet" in page.locator("header").inner_text()
        assert page.locator(".chart").count() == 0
