"""Everything that is wrong with episode files, found in one pass, and the list of episodes to leave out because of it.

It calls the checks that the readers raise from, and goes on where they stop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from paligemma_vla.data.formats import READ_ERRORS, EpisodeFile, identify_file, open_file
from paligemma_vla.data.index import NOTHING, Excluded, chain_faults, hex_digest, inside, read_flags, real_name, segment
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import first_line
from paligemma_vla.preprocess import PromptEncoder
from paligemma_vla.schema import Layout, Rows, joint_layout

BATCH_ROWS = 256
Progress = Callable[[int], object]


@dataclass(frozen=True)
class CheckOptions:
    """prompts: also check the length of instructions. config: also check dimensions and cameras."""

    prompts: PromptEncoder | None = None
    config: VLAConfig | None = None
    allow_prompt_changes: bool = False


@dataclass(frozen=True)
class FileReport:
    """One file: its faults, and the first row of each episode, as far as they are known.

    layout: None when the file cannot be used at all. outside: row ranges that were not selected (X, 2).
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
        """How many there are among the selected rows."""
        return int((~inside(self.starts, self.outside)).sum())

    @property
    def steps(self) -> int:
        return self.rows - int((self.outside[:, 1] - self.outside[:, 0]).sum())

    @property
    def bad_episodes(self) -> int:
        return self.episodes if self.unusable else len(self.excluded())

    @property
    def unusable(self) -> bool:
        """True if a fault is of the file as a whole, so that none of its episodes can be used."""
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
        if self.unusable:
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
    """Every file that was checked. misfits: what of the configuration fits none of them."""

    files: tuple[FileReport, ...]
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
        return sum(file.bad_episodes for file in self.files)


