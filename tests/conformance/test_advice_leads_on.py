"""What a failed check of the kit advises is done here, and the check passes then."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
from support.advice import executes, saw
from support.following import advised
from support.foreign import INITIALIZER, ForeignPackages

from noether_init_core import InitializerBase, kinds
from noether_init_core.testing import InitializerConformance, closed, open_

Check = Callable[[InitializerConformance], None]


def kit(**declared: Any) -> InitializerConformance:
    """The kit of the kind ``acme``, as an author declares it."""
    made: type[InitializerConformance] = type("TestAcme", (InitializerConformance,), {"kind": "acme", **declared})
    return made()


def declared(line: str) -> dict[str, Any]:
    """The names that a line declares in the body of a class."""
    found: dict[str, Any] = {}
    exec(line, {"open_": open_, "closed": closed}, found)
    return found


@executes("testing/snapshots.py", "Next: {}")
def test_a_kind_is_mended_by_what_its_failed_checks_say(foreign: ForeignPackages) -> None:
    """Its registration, the declaration in the test class, the contract, and the description of a key."""
    source = INITIALIZER.replace("import KindConfig", "import KindConfig\nfrom typing import ClassVar\nimport pydantic")
    file = foreign.folder / "site" / "acme_init.py"

    def written(code: str) -> None:
        file.write_text(code)
        foreign.forget()
        importlib.invalidate_caches()

    foreign.install("other-init", modules={"acme_init": source})
    loaded: type[InitializerBase] = importlib.import_module("acme_init").ConstantInitializer
    kinds.register("acme", loaded)
    try:
        said = advised(kit(distribution="acme-init").test_is_registered_by_its_distribution)
    finally:
        kinds.unregister("acme")
    offers = tomllib.loads(said.removeprefix("in pyproject.toml:"))["project"]["entry-points"][kinds.GROUP]
    foreign.install("acme-init", offers=offers)
    line = advised(kit(distribution=None).test_is_registered_by_its_distribution)
    made = kit(**declared(line))
    made.test_is_registered_by_its_distribution()
    line = advised(made.test_says_the_contract_it_was_written_for)
    source = source.replace("(InitializerBase):", f"(InitializerBase):\n    {line}")
    written(source)
    made.test_says_the_contract_it_was_written_for()
    call = re.fullmatch(r"(pydantic\.Field)\((description)=\.\.\.\)", advised(made.test_every_key_is_described))
    assert call is not None
    written(source.replace("float = 0.0", f"float = {call[1]}(0.0, {call[2]}='The number.')"))
    made.test_every_key_is_described()
    made.test_says_the_contract_it_was_written_for()


@executes("testing/checks.py", 'Next: {} = open_(), or {} = closed("why not")')
@pytest.mark.parametrize("value", [None, "the file holds one model"])
def test_what_is_no_answer_is_declared_as_one(value: Any) -> None:
    """In either of the two forms."""
    said = advised(lambda: kit(distribution=None, nested=value))
    lines = saw(said).split(", or ")
    assert len(lines) == 2
    for line, is_open in zip(lines, (True, False), strict=True):
        assert kit(distribution=None, **declared(line)).nested.is_open is is_open
