"""The server: one port for websockets and the few pages, by path."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import http
import logging
import signal
import ssl
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from paligemma_vla.serving.connection import MAX_FRAME
from paligemma_vla.serving.page import Page
from paligemma_vla.serving.protocols import groot, openpi, vla_eval
from paligemma_vla.serving.service import PolicyService, Session

log = logging.getLogger(__name__)
wire_log = logging.getLogger(f"{__name__}.wire")  # of websockets, which says of every answer to a page that it was sent
Serve = Callable[[ServerConnection, PolicyService, Session, int | None], Coroutine[Any, Any, None]]
# Path -> the protocol that is spoken there. GR00T's has a port of its own.
WIRES: dict[str, tuple[str, Serve]] = {
    "/": (openpi.NAMES.protocol, openpi.serve_openpi),
    "/vla-eval": (vla_eval.NAMES.protocol, vla_eval.serve_vla_eval),
}
OPEN_SECONDS = 10  # a client that has not said what it wants by then is disconnected
PING_SECONDS, PONG_SECONDS = 20, 20


@dataclass(frozen=True)
class ServeSettings:
    """host, port: where it listens; port 0 takes a free one. api_key: None lets everybody in. max_clients: connections at once.

    max_batch, batch_wait_s, max_queue: see `Engine`. execute: actions of a chunk that are sent, None: as the protocol has it.
    certfile, keyfile: TLS, PEM. zmq_port: of GR00T's protocol, None: not spoken, 0: a free one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_clients: int = 32
    max_batch: int = 8
    batch_wait_s: float = 0.005
    max_queue: int = 32
    execute: int | None = None
    certfile: Path | None = None
    keyfile: Path | None = None
    zmq_port: int | None = None


class PolicyServer:
    """Serves a `PolicyService`. It is reached at `port`, and at `zmq_port`, once `run` has called `ready`."""

    def __init__(self, service: PolicyService, settings: ServeSettings) -> None:
        self.service, self.settings = service, settings
        self.port, self.zmq_port = settings.port, settings.zmq_port
        self.page = Page(service)
        self._stop = asyncio.Event()

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` or SIGTERM or SIGINT; then answer what was asked, and return."""
        settings = self.settings
        self.service.start(settings.max_batch, settings.batch_wait_s, settings.max_queue)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(ValueError, RuntimeError):  # not the main thread
                loop.add_signal_handler(number, self.stop)
        context = None
        if settings.certfile is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(settings.certfile, settings.keyfile)
        wire_log.setLevel(logging.WARNING)
        async with (
            AsyncExitStack() as stack,
            serve(
                self._handle,
                settings.host,
                settings.port,
                ssl=context,
                process_request=self._process_request,
                compression=None,
                max_size=MAX_FRAME,
                max_queue=4,
                open_timeout=OPEN_SECONDS,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                server_header="paligemma-vla",
                logger=wire_log,
            ) as server,
        ):
            self.port = server.sockets[0].getsockname()[1]
            if settings.zmq_port is not None:
                self.zmq_port = await stack.enter_async_context(self._serve_groot(settings.zmq_port))
            ready()
            await self._stop.wait()
            await self._drain(server)
        await self.service.close()

    def stop(self) -> None:
        self._stop.set()

    def _serve_groot(self, port: int) -> AbstractAsyncContextManager[int]:
        settings = self.settings
        if settings.certfile is not None:
            log.warning("--zmq_port %d is not encrypted: ZeroMQ has no TLS", port)
        return groot.serve_groot(self.service, settings.host, port, settings.api_key, settings.max_clients, settings.execute)

    async def _drain(self, server: Server) -> None:
        """No new clients; those that are being answered get their answers."""
        server.close(close_connections=False)

    async def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        path, _, query = request.path.partition("?")
        if path in ("/healthz", "/health"):
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._is_authorized(request.headers):
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, "API key missing or wrong\n")
            response.headers["WWW-Authenticate"] = 'Basic realm="paligemma-vla", charset="UTF-8"'
            return response
        if "websocket" in request.headers.get("Upgrade", "").lower():
            return self._refuse(connection, path)
        return await self._show(connection, path, query)

    async def _show(self, connection: ServerConnection, path: str, query: str) -> Response:
        """What is read, not spoken to."""
        if path == "/metrics":
            return _respond(connection, self.service.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")
        if path == "/config":
            status, body = vla_eval.config_page(query, self.settings.max_batch, self.settings.batch_wait_s)
            return _respond(connection, body, "application/json", status)
        if (found := await self.page.get(path)) is not None:
            return _respond(connection, *found, headers=self.page.headers)
        return connection.respond(http.HTTPStatus.NOT_FOUND, "expected /, /healthz, /metrics or /config\n")

    def _refuse(self, connection: ServerConnection, path: str) -> Response | None:
        """Why a websocket is not opened; None where it is."""
        if path not in WIRES:
            return connection.respond(http.HTTPStatus.NOT_FOUND, "expected / (openpi) or /vla-eval\n")
        if len(self.service.sessions) >= self.settings.max_clients:
            text = f"{self.settings.max_clients} clients are connected; expected at most as many (--max_clients)\n"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, text)
        return None

    def _is_authorized(self, headers: Headers) -> bool:
        if self.settings.api_key is None:
            return True
        scheme, _, value = headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            with suppress(binascii.Error, UnicodeDecodeError):
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        elif scheme.lower() not in ("api-key", "bearer"):
            return False
        return hmac.compare_digest(value.encode(), self.settings.api_key.encode())

    async def _handle(self, connection: ServerConnection) -> None:
        request = connection.request
        assert request is not None
        protocol, serve_connection = WIRES[request.path.partition("?")[0]]
        session = self.service.open_session(protocol, str((connection.remote_address or ("?",))[0]))
        try:
            with suppress(ConnectionClosed):
                await serve_connection(connection, self.service, session, self.settings.execute)
        finally:
            self.service.close_session(session)


def _respond(
    connection: ServerConnection,
    body: bytes,
    kind: str,
    status: http.HTTPStatus = http.HTTPStatus.OK,
    headers: Mapping[str, str] | None = None,
) -> Response:
    response = connection.respond(status, "")
    del response.headers["Content-Length"], response.headers["Content-Type"]
    response.headers.update({"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})})
    response.body = body
    return response
