"""Encoded bytes to an RGB image, and reproducible augmentation."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from paligemma_vla.data.faults import LEAVE_OUT, Kind, Unusable, depth_map
from paligemma_vla.errors import first_line
from paligemma_vla.preprocess import to_upright_rgb
from paligemma_vla.storage import POINTER, POINTER_REMEDY

if TYPE_CHECKING:
    from paligemma_vla.config import AugmentationConfig
    from paligemma_vla.preprocess import Box

MAX_PIXELS = 32_000_000
WIDE_MODES = ("I", "F")  # of Pillow, which would cut them off at 255
GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma


def decode(data: bytes | memoryview) -> Image.Image:
    """Decode one JPEG or PNG to RGB, turned as its EXIF orientation says; raises `Unusable`.

    The size is read from the header and checked before any pixel is decoded: a small file can unfold to gigabytes.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "TIFF"))
        deep = image.mode.startswith(WIDE_MODES)
        if image.format == "TIFF" and not deep:  # it is opened only to tell a depth map
            raise ValueError("it is a TIFF")
        if not deep and image.width * image.height <= MAX_PIXELS:
            return to_upright_rgb(image)
    except Exception as error:  # hostile bytes lead Pillow to struct.error, zlib.error, IndexError, MemoryError and others
        # Pillow's own text for unknown bytes names an object's address.
        unknown = POINTER_REMEDY if bytes(data[: len(POINTER)]) == POINTER else "its bytes are of neither kind"
        reason = unknown if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise Unusable(Kind.IMAGE, f"cannot be decoded as JPEG or PNG ({reason}); restore it, or {LEAVE_OUT}") from error
    if deep:
        raise depth_map("more than 8 bits per channel")
    text = f"got an image of {image.width} x {image.height}, expected at most {MAX_PIXELS // 10**6} megapixels"
    raise Unusable(Kind.IMAGE_SIZE, f"{text}; shrink it before writing, or {LEAVE_OUT}")


def encode_image(image: Image.Image, kind: str, quality: int = 95) -> bytes:
    """An RGB image as `png`, which loses nothing, or as `jpeg` of a quality from 1 to 100."""
    stream = io.BytesIO()
    if kind == "png":
        image.save(stream, "PNG", compress_level=4)
    else:
        image.save(stream, "JPEG", quality=quality, subsampling=0)  # small pictures need colour at full resolution
    return stream.getvalue()


def random_crop(scale: float, rng: np.random.Generator) -> Box:
    """A box of `scale` times the image's sides at a random position; all four numbers are shares of the sides."""
    left, top = rng.random(2) * (1 - scale)
    return left, top, left + scale, top + scale


def jitter_colour(image: Image.Image, config: AugmentationConfig, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation of an RGB image by random factors around 1.

    All three are linear in a pixel's colours, so together they are one 3 x 4 matrix, which Pillow applies in one pass.
    """
    ranges = np.array([config.brightness, config.contrast, config.saturation])
    brightness, contrast, saturation = 1 + ranges * rng.uniform(-1, 1, 3)
    mean = np.asarray(image.convert("L")).mean()
    colours = contrast * brightness * (saturation * np.eye(3) + (1 - saturation) * GREY)
    offset = np.full((3, 1), (1 - contrast) * brightness * mean)
    return image.convert("RGB", tuple(np.hstack([colours, offset]).flatten().tolist()))
