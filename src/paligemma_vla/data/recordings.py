"""Whole episodes out of indexed files of any format, for whoever writes them in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paligemma_vla import schema
from paligemma_vla.data.checks import prompt_of
from paligemma_vla.data.episode_file import Pictures
from paligemma_vla.data.episodes import EpisodeIndex
from paligemma_vla.data.faults import FaultError, Unusable
from paligemma_vla.data.flags import read_flags
from paligemma_vla.data.reader import EpisodeReader
from paligemma_vla.data.sources import open_file

CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Picture:
    """One image of an episode. file, row, column: where it lies, for messages."""

    pictures: Pictures
    place: int
    file: str
    row: int
    column: str

    def encoded(self) -> bytes | None:
        """As it is stored, when that is an encoded image of its own. Raises `FaultError`."""
        try:
            return self.pictures.encoded(self.place)
        except Unusable as error:
            raise FaultError(error.at(self.file, self.row, self.column)) from error

    def decode(self) -> Image.Image:
        """As RGB. Raises `FaultError`."""
        try:
            return self.pictures.decode(self.place)
        except Unusable as error:
            raise FaultError(error.at(self.file, self.row, self.column)) from error


@dataclass(frozen=True)
class Recording:
    """One episode of L steps: state (L, P), action (L, A), an instruction per step, images per camera and step.

    file, row: where its first step lies, for messages. An image is None where the camera is absent.
    """

    file: str
    row: int
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    prompts: list[str]
    images: list[list[Picture | None]]
    is_terminal: bool

    @property
    def length(self) -> int:
        return len(self.action)

    def where(self, step: int = 0) -> str:
        """File and row of a step."""
        return f"{self.file}: row {self.row + step}"


class Recordings:
    """The episodes of an index. cameras: numbers, from 0, of those that are wanted."""

    def __init__(self, index: EpisodeIndex, cameras: Sequence[int]) -> None:
        self.index, self.cameras = index, tuple(cameras)
        self.reader = EpisodeReader(index, max(cameras) + 1, CACHE_BYTES)
        self._terminal = lru_cache(maxsize=16)(self._terminal_rows)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, episode: int) -> Recording:
        """One episode; images are decoded when they are asked for. Raises `DataError` naming file, row and column."""
        index = self.index
        file, start, length = (int(values[episode]) for values in (index.file, index.start, index.length))
        path = index.paths[file]
        states, prompts = [], []
        images: list[list[Picture | None]] = [[] for _ in self.cameras]
        for row in range(start, start + length):
            rows, place = self.reader.group_of(file, row)
            states.append(rows.state[place])
            try:
                prompts.append(prompt_of(rows.prompt, place))
            except Unusable as error:
                raise FaultError(error.at(path, row, schema.PROMPT)) from error
            for camera, found in zip(self.cameras, images, strict=True):
                pictures = rows.images[camera]
                there = pictures is not None and pictures.present(place)
                column = schema.image_column(camera + 1)
                found.append(Picture(pictures, place, path, row, column) if pictures is not None and there else None)
        return Recording(
            file=path,
            row=start,
            state=np.stack(states),
            action=self.reader.actions(file, start, start + length),
            prompts=prompts,
            images=images,
            is_terminal=start + length - 1 in self._terminal(file),
        )

    def instructions(self) -> list[str]:
        """Different instructions of all steps, in the order of their first occurrence. Raises `DataError`."""
        found: dict[str, None] = {}
        for file in np.unique(self.index.file).tolist():
            for text in self._file_instructions(file):
                found.setdefault(text)
        return list(found)

    def _file_instructions(self, file: int) -> list[str]:
        path = self.index.paths[file]
        with open_file(path) as episodes:
            column = episodes.read([schema.PROMPT])[schema.PROMPT].combine_chunks()
        rows = np.flatnonzero(self.index.holds(file, np.arange(len(column)))).tolist()
        texts: dict[str, None] = {}
        for row in rows:
            try:
                texts.setdefault(prompt_of(column, row))
            except Unusable as error:
                raise FaultError(error.at(path, row, schema.PROMPT)) from error
        return list(texts)

    def _terminal_rows(self, file: int) -> frozenset[int]:
        with open_file(self.index.paths[file]) as episodes:
            return frozenset(read_flags(episodes).terminal.tolist())
