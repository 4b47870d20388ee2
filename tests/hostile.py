"""What somebody could send to a policy server: bytes, damaged messages, and well-formed ones with hostile contents.

`read_naively` says, without the server's codec, what a message holds: an answer of the server must be the policy's to that.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from paligemma_vla.control import realtime

Message = dict[str, Any]
DTYPES = ("|u1", "<u1", "|i1", "<f4", ">f4", "<f8", "<f2", "<i8", "<u8", "|b1")
BAD_DTYPES = (
    "O",
    "|O",
    "<U8",
    "|S9",
    "V8",
    "<M8[s]",
    "<c8",
    "<f16",
    "f4,f4",
    "9" * 9 + "f4",
    "(1000,1000,1000)f8",
    "",
    "\0",
    7,
    None,
)
HUGE = 2**63 - 1


def plain_array(array: np.ndarray, dialect: str) -> Any:
    """As a client writes it, without the codec of this project."""
    if dialect == "npy":
        stream = io.BytesIO()
        np.save(stream, array)
        return {"__ndarray_class__": True, "as_npy": stream.getvalue()}
    if dialect == "nd":
        return {"nd": True, "type": array.dtype.str, "kind": "f", "shape": list(array.shape), "data": array.tobytes()}
    fields = {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}
    return {key.encode(): value for key, value in fields.items()} if dialect == "bytes" else fields


def png(width: int, height: int, content: bytes = b"", kind: bytes = b"IDAT") -> bytes:
    """A PNG whose header claims a size, whatever its content is."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(kind, content) + chunk(b"IEND", b"")


def jpeg(width: int = 8, height: int = 8, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)).save(stream, "JPEG", **options)
    return stream.getvalue()


def many_scans(number: int) -> bytes:
    """A progressive JPEG of 2048 x 2048 whose last scan, cut short, comes again and again; each goes over the whole picture."""
    whole = jpeg(2048, 2048, progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last : last + 40] * number + whole[-2:]


def picture(data: Any, form: Any = "png") -> Message:
    return {"__image__": True, "format": form, "data": data, "shape": [8, 8, 3]}


BOMB = zlib.compress(bytes(3 * 4096 * 4097 + 4097), 9)  # of 4096 x 4097 pixels, one row too many; 50 KB
PICTURES = [
    picture(png(30000, 30000, BOMB)),
    picture(png(4096, 4097, BOMB)),
    picture(png(2**31 - 1, 2**31 - 1)),
    picture(png(0, 0)),
    picture(png(8, 8, b"nonsense")),
    picture(png(8, 8, zlib.compress(bytes(2**24)), b"zTXt")),
    picture(jpeg()[:-100], "jpeg"),
    picture(jpeg(), "jpeg"),
    picture(jpeg(), "png"),
    picture(b"GIF89a" + bytes(99), "gif"),
    picture(b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(99), "jp2"),
    picture(b"", "raw"),
    picture("text"),
    picture(None),
    {"__image__": True},
    {b"__image__": True, b"format": b"png", b"data": png(8, 8)},
]
EXPENSIVE = [  # fields of an observation that is good otherwise
    {"image_1": [picture(png(4096, 4096, BOMB)) for _ in range(40)]},
    {f"image_{number}": picture(png(4096, 4096, BOMB)) for number in range(40)},
    {"image_1": picture(many_scans(30_000), "jpeg")},
    {"state": [[[]] * 100_000] * 20},
    {"state": [[""] * 1000] * 3000},
    {f"m{outer}": {f"state of arm {inner}": 0 for inner in range(9_900)} for outer in range(9)},
    {"a" * 2**20: 0, "prompt": "b" * 2**20},
    {"state": [0] * 3_000_000},
    {"prompt": "word " * 20_000},
]


def nested(opening: bytes, depth: int, end: bytes = b"\xc0") -> bytes:
    return opening * depth + end


