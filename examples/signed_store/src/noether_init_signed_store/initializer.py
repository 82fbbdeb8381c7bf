"""Config and initializer of ``signed_store``."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pydantic

from noether_init_core import (
    ArtifactCache,
    ConfigError,
    KindConfig,
    LocateQuery,
    Source,
    SourceInitializer,
    SourceInitializerConfig,
)
from noether_init_signed_store.fetching import fetch
from noether_init_signed_store.statement import MAX_STATEMENT, Statement, key_problem

__all__ = ["SignedStoreConfig", "SignedStoreInitializer"]


class SignedStoreConfig(SourceInitializerConfig):
    """The config of ``signed_store``. Nothing in it is secret."""

    # an error must not repeat what somebody wrote into the wrong field
    model_config = pydantic.ConfigDict(hide_input_in_errors=True)

    kind: str = "signed_store"
    url: str = pydantic.Field(
        description="Where the files are: <url>/<name> and <url>/<name>.json; without user, password and query."
    )
    name: str = pydantic.Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the file; it means one content for ever."
    )
    public_key: str = pydantic.Field(description="Ed25519 key of the publisher: base64 of its 32 bytes.")
    token: str | None = pydantic.Field(
        default=None,
        description="Name of the environment variable that holds the access token; never the token itself.",
    )

    @pydantic.field_validator("url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or not value.isprintable() or " " in value:
            raise ValueError("write https://host/path")
        if set("@?#") & set(value):
            raise ValueError("no user, password, query or fragment belongs here. Next: token: NAME_OF_A_VARIABLE")
        return value.rstrip("/")

    @pydantic.field_validator("public_key")
    @classmethod
    def _check_key(cls, value: str) -> str:
        if problem := key_problem(value):
            raise ValueError(problem)
        return value

    @pydantic.field_validator("token")
    @classmethod
    def _check_token(cls, value: str | None, info: pydantic.ValidationInfo) -> str | None:
        if value is None:
            return None
        if not (value.isidentifier() and value.isupper()):
            raise ValueError("write the name of an environment variable, such as STORE_TOKEN, never the token itself")
        url = urlsplit(info.data.get("url", ""))
        if url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError("over http everybody on the way could read the token. Next: url: https://...")
        return value

    @pydantic.field_validator("verify")
    @classmethod
    def _check_verify(cls, value: str) -> str:
        if value != "full":
            raise ValueError("what was signed is the digest of all bytes, which only verify: full compares")
        return value


class SignedStoreInitializer(SourceInitializer):
    """Weights of one single model from one signed file of a server; see the docstring of the package."""

    config_class: ClassVar[type[KindConfig]] = SignedStoreConfig
    contract: ClassVar[int] = 1
    one_model: ClassVar[bool] = True
    config: SignedStoreConfig

    def locate(self, query: LocateQuery) -> Source | None:
        """The file, fetched where the node does not have it; its statement is checked first, each time."""
        if query.part != "model":
            return None
        cache, address = ArtifactCache(), f"{self.config.url}/{self.config.name}"
        about = cache.get(
            f"{address}.json",
            partial(fetch, f"{address}.json", limit=MAX_STATEMENT, token=self._token),
            check=self._statement,
        )
        statement = self._statement(about)
        # the digest in the key: what was fetched for an earlier statement is another entry
        file = cache.get(
            f"{address}#{statement.digest}",
            partial(fetch, address, limit=statement.size, is_exact=True, token=self._token),
            digest=statement.digest,
        )
        return Source(file, digests=statement.digest, origin={"run_id": self.config.name, "store": self.config.url})

    def _statement(self, path: Path) -> Statement:
        with path.open("rb") as file:
            content = file.read(MAX_STATEMENT + 1)
        return Statement.read(content, self.config.name, self.config.public_key, where=f"{self.config.url} ({path})")

    def _token(self) -> pydantic.SecretStr | None:
        if self.config.token is None:
            return None
        value = os.environ.get(self.config.token, "").strip()  # secrets that were read from files end with a newline
        if not value:
            raise ConfigError(f"the environment variable {self.config.token} is not set. Next: put the token into it")
        if not re.fullmatch(r"[\x21-\x7e]+", value):  # http.client would show the whole of it in its error
            raise ConfigError(
                f"the environment variable {self.config.token} holds characters that no token has (spaces, control or "
                "other than ASCII). Next: put the token alone into it"
            )
        return pydantic.SecretStr(value)
