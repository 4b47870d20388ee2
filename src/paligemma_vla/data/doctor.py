"""Everything that is wrong with episode files, found in one pass, and the list of episodes to leave out because of it.

It goes through the checks that the readers raise from, and goes on where they stop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from threading import Event, Lock

import numpy as np
import pyarrow as pa

from paligemma_vla import schema
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.faults import (
    LEAVE_OUT,
    Fault,
    FaultError,
    Kind,
    Unusable,
    check_prompt,
    layout_misfits,
    missing_image,
    number_faults,
    prompt_of,
    robot_faults,
    to_matrix,
    unreadable_group,
)
from paligemma_vla.data.formats import READ_ERRORS, EpisodeFile, Pictures, identify_file, open_file
from paligemma_vla.data.index import NOTHING, Excluded, chain_faults, hex_digest, inside, read_flags, real_name, segment
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import first_line
from paligemma_vla.preprocess import PromptEncoder
from paligemma_vla.schema import Layout, Rows, joint_layout

BATCH_ROWS = 256
Progress = Callable[[int], object]


@dataclass(frozen=True)
class CheckOptions:
    """prompts: also judge the length of instructions. config: also judge dimensions and cameras."""

    prompts: PromptEncoder | None = None
    config: VLAConfig | None = None
    allow_prompt_changes: bool = False


@dataclass(frozen=True)
class Examined:
    """One file: its faults, and the first row of each episode, as far as they could be told.

    layout: None when the file cannot be used as a whole. outside: row ranges that were not asked for (X, 2).
    """

    path: str
    faults: tuple[Fault, ...]
    starts: Rows = field(default_factory=lambda: NOTHING[:, 0])
    rows: int = 0
    layout: Layout | None = None
    digest: str | None = None
    outside: Rows = field(default_factory=lambda: NOTHING)

    @property
    def episodes(self) -> int:
        """How many there are, as far as they were asked for."""
        return int((~inside(self.starts, self.outside)).sum())

    @property
    def steps(self) -> int:
        return self.rows - int((self.outside[:, 1] - self.outside[:, 0]).sum())

    @property
    def whole(self) -> bool:
        """Whether a fault is of the whole file, so that none of its episodes can be used."""
        return any(fault.row is None for fault in self.faults)

    def episodes_of(self, fault: Fault) -> range:
        """Numbers, in the file, of the episodes a fault touches."""
        if fault.row is None or len(self.starts) == 0:
            return range(0)
        first, last = np.searchsorted(self.starts, [fault.row, fault.row + fault.rows - 1], side="right") - 1
        return range(int(first), int(last) + 1)

    def excluded(self) -> list[Excluded]:
        """What of this file has to be left out."""
        file = real_name(self.path)
        if self.whole:
            reasons = tuple(sorted({fault.kind.value for fault in self.faults}))
            return [Excluded(file, None, None, None, reasons, self.digest)]
        bad: dict[int, set[str]] = {}
        for fault in self.faults:
            for episode in self.episodes_of(fault):
                bad.setdefault(episode, set()).add(fault.kind.value)
        bounds = np.append(self.starts, self.rows).tolist()
        return [
            Excluded(file, bounds[n], bounds[n + 1] - bounds[n], n, tuple(sorted(reasons)), self.digest)
            for n, reasons in sorted(bad.items())
        ]


@dataclass(frozen=True)
class Diagnosis:
    """Every file that was examined. misfits: what of the configuration fits none of it."""

    files: tuple[Examined, ...]
    misfits: tuple[Fault, ...]

    @property
    def faults(self) -> list[Fault]:
        return [*self.misfits, *(fault for file in self.files for fault in file.faults)]

    @property
    def excluded(self) -> list[Excluded]:
        return [entry for file in self.files for entry in file.excluded()]

    @property
    def episodes(self) -> int:
        return sum(file.episodes for file in self.files)

    @property
    def steps(self) -> int:
        return sum(file.steps for file in self.files)

    @property
    def bad_episodes(self) -> int:
        return sum(file.episodes if file.whole else len(file.excluded()) for file in self.files)


def diagnose(files: Sequence[str], options: CheckOptions, progress: Progress) -> Diagnosis:
    """Examine files, several at a time. progress: called with the bytes done since its last call."""
    stop = Event()
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        reports = list(pool.map(lambda path: examine(path, options, _stoppable(progress, stop)), files))
    finally:
        stop.set()  # an interrupt does not wait for the files in hand
        pool.shutdown(cancel_futures=True)
    reports = _compare(reports)
    usable = [report for report in reports if report.layout is not None]
    misfits: list[Fault] = []
    if options.config is not None and usable:
        layout = joint_layout([report.layout for report in usable if report.layout is not None])
        misfits = [Fault(usable[0].path, Kind.CONFIG, text) for text in layout_misfits(layout, options.config)]
    return Diagnosis(tuple(reports), tuple(misfits))


def _stoppable(progress: Progress, stop: Event) -> Progress:
    lock = Lock()

    def advance(size: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        with lock:
            progress(size)

    return advance


def _compare(reports: list[Examined]) -> list[Examined]:
    """Add what contradicts the first file that can be used."""
    usable = [report for report in reports if report.layout is not None]
    return [_compared(report, usable[0]) if usable else report for report in reports]


def _compared(report: Examined, first: Examined) -> Examined:
    if report.layout is None or first.layout is None:
        return report
    odd = tuple(robot_faults(report.path, report.layout, first.path, first.layout))
    return replace(report, faults=(*odd, *report.faults), layout=None) if odd else report


def examine(path: str, options: CheckOptions, progress: Progress) -> Examined:
    """Every fault of one file by itself."""
    try:
        size = identify_file(path)[0]
        with open_file(path, stream=True) as file:
            return _examine(file, options, _in_bytes(size, progress))
    except FaultError as error:
        return Examined(path, (error.fault,))


def _in_bytes(size: int, progress: Progress) -> Callable[[float], None]:
    """Turn shares of a file into whole bytes that add up to its size."""
    done, told = 0.0, 0

    def advance(share: float) -> None:
        nonlocal done, told
        done += share
        now = min(size, round(size * done))
        progress(now - told)
        told = now

    return advance


def _examine(file: EpisodeFile, options: CheckOptions, progress: Callable[[float], None]) -> Examined:
    """As `examine`, of an open file. progress: called with the share of it that is done since its last call."""
    layout, faults = file.survey()
    path, groups, digest = file.path, file.bounds, hex_digest(file.digest())
    rows = int(groups[-1])
    broken = {fault.column for fault in faults}
    starts: Rows = NOTHING[:, 0]
    try:
        if rows and not broken & set(schema.FLAGS):
            flags = read_flags(file)
            starts, _ = segment(flags, rows, NOTHING)
            faults += chain_faults(path, flags, rows, file.outside)
            told = file.flags_from_footer()
            if told is not None and not all(map(np.array_equal, told, (flags.first, flags.last, flags.terminal))):
                text = "the footer's statistics contradict them; write the file anew, or take it out of the data"
                faults.append(Fault(path, Kind.FLAGS, text, column=", ".join(schema.FLAGS)))
    except FaultError as error:
        faults.append(error.fault)
    cameras = [schema.image_column(n + 1) for n in range(layout.cameras)]
    columns = [name for name in (schema.STATE, schema.ACTION, schema.PROMPT, *cameras) if name not in broken]
    judge = _Judge(file, layout, options, frozenset(starts.tolist()))
    judged = list(_groups_to_judge(file))
    judged_rows = max(1, int(np.diff(groups)[judged].sum()))
    for group in judged:
        for column in columns:
            try:
                for first_row, values in _batches(file, group, column):
                    faults += judge(column, values, np.arange(first_row, first_row + len(values)))
            except FaultError as error:
                faults.append(error.fault)
            progress((groups[group + 1] - groups[group]) / judged_rows / len(columns))
    faults = [fault for fault in faults if fault.row is None or not _is_outside(file, fault)]
    faults.sort(key=lambda fault: (-1 if fault.row is None else fault.row, fault.column or ""))
    whole = any(fault.row is None for fault in faults)
    return Examined(path, tuple(faults), starts, rows, None if whole else layout, digest, file.outside)


def _groups_to_judge(file: EpisodeFile) -> Iterator[int]:
    """Row groups that hold a row that was asked for."""
    for group, (first, stop) in enumerate(pairwise(file.bounds.tolist())):
        if not inside(np.arange(first, stop), file.outside).all():
            yield group


def _is_outside(file: EpisodeFile, fault: Fault) -> bool:
    """Whether a fault is of rows that were not asked for."""
    assert fault.row is not None
    return bool(inside(np.arange(fault.row, fault.row + fault.rows), file.outside).all())


def _batches(file: EpisodeFile, group: int, column: str) -> Iterator[tuple[int, pa.Array]]:
    """One column of one row group, piece by piece (it may be as large as the file), each with its first row's number.

    Raises `FaultError` where it cannot be read further.
    """
    path, groups = file.path, file.bounds
    row, stop = int(groups[group]), int(groups[group + 1])
    try:
        for batch in file.batches([column], [group], BATCH_ROWS):
            yield row, batch.column(0)
            row += batch.num_rows
    except READ_ERRORS as error:
        raise FaultError(unreadable_group(path, group, groups, first_line(error), column)) from error
    if row != stop:
        raise FaultError(unreadable_group(path, group, groups, f"it ends at row {row}", column))


class _Judge:
    """The checks of one file's columns, called with their batches in the order of rows."""

    def __init__(self, file: EpisodeFile, layout: Layout, options: CheckOptions, starts: frozenset[int]) -> None:
        self.file, self.path, self.options, self.starts = file, file.path, options, starts
        self.videos = VideoDecoders()
        self.dimensions = {schema.STATE: layout.state_dim, schema.ACTION: layout.action_dim}
        self.previous: str | None = None

    def __call__(self, column: str, values: pa.Array, rows: Rows) -> Iterator[Fault]:
        if column in self.dimensions:
            matrix = to_matrix(values, self.dimensions[column])
            return number_faults(self.path, column, values, matrix, rows)
        if column == schema.PROMPT:
            return self._each(partial(self._prompt, values), column, rows)
        pictures = self.file.pictures(values, self.videos)
        return self._each(partial(self._image, pictures, column == schema.image_column(1)), column, rows)

    def _each(self, check: Callable[[int, int], None], column: str, rows: Rows) -> Iterator[Fault]:
        """check: called with each row's place in the batch and its number in the file."""
        for place, row in enumerate(rows.tolist()):
            try:
                check(place, row)
            except Unusable as error:
                yield error.at(self.path, row, column)

    def _image(self, pictures: Pictures, needed: bool, place: int, row: int) -> None:
        if pictures.present(place):
            pictures.decode(place)
        elif needed:
            raise missing_image()

    def _prompt(self, values: pa.Array, place: int, row: int) -> None:
        before, self.previous = self.previous, None
        prompt = self.previous = prompt_of(values, place)
        if self.options.prompts is not None:
            check_prompt(prompt, self.options.prompts)
        changed = before not in (None, prompt) and len(self.starts) > 0 and row not in self.starts
        if changed and not self.options.allow_prompt_changes:
            text = f"got {prompt[:60]!r}, expected {str(before)[:60]!r} as in the row before"
            remedy = f"two episodes glued? Mend the flags, {LEAVE_OUT}, or allow it with --allow_prompt_changes"
            raise Unusable(Kind.PROMPT_CHANGE, f"{text}; {remedy}")
