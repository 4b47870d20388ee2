"""The server: one port for websockets and the few pages, by path."""

from __future__ import annotations

import asyncio
import http
import logging
import signal
import ssl
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from paligemma_vla.serving.access import address_errors, is_authorized, is_same_origin, tls_context, warn_of_exposure
from paligemma_vla.serving.connection import MAX_FRAME, Door, PolicyConnection
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
DRAIN_SECONDS = 25  # Kubernetes kills after 30
SPARE_SOCKETS = 32  # beside those of the clients: for the pages, and for connections that have not said what they want
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class ServeSettings:
    """host, port: where it listens; port 0 takes a free one. api_key: None lets everybody in. max_clients: connections at once.

    max_batch, batch_wait_s, max_queue: see `Engine`. execute: actions of a chunk that are sent, None: as the protocol has it.
    certfile, keyfile: TLS, PEM; one file may hold both. A certificate of one's own, which clients are told to trust:

        openssl req -x509 -newkey rsa:2048 -nodes -days 365 -keyout key.pem -out cert.pem \\
            -subj /CN=robot -addext subjectAltName=IP:192.168.0.10

    zmq_port: of GR00T's protocol, None: not spoken, 0: a free one. action_repeat: observations of vla-eval that get the same
    action.
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
    action_repeat: int = 1


class PolicyServer:
    """Serves a `PolicyService`. It is reached at `port`, and at `zmq_port`, once `run` has called `ready`."""

    def __init__(self, service: PolicyService, settings: ServeSettings) -> None:
        self.service, self.settings = service, settings
        self.port, self.zmq_port = settings.port, settings.zmq_port
        self.page = Page(service)
        self._stop = asyncio.Event()
        self.door = Door(settings.max_clients + SPARE_SOCKETS)

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` or SIGTERM or SIGINT; then answer what was asked, and return. A second signal ends the process.

        Raises `ConfigError` where the address or the certificate cannot be used.
        """
        settings, service = self.settings, self.service
        context = tls_context(settings.certfile, settings.keyfile)
        wire_log.setLevel(logging.WARNING)
        service.start(settings.max_batch, settings.batch_wait_s, settings.max_queue)
        try:
            with address_errors(settings.host, settings.port):
                server = await self._listen(context)
            async with server, AsyncExitStack() as stack:
                self.port = server.sockets[0].getsockname()[1]
                if settings.zmq_port is not None:
                    self.zmq_port = await stack.enter_async_context(self._serve_groot(settings.zmq_port))
                warn_of_exposure(settings.host, settings.api_key is not None, context is not None)
                handled = self._handle_signals()
                ready()
                await self._stop.wait()
                await self._drain(server, stack, handled)
        finally:
            await service.close()

    def stop(self) -> None:
        self._stop.set()

    async def _listen(self, context: ssl.SSLContext | None) -> Server:
        return await serve(
            self._handle,
            self.settings.host,
            self.settings.port,
            ssl=context,
            process_request=self._process_request,
            create_connection=partial(PolicyConnection, self.door),  # type: ignore[arg-type]
            compression=None,  # a bomb could be hidden in it
            max_size=MAX_FRAME,
            max_queue=1,
            open_timeout=OPEN_SECONDS,
            ping_interval=PING_SECONDS,
            ping_timeout=PONG_SECONDS,
            server_header="paligemma-vla",
            logger=wire_log,
        )

    def _serve_groot(self, port: int) -> AbstractAsyncContextManager[int]:
        settings = self.settings
        if settings.certfile is not None:
            log.warning("--zmq_port %d is not encrypted: ZeroMQ has no TLS", port)
        return groot.serve_groot(self.service, settings.host, port, settings.api_key, settings.max_clients, settings.execute)

    def _handle_signals(self) -> bool:
        """Let the first signal stop the server, and the next one end the process. False: not in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return False
        loop = asyncio.get_running_loop()

        def stop() -> None:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)
            self.stop()

        for number in SIGNALS:
            loop.add_signal_handler(number, stop)
        return True

    async def _drain(self, server: Server, stack: AsyncExitStack, signals_handled: bool) -> None:
        """No new clients; those that wait for an answer get it, the others are told that the server stops. stack: of other
        servers, which do the same when they are closed."""
        log.info("stopping: what was asked is answered, for at most %d s; a second signal ends this at once", DRAIN_SECONDS)
        server.close(close_connections=False)
        for connection in list(self.door.open):
            connection.end()
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await stack.aclose()
                await server.wait_closed()
        except TimeoutError:
            log.warning("stopped after %d s; %d connections were not finished", DRAIN_SECONDS, len(self.door.open))
            for connection in list(self.door.open):
                connection.transport.abort()
            if signals_handled:
                signal.raise_signal(signal.SIGTERM)  # as a second one does: a model that hangs in its thread cannot be ended

    async def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        path, _, query = request.path.partition("?")
        if path in ("/healthz", "/health"):
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not is_authorized(request.headers, self.settings.api_key):
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, "API key missing or wrong\n")
            response.headers["WWW-Authenticate"] = 'Basic realm="paligemma-vla", charset="UTF-8"'
            return response
        if "websocket" in ",".join(request.headers.get_all("Upgrade")).lower():
            return self._refuse(connection, request.headers, path)
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

    def _refuse(self, connection: ServerConnection, headers: Headers, path: str) -> Response | None:
        """Why a websocket is not opened; None where it is."""
        if not is_same_origin(headers):
            return connection.respond(http.HTTPStatus.FORBIDDEN, "the page of another site may not use this server\n")
        if path not in WIRES:
            return connection.respond(http.HTTPStatus.NOT_FOUND, "expected / (openpi) or /vla-eval\n")
        if self._is_full():
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{self._full_text()}\n")
        return None

    async def _handle(self, connection: ServerConnection) -> None:
        if self._is_full():  # several came in at once
            await connection.close(CloseCode.TRY_AGAIN_LATER, self._full_text())
            return
        request = connection.request
        assert request is not None
        protocol, serve_connection = WIRES[request.path.partition("?")[0]]
        session = self.service.open_session(protocol, str((connection.remote_address or ("?",))[0]))
        session.action_repeat = self.settings.action_repeat
        try:
            with suppress(ConnectionClosed):
                await serve_connection(connection, self.service, session, self.settings.execute)
        finally:
            self.service.close_session(session)

    def _is_full(self) -> bool:
        return len(self.service.sessions) >= self.settings.max_clients

    def _full_text(self) -> str:
        return f"{self.settings.max_clients} clients are connected; expected at most as many (--max_clients)"


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
