"""The way of a file from its publisher into a model, and what a statement is worth."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from store import Store

from noether_init_core import CheckpointFormatError, InitializerStack, bind
from noether_init_signed_store import SignatureError, Statement


def test_published_weights_arrive(store: Store, tmp_path: Path) -> None:
    """Every value of the file is in the model, and the report says where it came from."""
    published, network = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    torch.save(published.state_dict(), tmp_path / "probe.pt")
    store.put(tmp_path / "probe.pt", "probe-v1.pt")
    report = InitializerStack.from_config([store.config("probe-v1.pt")]).initialize(bind(network, "probe"))
    assert torch.equal(network.weight, published.weight)
    assert torch.equal(network.bias, published.bias)
    assert str(report) == f"start E0_U0_S0\nsigned_store: probe <- probe-v1.pt (store {store.url}) (2 loaded)"
    (source,) = report.sources
    assert source.digest == f"sha256:{hashlib.sha256((tmp_path / 'probe.pt').read_bytes()).hexdigest()}"
    assert dict(source.origin) == {"run_id": "probe-v1.pt", "store": store.url}


def test_the_command_of_the_publisher_prints_the_key_of_the_config(store: Store, tmp_path: Path) -> None:
    """What it writes beside the file is a statement that this key has signed."""
    from cryptography.hazmat.primitives import serialization as write

    pem = store.key.private_bytes(write.Encoding.PEM, write.PrivateFormat.PKCS8, write.NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem)
    (tmp_path / "w.pt").write_bytes(b"content")
    command = [sys.executable, "-m", "noether_init_signed_store.publish", "w.pt", "--key", "key.pem"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"wrote w.pt.json\npublic_key: {store.public_key}\n"
    statement = Statement.read((tmp_path / "w.pt.json").read_bytes(), "w.pt", store.public_key, where="here")
    assert (statement.size, statement.digest) == (7, f"sha256:{hashlib.sha256(b'content').hexdigest()}")


@pytest.mark.parametrize("field", ["name", "sha256", "size", "signature"])
def test_a_statement_with_any_field_changed_is_not_believed(field: str, store: Store) -> None:
    """Name, digest, size and the signature itself are all covered."""
    statement = Statement.sign("w.pt", "0" * 64, 100, store.key)
    changed = {
        "name": "v.pt",
        "sha256": "1" * 64,
        "size": 101,
        "signature": Statement.sign("w.pt", "0" * 64, 100, Ed25519PrivateKey.generate()).signature,
    }
    content = json.dumps({**statement.model_dump(), field: changed[field]})
    with pytest.raises(SignatureError, match="is not signed by the public_key"):
        Statement.read(content.encode(), "w.pt", store.public_key, where="here")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"<html>please log in</html>", b"\xff", b'{"name": "w.pt", "size": "100"}', b" " * 5000, b"[" * 4000],
)
def test_what_is_no_statement_is_refused(content: bytes, store: Store) -> None:
    """Whatever a server may hand out in its place."""
    with pytest.raises(CheckpointFormatError, match="is not a signed statement"):
        Statement.read(content, "w.pt", store.public_key, where="here")
