"""A store for tests: a publisher with a key, and a real HTTP server for what was published."""

from __future__ import annotations

import base64
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from noether_init_signed_store.publish import publish

__all__ = ["Store"]


class Store:
    """Serves a folder on a port of this machine, while it is used as a context manager.

    Attributes:
        folder: What is served.
        key: The publisher's key.
        requests: (path, value of the header Authorization) of every request, in order.
        answers: Path -> what answers in place of the file; it is given the handler of the request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key = Ed25519PrivateKey.generate()
        self.requests: list[tuple[str, str | None]] = []
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.is_running = False

    @property
    def public_key(self) -> str:
        """As a config has it."""
        return base64.b64encode(self.key.public_key().public_bytes_raw()).decode()

    @property
    def paths(self) -> list[str]:
        """The path of every request, in order."""
        return [path for path, _ in self.requests]

    def config(self, name: str, **more: Any) -> dict[str, Any]:
        """The config that loads ``name`` from here."""
        return {"kind": "signed_store", "url": self.url, "name": name, "public_key": self.public_key, **more}

    def put(self, file: Path, name: str) -> Path:
        """Publish ``file`` as ``name``."""
        shutil.copyfile(file, self.folder / name)
        publish(self.folder / name, self.key)
        return self.folder / name

    def __enter__(self) -> Self:
        self._thread.start()
        self.is_running = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go down; who asks then is refused. Repeating it does nothing."""
        if self.is_running:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self.is_running = False


class _Handler(BaseHTTPRequestHandler):
    store: Store

    def do_GET(self) -> None:
        self.store.requests.append((self.path, self.headers["Authorization"]))
        answer = self.store.answers.get(self.path)
        file = self.store.folder / self.path.removeprefix("/")
        if answer is not None:
            answer(self)
        elif file.is_file():
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        """Nothing: what the tests ask for is in ``requests``."""
