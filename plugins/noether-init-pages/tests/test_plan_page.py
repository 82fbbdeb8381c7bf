"""The page of a plan, opened in a real browser: its numbers are those of the JSON, and it can be used."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from support.browser import opened

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    LoadPlan,
    PathProvider,
    TrainingIteration,
    bind,
    compose,
)
from noether_init_core.render.text import MARKS, amount, percent
from noether_init_core.surgery.plan import Origin, PlanRow, Problem
from noether_init_pages import html_page

WRITES = ("load", "rename", "transform", "cast")
SCREENS = Path(__file__).resolve().parents[3] / "build" / "screens"


def block(fused: bool) -> torch.nn.Module:
    """A layer with queries, keys and values as one matrix, or as three."""
    parts = {"proj": torch.nn.Linear(16, 16), "norm": torch.nn.LayerNorm(16)}
    names = ["qkv"] if fused else ["q", "k", "v"]
    return torch.nn.ModuleDict({**parts, **{name: torch.nn.Linear(16, 48 // len(names)) for name in names}})


def network(fused: bool, classes: int) -> torch.nn.Module:
    """Twelve layers under another name, and a head."""
    layers = torch.nn.ModuleList(block(fused) for _ in range(12))
    return torch.nn.ModuleDict({"h" if fused else "blocks": layers, "head": torch.nn.Linear(16, classes)})


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> LoadPlan:
    """Renamed layers, a split matrix, a fresh head, something of the file unused."""
    paths = PathProvider(tmp_path_factory.mktemp("runs"), "pretrain")
    CheckpointWriter(paths).save(bind(network(True, 10), name="vit"), TrainingIteration(4, 16, 128))
    rules = [
        {"from": "h.<i>.qkv.<leaf>", "to": [f"blocks.<i>.{name}.<leaf>" for name in "qkv"], "do": [{"split": 0}]},
        {"from": "h.<i>.", "to": "blocks.<i>."},
        {"keep_model": "head."},
    ]
    config = {"kind": "previous_run", "run_id": "pretrain", "transforms": rules}
    stack = InitializerStack.from_config([config], path_provider=PathProvider(paths.output_root, "finetune"))
    return stack.plan(bind(network(False, 4), name="vit"))


@pytest.fixture(scope="module")
def page_file(plan: LoadPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of this plan."""
    return written(tmp_path_factory.mktemp("pages") / "plan.html", plan)


def written(path: Path, value: Any) -> Path:
    """The page of a value, in a file."""
    path.write_text(html_page(value), "utf-8")
    return path


def figure(page: Any, name: str) -> str:
    """The exact value behind a figure at the top."""
    value = page.locator(f'[data-figure="{name}"]').get_attribute("data-value")
    assert isinstance(value, str)
    return value


def test_the_figures_at_the_top_are_those_of_the_json(chromium: Any, page_file: Path, plan: LoadPlan) -> None:
    """Coverage, parameters, entries, bytes, problems and warnings; what is shown is rounded as on the terminal."""
    data = plan.to_dict()
    with opened(chromium, page_file) as page:
        assert float(figure(page, "of the parameters are loaded")) == data["coverage"] < 1
        assert page.locator('[data-figure="of the parameters are loaded"]').inner_text() == percent(data["coverage"])
        assert int(figure(page, "parameters loaded")) == data["totals"]["parameters_loaded"]
        shown = page.locator('[data-figure="parameters loaded"]').inner_text()
        totals = data["totals"]
        assert shown == f"{amount(totals['parameters_loaded'])} of {amount(totals['parameters'])}"
        assert int(figure(page, "entries of the model written")) == sum(row["action"] in WRITES for row in data["rows"])
        assert int(figure(page, "written")) == data["totals"]["bytes_loaded"]
        assert (figure(page, "problems"), figure(page, "warnings")) == ("0", str(len(data["warnings"])))
        assert json.loads(page.locator("#data").inner_text()) == json.loads(plan.to_json())


