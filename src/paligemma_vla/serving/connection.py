"""Of connections: how many are open, whom an answer is owed, reading a frame, and work that ends when its client has gone."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosedOK
from websockets.frames import CloseCode
from websockets.protocol import State
from websockets.typing import Data

from paligemma_vla.errors import DataError
from paligemma_vla.serving.service import MAX_PIXELS
from paligemma_vla_client.codec import CodecError, unpack

T = TypeVar("T")
MAX_FRAME = 32 * 2**20  # bytes of one message
FORMATS = ("JPEG", "PNG")
MAX_SCANS = 100  # of a JPEG: a progressive one has about ten, and each costs as much as a whole picture
MAX_FIELDS = 256  # of one message
LONGEST_NAME, LONGEST_TEXT = 256, 1000  # letters


class PolicyConnection(ServerConnection):
    """Use `async for frame in connection`: it knows then whether the client waits for an answer."""

    def __init__(self, door: Door, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._door = door
        self._idle, self._ending = False, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._door.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.leave(self)
        super().connection_lost(exc)

    async def __aiter__(self) -> AsyncIterator[Data]:
        """Each message, until the connection closes, or `end` was called and the answer is sent."""
        try:
            while not self._ending:
                self._idle = True
                frame = await self.recv()
                self._idle = False
                yield frame
        except ConnectionClosedOK:
            return
        await self.close(CloseCode.GOING_AWAY, "the server stops")

    def end(self) -> None:
        """Close once the client has its answer; at once if it waits for none."""
        self._ending = True
        if self.state is State.CONNECTING and self.request is None:
            self.transport.abort()
        elif self._idle:
            self._closing = asyncio.create_task(self.close(CloseCode.GOING_AWAY, "the server stops"))


class Door:
    """Bounds the sockets that are open. When there are too many, the one that has said nothing for longest is closed: a flood
    of silent connections keeps no client out, since a client says at once what it wants."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open: dict[PolicyConnection, None] = {}  # in the order of their arrival

    def enter(self, connection: PolicyConnection) -> None:
        self.open[connection] = None
        if len(self.open) > self.most:
            closed = next((each for each in self.open if each.request is None), connection)
            self.leave(closed)
            closed.transport.abort()

    def leave(self, connection: PolicyConnection) -> None:
        self.open.pop(connection, None)


def decode(frame: str | bytes) -> dict[str, Any]:
    """A client's message. Raises `CodecError`."""
    if isinstance(frame, str):
        raise CodecError("got a text frame, expected a msgpack map in a binary one")
    message = unpack(frame, PictureDecoder())
    if not isinstance(message, dict):
        raise CodecError(f"got a {type(message).__name__}, expected a map with text keys")
    if _count_fields(message) > MAX_FIELDS:
        raise CodecError(f"got {_count_fields(message)} fields, expected at most {MAX_FIELDS}")
    return message


def text_field(message: Mapping[str, Any], name: str, default: str) -> str:
    """The text at `name`, `default` where there is none. Raises `DataError`."""
    value = message.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{name}: got {type(value).__name__}, expected text")
    if len(value) > LONGEST_TEXT:
        raise DataError(f"{name}: got {len(value)} letters, expected at most {LONGEST_TEXT}")
    return value


def _count_fields(message: Mapping[Any, Any]) -> int:
    """With those of maps in it. Raises `CodecError` for a name that is none."""
    for key in message:
        if not isinstance(key, str) or len(key) > LONGEST_NAME:
            raise CodecError(f"got a field named {key!r:.60}, expected text of at most {LONGEST_NAME} letters")
    return len(message) + sum(_count_fields(value) for value in message.values() if isinstance(value, Mapping))


class PictureDecoder:
    """The RGB array of `{"__image__", "format", "data"}`, for all pictures of one message together at most `MAX_PIXELS`."""

    def __init__(self) -> None:
        self.left = MAX_PIXELS

    def __call__(self, found: dict[Any, Any]) -> NDArray[np.uint8]:
        """Raises `CodecError`."""
        data = found.get("data")
        if not isinstance(data, bytes):
            raise CodecError("a picture without data")
        if data.count(b"\xff\xda") > MAX_SCANS:
            raise CodecError(f"a picture of more than {MAX_SCANS} scans")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                self.left -= image.width * image.height
                if self.left < 0:
                    size = f"{image.width} x {image.height}"
                    raise CodecError(f"a picture of {size}, expected at most {MAX_PIXELS} pixels in one message")
                return np.array(image.convert("RGB"))
        except CodecError:
            raise
        except Exception as error:  # of any kind: these are bytes from outside
            raise CodecError(f"a picture that cannot be decoded, expected {' or '.join(FORMATS)}") from error


async def while_connected(connection: ServerConnection, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes; then raises `ConnectionClosedOK`."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(connection.wait_closed())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ConnectionClosedOK(None, None)
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
