"""These tests are collected only in the environment of ``tools/real.py``, which has the libraries."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("NOETHER_INIT_REAL") else ["test_*.py"]