def test_areas_and_ribbons_add_up_to_the_parameters(chromium: Any, page_file: Path, plan: LoadPlan) -> None:
    """No parameter is drawn twice or left out, by action and by way."""
    data = plan.to_dict()
    by_action = Counter[str]()
    for row in data["rows"]:
        if row["target"] is not None and row["is_parameter"] and row["tied_to"] is None:
            by_action[row["action"]] += int(torch.Size(row["shape"]).numel())
    with opened(chromium, page_file) as page:
        legend = page.locator("[data-action]").evaluate_all(
            "all => all.map(one => [one.dataset.action, +one.dataset.value])"
        )
        assert dict(legend) == dict(by_action)
        drawn = page.evaluate(
            """() => {
                const add = ({ children, value }) => children?.reduce((sum, one) => sum + add(one), 0) ?? value;
                const series = document.querySelector('.chart').svgChart.getOption().series[0];
                return series.data.reduce((sum, one) => sum + add(one), 0);
            }"""
        )
        assert drawn == data["totals"]["parameters"] == sum(by_action.values())
        flows = page.locator("[data-flow]").evaluate_all("all => all.map(one => +one.dataset.flow)")
        assert sum(flows) == data["totals"]["parameters"]
        # text in a closed element is not laid out, so it is asked for by its content
        ways = page.locator("details table tbody tr").evaluate_all(
            "all => all.map(row => row.cells[0].textContent + ' > ' + row.cells[1].textContent)"
        )
        assert {"h.*.qkv > blocks.*.q", "h.*.qkv > blocks.*.k", "h.*.norm > blocks.*.norm"} <= set(ways)


def test_every_row_says_what_the_json_says(chromium: Any, page_file: Path, plan: LoadPlan) -> None:
    """Names, symbol and word of the action, sources, rule."""
    with opened(chromium, page_file) as page:
        section = page.locator("section", has=page.get_by_role("heading", name="Every entry"))
        section.get_by_role("button", name="Show all").click()
        cells = section.locator("tbody tr").evaluate_all(
            "all => all.map(row => [...row.cells].map(cell => cell.innerText))"
        )
    assert len(cells) == len(plan.rows) > 100
    for row, shown in zip(plan.rows, cells, strict=True):
        mark = MARKS[row.action]
        assert shown[0].split("\n")[0] == (row.target or ", ".join(row.sources))
        assert shown[1].split() == [mark.symbol, mark.word]
        assert shown[2] == amount(row.numel)
        if row.target is not None and row.sources and row.sources != (row.target,):
            assert all(source in shown[5] for source in row.sources)
        if row.rule is not None:
            assert row.rule.startswith(shown[6] or "?")


def test_coverage_by_module_is_that_of_the_json(chromium: Any, page_file: Path, plan: LoadPlan) -> None:
    """Every module with its share; the bar is as long."""
    with opened(chromium, page_file) as page:
        section = page.locator("section", has=page.get_by_role("heading", name="Coverage by module"))
        section.get_by_role("button", name="Show all").click()
        shown = section.locator("[data-module]").evaluate_all(
            """all => all.map(one => [
                one.dataset.module, +one.dataset.value, one.innerText.trim(), one.querySelector('i').style.width
            ])"""
        )
    assert {name: share for name, share, _text, _width in shown} == plan.coverage_by_module()
    for _name, share, text, width in shown:
        assert text == percent(share)
        assert float(width.rstrip("%")) == pytest.approx(100 * share, abs=0.01)


def found(section: Any) -> int:
    """How many rows match."""
    return int(section.locator(".count[role=status]").get_attribute("data-found"))


def test_the_filter_takes_words_groups_and_a_click_on_an_area(chromium: Any, page_file: Path, plan: LoadPlan) -> None:
    """All words have to occur; groups are added up; a module chosen in the picture narrows further; Clear ends it."""
    rows = plan.rows
    with opened(chromium, page_file) as page:
        section = page.locator("section", has=page.get_by_role("heading", name="Every entry"))
        search = section.get_by_role("searchbox")
        assert found(section) == len(rows)
        search.fill("blocks.1. BIAS")
        expected = [row for row in rows if "blocks.1." in (row.target or "") and "bias" in (row.target or "")]
        assert found(section) == len(expected) > 0
        assert section.locator("tbody tr").count() == len(expected)
        search.fill("")
        for action in ("keep", "transform"):
            section.locator(f'[data-chip="{MARKS[action].word}"]').click()
        assert found(section) == sum(row.action in ("keep", "transform") for row in rows)
        section.get_by_role("button", name="Clear").click()
        assert found(section) == len(rows)
        section.get_by_role("button", name="Parameters").click()
        largest = section.locator("tbody tr").first.locator("th, td").nth(2).inner_text()
        assert largest == amount(max(row.numel for row in rows))
        # an area: the first of the picture's leaves
        page.locator(".chart").first.locator("path").last.scroll_into_view_if_needed()
        box = page.locator(".chart").first.bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5)
        assert 0 < found(section) < len(rows)
        assert "only below" in section.locator(".count[role=status]").inner_text()
        search.fill("no such name")
        assert (found(section), section.locator("tbody tr").count()) == (0, 0)


