"""Every message about a kind that cannot be used, word for word; each ends with the next command."""

from __future__ import annotations

import re

import pytest
from support.foreign import INITIALIZER, ForeignPackages

from noether_init_core import kinds
from noether_init_core.errors import (
    KindBlockedError,
    KindConflictError,
    KindContractError,
    KindError,
    KindImportError,
    UnknownKindError,
)
from noether_init_core.kinds.hookspec import CONTRACT_VERSION

CORE = f"noether-init-core {kinds.describe('file').version}"
HEAD = "from noether_init_core import InitializerBase\nclass K(InitializerBase):\n"
HOOKS = "    def init_weights(self, model): pass\n    def init_optimizer(self, model): pass\n"
#: Where a message may end: a command to type, a variable to set, a call to make.
NEXT = re.compile(
    r"Next: (ninit [a-z]+( [\w.-]+)?|pip (un)?install( --upgrade)? [\w.-]+|python -c \"[^\"]+\"|"
    r"add [\w.-]+ to NOETHER_INIT_ALLOW|take [\w.-]+ out of NOETHER_INIT_DENY|"
    r"correct the class, and kinds\.register\(\"[\w.-]+\", \.\.\.\) again)"
    r"(, or set NOETHER_INIT_DENY=[\w.-]+|; if the package is not yours: pip install --upgrade [\w.-]+)?\Z"
)


@pytest.fixture
def only(foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch) -> ForeignPackages:
    """The core, and what the test installs: other kinds of the environment would stand in the messages."""
    monkeypatch.setenv("NOETHER_INIT_DENY", "noether-init-random, noether-init-signed-store")
    return foreign


def message_of(kind: str, error: type[KindError]) -> str:
    """The message that using the kind leads to."""
    with pytest.raises(error) as caught:
        kinds.create({"kind": kind})
    message = str(caught.value)
    assert NEXT.search(message), f"does not end with the next command: {message}"
    return message


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("previous-run", f'no kind "previous-run". Near: previous_run ({CORE}). Next: ninit kinds'),
        ("Resume", f'no kind "Resume". Near: resume ({CORE}). Next: ninit kinds'),
        ("zzz", f'no kind "zzz". Installed: file, previous_run, resume ({CORE}). Next: ninit kinds'),
        (
            "my.kinds.Special",
            f'no kind "my.kinds.Special". Installed: file, previous_run, resume ({CORE}). A dotted kind is a '
            'registered name, never an import path; no installed distribution has the line "my.kinds.Special" = '
            '"my.kinds:Special" under [project.entry-points."noether_init.initializers"]. Next: ninit kinds',
        ),
    ],
)
def test_unknown_kinds(kind: str, expected: str, only: ForeignPackages) -> None:
    """A near name, what there is, the distribution that has it, or the line that is missing."""
    assert message_of(kind, UnknownKindError) == expected


@pytest.mark.usefixtures("isolated_kinds")
@pytest.mark.needs_torch
def test_a_kind_that_is_not_installed() -> None:
    """The distribution that has it, and nothing that the config made up."""
    assert message_of("random", UnknownKindError) == (
        'no kind "random". random comes with noether-init-random, which is not installed. '
        "Next: pip install noether-init-random"
    )
    assert message_of("evil-package", UnknownKindError) == (
        'no kind "evil-package". No kind is installed. Next: ninit kinds'
    )


def test_a_conflict(only: ForeignPackages) -> None:
    """Both distributions with versions and targets, and the command that settles it."""
    only.install("one-init", offers={"claimed": "claim_one:K"})
    only.install("two-init", version="2.5", offers={"claimed": "claim_two:K"})
    first, other = sorted(["one-init 1.0 -> claim_one:K", "two-init 2.5 -> claim_two:K"])
    assert message_of("claimed", KindConflictError) == (
        f'kind "claimed" is provided more than once: {first} and {other}. None of them was imported. '
        "Next: pip uninstall two-init, or set NOETHER_INIT_DENY=two-init"
    )


@pytest.mark.needs_torch
def test_a_conflict_with_a_kind_of_this_process(only: ForeignPackages) -> None:
    """What is installed is what can be uninstalled."""
    only.install(
        "acme-init", offers={"acme": "acme_message:ConstantInitializer"}, modules={"acme_message": INITIALIZER}
    )
    cls = kinds.resolve("acme")
    with pytest.raises(KindConflictError) as caught:
        kinds.register("acme", cls)
    assert str(caught.value) == (
        'kind "acme" is provided more than once: acme-init 1.0 -> acme_message:ConstantInitializer and registered in '
        "this process -> acme_message:ConstantInitializer. None of them was imported. "
        "Next: pip uninstall acme-init, or set NOETHER_INIT_DENY=acme-init"
    )


