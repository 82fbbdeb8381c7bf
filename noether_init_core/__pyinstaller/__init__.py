"""For PyInstaller: kinds are found by metadata and imported by name, of which its analysis of imports sees nothing.

PyInstaller asks ``hook_folders`` where the hooks lie, by the entry point ``hook-dirs`` of its group ``pyinstaller40``.
It runs ``hook-noether_init_core.py`` when it freezes a program that imports this package. Nothing else may be imported
from here, and nothing here imports PyInstaller.
"""

from importlib.metadata import distributions
from pathlib import Path

import noether_init_core
from noether_init_core.kinds.hints import normalized
from noether_init_core.kinds.lookup import GROUP, OBSERVERS


def hook_folders() -> list[str]:
    """Where PyInstaller finds the hooks."""
    return [str(Path(__file__).parent)]


def collected() -> tuple[list[tuple[str, str]], list[str]]:
    """What a frozen program needs beside what its imports name.

    Returns: (file or folder, the folder that it goes to) of metadata and of the stub of the front; names of modules.
    These are of every distribution that offers a kind or an observer in the environment that freezes. Allow and deny
    lists do not count here: they are read again when the program runs.
    """
    package = Path(__file__).parents[1]
    datas = [(str(package / "__init__.pyi"), package.name)]
    modules = set(vars(noether_init_core)["_HOME_OF"].values())
    seen = set()
    for distribution in distributions():
        points = [point for point in distribution.entry_points if point.group in (GROUP, OBSERVERS.name)]
        folder, name = getattr(distribution, "_path", None), normalized(distribution.name or "")
        if not points or name in seen or not isinstance(folder, Path):
            continue
        seen.add(name)  # of a distribution that is found twice, the first one counts, as in an import
        datas.append((str(folder), folder.name))
        modules |= {point.module for point in points}
    return datas, sorted(modules)
