"""A policy server in a thread, for tests that speak to it over a real socket."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import fields
from typing import Any

from paligemma_vla.serving.build import build_service
from paligemma_vla.serving.server import PolicyServer, ServeSettings

SETTINGS = {field.name for field in fields(ServeSettings)}


class RunningServer:
    """Starts at once; `close` drains it. port, zmq_port, url: where it listens. service: what it serves.
    loop: its event loop."""

    def __init__(self, checkpoint: str, **changes: Any) -> None:
        settings = {"port": 0} | {name: value for name, value in changes.items() if name in SETTINGS}
        options = {"keys": (), "preset": None, "seed": None, "limited": True} | {
            name: value for name, value in changes.items() if name not in SETTINGS
        }
        self.service = build_service(checkpoint, "cpu", **options)
        self._settings = ServeSettings(**settings)
        self._ready, self._failure = threading.Event(), None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        assert self._ready.wait(30), "the server did not start"
        if self._failure is not None:
            raise self._failure

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Drain it; a second time does nothing."""
        if not self._thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not end"

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    async def _run(self) -> None:
        self.loop, self.server = asyncio.get_running_loop(), PolicyServer(self.service, self._settings)
        await self.server.run(self._began)

    def _began(self) -> None:
        self.port, self.zmq_port = self.server.port, self.server.zmq_port
        self._ready.set()
