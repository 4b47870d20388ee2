"""Whether two sets of episodes are the same: numbers, instructions, flags exactly, images exactly or within a codec's loss."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.data.reader import Picture, Recording, Recordings
from paligemma_vla.errors import DataError

SAMPLED = 4  # images of an episode and camera that are decoded and compared, when their bytes are not the same
LEAST_PSNR = 20.0  # dB; a lossy codec's usual pictures have 30 and more, another picture has 10 or so
CLOSER = 1.0  # mean difference in levels by which a picture's neighbour may be more like it without a complaint


@dataclass(frozen=True)
class Comparison:
    """What was compared and found the same. identical: images whose bytes are equal. sampled: images that were decoded.

    worst: least peak signal-to-noise ratio of those, in dB; infinite when all pixels were equal.
    """

    episodes: int = 0
    steps: int = 0
    identical: int = 0
    sampled: int = 0
    worst: float = float("inf")

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.episodes + other.episodes,
            self.steps + other.steps,
            self.identical + other.identical,
            self.sampled + other.sampled,
            min(self.worst, other.worst),
        )

    def __str__(self) -> str:
        counts = f"{self.episodes} episodes, {self.steps} steps; state, action, instructions and flags are equal"
        images = [f"{self.identical} images have the same bytes"] if self.identical else []
        if self.sampled and self.worst == float("inf"):
            images.append(f"{self.sampled} frames were compared, every pixel is equal")
        elif self.sampled:
            images.append(f"{self.sampled} frames were compared, PSNR {self.worst:.1f} dB or better (at least {LEAST_PSNR:g})")
        return "; ".join([counts, *images])


def compare_episode(source: Recordings, result: Recordings, episode: int, lossless: bool) -> Comparison:
    """Hold one episode of a result against its source. Raises `DataError` with the first difference."""
    first, second = source.read(episode), result.read(episode)
    for name, got, expected in [
        ("steps", second.length, first.length),
        ("state", _digest(second.state), _digest(first.state)),
        ("action", _digest(second.action), _digest(first.action)),
        ("instructions", second.prompts, first.prompts),
        ("is_terminal", second.is_terminal, first.is_terminal),
        ("cameras", len(second.images), len(first.images)),
    ]:
        if got != expected:
            raise _difference(first, second, f"{name}: got {str(got)[:80]}, expected {str(expected)[:80]}")
    found = Comparison(episodes=1, steps=first.length)
    for camera in range(len(first.images)):
        found += _compare_camera(first, second, camera, lossless)
    return found


def _digest(values: NDArray[np.float32]) -> str:
    """Of every bit."""
    digest = hashlib.blake2b(repr(values.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(values, np.float32).tobytes())
    return digest.hexdigest()


def _difference(first: Recording, second: Recording, text: str) -> DataError:
    return DataError(f"{second.where()}: differs from {first.where()}: {text}; delete the result and convert again")


def _compare_camera(first: Recording, second: Recording, camera: int, lossless: bool) -> Comparison:
    pairs = list(zip(first.images[camera], second.images[camera], strict=True))
    identical, different = 0, []
    for step, (source, result) in enumerate(pairs):
        if (source is None) != (result is None):
            raise _difference(first, second, f"camera {camera + 1}, step {step}: an image is there in only one of them")
        if source is None or result is None:
            continue
        data = source.encoded()
        if data is not None and data == result.encoded():
            identical += 1
        else:
            different.append(step)
    chosen = np.unique(np.linspace(0, len(different) - 1, min(SAMPLED, len(different))).round().astype(int))
    ratios = [_compare_frame(first, second, camera, different[n], lossless) for n in chosen]
    return Comparison(identical=identical, sampled=len(ratios), worst=min(ratios, default=float("inf")))


def _compare_frame(first: Recording, second: Recording, camera: int, step: int, lossless: bool) -> float:
    """PSNR of one frame, in dB."""
    source, result = first.images[camera][step], second.images[camera][step]
    assert source is not None and result is not None
    expected, got = _pixels(source), _pixels(result)
    where = f"camera {camera + 1}, step {step}"
    if got.shape != expected.shape:
        raise _difference(first, second, f"{where}: got an image of {got.shape[:2]}, expected {expected.shape[:2]}")
    error = float(((got - expected) ** 2).mean())
    psnr = float("inf") if error == 0 else 10 * np.log10(255**2 / error)
    if lossless and error:
        raise _difference(first, second, f"{where}: got other pixels (PSNR {psnr:.1f} dB), expected the same")
    if psnr < LEAST_PSNR:
        text = f"{where}: got PSNR {psnr:.1f} dB, expected {LEAST_PSNR:g} dB at least; a smaller --crf loses less"
        raise _difference(first, second, text)
    for neighbour in (step - 1, step + 1):  # a picture that is one step off may still look much the same
        other = first.images[camera][neighbour] if 0 <= neighbour < first.length else None
        if other is not None and np.abs(got - _pixels(other)).mean() + CLOSER < np.abs(got - expected).mean():
            raise _difference(first, second, f"{where}: got an image more like step {neighbour} than its own")
    return psnr


def _pixels(picture: Picture) -> NDArray[np.float64]:
    return np.asarray(picture.decode(), np.float64)
