"""The codec: arrays go through all dialects, and nothing but them and plain values comes out."""

from __future__ import annotations

import io
import pickle
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paligemma_vla_client import CodecError, pack, unpack
from paligemma_vla_client.codec import DIALECTS, MAX_DEPTH, MAX_ITEMS, MAX_TOTAL

DTYPES = ["|b1", "|i1", "|u1", "<i2", "<u4", "<i8", "<f2", "<f4", "<f8", ">f4", ">i2"]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
TEXT = st.text(max_size=8).filter(lambda text: text not in ("nd", "__ndarray__", "__image__"))
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | st.binary(max_size=8)
MESSAGES = st.recursive(
    PLAIN | ARRAYS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


def same(got: object, sent: object) -> bool:
    if isinstance(sent, np.ndarray):
        alike = isinstance(got, np.ndarray) and (got.dtype, got.shape) == (sent.dtype, sent.shape)
        return alike and got.tobytes() == sent.tobytes()
    if isinstance(sent, dict):
        return isinstance(got, dict) and got.keys() == sent.keys() and all(same(got[key], sent[key]) for key in sent)
    if isinstance(sent, list):
        return isinstance(got, list) and len(got) == len(sent) and all(map(same, got, sent))
    return type(got) is type(sent) and got == sent


@settings(max_examples=150, deadline=None)
@given(message=MESSAGES, dialect=st.sampled_from(DIALECTS))
def test_message_comes_back_as_it_was_sent_in_every_dialect(message, dialect):
    assert same(unpack(pack(message, dialect)), message)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60) | MESSAGES.map(pack), cut=st.integers(0, 60), changed=st.binary(max_size=3))
def test_damaged_bytes_are_a_codec_error_or_a_message(data, cut, changed):
    try:
        unpack(data[:cut] + changed + data[cut + len(changed) :])
    except CodecError as error:
        assert len(str(error)) < 400


def test_array_may_be_written_to_and_is_not_part_of_the_frame():
    frame = pack({"a": np.zeros(3, np.float32)})
    array = unpack(frame)["a"]
    array[:] = 1
    assert unpack(frame)["a"].tolist() == [0, 0, 0]


def test_array_that_is_not_contiguous_is_sent_in_its_order():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-1]
    for dialect in DIALECTS:
        np.testing.assert_array_equal(unpack(pack(image, dialect)), image)
        np.testing.assert_array_equal(unpack(pack(np.asfortranarray(image), dialect)), image)


def test_numpy_numbers_are_sent_as_plain_ones():
    assert unpack(pack([np.float32(0.5), np.int64(-3), np.bool_(True)])) == [0.5, -3, True]


# The bytes below are written by hand, from the dialects' descriptions.
ARRAY = np.arange(6, dtype="<f4").reshape(2, 3)


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "written",
    [
        {b"__ndarray__": True, b"data": ARRAY.tobytes(), b"dtype": "<f4", b"shape": [2, 3]},
        {"__ndarray__": True, "data": ARRAY.tobytes(), "dtype": "<f4", "shape": [2, 3]},
        {"__ndarray_class__": True, "as_npy": npy(ARRAY)},
        {"__ndarray_class__": True, "as_npy": npy(np.asfortranarray(ARRAY))},
        {"nd": True, "type": "<f4", "kind": "f", "shape": [2, 3], "data": ARRAY.tobytes()},
        {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [2, 3], b"data": ARRAY.tobytes()},
        {"__image__": True, "format": "raw", "data": ARRAY.tobytes(), "dtype": "<f4", "shape": [2, 3]},
    ],
    ids=["openpi", "vla-eval", "groot", "groot, fortran", "msgpack-numpy, str", "msgpack-numpy, bytes", "raw picture"],
)
def test_array_of_each_dialect_is_read(written):
    got = unpack(msgpack.packb({"a": written}))["a"]
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, ARRAY)


