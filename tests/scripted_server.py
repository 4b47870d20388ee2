"""A websocket server whose behaviour a test writes: what a real policy server does only on a bad day."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from paligemma_vla_client import pack, unpack

Handle = Callable[[ServerConnection], None]


class ScriptedServer:
    """Calls `handle` for each connection, in a thread of its own. port: 0 takes a free one."""

    def __init__(self, handle: Handle, port: int = 0, **options: Any) -> None:
        def until_closed(connection: ServerConnection) -> None:
            self.connections.append(connection)
            with suppress(ConnectionClosed):
                handle(connection)

        self.connections: list[ServerConnection] = []
        self._server = serve(until_closed, "127.0.0.1", port, compression=None, **options)
        self.port = self._server.socket.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        for connection in self.connections:
            connection.close_socket()
        self._thread.join(10)


def echo(message: dict) -> bytes:
    """An answer by which its observation is known: its state as the one action."""
    return pack({"actions": np.asarray(message["state"], np.float32)[None]})


def answering(reply: Callable[[ServerConnection, dict], Any], metadata: dict | None = None) -> Handle:
    """A handler that sends the metadata, then what `reply` returns for each message."""

    def handle(connection: ServerConnection) -> None:
        connection.send(pack(metadata or {}))
        for frame in connection:
            if (answer := reply(connection, unpack(frame))) is not None:
                connection.send(answer)

    return handle
