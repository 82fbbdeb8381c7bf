"""Take the pictures of pages that the documentation shows, from what ``make demo`` wrote: ``make pictures``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.browser import browser, opened  # noqa: E402 - the tests' own way to a browser

#: Page -> height of the part that is shown.
HEIGHTS = {"plan": 1030, "report": 800, "diff": 900, "lineage": 620}


def main(demo: Path, target: Path) -> None:
    """Write a PNG of the upper part of each page."""
    target.mkdir(parents=True, exist_ok=True)
    with browser() as started, tempfile.TemporaryDirectory() as folder:
        for name, height in HEIGHTS.items():
            page_file = Path(folder) / f"{name}.html"
            # a picture shows the same on every machine
            page_file.write_text((demo / f"{name}.html").read_text("utf-8").replace(str(demo), "runs/demo"), "utf-8")
            with opened(started, page_file, viewport={"width": 1080, "height": height}) as page:
                page.screenshot(path=target / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), ROOT / "docs" / "_static" / "pages")
