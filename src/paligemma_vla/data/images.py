"""Encoded bytes to the pixels of an RGB image, and reproducible augmentation."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg

from paligemma_vla.data.faults import LEAVE_OUT, Kind, Unusable, depth_map
from paligemma_vla.errors import first_line
from paligemma_vla.preprocess import exif_turn, to_upright_rgb
from paligemma_vla.storage import POINTER, POINTER_REMEDY

if TYPE_CHECKING:
    from paligemma_vla.config import AugmentationConfig
    from paligemma_vla.preprocess import Box
    from paligemma_vla.schema import Pixels

MAX_PIXELS = 32_000_000
WIDE_MODES = ("I", "F")  # of Pillow, which would cut them off at 255
GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma


def decode(data: bytes | memoryview, side: int = 0) -> Pixels:
    """Decode one JPEG or PNG to RGB (H, W, 3), turned as its EXIF orientation says; raises `Unusable`.

    side: a JPEG may come at a half, a quarter or an eighth of its size, of at least so many px; 0: at its own.
    The size is read from the header and checked before any pixel is decoded: a small file can unfold to gigabytes.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "TIFF"))
        deep = image.mode.startswith(WIDE_MODES)
        if image.format == "TIFF" and not deep:  # it is opened only to tell a depth map
            raise ValueError("it is a TIFF")
        if not deep and image.width * image.height <= MAX_PIXELS:
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                pixels = _decode_jpeg(image, data, side)
                if pixels is not None:
                    return pixels
            return np.asarray(to_upright_rgb(image))
    except Exception as error:  # hostile bytes lead Pillow to struct.error, zlib.error, IndexError, MemoryError and others
        # Pillow's own text for unknown bytes names an object's address.
        unknown = POINTER_REMEDY if bytes(data[: len(POINTER)]) == POINTER else "its bytes are of neither kind"
        reason = unknown if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise Unusable(Kind.IMAGE, f"cannot be decoded as JPEG or PNG ({reason}); restore it, or {LEAVE_OUT}") from error
    if deep:
        raise depth_map("more than 8 bits per channel")
    text = f"got an image of {image.width} x {image.height}, expected at most {MAX_PIXELS // 10**6} megapixels"
    raise Unusable(Kind.IMAGE_SIZE, f"{text}; shrink it before writing, or {LEAVE_OUT}")


def _decode_jpeg(image: Image.Image, data: bytes | memoryview, side: int) -> Pixels | None:
    """The pixels of a JPEG that Pillow has opened, by a decoder that gives the same ones in less time; None: Pillow must."""
    if image.info.keys() & {"exif", "xmp"} and exif_turn(image) is not None:
        return None
    shrinks = 0 < 2 * side <= min(image.size)
    least = {"min_height": side, "min_width": side, "min_factor": 2} if shrinks else {}
    try:
        pixels: Pixels = decode_jpeg(np.frombuffer(data, np.uint8), "RGB", **least)  # Arrow's own bytes are signed
    except ValueError:  # damaged: Pillow reads what there is, or says what is wrong
        return None
    return pixels


def encode_image(pixels: Pixels, kind: str, quality: int = 95) -> bytes:
    """An RGB image (H, W, 3) as `png`, which loses nothing, or as `jpeg` of a quality from 1 to 100."""
    image, stream = Image.fromarray(pixels), io.BytesIO()
    if kind == "png":
        image.save(stream, "PNG", compress_level=4)
    else:
        image.save(stream, "JPEG", quality=quality, subsampling=0)  # small pictures need colour at full resolution
    return stream.getvalue()


def random_crop(scale: float, rng: np.random.Generator) -> Box:
    """A box of `scale` times the image's sides at a random position; all four numbers are shares of the sides."""
    left, top = rng.random(2) * (1 - scale)
    return left, top, left + scale, top + scale


def jitter_colour(planes: Pixels, config: AugmentationConfig, rng: np.random.Generator) -> Pixels:
    """Change brightness, contrast and saturation of an RGB image (3, H, W) by random factors around 1.

    All three are linear in a pixel's colours, so together they are one 3 x 4 matrix. By torch, which a loader process keeps to
    one thread: numpy's product of a large picture would start others, which wait for the next one at full load.
    """
    import torch  # here: commands that only look at data do without

    ranges = np.array([config.brightness, config.contrast, config.saturation])
    brightness, contrast, saturation = 1 + ranges * rng.uniform(-1, 1, 3)
    pixels = torch.from_numpy(planes).view(3, -1).float()
    mean = float(GREY @ pixels.mean(dim=1).numpy())
    matrix = contrast * brightness * (saturation * np.eye(3) + (1 - saturation) * GREY)
    offset = (1 - contrast) * brightness * mean + 0.5  # the half is for rounding
    changed = torch.addmm(torch.tensor([[offset]], dtype=torch.float32), torch.from_numpy(matrix.astype(np.float32)), pixels)
    result: Pixels = changed.clamp_(0, 255).to(torch.uint8).numpy()
    return result.reshape(planes.shape)
