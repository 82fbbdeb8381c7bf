"""The pages of comparisons and lineages, opened in a real browser: they say what the JSON says, and can be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from support.browser import opened

from noether_init_core import CheckpointDiff, Lineage, compare_checkpoints
from noether_init_core.lineage import LineageEdge, LineageNode, LineageSet, related
from noether_init_pages import html_page

SCREENS = Path(__file__).resolve().parents[3] / "build" / "screens"
SYMBOLS = {"equal": "=", "changed": "~", "dtype": "c", "shape": "x", "nonfinite": "!", "only_a": "-", "only_b": "+"}


@pytest.fixture(scope="module")
def diff(tmp_path_factory: pytest.TempPathFactory) -> CheckpointDiff:
    """Ten layers that drifted the more the deeper they are, and one row of every state."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    kinds = ("q.weight", "q.bias", "mlp.weight")
    a = {f"blocks.{layer}.{kind}": torch.randn(16, 16) for layer in range(10) for kind in kinds}
    b = {key: value + 0.01 * (1 + int(key.split(".")[1])) * torch.randn_like(value) for key, value in a.items()}
    b["blocks.2.q.bias"] = a["blocks.2.q.bias"].clone()
    a |= {"head.weight": torch.ones(3, 16), "old": torch.ones(2), "scale": torch.ones(4), "lost": torch.ones(2)}
    b |= {"head.weight": torch.ones(5, 16), "new": torch.ones(2), "scale": torch.ones(4).half()}
    b |= {"lost": torch.tensor([1.0, float("nan")])}
    torch.save(a, folder / "a.pt")
    torch.save(b, folder / "b.pt")
    return compare_checkpoints(folder / "a.pt", folder / "b.pt")


@pytest.fixture(scope="module")
def lineage() -> Lineage:
    """Two ancestors, one of them gone, a fork, and a descendant by two ways."""
    one = LineageSet(
        "00000001_E1_U28_S896", ("E1_U28_S896", "latest"), "E1_U28_S896", True, "2026-01-31T12:00:00", 1234567
    )
    nodes = [
        LineageNode("weights.safetensors", "file", None, None, "weights.safetensors"),
        LineageNode("gone", "missing", "gone", None, "runs/gone", note="no longer at the recorded path"),
        *(
            LineageNode(name, "run", name, None, f"runs/{name}", (one,))
            for name in ("pretrain", "tune", "fork", "distill")
        ),
    ]

    def way(source: str, target: str, kind: str = "previous_run", *, resume: bool = False) -> LineageEdge:
        return LineageEdge(source, target, kind, "vit", "f.th", "latest", "E1_U28_S896", None, 12, 0.75, resume)

    edges = [
        way("weights.safetensors", "pretrain", "file"),
        way("pretrain", "tune"),
        way("gone", "tune"),
        way("tune", "fork", "resume", resume=True),
        way("fork", "distill"),
        way("tune", "distill"),
    ]
    return related(["tune"], nodes, edges)


@pytest.fixture(scope="module")
def files(diff: CheckpointDiff, lineage: Lineage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both pages."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, value in (("diff", diff), ("lineage", lineage)):
        found[name] = folder / f"{name}.html"
        found[name].write_text(html_page(value), "utf-8")
    return found


def test_every_tensor_is_a_field_of_the_heatmap(chromium: Any, files: dict[str, Path], diff: CheckpointDiff) -> None:
    """At its layer and kind, with the power of ten of its drift, or the symbol of its state."""
    with opened(chromium, files["diff"]) as page:
        cells = page.evaluate(
            """() => {
                const option = document.querySelector('.chart').svgChart.getOption();
                return option.series[0].data.map(({ cell, value, label }) => [
                    cell.row.key, option.yAxis[0].data[value[1]], option.xAxis[0].data[value[0]], value[2],
                    label.show ? label.formatter : null,
                ]);
            }"""
        )
        SCREENS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENS / "diff.png", full_page=True)
    rows = {row.key: row for row in diff.rows}
    assert [cell[0] for cell in cells] == list(rows)
    for key, layer, kind, power, symbol in cells:
        if key.startswith("blocks."):
            assert f"{layer}.{kind}" == key
        row = rows[key]
        if row.relative_norm and row.state == "changed":
            assert 10**power == pytest.approx(row.relative_norm)
            assert symbol is None
        else:
            assert symbol == SYMBOLS[row.state]


