"""``python -m noether_init_core``: the command, for environments whose scripts are not on the path."""

from __future__ import annotations

from noether_init_core.cli import main

if __name__ == "__main__":
    main()