def diagnose(files: Sequence[str], options: CheckOptions, progress: Progress) -> Diagnosis:
    """Check files, several at a time. progress: called with the bytes done since its last call."""
    stop, lock = Event(), Lock()

    def advance(size: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        with lock:
            progress(size)

    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        reports = list(pool.map(lambda path: _check_file(path, options, advance), files))
    finally:
        stop.set()  # an interrupt does not wait for the files under way
        pool.shutdown(cancel_futures=True)
    first = next((report for report in reports if report.layout is not None), None)
    known = None if first is None else first.layout
    for number, report in enumerate(reports):  # what contradicts the first file that can be used
        if first is not None and known is not None and report.layout is not None:
            found = tuple(robot_faults(report.path, report.layout, first.path, known))
            reports[number] = replace(report, faults=(*found, *report.faults), layout=None if found else report.layout)
    usable = [report.layout for report in reports if report.layout is not None]
    misfits: list[Fault] = []
    if options.config is not None and first is not None:
        misfits = [Fault(first.path, Kind.CONFIG, text) for text in layout_misfits(joint_layout(usable), options.config)]
    return Diagnosis(tuple(reports), tuple(misfits))


def _check_file(path: str, options: CheckOptions, progress: Progress) -> FileReport:
    """Every fault of one file by itself."""
    try:
        size = identify_file(path)[0]
        with open_file(path, stream=True) as file:
            return _FileCheck(file, options).run(size, progress)
    except FaultError as error:
        return FileReport(path, (error.fault,))


class _FileCheck:
    """The checks of one open file: columns, flags, then the values of each column in the order of rows."""

    def __init__(self, file: EpisodeFile, options: CheckOptions) -> None:
        self.file, self.path, self.options = file, file.path, options
        self.layout, self.faults = file.survey()
        self.starts: Rows = NOTHING[:, 0]
        self.videos = VideoDecoders()
        self.previous: str | None = None  # instruction

    def run(self, size: int, progress: Progress) -> FileReport:
        """size: bytes that `progress` is called with, all in all."""
        file, digest, rows = self.file, hex_digest(self.file.digest()), int(self.file.bounds[-1])
        broken = {fault.column for fault in self.faults}
        if rows and not broken & set(schema.FLAGS):
            with self._collected():
                self._check_flags(rows)
        cameras = [schema.image_column(n + 1) for n in range(self.layout.cameras)]
        columns = [name for name in (schema.STATE, schema.ACTION, schema.PROMPT, *cameras) if name not in broken]
        bounds = list(enumerate(pairwise(file.bounds.tolist())))
        groups = [group for group, (first, stop) in bounds if not inside(np.arange(first, stop), file.outside).all()]
        steps, reported = len(groups) * len(columns), 0
        for number, (group, column) in enumerate((group, column) for group in groups for column in columns):
            with self._collected():
                for first, values in self._batches(group, column):
                    self._check_values(column, values, np.arange(first, first + len(values)))
            done = size * (number + 1) // steps
            progress(done - reported)
            reported = done
        faults = [fault for fault in self.faults if fault.row is None or not self._is_outside(fault)]
        faults.sort(key=lambda fault: (-1 if fault.row is None else fault.row, fault.column or ""))
        layout = None if any(fault.row is None for fault in faults) else self.layout
        return FileReport(self.path, tuple(faults), self.starts, rows, layout, digest, file.outside)

    @contextmanager
    def _collected(self) -> Iterator[None]:
        """Keep a fault that ends a check."""
        try:
            yield
        except FaultError as error:
            self.faults.append(error.fault)

    def _is_outside(self, fault: Fault) -> bool:
        """True if a fault is of rows that were not selected."""
        assert fault.row is not None
        return bool(inside(np.arange(fault.row, fault.row + fault.rows), self.file.outside).all())

    def _check_flags(self, rows: int) -> None:
        flags = read_flags(self.file)
        self.starts, _ = segment(flags, rows, NOTHING)
        self.faults += chain_faults(self.path, flags, rows, self.file.outside)
        known = self.file.flags_from_footer()
        if known is not None and not all(map(np.array_equal, known, (flags.first, flags.last, flags.terminal))):
            text = "the footer's statistics contradict them; write the file anew, or take it out of the data"
            self.faults.append(Fault(self.path, Kind.FLAGS, text, column=", ".join(schema.FLAGS)))

    def _batches(self, group: int, column: str) -> Iterator[tuple[int, pa.Array]]:
        """One column of one row group, piece by piece (it may be as large as the file), each with its first row's number.

        Raises `FaultError` where it cannot be read further.
        """
        row, stop = (int(bound) for bound in self.file.bounds[group : group + 2])
        try:
            for batch in self.file.batches([column], [group], BATCH_ROWS):
                yield row, batch.column(0)
                row += batch.num_rows
            if row != stop:
                raise ValueError(f"it ends at row {row}")
        except READ_ERRORS as error:
            raise FaultError(unreadable_group(self.path, group, self.file.bounds, first_line(error), column)) from error

    def _check_values(self, column: str, values: pa.Array, rows: Rows) -> None:
        """Values of some rows of a column; rows (R,): their numbers in the file."""
        if column in (schema.STATE, schema.ACTION):
            matrix = to_matrix(values, self.layout.state_dim if column == schema.STATE else self.layout.action_dim)
            self.faults += number_faults(self.path, column, values, matrix, rows)
            return
        pictures = None if column == schema.PROMPT else self.file.pictures(values, self.videos)
        for slot, row in enumerate(rows.tolist()):
            try:
                if pictures is None:
                    self._check_prompt(values, slot, row)
                elif pictures.present(slot):
                    pictures.decode(slot)
                elif column == schema.image_column(1):
                    raise missing_image()
            except Unusable as error:
                self.faults.append(error.at(self.path, row, column))

    def _check_prompt(self, values: pa.Array, slot: int, row: int) -> None:
        before, self.previous = self.previous, None
        prompt = self.previous = prompt_of(values, slot)
        if self.options.prompts is not None:
            check_prompt(prompt, self.options.prompts)
        changed = before not in (None, prompt) and len(self.starts) > 0 and row not in self.starts
        if changed and not self.options.allow_prompt_changes:
            text = f"got {prompt[:60]!r}, expected {str(before)[:60]!r} as in the row before"
            remedy = f"two episodes glued? Mend the flags, {LEAVE_OUT}, or allow it with --allow_prompt_changes"
            raise Unusable(Kind.PROMPT_CHANGE, f"{text}; {remedy}")
