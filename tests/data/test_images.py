"""Decoding with limits, and augmentation that is the identity when it is told to be."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from lerobot_sets import encode
from mutations import flip, png
from paligemma_vla.config import AugmentationConfig
from paligemma_vla.data import images
from paligemma_vla.data.formats.parquet import EncodedPictures
from paligemma_vla.data.images import jitter_colour, random_crop
from paligemma_vla.data.reader import Picture
from paligemma_vla.errors import DataError
from paligemma_vla.preprocess import ImageSpec
from support import encode_image


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


def decode_image(data: bytes) -> np.ndarray:
    """An image as it is decoded out of a column."""
    return Picture(EncodedPictures(pa.array([data], pa.binary())), 0, "f.parquet", 3, "image_1_bytes").decode()


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "CMYK"), ("JPEG", "L")]
)
def test_decode_gives_rgb(kind: str, mode: str) -> None:
    data = encoded(kind, mode)
    image = decode_image(data)
    assert (image.dtype, image.shape) == (np.uint8, (6, 8, 3))
    assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{"quality": 60}, {"quality": 95}, {"quality": 90, "progressive": True}])
@pytest.mark.parametrize("size", [(224, 224), (33, 17)])
def test_a_jpeg_has_the_pixels_that_pillow_gives(size: tuple[int, int], options: dict[str, Any], subsampling: int) -> None:
    data = jpeg(size, **options, subsampling=subsampling)
    with mock.patch.object(images, "to_upright_rgb", None):  # it is not Pillow that decodes
        got = decode_image(data)
    assert np.array_equal(got, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_large_jpeg_may_be_decoded_smaller_and_looks_the_same() -> None:
    data = jpeg((640, 480), quality=95)
    whole = decode_image(data)
    assert images.decode(data, 240).shape == (240, 320, 3)
    assert images.decode(data, 100).shape == (120, 160, 3)
    assert np.array_equal(images.decode(data, 241), whole)  # a half would be too small
    spec = ImageSpec(60, (0.5,) * 3, (0.5,) * 3, resizer="torch")
    assert spec.decoded_side() == 120
    difference = spec.apply(images.decode(data, spec.decoded_side())).astype(int) - spec.apply(whole)
    assert 0 < np.abs(difference).max() <= 2
    assert np.abs(difference).mean() < 0.3
    assert replace(spec, resizer="pillow").decoded_side() == 0


def jpeg(size: tuple[int, int], **options: Any) -> bytes:
    """A picture of smooth colours with some noise."""
    rng, stream = np.random.default_rng(0), io.BytesIO()
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth).astype(int) + rng.integers(-10, 11, (size[1], size[0], 3))
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(stream, "JPEG", **options)
    return stream.getvalue()


def tagged(kind: str, tag: str, orientation: int) -> bytes:
    """A picture 8 wide and 6 high whose EXIF or XMP says how it is to be turned; `damaged`: EXIF that is cut."""
    image, stream = Image.open(io.BytesIO(encoded(kind))), io.BytesIO()
    exif = Image.Exif()
    exif[274] = orientation
    if tag == "exif":
        image.save(stream, kind, exif=exif)
    elif tag == "damaged":
        image.save(stream, kind, exif=exif.tobytes()[:-9])
    else:
        text = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'
        notes = PngInfo()
        notes.add_itxt("XML:com.adobe.xmp", text)
        image.save(stream, kind, **({"xmp": text.encode()} if kind == "JPEG" else {"pnginfo": notes}))
    return stream.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "tag"), [("JPEG", "exif"), ("PNG", "exif"), ("JPEG", "xmp"), ("PNG", "xmp")])
def test_decode_turns_as_the_tag_says_and_what_is_encoded_is_not_turned_again(kind: str, tag: str, orientation: int) -> None:
    data = tagged(kind, tag, orientation)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    image = decode_image(data)
    assert np.array_equal(image, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))
    assert (image.shape == stored.shape) == (orientation < 5)
    assert np.array_equal(image, stored) == (orientation == 1)
    assert np.array_equal(decode_image(images.encode_image(image, "png")), image)
    assert decode_image(images.encode_image(image, "jpeg")).shape == image.shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_exif_leaves_the_picture_as_it_is_stored(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_image(tagged(kind, "damaged", 6)).shape == (6, 8, 3)


@pytest.mark.parametrize("side", [6000, 60000])
def test_decode_refuses_a_bomb_before_any_pixel(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with warnings.catch_warnings(), pytest.raises(DataError, match=r"^f\.parquet: row 3, column image_1_bytes: "):
        warnings.simplefilter("ignore")
        decode_image(png(side, side))


def test_decode_limit_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paligemma_vla.data.images.MAX_PIXELS", 48)
    assert decode_image(encoded("PNG", size=(8, 6))).shape == (6, 8, 3)
    with pytest.raises(DataError, match="7 x 7"):
        decode_image(encoded("PNG", size=(7, 7)))


DEPTH = [
    encode(np.arange(0, 48000, 1000).reshape(6, 8).astype(kind), form)
    for kind, form in [("u2", "PNG"), ("u2", "TIFF"), ("f4", "TIFF")]
]
FOREIGN = [(encoded(kind), "image_1_bytes: cannot be decoded as JPEG or PNG") for kind in ("GIF", "BMP", "TIFF", "WEBP", "PPM")]


@pytest.mark.parametrize(
    ("data", "message"), [*FOREIGN, *((data, "more than 8 bits per channel: a depth map") for data in DEPTH)]
)
def test_decode_takes_jpeg_and_png_of_8_bits_only(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode_of_damaged_bytes_is_an_image_or_a_data_error(kind: str) -> None:
    """Truncations and flipped bytes: whatever the decoder meets, nothing but DataError comes out."""
    data, rng, decoded = encode_image(np.random.default_rng(0), kind), np.random.default_rng(1), 0
    for trial in range(300):
        damaged = flip(rng, bytearray(data), 0, len(data))[: None if trial % 3 else rng.integers(len(data))]
        with warnings.catch_warnings(), contextlib.suppress(DataError):
            warnings.simplefilter("ignore")
            decode_image(bytes(damaged))
            decoded += 1
    assert decoded <= 200


def test_random_crop_stays_inside_and_keeps_the_scale() -> None:
    rng = np.random.default_rng(0)
    left, top, right, bottom = np.array([random_crop(0.8, rng) for _ in range(500)]).T
    np.testing.assert_allclose([right - left, bottom - top], 0.8)
    assert min(left.min(), top.min()) >= 0
    assert max(right.max(), bottom.max()) <= 1
    for edge in (left, top):  # every place is used
        assert edge.min() < 0.01
        assert edge.max() > 0.19


def test_random_crop_never_rounds_to_outside() -> None:
    class Largest:
        def random(self, size: int) -> np.ndarray:
            return np.full(size, np.nextafter(1.0, 0.0))

    assert max(max(random_crop(float(scale), Largest())) for scale in np.linspace(0.11, 1, 1000)) <= 1  # type: ignore[arg-type]


def test_jitter_equals_the_three_steps_one_after_the_other() -> None:
    pixels = np.random.default_rng(0).integers(60, 160, (3, 20, 20), dtype=np.uint8)
    config = AugmentationConfig(brightness=0.3, contrast=0.3, saturation=0.3)
    for seed in range(10):
        brightness, contrast, saturation = 1 + 0.3 * np.random.default_rng(seed).uniform(-1, 1, 3)
        image = pixels * brightness
        grey = np.tensordot([0.299, 0.587, 0.114], image, axes=1)
        image = grey + saturation * (image - grey)
        image = grey.mean() + contrast * (image - grey.mean())
        assert np.abs(jitter_colour(pixels, config, np.random.default_rng(seed)) - np.clip(image, 0, 255)).max() < 1.5


def test_jitter_without_ranges_is_the_identity() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 7), dtype=np.uint8)
    still = AugmentationConfig(brightness=0.0, contrast=0.0, saturation=0.0)
    np.testing.assert_array_equal(jitter_colour(pixels, still, np.random.default_rng(0)), pixels)
