"""Of connections: reading a frame, and work that ends when its client has gone."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosedOK

from paligemma_vla.errors import DataError, first_line
from paligemma_vla.serving.service import MAX_PIXELS
from paligemma_vla_client.codec import CodecError, unpack

T = TypeVar("T")
MAX_FRAME = 64 * 2**20  # bytes of one message
FORMATS = ("JPEG", "PNG")


async def decode(frame: str | bytes) -> dict[str, Any]:
    """A client's message, decoded in a thread: pictures in it may be compressed. Raises `CodecError`."""
    return await asyncio.to_thread(_decode, frame)


def _decode(frame: str | bytes) -> dict[str, Any]:
    if isinstance(frame, str):
        raise CodecError("got a text frame, expected a msgpack map in a binary one")
    message = unpack(frame, decode_picture)
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise CodecError(f"got a {type(message).__name__}, expected a map with text keys")
    return message


def text_field(message: Mapping[str, Any], name: str, default: str) -> str:
    """The text at `name`, `default` where there is none. Raises `DataError`."""
    value = message.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{name}: got {type(value).__name__}, expected text")
    return value


def decode_picture(found: dict[Any, Any]) -> NDArray[np.uint8]:
    """The RGB array of `{"__image__", "format", "data"}`. Raises `CodecError`."""
    data = found.get("data")
    if not isinstance(data, bytes):
        raise CodecError("a picture without data")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CodecError(f"a picture of {image.width} x {image.height}, expected at most {MAX_PIXELS} pixels")
            return np.array(image.convert("RGB"))
    except CodecError:
        raise
    except UnidentifiedImageError as error:  # whose own text has an address in memory
        raise CodecError(f"a picture that is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # of any kind: these are bytes from outside
        raise CodecError(f"a picture that cannot be decoded ({first_line(error)})") from error


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
