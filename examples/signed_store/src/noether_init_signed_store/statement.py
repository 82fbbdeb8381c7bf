"""What a publisher says about a file, and signs."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Self

import pydantic
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from noether_init_core import CheckpointError, CheckpointFormatError

__all__ = ["MAX_STATEMENT", "SignatureError", "Statement", "key_problem"]

#: Bytes of the longest statement that is read.
MAX_STATEMENT = 4096


class SignatureError(CheckpointError):
    """The statement was not signed by the key of the config, or is about another file."""


class Statement(pydantic.BaseModel):
    """Name, digest and size of a file, with the signature of its publisher over these three."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    sha256: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, pydantic.Field(ge=0)]
    signature: str

    @property
    def digest(self) -> str:
        """The digest as ``Source`` and ``ArtifactCache`` take it."""
        return f"sha256:{self.sha256}"

    @classmethod
    def sign(cls, name: str, sha256: str, size: int, key: Ed25519PrivateKey) -> Self:
        """The statement of the publisher who has ``key``."""
        signature = key.sign(_canonical(name, sha256, size))
        return cls(name=name, sha256=sha256, size=size, signature=base64.b64encode(signature).decode())

    @classmethod
    def read(cls, content: bytes, name: str, public_key: str, *, where: str) -> Self:
        """The statement about ``name``; nothing of it is believed before its signature has been checked.

        Raises ``CheckpointFormatError`` for other content, ``SignatureError`` if it was not signed by ``public_key`` or
        is about another file.
        """
        try:
            if len(content) > MAX_STATEMENT:
                raise ValueError(f"it has more than {MAX_STATEMENT} bytes")
            statement = cls.model_validate_json(content)
            signature = base64.b64decode(statement.signature, validate=True)
        except ValueError as error:  # pydantic's and that of base64 are such, too
            raise CheckpointFormatError(
                f"{name}.json of {where} is not a signed statement. Next: check url and name"
            ) from error
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key))
        try:
            key.verify(signature, _canonical(statement.name, statement.sha256, statement.size))
        except InvalidSignature as error:
            raise SignatureError(
                f"{name}.json of {where} is not signed by the public_key {public_key}. Next: compare public_key with "
                "what the publisher says; if it is right, do not use the file, and tell them"
            ) from error
        if statement.name != name:
            raise SignatureError(
                f"{name}.json of {where} is a genuine statement, but about {statement.name!r}. Next: do not use the "
                "file; whoever runs the server has to put the right statement there"
            )
        return statement


def key_problem(public_key: str) -> str:
    """What is wrong with a public key as it is written in a config; empty where it can be used."""
    try:
        if len(base64.b64decode(public_key, validate=True)) == 32:
            return ""
    except binascii.Error:
        pass
    return "is no Ed25519 key: base64 of 32 bytes, 44 characters, as the publisher's command prints it"


def _canonical(name: str, sha256: str, size: int) -> bytes:
    # one writing only: sorted keys, no spaces, ASCII
    return json.dumps({"name": name, "sha256": sha256, "size": size}, sort_keys=True, separators=(",", ":")).encode()
