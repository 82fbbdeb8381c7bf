"""One self-contained HTML file: the JSON of a value, and the scripts and styles that draw it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.metadata
import json
from importlib.resources import files
from typing import Any, Literal

import attrs

from noether_init_core.render.text import MARKS

Page = Literal["plan", "report", "diff", "lineage"]

#: Of Apache ECharts, from which ``tools/charts`` makes ``charts.min.js``.
CHARTS_VERSION = "6.1.0"
# Larger data are compressed, to a tenth and less.
_MOST_READABLE = 1_000_000


def document(page: Page, title: str, data: dict[str, Any], command: str) -> str:
    """The page as text, to be written as UTF-8. The same data give the same text.

    Args:
        page: Which script draws it.
        title: What it is about, in one line; plain text.
        data: What is shown, as its ``to_dict`` gives it.
        command: What gives the same as text, for readers without JavaScript.

    No script runs but those of this package (a content security policy names their digests), and nothing is fetched.
    """
    from jinja2 import Environment, StrictUndefined

    assets = files("noether_init_pages") / "assets"
    marks = {action: attrs.asdict(mark) for action, mark in MARKS.items()}
    scripts = [(assets / name).read_text("utf-8") for name in ("charts.min.js", "common.js", f"{page}.js")]
    data_type, stored = _stored(_json(data))
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string((assets / "page.html.j2").read_text("utf-8")).render(
        page=page,
        title=title,
        command=command,
        style=(assets / "page.css").read_text("utf-8"),
        data_type=data_type,
        data=stored,
        marks=_json(marks),
        scripts=scripts,
        policy=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        version=importlib.metadata.version("noether-init-core"),
        charts_version=CHARTS_VERSION,
    )


def _json(data: Any) -> str:
    """JSON that no HTML parser mistakes for markup, whatever names a file has; strict, so that browsers read it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _stored(text: str) -> tuple[str, str]:
    """Type and text of the element with the data: readable, or compressed where a page would get large."""
    if len(text) <= _MOST_READABLE:
        return "application/json", text
    return "application/gzip", base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