def test_it_can_be_used_without_a_mouse(chromium: Any, page_file: Path, plan: LoadPlan) -> None:
    """The first key leads past the head, / goes to the filter, groups are buttons that say whether they are pressed."""
    with opened(chromium, page_file) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.type") == "search"
        page.keyboard.type("/")
        assert page.evaluate("document.activeElement.value") == "/"
        section = page.locator("section", has=page.get_by_role("heading", name="Every entry"))
        chip = section.locator(f'[data-chip="{MARKS["keep"].word}"]')
        chip.focus()
        page.keyboard.press("Enter")
        assert chip.get_attribute("aria-pressed") == "true"
        assert found(section) == sum(row.action == "keep" for row in plan.rows)
        heading = section.get_by_role("button", name="Entry")
        heading.focus()
        page.keyboard.press("Space")
        assert section.get_by_role("columnheader").first.get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wrong_for_screen_readers_and_weak_eyes(chromium: Any, page_file: Path, scheme: str) -> None:
    """axe-core finds nothing, contrast included; every picture has a sentence that says what it shows."""
    with opened(chromium, page_file, color_scheme=scheme) as page:
        results = Axe().run(page)
        assert [violation["id"] for violation in results.response["violations"]] == [], results.generate_report()
        assert results.response["passes"]
        for picture in page.locator(".chart").all():
            assert len(picture.get_attribute("aria-label")) > 40


def test_light_dark_and_paper_look_different(chromium: Any, page_file: Path) -> None:
    """The shade follows the system until it is chosen; paper is always light, and hides what only works on a screen."""
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(chromium, page_file, color_scheme="dark") as page:
        dark = page.evaluate(ground)
        SCREENS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENS / "plan-dark.png")
        page.emulate_media(color_scheme="light")
        page.wait_for_selector("html[data-shade=light]")
        light = page.evaluate(ground)
        assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")
        page.screenshot(path=SCREENS / "plan-light.png")
        button = page.get_by_role("button", name="Shade")
        button.click()
        assert (page.evaluate(ground), button.inner_text()) == (dark, "Shade: dark")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert page.evaluate(ground) == light
        assert not page.get_by_role("searchbox").first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.pdf().startswith(b"%PDF-")


