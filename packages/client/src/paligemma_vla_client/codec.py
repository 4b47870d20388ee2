"""NumPy arrays in msgpack, in the dialects that servers and clients of policies use.

| dialect | an array is | who writes it |
|---|---|---|
| `openpi` | `{b"__ndarray__": True, b"data", b"dtype", b"shape"}` | openpi, RoboArena, this client |
| `vla-eval` | the same with str keys; pictures as `{"__image__", "format", "data", "shape"}` | vla-eval |
| `groot` | `{"__ndarray_class__": True, "as_npy": bytes}` | GR00T |
| | `{"nd": True, "type", "kind", "shape", "data"}` | msgpack-numpy, which some clients of GR00T use |

`unpack` takes all of them. What comes from outside can hold anything: only numbers are decoded, nothing is ever unpickled, an
array cannot claim more than the bytes that came with it, and every fault is a `CodecError`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

MAX_DEPTH = 16  # containers within each other; observations have three
MAX_ITEMS = 10_000  # of one list or map
MAX_TOTAL = 100_000  # of all lists and maps of a message: a byte on the wire can become an object of 64
MAX_DIMENSIONS = 8
DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")
DIALECTS = ("openpi", "vla-eval", "groot")

ImageDecoder = Callable[[dict[str, Any]], np.ndarray]


class CodecError(ValueError):
    """A message that cannot be decoded, or holds what is not allowed in one."""


def pack(message: Any, dialect: str = "openpi") -> bytes:
    """Encode a message of maps, lists, text, numbers and arrays. Raises `CodecError` for anything else in it."""

    def encode(value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)) and not DTYPE.fullmatch(value.dtype.str):
            raise CodecError(f"got an array of dtype {value.dtype}, expected numbers of at most 64 bits")
        if isinstance(value, np.ndarray):
            return _encode_array(value, dialect)
        if isinstance(value, np.generic):
            return value.item()
        raise CodecError(f"got {type(value).__name__}, expected NumPy arrays, numbers of at most 64 bits, text, lists or maps")

    if dialect not in DIALECTS:
        raise CodecError(f"dialect: got {dialect!r}, expected one of {', '.join(DIALECTS)}")
    try:
        packed: bytes = msgpack.packb(message, default=encode)
    except CodecError:
        raise
    except (OverflowError, ValueError, TypeError) as error:
        raise CodecError(f"cannot be encoded: {error}") from error
    return packed


def unpack(data: bytes, decode_image: ImageDecoder | None = None) -> Any:
    """Decode one message; arrays of any dialect become `numpy.ndarray`s that may be written to.

    decode_image: makes an array of a compressed picture `{"__image__", ...}`; without it such a picture is refused.
    Raises `CodecError`.
    """
    total = 0

    def counted(items: Any) -> Any:
        nonlocal total
        total += len(items) + 1
        if total > MAX_TOTAL:
            raise CodecError(f"more than {MAX_TOTAL} items in lists and maps; send numbers as arrays")
        return items

    def hook(found: dict[Any, Any]) -> Any:
        key, value = _marker(counted(found))
        if key is None:
            return found
        if key == "__image__":
            return _decode_image(found, decode_image)
        if key == "__ndarray_class__":
            return _from_npy(_field(found, "as_npy"))
        dtype, content = _dtype(_field(found, "type" if key == "nd" else "dtype")), _field(found, "data")
        if key == "__npgeneric__" or not value:
            return _scalar(content, dtype)
        return _array(content, dtype, _field(found, "shape"))

    try:
        message = msgpack.unpackb(
            data,
            object_hook=hook,
            list_hook=counted,
            max_ext_len=0,
            ext_hook=_refuse_extension,  # of length 0
            strict_map_key=True,
            max_array_len=min(MAX_ITEMS, len(data)),  # each item takes a byte: a length beyond that is not true
            max_map_len=min(MAX_ITEMS, len(data)),
        )
    except CodecError:
        raise
    except Exception as error:  # of any kind: these are bytes from outside
        raise CodecError(f"not a msgpack message ({type(error).__name__}: {error})"[:300]) from error
    _check_depth(message)
    return message


def _refuse_extension(code: int, data: bytes) -> Any:
    raise CodecError(f"an extension of type {code}, expected maps, lists, text, numbers and arrays")


def _encode_array(array: np.ndarray, dialect: str) -> dict[Any, Any]:
    if dialect == "groot":
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": buffer.getvalue()}
    fields = {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}
    return {key.encode(): value for key, value in fields.items()} if dialect == "openpi" else fields


MARKERS = ("__ndarray__", "__npgeneric__", "__ndarray_class__", "__image__", "nd")


def _marker(found: dict[Any, Any]) -> Any:
    """Which of `MARKERS` a map has, as text, and its value; (None, None) for a map that is just a map."""
    for marker in MARKERS:
        for key in (marker, marker.encode()):
            if key in found:
                return marker, found[key]
    return None, None


def _field(found: dict[Any, Any], name: str) -> Any:
    value = found.get(name, found.get(name.encode()))
    if value is None:
        raise CodecError(f"an array without '{name}'")
    return value


def _dtype(text: Any) -> np.dtype:
    text = text.decode("ascii", "replace") if isinstance(text, bytes) else text
    if not isinstance(text, str) or not DTYPE.fullmatch(text):
        raise CodecError(f"an array of dtype {text!r:.40}, expected numbers of at most 64 bits")
    return np.dtype(text)


def _array(data: Any, dtype: np.dtype, shape: Any) -> np.ndarray:
    sizes = list(shape) if isinstance(shape, (list, tuple)) else None
    if sizes is None or len(sizes) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**40 for size in sizes):
        raise CodecError(f"an array of shape {shape!r:.60}, expected at most {MAX_DIMENSIONS} sizes")
    if not isinstance(data, bytes) or len(data) != math.prod(sizes) * dtype.itemsize:
        got = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise CodecError(f"an array of {dtype} {tuple(sizes)} with {got}, expected {math.prod(sizes) * dtype.itemsize}")
    return np.frombuffer(data, dtype).reshape(sizes).copy()


def _scalar(data: Any, dtype: np.dtype) -> Any:
    if isinstance(data, bytes):
        return _array(data, dtype, [1])[0]
    if not isinstance(data, (bool, int, float)):
        raise CodecError(f"a number given as {type(data).__name__}")
    try:
        with np.errstate(over="ignore"):
            value = dtype.type(data)
    except (OverflowError, ValueError):
        value = None
    if value is None or (dtype.kind in "iu" and value != data):  # NumPy 1 wraps
        raise CodecError(f"a number of {dtype} that is {data!r:.40}")
    return value


def _from_npy(content: Any) -> np.ndarray:
    """An array in NumPy's file format. `numpy.load` would allocate whatever its header claims."""
    if not isinstance(content, bytes):
        raise CodecError(f"an array given as {type(content).__name__}, expected bytes of a .npy file")
    buffer = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(buffer)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(buffer)
    except Exception as error:  # of any kind: the header is parsed as Python
        raise CodecError("not a .npy file") from error  # whose own text may hold an address in memory
    if fortran:
        return _array(buffer.read(), _dtype(dtype.str), shape[::-1]).T.copy()
    return _array(buffer.read(), _dtype(dtype.str), shape)


def _decode_image(found: dict[Any, Any], decode_image: ImageDecoder | None) -> np.ndarray:
    kind = _field(found, "format")
    if kind in ("raw", b"raw"):
        return _array(_field(found, "data"), _dtype(_field(found, "dtype")), _field(found, "shape"))
    if decode_image is None:
        raise CodecError(f"a picture of format {kind!r:.20}, expected an array")
    return decode_image(found)


def _check_depth(message: Any) -> None:
    level = [message]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise CodecError(f"containers within each other more than {MAX_DEPTH} deep")
