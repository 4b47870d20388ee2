"""Frames into a video that can be read at random: H.264 or AV1, a keyframe at every second frame."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import ConfigError, DataError

if TYPE_CHECKING:
    import av

KEYFRAME_EVERY = 2  # as LeRobot: a frame is had by decoding two at most
# name -> encoder of FFmpeg, and its options beside the constant rate factor. x264 without its look ahead, which has nothing to
# gain from two frames: with it, the same frames became other bytes now and then, by what lay in memory beside them. Without
# B-frames a decoder need not read one frame more than is wanted.
CODECS = {
    "h264": ("libx264", {"x264-params": "mbtree=0:rc-lookahead=0:bframes=0"}),
    "av1": ("libsvtav1", {"preset": "8", "svtav1-params": "lp=1"}),
}


class VideoWriter:
    """Write RGB frames as an MP4 file; `with` ends it. fps: frames per second. crf: smaller is better and larger.

    Raises `ConfigError` when this machine's PyAV lacks the encoder.
    """

    def __init__(self, path: Path, codec: str, fps: float, crf: int) -> None:
        import av  # here, since most data has no videos

        os.environ.setdefault("SVT_LOG", "1")  # errors only: the encoder of AV1 writes to stderr itself
        encoder, options = CODECS[codec]
        if encoder not in av.codecs_available:
            raise ConfigError(f"--codec {codec}: got a PyAV without {encoder}, expected one with it; choose another codec")
        self.path = path
        self._rate = Fraction(fps).limit_denominator(1001)
        self._options = {"g": str(KEYFRAME_EVERY), "crf": str(crf), **options}
        self._encoder = encoder
        self._container = av.open(str(path), "w", format="mp4")
        self._stream: av.VideoStream | None = None
        self._shape: tuple[int, ...] = ()
        self.frames = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def write(self, image: NDArray[np.uint8], where: str) -> None:
        """Append a frame (H, W, 3) uint8. Raises `DataError`, beginning with `where`, for a size that does not do."""
        import av

        if self._stream is None:
            self._begin(image.shape, where)
        if image.shape != self._shape:
            got, expected = (f"{shape[1]} x {shape[0]}" for shape in (image.shape, self._shape))
            raise DataError(f"{where}: got {got} pixels, expected {expected} as before; in LeRobot a camera has one size")
        assert self._stream is not None
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts = self.frames
        self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def _begin(self, shape: tuple[int, ...], where: str) -> None:
        height, width, _ = shape
        if height % 2 or width % 2:
            text = f"got {width} x {height} pixels, expected even numbers, since a video halves its colours"
            raise DataError(f"{where}: {text}; use --images parquet")
        stream = cast("av.VideoStream", self._container.add_stream(self._encoder, rate=self._rate, options=self._options))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = 1 / self._rate
        stream.codec_context.thread_count = 1  # what is written must not depend on how many cores there are
        self._stream, self._shape = stream, shape