FRAMES = [
    b"",
    *(
        nested(opening, depth)
        for opening in (b"\x91", b"\x81\xa1a", b"\x81\xc4\x01a")
        for depth in (14, 17, 500, 1100, 100_000)
    ),
    *(nested(b"\xdd\x00\x01\x86\xa0", depth) for depth in (3, 400)),
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\x81\xa1a\xdd\x7f\xff\xff\xff\x00",
    b"\x81\xa1a\xa2\xff\xfe",
    b"\x81\xc0\xc0",
    b"\x82\xa1a\x01\xa1a\x02",
    b"\x80\x80",
    b"\xc1",
    msgpack.packb({"state": msgpack.ExtType(5, b"abc")}),
    msgpack.packb({"state": msgpack.Timestamp(1, 2)}),
    msgpack.packb([1, 2]),
    msgpack.packb("text"),
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(width=64),
    st.sampled_from([0, 1, -1, HUGE, 2**64 - 1, float("nan"), float("inf"), -float("inf"), 1e38, 3.5e38, 1e308, 5e-324]),
    st.text(max_size=8),
    st.sampled_from(["__ndarray__", "../../etc/passwd", "\0", "\x1b[2J", "<image>" * 20, "a\nb", "%s%n", "\u202e"]),
    st.binary(max_size=8),
)
sizes = st.one_of(st.integers(-2, 9), st.sampled_from([0, 1, 3, 2**31, 2**40, HUGE, 2**64 - 1, 1.5, None, "3", True]))


@st.composite
def claims(draw: st.DrawFn) -> Any:
    """An array whose dtype, shape and bytes need not agree."""
    dtype = draw(st.one_of(st.sampled_from(DTYPES), st.sampled_from(BAD_DTYPES)))
    shape = draw(st.one_of(st.lists(sizes, max_size=10), st.just([8, 8, 3]), st.just([3]), sizes))
    data = draw(st.one_of(st.binary(max_size=32), st.sampled_from([bytes(192), bytes(12), bytes(24), b"\xff" * 12, "", None])))
    fields = {"__ndarray__": draw(st.sampled_from([True, True, False, 1, None])), "dtype": dtype, "shape": shape, "data": data}
    kind = draw(st.sampled_from(["str", "bytes", "nd", "generic", "npy"]))
    if kind == "npy":
        header = {
            "descr": dtype,
            "fortran_order": draw(st.booleans()),
            "shape": tuple(shape) if isinstance(shape, list) else shape,
        }
        text = repr(draw(st.sampled_from([header, "__import__('os')", {**header, "more": 1}, "(" * 200]))).encode()[:1000]
        start = draw(st.sampled_from([b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00\0\0", b"\x93NUMPY\x09\x00"]))
        return {
            "__ndarray_class__": True,
            "as_npy": start[:8]
            + struct.pack("<H", len(text))
            + start[8:]
            + text
            + (data or b"" if isinstance(data, bytes) else b""),
        }
    if kind == "nd":
        return {"nd": True, "type": dtype, "kind": draw(st.sampled_from([b"", "f", b"O", "O"])), "shape": shape, "data": data}
    if kind == "generic":
        return {"__npgeneric__": True, "dtype": dtype, "data": draw(st.one_of(scalars, st.just(data)))}
    dropped = draw(st.sampled_from(["", "", "", "dtype", "shape", "data"]))
    fields = {key: value for key, value in fields.items() if key != dropped}
    return {key.encode(): value for key, value in fields.items()} if kind == "bytes" else fields


@st.composite
def odd_arrays(draw: st.DrawFn) -> Any:
    """A sound array that may be wrong in its place: shapes, types and values."""
    shape = draw(
        st.sampled_from(
            [(8, 8, 3), (3, 8, 8), (1, 8, 8, 3), (8, 8), (0, 8, 3), (8, 8, 4), (1, 1, 3), (3,), (1, 3), (4,), (0,), ()]
        )
    )
    dtype = draw(st.sampled_from(DTYPES))
    fill = draw(st.sampled_from([0, 1, 0.5, 100, float("nan"), float("inf"), 1e38]))
    with np.errstate(all="ignore"):
        array = np.resize(np.array([fill, 0.25, 0]), shape).astype(dtype)
    return plain_array(array, draw(st.sampled_from(["str", "bytes", "nd", "npy"])))


values = st.recursive(
    st.one_of(scalars, claims(), odd_arrays(), st.sampled_from(PICTURES)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=4), st.binary(max_size=4)), inner, max_size=3)
    ),
    max_leaves=4,
)


