"""Encoded bytes to an RGB image, and reproducible augmentation."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from paligemma_vla.config import AugmentationConfig
from paligemma_vla.errors import DataError
from paligemma_vla.preprocess import Box

MAX_PIXELS = 32_000_000
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601 luma


def decode_image(data: bytes | memoryview, where: str) -> Image.Image:
    """Decode one JPEG or PNG to RGB.

    The size is read from the header and checked before any pixel is decoded: a small file can unfold to gigabytes.
    Raises `DataError`, starting with `where` (file, row, column).
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"{where}: got an image of {image.width} x {image.height}, expected at most {MAX_PIXELS // 10**6} megapixels; "
                f"shrink it before writing"
            )
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError(
            f"{where}: got {len(data)} bytes that are neither JPEG nor PNG; restore it, or leave the episode out"
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: cannot be decoded as JPEG or PNG ({error}); restore it, or leave the episode out") from error


def random_crop(scale: float, rng: np.random.Generator) -> Box:
    """A box of `scale` times the image's sides at a random place; all four numbers are shares of the sides."""
    left, top = rng.random(2) * (1 - scale)
    return left, top, left + scale, top + scale


def jitter_colour(pixels: NDArray[np.uint8], config: AugmentationConfig, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Change brightness, contrast and saturation of (3, H, W) uint8 by random factors around 1."""
    ranges = np.array([config.brightness, config.contrast, config.saturation])
    brightness, contrast, saturation = (1 + ranges * rng.uniform(-1, 1, 3)).astype(np.float32)
    image = pixels.astype(np.float32) * brightness
    grey = np.tensordot(GREY, image, axes=1)  # (H, W)
    image = grey + saturation * (image - grey)
    mean = grey.mean()
    image = mean + contrast * (image - mean)
    jittered: NDArray[np.uint8] = np.clip(image + 0.5, 0, 255).astype(np.uint8)
    return jittered
