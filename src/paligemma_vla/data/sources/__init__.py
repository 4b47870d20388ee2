"""The door for data of other formats: a place that begins with `NAME:` is read by the module of that name.

Such a module has a class `Source` below; another format is another file, and a line here. Everything else is a path, or a URL,
of files of this project's own format.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Protocol

from paligemma_vla.data.episode_file import EpisodeFile, ParquetEpisodes
from paligemma_vla.data.files import identify

MODULES = {"lerobot": "paligemma_vla.data.sources.lerobot"}
MARKS = {"lerobot": "meta/info.json"}  # what a folder of a foreign format is known by


class Source(Protocol):
    """A foreign format. A place is what follows `NAME:`; a file is one of the places that `files` lists."""

    def files(self, place: str, where: str) -> list[str]:
        """Places of the files behind a place, in order. Raises `DataError`, naming `where` (config key or flag)."""

    def open(self, place: str, name: str, stream: bool) -> EpisodeFile:
        """Open a file that is called `name`. stream: it is read piece by piece. Raises `FaultError`."""

    def identify(self, place: str) -> tuple[int, int, int]:
        """Size, mtime_ns and ctime_ns of a file with all that belongs to it, as `data.files.identify`."""

    def file_of(self, place: str) -> str:
        """The path of a file itself, without what is selected of it."""

    def episodes_of(self, place: str) -> tuple[int | None, int | None]:
        """Numbers [first, stop) of the episodes that a place selects, None where it is open."""


def find_source(name: str) -> tuple[str, Source | None, str]:
    """Prefix, source and place of a name; without a source, an empty prefix and the name itself."""
    prefix, colon, place = name.partition(":")
    if not colon or prefix not in MODULES or os.path.exists(name):
        return "", None, name
    return f"{prefix}:", _source(prefix), place


def foreign_format(folder: str) -> str | None:
    """The foreign format that a folder holds, None for any other."""
    return next((name for name, mark in MARKS.items() if os.path.isfile(os.path.join(folder, mark))), None)


@cache
def _source(prefix: str) -> Source:
    source: Source = import_module(MODULES[prefix]).SOURCE
    return source


def open_file(name: str, stream: bool = False) -> EpisodeFile:
    """Open a file of episodes of any format. Raises `FaultError` when it cannot be read."""
    _, source, place = find_source(name)
    return ParquetEpisodes(name, stream) if source is None else source.open(place, name, stream)


def identify_file(name: str) -> tuple[int, int, int]:
    """Size, mtime_ns and ctime_ns of a file, and of all that belongs to it; raises `FaultError` when it is not there."""
    _, source, place = find_source(name)
    return identify(name) if source is None else source.identify(place)
