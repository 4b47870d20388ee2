"""Frames of videos as recorders, phones and editors leave them, against a plain pass of PyAV in order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from paligemma_vla.data.faults import Unusable
from paligemma_vla.data.video import VideoDecoders

FPS, FRAMES, HEIGHT, WIDTH = 10, 13, 48, 64


def picture(step: int) -> np.ndarray:
    """(H, W, 3) uint8, another one for every step and every way of turning it."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([3 * x, 4 * y, np.full_like(x, 17 * step)], axis=-1).clip(0, 255).astype(np.uint8)


def write(
    path: Path,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    form: str = "mp4",
    begin: float = 0.0,
    jitter: float = 0.0,
    audio: bool = False,
    muxer: dict[str, str] | None = None,
    range_and_space: tuple[int, int] = (0, 2),
    **options: str,
) -> list[np.ndarray]:
    """Write a video; returns its frames in order."""
    clock = Fraction(1, 1000)
    with av.open(str(path), "w", format=form, options=muxer or {}) as container:
        sound: Any = container.add_stream("aac", rate=16000) if audio else None
        stream: Any = container.add_stream(codec, rate=FPS, options={"crf": "12", **options})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        stream.codec_context.time_base = clock
        stream.codec_context.color_range, stream.codec_context.colorspace = range_and_space
        for step in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(step), format="rgb24").reformat(format=pix_fmt)
            late = jitter * (step * 7 % 3 - 1) if step else 0.0
            frame.pts, frame.time_base = round((begin + step / FPS + late) * 1000), clock
            container.mux(stream.encode(frame))
            if audio:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, step * 1600
                container.mux(sound.encode(silence))
        for one in filter(None, (stream, sound)):
            container.mux(one.encode())
    return plain(path)


def plain(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.video[0])]


B_FRAMES = {"bf": "3", "g": "12"}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "B-frames": B_FRAMES,
    "B-frames, pts begin late": {**B_FRAMES, "muxer": {"use_editlist": "0"}},
    "begins after 2 s": {"begin": 2.0},
    "begins late by less than a frame": {"begin": 0.08},
    "MPEG-TS": {**B_FRAMES, "form": "mpegts"},
    "full range": {"pix_fmt": "yuvj420p", "range_and_space": (2, 2)},
    "BT.709": {"range_and_space": (1, 1)},
    "yuv444": {"pix_fmt": "yuv444p"},
    "10 bits": {"codec": "libx265", "pix_fmt": "yuv420p10le", "x265-params": "log-level=none"},
    "audio first": {"audio": True},
    "variable rate": {"jitter": 0.02},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_a_plain_pass_in_any_order(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    expected, rng = write(path, **KINDS[kind]), np.random.default_rng(0)
    assert len(expected) == FRAMES
    for steps in (np.arange(FRAMES), rng.permutation(FRAMES)):
        decoders = VideoDecoders()
        for step in steps.tolist():
            got = decoders.frame(str(path), step / FPS, 0.5 / FPS, 0.0)
            assert np.array_equal(np.asarray(got), expected[step]), f"step {step}"


def test_threads_share_the_decoders(tmp_path: Path) -> None:
    """Cameras are decoded side by side; that two ask the same video at once is rare, but must not mix their frames."""
    videos = {path: write(path, g="4") for path in (tmp_path / "a.mp4", tmp_path / "b.mp4")}
    decoders, rng = VideoDecoders(), np.random.default_rng(0)
    wanted = [(path, step) for path in videos for step in rng.permutation(FRAMES).tolist() * 4]

    def right(job: tuple[Path, int]) -> bool:
        path, step = job
        return np.array_equal(decoders.frame(str(path), step / FPS, 0.5 / FPS, 0.0), videos[path][step])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(right, rng.permutation(np.array(wanted, object)).tolist()))


def test_a_frame_alone_is_had_without_those_after_it(tmp_path: Path) -> None:
    """Of two frames from keyframe to keyframe a decoder would otherwise hold back the one that is wanted for two more."""
    expected, decoders = write(tmp_path / "a.mp4", **{"g": "2", "bf": "3"}), VideoDecoders()
    for step in (9, 2, 7, 4):
        got = decoders.frame(str(tmp_path / "a.mp4"), step / FPS, 0.5 / FPS, 0.0)
        assert np.array_equal(got, expected[step])
    video = decoders._video(str(tmp_path / "a.mp4"))
    assert video.current is None and video._on_time  # no frame was decoded that others follow
    assert len(list(video.container.demux(video.stream))) >= FRAMES - 4  # reading goes on just after the last one


def test_a_clock_that_the_data_shares_with_the_video_is_kept(tmp_path: Path) -> None:
    """Times that begin where the video begins are its own; so are those that begin within it."""
    path = tmp_path / "a.mp4"
    expected = write(path, begin=2.0)
    for first in (2.0, 2.3):
        got = VideoDecoders().frame(str(path), 2.4, 0.5 / FPS, first)
        assert np.array_equal(np.asarray(got), expected[4])


def write_turned(path: Path, matrix: tuple[float, float, float, float]) -> list[np.ndarray]:
    """A video whose track header has (a, b, c, d) as its display matrix; returns the frames as they are stored."""
    frames = write(path)
    content = bytearray(path.read_bytes())
    begin = content.find(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * 65536) for value in matrix)
    content[begin : begin + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(content)
    return frames


def shown(frame: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray:
    """The pixel at (x, y) goes to (a x + c y, b x + d y), moved back to where numbers begin at 0."""
    a, b, c, d = (int(np.sign(value)) for value in matrix)
    y, x = np.mgrid[0 : frame.shape[0], 0 : frame.shape[1]]
    column, row = a * x + c * y, b * x + d * y
    row, column = row - row.min(), column - column.min()
    turned = np.zeros((row.max() + 1, column.max() + 1, 3), np.uint8)
    turned[row, column] = frame
    return turned


QUARTERS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
FLIPS = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", [*QUARTERS, *FLIPS, (0, 1.5, -0.75, 0.001)])
def test_frames_are_turned_as_the_display_matrix_says(matrix: tuple[float, float, float, float], tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    stored = write_turned(path, matrix)
    decoders = VideoDecoders()
    for step in (0, 7, 3):
        got = np.asarray(decoders.frame(str(path), step / FPS, 0.5 / FPS, 0.0))
        assert np.array_equal(got, shown(stored[step], tuple(np.round(matrix, 1))))


def test_an_angle_that_is_no_quarter_turn_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_turned(path, (0.7, 0.7, -0.7, 0.7))
    with pytest.raises(Unusable, match=r"got a display matrix of \[0\.7.*expected quarter turns and flips"):
        VideoDecoders().frame(str(path), 0.0, 0.05, 0.0)
