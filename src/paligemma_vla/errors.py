"""Exceptions a user meets. Each message says where, what was got, what was expected, and the remedy.

The command line turns a `VLAError` into one message and exit status 2, and a path or disk that cannot be used as well;
anything else is a defect of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

OPEN_FILES_REMEDY = "raise the limit (`ulimit -n` shows it, `ulimit -n 65536` sets it), or lower data.num_workers"


class VLAError(Exception):
    """Base of every error caused by what the user gave: configuration, data, checkpoint or surroundings."""


class ConfigError(VLAError):
    """A configuration, or a command line, that cannot be run."""


class DataError(VLAError):
    """Episodes or statistics that cannot be used; the message names file, row and column where there is one."""


class CheckpointError(VLAError):
    """A checkpoint that is missing, damaged, or does not fit."""


class NotFiniteError(CheckpointError):
    """Actions that are not numbers; none of them may reach a robot."""


class UnreadableCheckpointError(CheckpointError):
    """A checkpoint that this machine cannot read just now; it may be intact."""


class ModelError(VLAError):
    """A backbone or head that cannot be built or loaded."""


class SimulatorError(VLAError):
    """A simulator, or its graphics, that cannot run here."""


class WorkerError(VLAError):
    """Worker processes that cannot be had, or that died."""


class TrainingError(VLAError):
    """A run that had to stop (out of memory, a lost rank); the message carries the remedy."""


class CommunicationError(TrainingError):
    """Another process is gone or does not answer: the reason is there, not here."""


class StorageError(VLAError):
    """A location behind a URL that cannot be reached, or bytes that cannot be read."""


class UnreachableError(StorageError):
    """A location that could still not be reached after many attempts."""


class Terminated(BaseException):
    """SIGTERM, as an exception: what is open gets closed."""


class Faults:
    """Collects the errors of independent checks, so that a user meets all of them at once."""

    def __init__(self) -> None:
        self.errors: list[VLAError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep a `VLAError` raised inside, and go on after the block."""
        try:
            yield
        except VLAError as error:
            self.errors.append(error)

    def raise_all(self, where: str) -> None:
        """Raise what was collected: one error as it is, several as one `ConfigError`."""
        texts = dict.fromkeys(map(str, self.errors))  # one file may hold training and validation
        if len(texts) == 1:
            raise self.errors[0]
        if texts:
            raise ConfigError("\n  ".join([f"{where}: {len(texts)} faults", *"\n".join(texts).splitlines()]))


@contextmanager
def needs_extra(where: str, extra: str, error: type[VLAError] = ConfigError) -> Iterator[None]:
    """Turn a package that is missing in the block into an `error` that names the extra with it. where: what asks for it."""
    try:
        yield
    except ImportError as missing:
        raise error(f"{where}: {first_line(missing)}; pip install 'paligemma-vla[{extra}]'") from missing


def first_line(error: BaseException) -> str:
    """The message of a library's error in one line; its type when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def closest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
