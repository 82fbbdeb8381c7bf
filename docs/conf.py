"""Sphinx: Markdown pages by myst-parser, the theme furo; every warning is an error (``sphinx-build -W``)."""

from __future__ import annotations

import importlib.metadata

project = "noether-init-core"
author = "The noether-init-core developers"
project_copyright = "The noether-init-core developers"
try:
    release = importlib.metadata.version("noether-init-core")
except importlib.metadata.PackageNotFoundError:  # built from a source tree that is not installed
    release = "source tree"
version = release

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
nitpicky = True
myst_heading_anchors = 3
# A block of output may hold anything, so no lexer is asked to make sense of it.
highlight_language = "none"

html_theme = "furo"
html_title = f"noether-init-core {release}"
html_static_path = ["_static"]