OTHER_FIELDS = ("observation", "observation/state", "images", "endpoint", "session_id", "seed", *realtime.FIELDS, "extra")


@st.composite
def messages(draw: st.DrawFn, good: Message) -> Message:
    """A good message with some of its fields hostile, missing, or under another name; and others beside them."""
    message = dict(good)
    for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=2, unique=True)):
        message[name] = draw(values)
    if draw(st.integers(0, 3)) == 0:
        del message[draw(st.sampled_from(sorted(message)))]
    if draw(st.integers(0, 3)) == 0:
        message[
            draw(
                st.sampled_from(
                    [
                        "observation",
                        "observation/state",
                        "images",
                        "seed",
                        "executed",
                        "delay",
                        "endpoint",
                        "session_id",
                        "extra",
                    ]
                )
            )
        ] = draw(values)
    return message


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """A good frame after a few bytes were changed, lost, repeated or inserted."""
    frame = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(frame) - 1)))
        length = draw(st.integers(1, 8))
        match draw(st.integers(0, 4)):
            case 0:
                frame[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del frame[at : at + length]
            case 2:
                frame[at:at] = draw(st.binary(min_size=1, max_size=length))
            case 3:
                frame[at:at] = frame[at : at + length]
            case _:
                del frame[at:]
    return bytes(frame)


def frames(good: Message, wrap: Callable[[Message], Any]) -> st.SearchStrategy[bytes]:
    """Frames of one protocol. good: an observation in small plain arrays. wrap: puts a message around one."""

    def pack(message: Any) -> bytes:
        return msgpack.packb(message, unicode_errors="surrogatepass")

    hostile = messages(good)
    return st.one_of(
        hostile.map(wrap).map(pack),
        hostile.map(wrap).map(pack),
        damaged(pack(wrap(good))),
        st.one_of(st.binary(max_size=64), st.sampled_from(FRAMES)),
        st.one_of(values.map(wrap).map(pack), st.just(pack(wrap(good)))),
    )


def read_naively(raw: Any) -> Any:
    """What `msgpack` alone read, with its arrays and pictures decoded in the plainest way. Raises for what is none."""
    if not isinstance(raw, dict):
        return [read_naively(value) for value in raw] if isinstance(raw, list) else raw
    fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in raw.items()}
    if "__npgeneric__" in fields or fields.get("__ndarray__") is False or fields.get("nd") is False:
        return np.dtype(fields.get("dtype", fields.get("type"))).type(fields["data"])
    if fields.get("__ndarray__") or fields.get("nd"):
        dtype = np.dtype(fields.get("type" if fields.get("nd") else "dtype"))
        assert dtype.kind in "biuf", dtype
        return np.ndarray(fields["shape"], dtype, fields["data"])
    if "__ndarray_class__" in fields:
        return np.load(io.BytesIO(fields["as_npy"]), allow_pickle=False)
    if fields.get("__image__"):
        return np.array(Image.open(io.BytesIO(fields["data"])).convert("RGB"))
    return {key: read_naively(value) for key, value in raw.items()}


def find(message: Mapping[str, Any], names: list[str]) -> Any:
    """The first of several names that holds something, each of which may be a path through maps. Raises `LookupError`."""
    for name in names:
        value: Any = message
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, Mapping) else None
        value = read_naively(message.get(name, value))
        if value is not None and not isinstance(value, Mapping):
            return value
    raise LookupError(names)