def test_blocked_kinds(only: ForeignPackages, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that shuts the distribution out."""
    only.install("acme-init", offers={"acme": "acme_blocked:K"})
    monkeypatch.setenv("NOETHER_INIT_DENY", "acme-init")
    assert message_of("acme", KindBlockedError) == (
        'kind "acme" is provided by acme-init 1.0, which is listed in NOETHER_INIT_DENY. '
        "Next: take acme-init out of NOETHER_INIT_DENY"
    )
    monkeypatch.setenv("NOETHER_INIT_ALLOW", "noether-init-core")
    assert message_of("acme", KindBlockedError) == (
        'kind "acme" is provided by acme-init 1.0, which is not listed in NOETHER_INIT_ALLOW. '
        "Next: add acme-init to NOETHER_INIT_ALLOW"
    )


@pytest.mark.parametrize(
    ("target", "source", "reason"),
    [
        ("broken_one:K", "raise RuntimeError('no driver')\n", "RuntimeError: no driver"),
        ("gone_one:K", None, "ModuleNotFoundError: No module named 'gone_one'"),
        ("empty_one:K", "", "AttributeError: module 'empty_one' has no attribute 'K'"),
        ("leaving_one:K", "raise SystemExit(3)\n", "SystemExit: 3"),
    ],
)
def test_a_kind_that_cannot_be_imported(target: str, source: str | None, reason: str, only: ForeignPackages) -> None:
    """What it raised, and the command that shows it again."""
    module = target.partition(":")[0]
    only.install("bad-init", offers={"bad": target}, modules={} if source is None else {module: source})
    assert message_of("bad", KindImportError) == (
        f'kind "bad" (bad-init 1.0): importing {target} raised {reason}. Other kinds are not affected. '
        f'Next: python -c "from {module} import K"'
    )


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("K = 3\n", "is of type int, not a subclass of InitializerBase"),
        ("class K: pass\n", "is the class K, not a subclass of InitializerBase"),
        (
            "from noether_init_core import SourceInitializer, SourceInitializerConfig\n"
            "class K(SourceInitializer):\n    config_class = SourceInitializerConfig\n",
            "breaks the contract of initializers: locate(query) is not implemented",
        ),
        (
            f"{HEAD}    def init_weights(self, module): pass\n    def init_optimizer(self, *rest): pass\n",
            "breaks the contract of initializers: init_weights takes module, which would never be filled; it may take: "
            "model, initializer; init_optimizer takes *rest, which would never be filled; it may take: model, "
            "initializer",
        ),
    ],
)
@pytest.mark.needs_torch
def test_a_class_that_breaks_the_contract(source: str, finding: str, only: ForeignPackages) -> None:
    """Every finding in one message; the command shows the fixes."""
    only.install("odd-init", offers={"odd": "odd_one:K"}, modules={"odd_one": source})
    assert message_of("odd", KindContractError) == (
        f'kind "odd" (odd-init 1.0): odd_one:K {finding}. Next: ninit check odd; '
        "if the package is not yours: pip install --upgrade odd-init"
    )


@pytest.mark.needs_torch
def test_a_class_for_a_newer_contract(only: ForeignPackages) -> None:
    """Both versions, and the command that brings the newer one."""
    newer = CONTRACT_VERSION + 1
    only.install("new-init", offers={"new": "new_one:K"}, modules={"new_one": f"{HEAD}    contract = {newer}\n{HOOKS}"})
    assert message_of("new", KindContractError) == (
        f'kind "new" (new-init 1.0): new_one:K was written for contract {newer}; the installed noether-init-core has '
        f"contract {CONTRACT_VERSION}. Next: pip install --upgrade noether-init-core"
    )


@pytest.mark.needs_torch
def test_a_class_that_is_registered_by_hand() -> None:
    """Nothing is installed that a command could look at: the call to make again."""
    with pytest.raises(KindContractError) as caught:
        kinds.register("mine", int)  # type: ignore[arg-type]  # the mistake that is tested
    assert str(caught.value) == (
        'kind "mine" (registered in this process): builtins:int is the class int, not a subclass of InitializerBase. '
        'Next: correct the class, and kinds.register("mine", ...) again'
    )
    assert NEXT.search(str(caught.value))
