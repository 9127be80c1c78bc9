"""The servers of `unmask up`: on 127.0.0.1 alone, and deaf to pages of foreign sites, whatever way they come."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import Any

import psutil
import pytest
import uvicorn
import websockets
from conftest import Clone, free_port
from websockets.exceptions import InvalidStatus

from flows.prefect_server import Guard, allowed

FOREIGN = ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "localhost.evil.example", ""]
"""Hosts under which a foreign site's name could lead here."""
ORIGINS = [
    "https://evil.example", "http://evil.example:{port}", "http://127.0.0.1.evil.example:{port}", "null",
    "http://127.0.0.1:{port}@evil.example", "http://evil@127.0.0.1:{port}", "https://127.0.0.1:{port}",
]  # fmt: skip
API = "/api/flows/filter"


def ask(
    port: int, path: str, method: str = "GET", host: str | None = None, body: Any = None, **headers: str
) -> tuple[int, Mapping[str, str], str]:
    """Ask a server on 127.0.0.1 under any name; gives status, headers (by small letters) and text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    content = None if body is None else json.dumps(body).encode()
    try:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", f"127.0.0.1:{port}" if host is None else host)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        if content is not None:
            connection.putheader("Content-Type", headers.get("Content_Type", "application/json"))
            connection.putheader("Content-Length", str(len(content)))
        connection.endheaders(content)
        answer = connection.getresponse()
        return answer.status, {key.lower(): one for key, one in answer.getheaders()}, answer.read().decode()
    finally:
        connection.close()


def handshake(port: int, origin: str | None, path: str) -> int:
    """The status that a WebSocket is answered with; 101 where it is opened."""

    async def opened() -> int:
        try:
            async with websockets.connect(f"ws://127.0.0.1:{port}{path}", origin=origin, open_timeout=30):  # type: ignore[arg-type]
                return 101
        except InvalidStatus as refused:
            return refused.response.status_code

    return asyncio.run(opened())


def check_prefect(port: int) -> None:
    assert ask(port, API, "POST", body={})[0] == 200
    assert ask(port, API, "POST", f"localhost:{port}", {}, Origin=f"http://localhost:{port}")[0] == 200
    for host in FOREIGN:
        status, _, text = ask(port, API, "POST", host.format(port=port), {})
        assert (status, "Host or Origin is foreign" in text) == (403, True), host
    for origin in ORIGINS:
        said = origin.format(port=port)
        for method, path, kind in (
            ("POST", API, "application/json"),
            ("POST", API, "text/plain"),
            ("GET", "/", "text/plain"),
            ("OPTIONS", API, "text/plain"),
        ):
            status, headers, _ = ask(port, path, method, body={}, Origin=said, Content_Type=kind)
            assert (status, headers.get("access-control-allow-origin")) == (403, None), (origin, method)
        assert handshake(port, said, "/api/events/in") == 403, origin
    assert handshake(port, None, "/api/events/in") == 101


def check_mlflow(port: int) -> None:
    path, body = "/api/2.0/mlflow/experiments/search", {"max_results": 1}
    assert ask(port, path, "POST", body=body)[0] == 200
    for host in FOREIGN:
        assert ask(port, path, "POST", host.format(port=port), body)[0] == 403, host
        assert ask(port, "/", "GET", host.format(port=port))[0] == 403, host
    for origin in ORIGINS[:4]:
        said = origin.format(port=port)
        for kind in ("application/json", "text/plain"):
            assert ask(port, path, "POST", body=body, Origin=said, Content_Type=kind)[0] == 403, origin
        _, headers, _ = ask(port, f"{path}?max_results=1", Origin=said)
        assert "access-control-allow-origin" not in headers, "a page may not read what it asked for"


def check_bound(ports: set[int]) -> None:
    """All that listens on the ports does so on 127.0.0.1."""
    found = {(one.laddr.ip, one.laddr.port) for one in psutil.net_connections("tcp") if one.status == "LISTEN"}
    assert {one for one in found if one[1] in ports} == {("127.0.0.1", port) for port in ports}


@pytest.mark.orchestration
def test_real_servers_listen_here_and_refuse_what_is_foreign(served: Clone) -> None:
    ports = {name: int(served.environment[f"UNMASK_{name.upper()}_PORT"]) for name in ("prefect", "mlflow")}
    if sys.platform == "linux":
        check_bound(set(ports.values()))
    check_prefect(ports["prefect"])
    check_mlflow(ports["mlflow"])


async def answering(scope: Any, receive: Any, send: Any) -> None:
    """An app that answers everything."""
    if scope["type"] == "lifespan":
        for stage in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{stage}.complete"})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answered"})


@contextmanager
def guarded(port: int, origins: frozenset[str]) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(Guard(answering, origins), host="127.0.0.1", port=port, log_level="error"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.delenv("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", raising=False)
    return free_port()


def test_the_guard_lets_through_this_machine_and_nothing_else(port: int) -> None:
    with guarded(port, allowed(port)):
        check_prefect(port)
        # A tunnel's port is another one.
        assert ask(port, "/", host="localhost:9999", Origin="http://localhost:9999")[0] == 200
        with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
            assert raw.recv(100).split()[1] in (b"400", b"403"), "two hosts: which one is meant?"


def test_an_origin_that_the_user_sets_is_let_through(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "https://team.example")
    with guarded(port, allowed(port)):
        assert ask(port, API, "POST", "team.example", {}, Origin="https://team.example")[0] == 200
        assert ask(port, API, "POST", "evil.example", {}, Origin="https://team.example")[0] == 403
        assert ask(port, API, "POST", None, {}, Origin="https://evil.example")[0] == 403
