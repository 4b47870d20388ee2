"""`PATH?cameras=front,wrist&episodes=0:50`: a LeRobot data set, or one of its files, and what is wanted of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from paligemma_vla.errors import DataError, closest

EXPECTED = "PATH?cameras=NAME,NAME&episodes=FIRST:STOP&state=FEATURE&action=FEATURE, each of them if wanted"


@dataclass(frozen=True)
class Selection:
    """What is wanted of a data set.

    cameras: names in the order image_1, image_2, ... (None: all of them, as info.json has them). episodes: [first, stop) of
    their numbers, None where it is open. state, action: the features that hold them.
    """

    cameras: tuple[str, ...] | None = None
    episodes: tuple[int | None, int | None] = (None, None)
    state: str = "observation.state"
    action: str = "action"

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Read what follows the question mark. Raises `DataError` that begins with `where`."""
        values: dict[str, object] = {}
        for part in filter(None, text.split("&")):
            key, sign, value = part.partition("=")
            if key not in _PARSERS:
                raise DataError(f"{where}: got '{key}', expected {EXPECTED}{closest(key, _PARSERS)}")
            if not sign or not value or key in values:
                raise DataError(f"{where}: {key}: got '{part}', expected one value; write {EXPECTED}")
            values[key] = _PARSERS[key](value, where)
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """As it is written; nothing where nothing is selected."""
        first, stop = ("" if number is None else str(number) for number in self.episodes)
        default = Selection()
        parts = [
            f"cameras={','.join(self.cameras)}" if self.cameras is not None else "",
            f"episodes={first}:{stop}" if self.episodes != default.episodes else "",
            f"state={self.state}" if self.state != default.state else "",
            f"action={self.action}" if self.action != default.action else "",
        ]
        return "&".join(filter(None, parts))


def parse_range(text: str, where: str) -> tuple[int | None, int | None]:
    """`FIRST:STOP`, of which either may be missing. Raises `DataError`."""
    first, colon, stop = text.partition(":")
    if not colon or not all(number == "" or (number.isascii() and number.isdigit()) for number in (first, stop)):
        raise DataError(f"{where}: episodes: got '{text}', expected FIRST:STOP, as 0:50 for the first fifty")
    return int(first) if first else None, int(stop) if stop else None


def _names(text: str, where: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise DataError(f"{where}: cameras: got '{text}', expected different names with commas between them")
    return names


def _feature(text: str, where: str) -> str:
    return text


_PARSERS = {"cameras": _names, "episodes": parse_range, "state": _feature, "action": _feature}


@dataclass(frozen=True)
class Place:
    """path: of the data set's folder, or of one of its data files."""

    path: str
    selection: Selection

    @classmethod
    def parse(cls, text: str, where: str = "lerobot") -> Self:
        """Raises `DataError` that begins with `where`. A leading `~` is the home folder, as in a shell."""
        if not os.path.exists(text):
            text = os.path.expanduser(text)
        if os.path.exists(text):  # a name may hold a question mark
            return cls(text, Selection())
        path, _, selection = text.rpartition("?") if "?" in text else (text, "", "")
        if not path:
            raise DataError(f"{where}: got 'lerobot:{text}', expected a folder after lerobot: as in lerobot:{EXPECTED}")
        return cls(path, Selection.parse(selection, f"{where}: {text}"))

    def __str__(self) -> str:
        return f"{self.path}?{self.selection}" if str(self.selection) else self.path
