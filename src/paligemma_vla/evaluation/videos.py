"""Small films of episodes: frames with the instruction written into them, as H.264 in an .mp4, and a still picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from paligemma_vla.errors import SimulatorError

FRAMES_PER_SECOND = 20
HOLD_FRAMES = 12  # the last picture stays, long enough to see how it ended
QUALITY = "26"  # x264 constant rate factor


def caption(image: NDArray[np.uint8], text: str, success: bool) -> NDArray[np.uint8]:
    """The picture (H, W, 3) with `text` on a strip at its lower edge, green for a success and red for a failure."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(10, picture.height // 18))
    strip = picture.height // 12
    colour = (20, 105, 60) if success else (150, 40, 40)
    draw.rectangle((0, picture.height - strip, picture.width, picture.height), fill=colour)
    middle = (picture.width / 2, picture.height - strip / 2)
    draw.text(middle, text, font=font, fill=(255, 255, 255), anchor="mm")
    return np.asarray(picture)


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]]) -> Path:
    """Write frames (H, W, 3) uint8 with even H and W as H.264 to `path` (.mp4) and the last one beside it (.jpg).

    Returns the path of the still. Raises `SimulatorError` when PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise SimulatorError(
            'videos need PyAV, which is not installed: pip install "paligemma-vla[metaworld]", or ask for no videos'
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = frames[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=FRAMES_PER_SECOND, options={"crf": QUALITY})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in [*frames, *[frames[-1]] * HOLD_FRAMES]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    poster = path.with_suffix(".jpg")
    Image.fromarray(frames[-1]).save(poster, quality=85)
    return poster
