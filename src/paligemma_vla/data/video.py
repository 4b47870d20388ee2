"""Videos: frames on demand, by their time; and frames written so that they can be read at random."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, NamedTuple, Self, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Transpose

from paligemma_vla.data.faults import LEAVE_OUT, Kind, Unusable, depth_map
from paligemma_vla.data.images import MAX_PIXELS
from paligemma_vla.errors import ConfigError, DataError
from paligemma_vla.schema import Pixels
from paligemma_vla.storage import read_failure

if TYPE_CHECKING:
    import av

OPEN_VIDEOS = 16  # per reader; a decoder holds some frames of its video
EXACT = 1e-4  # seconds within which a frame is the one that is wanted, without a look at the next
DEEP_GREY = re.compile(r"gray(9|1\d|f)")  # of FFmpeg's pixel formats: grey of more than 8 bits
REMEDY = f"restore the video, or {LEAVE_OUT}"
# Signs of (a, b, c, d) of a display matrix, which shows the pixel at (x, y) at (a x + c y, b x + d y) -> what does that.
TURNS = {
    **{(1, 0, 0, 1): None, (0, 0, 0, 0): None},
    **{(-1, 0, 0, 1): Transpose.FLIP_LEFT_RIGHT, (1, 0, 0, -1): Transpose.FLIP_TOP_BOTTOM},
    **{(0, 1, 1, 0): Transpose.TRANSPOSE, (0, -1, -1, 0): Transpose.TRANSVERSE},
    **{(0, 1, -1, 0): Transpose.ROTATE_270, (0, -1, 1, 0): Transpose.ROTATE_90, (-1, 0, 0, -1): Transpose.ROTATE_180},
}
PIX_FMT = "yuv420p"  # of what is written
KEYFRAME_EVERY = 2  # as LeRobot: a frame is had by decoding two at most


class Codec(NamedTuple):
    """An encoder of FFmpeg, and its options beside the distance of keyframes and the constant rate factor."""

    encoder: str
    preset: int | None
    options: dict[str, int | str]


# x264 without its look ahead, which has nothing to gain from two frames: with it, the same frames became other bytes now and
# then, by what lay in memory beside them. B-frames are allowed, though two frames leave no room for one: without them a
# packet's decoding time is another, and LeRobot cannot append a video of its own.
CODECS = {
    "h264": Codec("libx264", None, {"x264-params": "mbtree=0:rc-lookahead=0"}),
    "av1": Codec("libsvtav1", 8, {"svtav1-params": "lp=1"}),
}


class VideoDecoders:
    """Decoders of the videos used last, kept open. limit: how many; at least one for each thread that decodes."""

    def __init__(self, limit: int = OPEN_VIDEOS) -> None:
        self.limit = limit
        self._lock = threading.Lock()  # of the dictionary; each video has one of its own
        self._open: dict[str, _Video] = {}  # the one used last at the end

    def frame(self, path: str, time: float, tolerance: float, first: float) -> Pixels:
        """The frame nearest to `time`, at most `tolerance` away, as RGB, turned as it is to be seen. Raises `Unusable`.

        first: the earliest time that is asked of this video; all in seconds. A video that begins later has a clock of its
        own (B-frames, cut from a longer one): its first frame is then the one at `first`.
        """
        from av.error import FFmpegError  # here, since most data has no videos

        try:
            with self._lock:
                video = self._video(path)
            late = video.start - first
            with video.lock:
                frame = video.nearest(time + late if late > tolerance - EXACT else time, tolerance)
        except (FFmpegError, OSError, ValueError, EOFError, OverflowError) as error:  # a time may be any number
            with self._lock:
                self._close(path)
            raise Unusable(Kind.IMAGE, f"{path}: cannot be decoded ({read_failure(path, error)}); {REMEDY}") from error
        if frame is None:
            last = "" if video.current is None else f", the last one before is at {_time(video.current):.3f} s"
            with self._lock:
                self._close(path)
            text = f"{path}: got no frame within {tolerance:.3f} s of {time:.3f} s{last}; {REMEDY}"
            raise Unusable(Kind.FRAME, text)
        turn = _turn(frame, path)
        pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
        return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))

    def _close(self, path: str) -> None:
        if path in self._open:
            self._open.pop(path).container.close()

    def _video(self, path: str) -> _Video:
        video = self._open[path] = self._open.pop(path) if path in self._open else _Video(path)
        if len(self._open) > self.limit:
            self._close(next(iter(self._open)))
        return video


class _Video:
    """One open video. start: time of its first frame, in s. current: the frame decoded last, if those after it come next."""

    def __init__(self, path: str) -> None:
        import av

        self.container = av.open(os.path.abspath(path))  # of a relative one with a colon FFmpeg takes the start for a protocol
        if not self.container.streams.video:
            raise ValueError("it holds no video")
        self.stream = self.container.streams.video[0]
        if self.stream.codec_context is None:
            raise ValueError("there is no decoder for its codec")
        width, height = self.stream.codec_context.width, self.stream.codec_context.height
        if width * height > MAX_PIXELS:
            got = f"{path}: got frames of {width} x {height}, expected at most {MAX_PIXELS // 10**6} megapixels"
            raise Unusable(Kind.IMAGE_SIZE, f"{got}; {REMEDY}")
        if DEEP_GREY.match(pixels := self.stream.codec_context.pix_fmt or ""):
            raise depth_map(f"pixels of {pixels}")
        self.start, self.lock = _start(self.stream), threading.Lock()
        self.stream.thread_type = "NONE"  # a loader has processes; threads would decode ahead of what is asked
        self.current: av.VideoFrame | None = None
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._asked, self._on_time = -math.inf, True  # the time asked for last; whether frames were at the very times

    def nearest(self, time: float, tolerance: float) -> av.VideoFrame | None:
        """The frame nearest to `time`, None when it is further away than `tolerance`."""
        follows, self._asked = -EXACT <= time - self._asked <= 4 * tolerance, time
        # Decoding on to the current frame or one of the next two is cheaper than seeking.
        if self.current is None or not -EXACT <= time - _time(self.current) <= 4 * tolerance:
            if self._on_time and not follows and (frame := self._alone(time, tolerance)) is not None:
                return frame
            self._seek(time + tolerance / 2)
            first = next(self._frames, None)
            if first is None or _time(first) > time + tolerance:  # some files are sought too far
                self._seek(0.0)
                first = next(self._frames, None)
            self.current = first
        return self._forward(time, tolerance)

    def _alone(self, time: float, tolerance: float) -> av.VideoFrame | None:
        """The frame at `time` by decoding no frame that it does not need; None: none is at that very time.

        A decoder holds frames back, to give them in the order of their times, until it is told that no more come: of a keyframe
        and the frame after it, it would decode twice as many.
        """
        self._seek(time + tolerance / 2)
        base, decoder = float(self.stream.time_base or 0), self.stream.codec_context
        for packet in self.container.demux(self.stream):
            if packet.pts is None or packet.dts is None or packet.dts * base > time + EXACT:
                break
            frames, last = packet.decode(), abs(packet.pts * base - time) <= EXACT
            if last:
                frames += decoder.decode(None)
            for frame in frames:
                if frame.pts is not None and abs(frame.pts * base - time) <= EXACT:  # the last ones do not know their time
                    return frame
            if last:
                break
        self._on_time = False
        return None

    def _forward(self, time: float, tolerance: float) -> av.VideoFrame | None:
        """Decode until the wanted time is reached; of the frames around it, the nearer one."""
        before, frame = None, self.current
        while frame is not None and _time(frame) < time - EXACT:
            before = frame
            frame = next(self._frames, None)
            self.current = frame or before
        near = [one for one in (before, frame) if one is not None and abs(_time(one) - time) <= tolerance]
        return min(near, key=lambda one: abs(_time(one) - time), default=None)

    def _seek(self, time: float) -> None:
        """Go to the keyframe before a time."""
        self.current = None
        assert self.stream.time_base is not None
        self.container.seek(int(max(time, 0.0) / self.stream.time_base), stream=self.stream, backward=True)
        self._frames = (frame for frame in self.container.decode(self.stream) if frame.pts is not None)


def _time(frame: av.VideoFrame) -> float:
    assert frame.time is not None
    return frame.time


def _start(stream: av.VideoStream) -> float:
    return float((stream.start_time or 0) * (stream.time_base or 0))


def video_format(path: str) -> tuple[str, str, float]:
    """Codec and pixel format of a video, by FFmpeg's names, and the time of its first frame in s. Raises `DataError`."""
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            return stream.codec_context.codec.canonical_name, stream.codec_context.pix_fmt or "", _start(stream)
    except (av.FFmpegError, OSError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: cannot be decoded ({read_failure(path, error)}); {REMEDY}") from error


def _turn(frame: av.VideoFrame, path: str) -> Transpose | None:
    """What turns a frame as it is to be seen, by its display matrix; None when it is stored so. Raises `Unusable`."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    values = np.frombuffer(cast("bytes", matrix), np.int32)[[0, 1, 3, 4]].astype(np.float64)
    signs = tuple(np.sign(np.where(np.abs(values) < np.abs(values).max() / 100, 0, values)).astype(int).tolist())
    if signs not in TURNS:
        text = f"{path}: got a display matrix of {(values / 2**16).round(2).tolist()}, expected quarter turns and flips"
        raise Unusable(Kind.IMAGE, f"{text}; encode the video anew, or {LEAVE_OUT}")
    return TURNS[signs]


class VideoWriter:
    """Write RGB frames as an MP4 file; `with` ends it. fps: frames per second. crf: smaller is better and larger.

    keyframe_every: a video that is only played forwards is smaller with fewer keyframes. Raises `ConfigError` when this
    machine's PyAV lacks the encoder.
    """

    def __init__(self, file: Path | IO[bytes], codec: str, fps: float, crf: int, keyframe_every: int = KEYFRAME_EVERY) -> None:
        import av  # here, since most data has no videos

        os.environ.setdefault("SVT_LOG", "1")  # errors only: the encoder of AV1 writes to stderr itself
        encoder, preset, options = CODECS[codec]
        if encoder not in av.codecs_available:
            raise ConfigError(f"--codec {codec}: got a PyAV without {encoder}, expected one with it; choose another codec")
        self._rate = Fraction(fps).limit_denominator(1001)
        given = {"g": keyframe_every, "crf": crf, "preset": preset, **options}
        self._options = {name: str(value) for name, value in given.items() if value is not None}
        self._encoder = encoder
        self._container = av.open(str(file.absolute()) if isinstance(file, Path) else file, "w", format="mp4")
        self._stream: av.VideoStream | None = None
        self.frames = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def write(self, image: NDArray[np.uint8], where: str) -> None:
        """Append a frame (H, W, 3) uint8. Raises `DataError`, beginning with `where`, for an odd size."""
        import av

        if self._stream is None:
            self._begin(image.shape, where)
        assert self._stream is not None and self._stream.height == image.shape[0] and self._stream.width == image.shape[1]
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
        stream.width, stream.height, stream.pix_fmt = width, height, PIX_FMT
        stream.codec_context.time_base = 1 / self._rate
        stream.codec_context.thread_count = 1  # what is written must not depend on how many cores there are
        self._stream = stream
