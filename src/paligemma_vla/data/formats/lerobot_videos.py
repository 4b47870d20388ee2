"""Which video files of a LeRobot data set are copied when it is converted, and which episodes are encoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.data.formats import open_file
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.video import CODECS, EXACT, PIX_FMT, video_format


class VideoFile(NamedTuple):
    """first: its first episode. copied: it is the source's file; else its frames are encoded."""

    first: int
    copied: bool


@dataclass(frozen=True)
class CameraVideos:
    """The video files of a camera, in the order of their episodes. info: what the source says of them, if all are copied."""

    codec: str
    pix_fmt: str
    files: tuple[VideoFile, ...]
    info: dict[str, Any] | None

    @property
    def copied(self) -> int:
        """How many files are copied."""
        return sum(file.copied for file in self.files)

    def __str__(self) -> str:
        counts = {"copied": self.copied, f"encoded ({self.codec})": len(self.files) - self.copied}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


class SourceVideos(NamedTuple):
    """Videos of a camera of the source. paths: of each episode's (E,). begin: in it, in s (E,). whole: runs of episodes
    [first, stop) which are all that their file has. info: what the data set says of them."""

    paths: list[str]
    begin: NDArray[np.float64]
    whole: list[tuple[int, int]]
    info: dict[str, Any]


def find_videos(index: EpisodeIndex, column: str, version: str) -> SourceVideos | None:
    """The videos of a camera's column; None when its images are stored one by one."""
    count, fps, info = len(index), index.layout.metadata.control_hz, dict[str, Any]()
    paths, begin, fits, listed = [""] * count, np.zeros(count), np.zeros(count, bool), np.zeros(count, np.int64)
    for episodes in np.split(np.arange(count), np.flatnonzero(np.diff(index.file)) + 1):
        with open_file(index.paths[index.file[episodes[0]]]) as file:
            frames = file.frames(column)
        if frames is None:
            return None
        info = frames.info
        for episode in episodes.tolist():
            start, length = int(index.start[episode]), int(index.length[episode])
            times, number = frames.time[start : start + length], frames.file[start]
            begin[episode], listed[episode] = times[0], frames.episodes[number]
            paths[episode] = os.path.join(frames.root, frames.files[number])
            fits[episode] = np.allclose(times - times[0], np.arange(length) / fps, rtol=1e-6, atol=EXACT)
    edges = [0, *(n for n in range(1, count) if paths[n] != paths[n - 1]), count]
    if version == "v2.1":  # it has no place for where in its video an episode begins
        fits &= (listed == 1) & (np.abs(begin) <= EXACT)
    whole = [
        (first, stop)
        for first, stop in pairwise(edges)
        if stop - first == listed[first] and fits[first:stop].all() and (np.diff(begin[first:stop]) > 0).all()
    ]
    return SourceVideos(paths, begin, whole, info)


def plan_camera(source: SourceVideos | None, begins: Sequence[int], codec: str | None, copy: bool) -> CameraVideos:
    """The video files of one camera. begins: the first episode of each shard."""
    theirs, pix_fmt = ("", "") if source is None else video_format(source.paths[0])[:2]
    codec = codec or (theirs if theirs in CODECS else "h264")
    whole = [run for run in source.whole if not _begins_late(source, run[0])] if source and copy else []
    covered = {episode for run in whole for episode in range(*run)}
    if source and len(covered) == len(source.paths):
        return CameraVideos(theirs, pix_fmt, tuple(VideoFile(first, True) for first, _ in whole), source.info)
    if (theirs, pix_fmt) != (codec, PIX_FMT):  # the files of one camera are of one kind
        whole, covered = [], set[int]()
    encoded = {*begins, *(stop for _, stop in whole if source and stop < len(source.paths))} - covered
    files = [VideoFile(first, True) for first, _ in whole] + [VideoFile(first, False) for first in encoded]
    return CameraVideos(codec, PIX_FMT, tuple(sorted(files)), None)


def _begins_late(source: SourceVideos, episode: int) -> bool:
    """True if a video has a clock of its own, in which LeRobot finds no frame at the begin of its first episode."""
    return bool(video_format(source.paths[episode])[2] > source.begin[episode] + EXACT)