@pytest.mark.parametrize(
    "written, value",
    [
        ({b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"}, np.float32(0.5)),
        ({b"__npgeneric__": True, b"data": 0, b"dtype": "|u1"}, np.uint8(0)),
        ({b"nd": False, b"type": "<i2", b"data": b"\x02\x01"}, np.int16(258)),
    ],
)
def test_number_of_each_dialect_is_read(written, value):
    got = unpack(msgpack.packb(written))
    assert got == value and got.dtype == value.dtype


def test_picture_is_decoded_by_who_can_and_refused_by_others():
    frame = msgpack.packb({"__image__": True, "format": "png", "data": b"...", "shape": [1, 1, 3]})
    assert unpack(frame, lambda found: np.frombuffer(found["data"], np.uint8)).tolist() == [46, 46, 46]
    with pytest.raises(CodecError, match="a picture of format 'png', expected an array"):
        unpack(frame)


CYCLE: list = []
CYCLE.append(CYCLE)


def openpi(**changes: object) -> dict:
    fields = {"__ndarray__": True, "data": ARRAY.tobytes(), "dtype": "<f4", "shape": [2, 3]} | changes
    return {key.encode(): value for key, value in fields.items() if value is not None}


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "written, said",
    [
        (openpi(shape=[2, 4]), "an array of float32 (2, 4) with 24 bytes, expected 32"),
        (openpi(shape=[2**39, 2**39]), "with 24 bytes, expected"),
        (openpi(shape=[-2, -3]), "shape"),
        (openpi(shape=[2.0, 3]), "shape"),
        (openpi(shape=[1] * 8 + [6]), "at most 8 sizes"),
        (openpi(shape=6), "shape"),
        (openpi(shape=None), "without 'shape'"),
        (openpi(data=None), "without 'data'"),
        (openpi(data="text"), "with str"),
        (openpi(data=[1, 2]), "with list"),
        (openpi(dtype="|O"), "an array of dtype '|O', expected numbers"),
        (openpi(dtype="<c8"), "'<c8'"),
        (openpi(dtype="|S4"), "'|S4'"),
        (openpi(dtype="<M8[s]"), "'<M8[s]'"),
        (openpi(dtype="f4,f4"), "'f4,f4'"),
        (openpi(dtype="<f16"), "'<f16'"),
        (openpi(dtype=[["a", "<f4"]]), "expected numbers"),
        ({b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": pickle.dumps([1])}, "'|O'"),
        ({b"nd": True, b"type": [["a", "<f4"]], b"kind": b"V", b"shape": [1], b"data": b"1234"}, "expected numbers"),
        ({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}, "uint8"),
        ({b"__npgeneric__": True, b"data": 1.5, b"dtype": "<i4"}, "a number of int32 that is 1.5"),
        ({b"__npgeneric__": True, b"data": "1", b"dtype": "|u1"}, "a number given as str"),
        ({"__ndarray_class__": True, "as_npy": npy(np.array([{}], object), allow_pickle=True)}, "'|O'"),
        ({"__ndarray_class__": True, "as_npy": npy(ARRAY)[:-1]}, "with 23 bytes, expected 24"),
        ({"__ndarray_class__": True, "as_npy": npy(ARRAY) + b"1"}, "with 25 bytes, expected 24"),
        ({"__ndarray_class__": True, "as_npy": npy(ARRAY).replace(b"(2, 3)", b"(2**9,")}, "not a .npy file"),
        ({"__ndarray_class__": True, "as_npy": pickle.dumps(ARRAY)}, "not a .npy file"),
        ({"__ndarray_class__": True, "as_npy": "text"}, "given as str"),
        ({1: 2}, "not a msgpack message"),
        (msgpack.ExtType(5, b"abc"), "exceeds max_ext_len"),
        (msgpack.ExtType(5, b""), "an extension of type 5"),
        (msgpack.Timestamp(1), "exceeds max_ext_len"),
        (nested(MAX_DEPTH), f"more than {MAX_DEPTH} deep"),
        (nested(400), f"more than {MAX_DEPTH} deep"),
        ([0] * (MAX_ITEMS + 1), "exceeds max_array_len"),
        ([[0] * MAX_ITEMS] * (MAX_TOTAL // MAX_ITEMS), "more than 100000 items"),
        ([[{}] * 9_000] * 6, "more than 100000 items"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_allowed_in_a_message_is_refused_with_its_reason(written, said):
    with pytest.raises(CodecError) as caught:
        unpack(msgpack.packb({"a": written}))
    assert said in str(caught.value) and len(str(caught.value)) < 400


def test_deepest_allowed_message_is_read():
    assert unpack(pack(nested(MAX_DEPTH - 1))) == nested(MAX_DEPTH - 1)


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x01\x01", b"\xa3abcd", b"\xa2\xff\xfe", pack([1])[:-1], "text", None])
def test_what_is_no_message_is_refused(frame):
    with pytest.raises(CodecError, match="not a msgpack message"):
        unpack(frame)


def test_length_that_is_not_true_takes_no_memory():
    claims = b"\x91" * 500 + b"\xdd\x00\x00\x27\x0f" * 100  # lists of 9,999 within each other, without their items
    tracemalloc.start()
    with pytest.raises(CodecError):
        unpack(claims)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100 * len(claims)


@pytest.mark.parametrize(
    "value, said",
    [
        (np.array([{}], object), "got an array of dtype object, expected numbers"),
        (np.array(["a"]), "expected numbers"),
        (np.array([1j]), "complex128"),
        (np.datetime64(1, "s"), "datetime64"),
        (object(), "got object, expected NumPy arrays"),
        ({1, 2}, "got set, expected NumPy arrays"),
        (2**64, "numbers of at most 64 bits"),
        ("\ud800", "cannot be encoded"),
        (CYCLE, "cannot be encoded"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isascii() else "",
)
def test_what_cannot_be_sent_is_refused_with_its_reason(value, said):
    with pytest.raises(CodecError) as caught:
        pack({"a": value})
    assert said in str(caught.value)


def test_unknown_dialect_is_refused():
    with pytest.raises(CodecError, match="dialect: got 'pickle', expected one of openpi, vla-eval, groot"):
        pack({}, "pickle")
