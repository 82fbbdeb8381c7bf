"""What messages name besides the kind: extras to install, the other group, metadata that was passed over."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from typing import Any

from noether_init_core.messages import one_line, yaml_field

_SEPARATORS = re.compile(r"[-_.]+")
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w.-]+)["']""")


def normalized(distribution: str) -> str:
    """The name of a distribution in the form for comparison: ``Noether.Init_Core`` becomes ``noether-init-core``."""
    return _SEPARATORS.sub("-", distribution.strip()).lower()


def install_extra(distribution: str | None, target: str, error: BaseException) -> str | None:
    """The command that installs the extra whose package was not found; None for other errors and without extras.

    The extra is the one of the entry point, ``module:Class [gpu]``, or the one that requires a package of that name.
    """
    absent = next((one for one in _chain(error) if isinstance(one, ModuleNotFoundError) and one.name), None)
    if distribution is None or absent is None or f"{target.partition(':')[0].strip()}.".startswith(f"{absent.name}."):
        return None
    stated = re.search(r"\[([\w\s,.-]+)\]\s*$", target)
    extras = stated[1].replace(" ", "") if stated else _extra_with(distribution, str(absent.name).partition(".")[0])
    return f'pip install "{distribution}[{extras}]"' if extras else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _extra_with(distribution: str, module: str) -> str | None:
    found = importlib.metadata.distribution(distribution)
    packages = {normalized(one) for one in importlib.metadata.packages_distributions().get(module, ())}
    wanted = {normalized(module), *packages}
    other = None
    for line in found.requires or ():
        extra = _EXTRA.search(line)
        name = re.split(r"[ ;\[<>=!~(]", line, maxsplit=1)[0]
        if extra and normalized(name) in wanted:
            return extra[1]
        # opencv-python provides cv2: a name may differ, so a single extra is still a good guess
        other = extra[1] if extra and other in (None, extra[1]) else "" if extra else other
    return other or None


def of_other_group(name: str, others: Mapping[str, Any], noun: str) -> str:
    """What to write where a kind is called as an observer, or the reverse; empty for other names."""
    if name not in others:
        return ""
    line = yaml_field("observers", [name]) if noun == "kind" else yaml_field("initializers", [{"kind": name}])
    return f"{one_line(name, 80)} is {'an observer' if noun == 'kind' else 'a kind'}: write {line} in the config"


def passed_over(group: str, name: str) -> Iterator[str]:
    """A sentence for each distribution that provides ``name`` and was not read: the same one comes earlier on the path.

    It is shadowed by other metadata of the same distribution, such as the egg-info of a clone in this folder.
    """
    first: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        try:
            key = normalized(distribution.name)
            used = first.setdefault(key, distribution)
            if used is distribution or not any(one.name == name for one in _points(distribution, group)):
                continue
            here, there = (f"{key} {one.version} ({place_of(one)})" for one in (used, distribution))
            folder = place_of(used)
            yield (
                f"{there} provides it, and was passed over: {here} comes earlier on the import path. Next: remove or "
                f"rename {folder}, or start in another folder"
            )
        except Exception:  # broken metadata was reported by the scan
            continue


def _points(distribution: importlib.metadata.Distribution, group: str) -> Iterator[importlib.metadata.EntryPoint]:
    return (one for one in distribution.entry_points if one.group == group)


def place_of(distribution: importlib.metadata.Distribution) -> str:
    """The folder with the metadata of a distribution, for messages; its name where it has no folder."""
    return one_line(str(getattr(distribution, "_path", distribution.name)))