def test_the_numbers_of_a_comparison_are_those_of_the_json(
    chromium: Any, files: dict[str, Path], diff: CheckpointDiff
) -> None:
    """Figures and every row; a group and words filter; a heading sorts by drift."""
    with opened(chromium, files["diff"]) as page:
        figures = {
            one.get_attribute("data-figure"): one.get_attribute("data-value") for one in page.locator("dd").all()
        }
        section = page.locator("section", has=page.get_by_role("heading", name="Every key"))
        drifts = section.locator("tbody tr").evaluate_all(
            "all => all.map(row => [row.cells[0].innerText.split('\\n')[0], "
            "row.querySelector('[data-drift]')?.dataset.drift ?? null])"
        )
        section.locator('[data-chip="changed"]').click()
        section.get_by_role("searchbox").fill("mlp")
        matching = int(section.locator(".count[role=status]").get_attribute("data-found"))
        section.get_by_role("button", name="Drift").click()
        first = section.locator("tbody th").first.inner_text()
    assert float(figures["drift of all together"]) == pytest.approx(diff.relative_norm)
    assert float(figures["cosine of all together"]) == pytest.approx(diff.cosine)
    assert int(figures["changed"]) == diff.counts()["changed"]
    assert int(figures["another shape"]) == 1
    expected = {row.key: row.relative_norm for row in diff.rows}
    assert {key: None if drift is None else float(drift) for key, drift in drifts} == expected
    assert matching == 10
    changed = [row for row in diff.rows if row.state == "changed" and "mlp" in row.key]
    assert first == max(changed, key=lambda row: row.relative_norm or 0).key


def test_every_run_and_every_way_is_drawn_and_listed(chromium: Any, files: dict[str, Path], lineage: Lineage) -> None:
    """Ancestors above, descendants below; kind and tag at each line; the list says the same."""
    with opened(chromium, files["lineage"]) as page:
        drawn = page.evaluate(
            """() => {
                const { data, links } = document.querySelector('.chart').svgChart.getOption().series[0];
                return [
                    data.filter((one) => one.node).map((one) => [one.node.id, one.x, one.y]),
                    data.filter((one) => one.name.startsWith('words')).map((one) => one.label.formatter()),
                    links.map((one) => [one.edge.source, one.edge.target]),
                ];
            }"""
        )
        listed = page.locator("[data-edge]").evaluate_all("all => all.map(one => one.dataset.edge)")
        text = page.locator(".tree").text_content()
        figures = {
            one.get_attribute("data-figure"): one.get_attribute("data-value") for one in page.locator("dd").all()
        }
        page.screenshot(path=SCREENS / "lineage.png", full_page=True)
    places, words, links = drawn
    heights = {name: y for name, _x, y in places}
    assert set(heights) == {node.id for node in lineage.nodes}
    assert len({(x, y) for _name, x, y in places}) == len(places)
    for edge in lineage.edges:
        assert heights[edge.source] < heights[edge.target]
    assert sorted(words) == sorted(f"{edge.kind}\nlatest = E1_U28_S896" for edge in lineage.edges)
    assert {tuple(link) for link in links} == {(edge.source, edge.target) for edge in lineage.edges}
    assert sorted(listed) == sorted(f"{edge.source} {edge.target}" for edge in lineage.edges)
    assert "12 tensors (75.0 %)" in text
    assert (figures["ancestors"], figures["descendants"], figures["links"]) == ("3", "2", "6")


def test_a_circle_of_runs_is_drawn(chromium: Any, tmp_path: Path) -> None:
    """Two runs that started from each other, and one that went on from itself."""
    nodes = [LineageNode(name, "run", name, None, name) for name in ("a", "b")]
    edges = [
        LineageEdge(source, target, "previous_run", "m", "f", None, None, None, None, None)
        for source, target in (("a", "b"), ("b", "a"), ("a", "a"))
    ]
    file = tmp_path / "circle.html"
    file.write_text(html_page(related(["a"], nodes, edges)), "utf-8")
    with opened(chromium, file) as page:
        assert page.locator("[data-edge]").count() == 3
        assert page.locator(".chart svg").count() == 1


@pytest.mark.parametrize("name", ["diff", "lineage"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wrong_for_screen_readers(chromium: Any, files: dict[str, Path], name: str, scheme: str) -> None:
    """axe-core finds nothing."""
    with opened(chromium, files[name], color_scheme=scheme) as page:
        results = Axe().run(page)
        assert [one["id"] for one in results.response["violations"]] == [], results.generate_report()


@pytest.mark.parametrize("name", ["diff", "lineage"])
def test_pages_fit_on_a_telephone_and_on_paper(chromium: Any, files: dict[str, Path], name: str) -> None:
    """Only pictures and tables in their own frames are wider than the screen."""
    with opened(chromium, files[name], viewport={"width": 380, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        assert page.pdf().startswith(b"%PDF-")