def test_it_fits_on_a_telephone(chromium: Any, page_file: Path) -> None:
    """Nothing but pictures and tables, inside their own frames, is wider than the screen."""
    with opened(chromium, page_file, viewport={"width": 380, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 380


def test_names_from_a_file_are_text_and_nothing_else(chromium: Any, tmp_path: Path) -> None:
    """Markup, the end of a script, marks that turn the direction of text: shown, never obeyed."""
    names = [
        "</script><script>window.hacked = 1</script>",
        '<img src=x onerror="window.hacked = 1">.weight',
        "a\u202eb.weight",
        "line\nbreak\x07",
        "&lt;b&gt; \\u003c",
        "__proto__",
        "constructor.weight",
    ]
    rows = tuple(
        PlanRow(
            "<b>m</b>",
            name,
            (f"old.{name}",),
            "rename",
            (2, 2),
            "float32",
            16,
            rule=f"{name}:1",
            source_shapes=((2, 2),),
        )
        for name in names
    )
    problem = Problem("missing", "needs <i>x</i>\nNext: </script>", "<b>m</b>", tuple(names))
    hostile = LoadPlan(
        "<u>kind</u>",
        rows,
        (problem,),
        origins=(Origin("file", "<b>m</b>", 0, "<script>alert(1)</script>", ("f<.th",)),),
    )
    with opened(chromium, written(tmp_path / "hostile.html", hostile)) as page:
        assert page.evaluate("window.hacked") is None
        assert page.locator("main script, main img, main b, main i.weight").count() == 0
        shown = (
            page.locator("section", has=page.get_by_role("heading", name="Every entry"))
            .locator("tbody th")
            .all_inner_texts()
        )
        assert shown[0] == names[0]
        assert shown[2] == "a\\u{202e}b.weight"
        assert shown[3] == "line\\u{a}break\\u{7}"
        assert shown[5] == "__proto__"
        assert page.title() == "What <u>kind</u> will do to <b>m</b>"
        assert "needs <i>x</i>" in page.locator(".panel.bad").inner_text()


def test_ten_thousand_keys_are_a_page_of_five_megabytes_with_few_areas(chromium: Any, tmp_path: Path) -> None:
    """A large model with long names, every other action, rules and steps."""
    rows = []
    for number in range(10_000):
        target = f"backbone.encoder.layers.{number // 20}.self_attention.projection_{number % 20}.weight"
        action = ("rename", "load", "keep", "transform")[number % 4]
        rule = f"configs/finetune/init.yaml:{number % 50} initializers.0.transforms.{number % 50} (a.<i>. -> b.<i>.)"
        source = target.replace("backbone.encoder", "model.transformer")
        rows.append(
            PlanRow(
                "vit",
                target,
                () if action == "keep" else (source,),
                action,
                (1024, 1024),
                "float32",
                4 << 20,
                rule=rule,
                source_dtype="float32",
                source_shapes=((1024, 1024),),
            )
        )
    large = LoadPlan(
        "previous_run", tuple(rows), origins=(Origin("previous_run", "vit", 0, "pretrain @ latest", ("vit.th",)),)
    )
    file = written(tmp_path / "large.html", large)
    assert file.stat().st_size < 5_000_000
    with opened(chromium, file) as page:
        section = page.locator("section", has=page.get_by_role("heading", name="Every entry"))
        assert found(section) == 10_000
        section.get_by_role("searchbox").fill("layers.499. projection_7")
        assert found(section) == 1
        areas = page.locator(".chart").first.locator("path").count()
        assert 1_000 < areas < 6_000


def test_the_page_needs_nothing_but_itself(page_file: Path) -> None:
    """No address but the names of namespaces, and a policy that forbids the rest; the same plan, the same bytes."""
    text = page_file.read_text("utf-8")
    start = text.index('id="data"')
    data = text[start : text.index("</script>", start)]
    addresses = {
        word.split("//")[1].split("/")[0]
        for word in text.replace(data, "").split('"')
        if word.startswith(("http:", "https:"))
    }
    assert addresses <= {"www.w3.org"}
    assert "default-src 'none'" in text
    assert "script-src 'sha256-" in text
    assert text.count("<script>") == 3


def test_an_unknown_format_or_version_is_refused(plan: LoadPlan) -> None:
    """Better no page than one that shows something else."""
    with pytest.raises(ValueError, match="no page for the format 'noether-init-kinds'"):
        html_page({"format": "noether-init-kinds", "version": 1})
    with pytest.raises(ValueError, match="version 2 cannot be shown"):
        html_page({**plan.to_dict(), "version": 2})
    assert html_page(plan) == html_page(json.loads(plan.to_json()))


def test_composites_ties_buffers_and_several_files_add_up_too(chromium: Any, tmp_path: Path) -> None:
    """Two models, two initializers, tied weights, buffers: each parameter is drawn once, and filters know the model."""

    def half() -> torch.nn.Module:
        tied = torch.nn.ModuleDict(
            {"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8), "n": torch.nn.BatchNorm1d(8)}
        )
        tied["b"].weight = tied["a"].weight
        return tied

    def pair() -> Any:
        return compose("pair", {name: bind(half(), name=name) for name in ("left", "right")})

    CheckpointWriter(PathProvider(tmp_path, "first")).save(pair(), TrainingIteration(1, 4, 32))
    configs = [
        {"kind": "previous_run", "run_id": "first", "transforms": [{"keep_model": "n."}]},
        {"kind": "previous_run", "run_id": "first", "transforms": [{"only": "a.bias"}], "on_missing": "keep"},
    ]
    stack = InitializerStack.from_config(configs, path_provider=PathProvider(tmp_path, "second"))
    merged = stack.plan(pair())
    assert merged.is_fine
    data = merged.to_dict()
    with opened(chromium, written(tmp_path / "pair.html", merged)) as page:
        assert int(figure(page, "parameters loaded")) == data["totals"]["parameters_loaded"]
        legend = page.locator("[data-action]").evaluate_all("all => all.map(one => +one.dataset.value)")
        flows = page.locator("[data-flow]").evaluate_all("all => all.map(one => +one.dataset.flow)")
        assert sum(legend) == sum(flows) == data["totals"]["parameters"] == 2 * (64 + 16 + 16)
        section = page.locator("section", has=page.get_by_role("heading", name="Every entry"))
        section.get_by_role("searchbox").fill("pair.left: a.weight")
        # the second file has it too, and is not asked for it
        of_left = [row for row in data["rows"] if row["model"] == "pair.left"]
        assert found(section) == sum("a.weight" in (row["target"], *row["sources"]) for row in of_left) == 2
        names = section.locator("tbody th code").all_inner_texts()
        assert "pair.left: a.weight" in names
