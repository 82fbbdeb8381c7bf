"""One file over HTTP by the standard library: limits, no downgrade, and the token for one server."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from noether_init_core import ArtifactCache, CheckpointCorruptError, CheckpointError, CheckpointNotFoundError

__all__ = ["fetch"]

#: Seconds without a byte after which a server counts as gone.
TIMEOUT = 60
_CHUNK = 1 << 20


class _SameScheme(urllib.request.HTTPRedirectHandler):
    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        # before urllib looks at the address itself: its errors would show all of it
        try:
            # where there is no Location, urllib follows the old URI
            scheme = urlsplit(headers.get("location") or headers.get("uri") or "").scheme
        except ValueError:
            scheme = "?"
        if scheme not in ("", urlsplit(req.full_url).scheme):
            fp.close()
            raise CheckpointError(
                f"{ArtifactCache.shown(req.full_url)} leads to another place by another protocol, or to no address. "
                "Next: ask whoever runs the server where the file is now, and name that as url"
            )
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme != urlsplit(req.full_url).scheme:
            fp.close()
            shown = ArtifactCache.shown
            raise CheckpointError(
                f"{shown(req.full_url)} leads to {shown(newurl)}, by another protocol. Next: url: <where that leads to>"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, target: Path, *, limit: int, is_exact: bool = False, token: Callable[[], SecretStr | None]) -> None:
    """Write what ``url`` offers to ``target``: at most ``limit`` bytes, or with ``is_exact`` just as many.

    Raises ``CheckpointNotFoundError`` if there is nothing, ``CheckpointCorruptError`` for another number of bytes, and
    ``CheckpointError`` if the server refuses, cannot be reached, or stops.
    """
    shown, secret = ArtifactCache.shown(url), token()
    request = urllib.request.Request(url)
    if secret is not None:
        # such a header does not go along when the server redirects to another one
        request.add_unredirected_header("Authorization", f"Bearer {secret.get_secret_value()}")
    try:
        # without encryption, no proxy on the way may read the token
        direct = [urllib.request.ProxyHandler({})] if secret is not None and urlsplit(url).scheme == "http" else []
        opener = urllib.request.build_opener(_SameScheme, *direct)
        with opener.open(request, timeout=TIMEOUT) as response, target.open("xb") as file:
            count = 0
            while chunk := response.read(min(_CHUNK, limit + 1 - count)):
                count += len(chunk)
                if count > limit:
                    raise CheckpointCorruptError(
                        f"{shown} has more than the {limit} bytes that it may have; the rest was not read. Next: tell "
                        "whoever runs the server"
                    )
                file.write(chunk)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise CheckpointNotFoundError(
                f"there is no {shown} (the server says {error.code}). Next: look at url and name", asked=shown
            ) from error
        hint = "token: NAME_OF_A_VARIABLE that holds one" if error.code in (401, 403) else "try again later"
        raise CheckpointError(f"the server answers {error.code} to {shown}. Next: {hint}") from error
    except (ValueError, http.client.InvalidURL):  # of an address that the server leads to; it may hold a secret
        raise CheckpointError(
            f"{shown} leads to no address. Next: ask whoever runs the server where the file is now"
        ) from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise CheckpointError(
            f"{shown} cannot be fetched: {reason}. Next: see whether url is right and the server runs, then start again"
        ) from error
    if is_exact and count < limit:
        raise CheckpointCorruptError(f"{shown} ended after {count} of {limit} bytes. Next: start again")
