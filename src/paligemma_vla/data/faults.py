"""What can be wrong with episode files. Readers raise the first fault they meet, `data check` collects them all: same words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from paligemma_vla.errors import DataError

LEAVE_OUT = "leave the episode out"
HOW = "`paligemma-vla data check` finds every fault, and lists the episodes to leave out"


class Kind(StrEnum):
    """Kinds of faults, as the summary of `data check` counts them."""

    FILE = "unreadable file"
    EMPTY = "file without rows"
    COLUMN = "missing column"
    TYPE = "wrong column type"
    METADATA = "unusable metadata"
    ROBOT = "differs from the first file"
    GROUP = "unreadable row group"
    FLAGS = "broken flags"
    LENGTH = "wrong number of values"
    NUMBER = "not a finite number"
    NO_IMAGE = "missing image"
    IMAGE = "undecodable image"
    IMAGE_SIZE = "oversized image"
    FRAME = "missing video frame"
    PROMPT = "missing instruction"
    PROMPT_LENGTH = "instruction too long"
    PROMPT_CHANGE = "instruction changes"
    CONFIG = "does not fit the configuration"


@dataclass(frozen=True)
class Fault:
    """One fault. row: the first row it touches, `rows` how many; None: the file as a whole. text: got, expected, remedy."""

    file: str
    kind: Kind
    text: str
    row: int | None = None
    column: str | None = None
    rows: int = 1

    def __str__(self) -> str:
        place = [f"{name} {value}" for name, value in (("row", self.row), ("column", self.column)) if value is not None]
        return ": ".join([self.file, *([", ".join(place)] if place else []), self.text])


class FaultError(DataError):
    """A fault where reading cannot go on."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)  # the one argument, so that it can be pickled by a loader's worker
        self.fault = fault

    def __str__(self) -> str:
        return f"{self.fault}\n  {HOW}"


class Unusable(Exception):
    """A value that cannot be used; whoever knows its place makes a `Fault` of it."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind, self.text = kind, text

    def at(self, file: str, row: int, column: str) -> Fault:
        return Fault(file, self.kind, self.text, row, column)


def raise_first(faults: Iterable[Fault]) -> None:
    """Raise `FaultError` for the first fault, if there is one."""
    for fault in faults:
        raise FaultError(fault)
