"""For publishers: ``python -m noether_init_signed_store.publish FILE --key KEY.pem`` writes ``FILE.json``."""

from __future__ import annotations

import argparse
import base64
import hashlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from noether_init_signed_store.statement import Statement

__all__ = ["publish"]


def publish(file: Path, key: Ed25519PrivateKey) -> Path:
    """Write the signed statement about ``file`` beside it; returns its path."""
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    written = file.with_name(f"{file.name}.json")
    written.write_text(Statement.sign(file.name, sha256, file.stat().st_size, key).model_dump_json() + "\n")
    return written


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Sign a file for the kind signed_store.")
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--key", type=Path, required=True, help="PEM file: openssl genpkey -algorithm ed25519 -out KEY.pem"
    )
    arguments = parser.parse_args()
    key = load_pem_private_key(arguments.key.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        parser.error(f"{arguments.key} holds no Ed25519 key")
    print(f"wrote {publish(arguments.file, key)}")
    print(f"public_key: {base64.b64encode(key.public_key().public_bytes_raw()).decode()}")


if __name__ == "__main__":
    main()
