"""Prefect's server behind a guard: `python -m flows.prefect_server PORT`.

A page of a foreign site, open in the user's browser, reaches servers on 127.0.0.1 too: by a request across origins, by
a WebSocket, which no browser holds back, or under a name of its own that it has led here (DNS rebinding). Prefect
answers all of them, and what it is told to run, its workers run. So the guard refuses every request whose Host or
Origin is not on this machine, as MLflow's server does. Ports are free, so that a tunnel to another machine works.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

ORIGINS = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
"""Prefect's own setting; the origins in it, such as that of a reverse proxy, are let through here as well."""
NAMES = ("127.0.0.1", "localhost")
REFUSED = b"refused: the request's Host or Origin is foreign; see docs/security.md\n"


class Guard:
    """An ASGI app that hands on only what comes from `origins` to their hosts."""

    def __init__(self, app: App, origins: frozenset[str]) -> None:
        self.app, self.origins = app, origins
        self.hosts = frozenset(urlsplit(origin).netloc for origin in origins)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._known(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: answered with 403
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": REFUSED})

    def _known(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether the request's one host and its origin, which programs do not send, are known."""
        said: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for name, value in headers:
            if name.lower() in said:
                said[name.lower()].append(value.decode("latin-1").lower())
        hosts, origins = said[b"host"], said[b"origin"]
        return (
            len(hosts) == 1
            and (_local(f"http://{hosts[0]}") or hosts[0] in self.hosts)
            and all(_local(one) or one in self.origins for one in origins)
        )


def _local(origin: str) -> bool:
    """Whether an origin is a page of this machine; `evil@localhost` and the like are none."""
    try:
        found = urlsplit(origin)
        return found.scheme == "http" and found.hostname in NAMES and "@" not in found.netloc and not found.path
    except ValueError:
        return False


def allowed(port: int) -> frozenset[str]:
    """The origins of this server's own pages, and those that the user has set."""
    given = os.environ.get(ORIGINS, "").split(",")
    return frozenset(f"http://{name}:{port}" for name in NAMES) | {one.strip().lower() for one in given if one.strip()}


def main() -> None:
    port = int(sys.argv[1])
    origins = allowed(port)
    os.environ[ORIGINS] = ",".join(sorted(origins))  # Prefect's default answers every origin
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    settings = get_current_settings().server
    # As `prefect server start` runs it.
    uvicorn.run(
        Guard(create_app(final=True), origins),
        host="127.0.0.1",
        port=port,
        timeout_keep_alive=settings.api.keepalive_timeout,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
        log_level=settings.logging_level.lower(),
    )


if __name__ == "__main__":
    main()
