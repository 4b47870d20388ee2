"""Reading one message: what it may hold at most."""

from __future__ import annotations

import msgpack
import pytest

from hostile import jpeg, many_scans, picture, png
from paligemma_vla.serving import connection
from paligemma_vla.serving.connection import decode
from paligemma_vla_client import CodecError


def test_pictures_are_decoded_within_the_pixels_of_a_message(monkeypatch):
    message = msgpack.packb({"image_1": picture(jpeg(), "jpeg"), "image_2": picture(jpeg(), "jpeg")})
    monkeypatch.setattr(connection, "MAX_PIXELS", 2 * 8 * 8)
    assert {name: array.shape for name, array in decode(message).items()} == {"image_1": (8, 8, 3), "image_2": (8, 8, 3)}
    monkeypatch.setattr(connection, "MAX_PIXELS", 2 * 8 * 8 - 1)
    with pytest.raises(CodecError, match="a picture of 8 x 8, expected at most 127 pixels in one message"):
        decode(message)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({str(number): 0 for number in range(257)}, "got 257 fields, expected at most 256"),
        ({str(number): {"a": 0} for number in range(150)}, "got 300 fields, expected at most 256"),
        ({"a" * 257: 0}, "expected text of at most 256 letters"),
        ({"a": {b"b": 0}}, "got a field named b'b', expected text"),
        ([1], "got a list, expected a map"),
        ({"image_1": picture(many_scans(200), "jpeg")}, "a picture of more than 100 scans"),
        ({"image_1": picture(png(5000, 5000))}, "a picture of 5000 x 5000"),
        ({"image_1": picture(b"GIF89a")}, "a picture that cannot be decoded, expected JPEG or PNG"),
        ({"image_1": picture(None)}, "an array without 'data'|a picture without data"),
    ],
)
def test_message_that_holds_too_much_is_refused(message, said):
    with pytest.raises(CodecError, match=said):
        decode(msgpack.packb(message))


def test_text_frame_is_refused():
    with pytest.raises(CodecError, match="got a text frame"):
        decode("{}")
