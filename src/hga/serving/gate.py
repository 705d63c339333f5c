"""What every request passes before it is looked at: host, key and size."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from hga.serving.metrics import Metrics
from hga.serving.protocol import error_body

logger = logging.getLogger("hga.serving")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN = ("/", "/health")
_COUNTED = (
    *("/", "/health", "/metrics", "/openapi.json", "/load_model"),
    *("/v1/models", "/v1/chat/completions", "/v1/completions"),
)


def read_keys(path: Path) -> list[str]:
    """The API keys of a file, one a line. ValueError if there is none, or one that is too short to be secret."""
    if not path.is_file():
        raise ValueError(f"--api-key-file {path} is no file; put one key a line into it")
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ValueError(f"--api-key-file {path} holds no key; put one key a line into it")
    if any(len(key) < 16 for key in keys):
        raise ValueError(
            f"--api-key-file {path} holds a key of less than 16 characters; make one: openssl rand -hex 24"
        )
    return keys


class Gate:
    """The outermost layer of the server: refuses strangers and floods, counts answers, hides what went wrong inside."""

    def __init__(self, app: App, *, keys: Sequence[str], hosts: Sequence[str], max_body_bytes: int, metrics: Metrics):
        """keys: none, and everybody is let in; hosts: names that a request may be addressed to, none for all."""
        self._app = app
        self._digests = [_digest(key) for key in keys]
        self._hosts = hosts
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: there is none here
            await send({"type": "websocket.close", "code": 1008})
            return
        path, begun = scope["path"], False

        async def count(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                known = path if path in _COUNTED else "other"
                self._metrics.requests.labels(known, message["status"]).inc()
            await send(message)

        try:
            refused = self._refuse(scope)
            if refused is not None:
                await _answer(count, *refused)
                return
            await self._app(scope, self._bounded(receive), count)
        except Exception:
            logger.exception("%s failed", path)
            if not begun:
                await _answer(count, 500, "the server failed; its log says why")

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason for a request that is not let in."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts and _host_name(host) not in self._hosts:
            # Else any web page could reach a server on this machine through a name of its own.
            return 421, f"this server answers to {', '.join(self._hosts)}"
        if self._digests and scope["path"] not in _OPEN:
            own = _owner(headers)
            # Every key is compared, so that the time taken does not tell which one was close.
            if not sum(hmac.compare_digest(own, digest) for digest in self._digests):
                return 401, "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            scope.setdefault("state", {})["owner"] = own.hex()
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            return 413, self._too_large()
        return None

    def _bounded(self, receive: Receive) -> Receive:
        received = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return bounded

    def _too_large(self) -> str:
        return f"the request has more than {self._max_body_bytes:,} bytes, the most that this server takes"


def _owner(headers: MutableMapping[bytes, bytes]) -> bytes:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return _digest(key.strip().decode("latin-1") if scheme.lower() == b"bearer" else "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


async def _answer(send: Send, status: int, reason: str) -> None:
    body = json.dumps(error_body(status, reason)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
