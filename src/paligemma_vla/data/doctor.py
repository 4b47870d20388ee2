"""Everything that is wrong with episode files, found in one pass, and the list of episodes to leave out because of it.

It calls the checks that the readers raise from, and goes on where they stop.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
    actor_faults,
    check_prompt,
    layout_misfits,
    missing_image,
    number_faults,
    prompt_of,
    robot_faults,
    to_matrix,
    unreadable_group,
)
from paligemma_vla.data.formats import READ_ERRORS, EpisodeFile, Pictures, depth_faults, identify_file, open_file
from paligemma_vla.data.index import (
    NOTHING,
    Excluded,
    chain_faults,
    find_copies,
    hex_digest,
    inside,
    read_flags,
    real_name,
    segment,
)
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


class FileCheck:
    """The checks of one file: columns, flags, then the values of each column in the order of rows.

    faults: in the order of rows, first those of the file as a whole. starts: first row of each episode, as far as they are
    known. layout: None when the file cannot be used at all. outside: row ranges that were not selected (X, 2).
    """

    def __init__(self, path: str, options: CheckOptions) -> None:
        self.path, self.options = path, options
        self.faults: list[Fault] = []
        self.starts, self.outside, self.rows = NOTHING[:, 0], NOTHING, 0
        self.layout: Layout | None = None
        self.digest: str | None = None
        self.previous: str | None = None  # instruction
        self.prompts_change = options.allow_prompt_changes
        # The normalised state that needs most digits, where a prompt has the state in it.
        self.longest_state = np.ones(options.config.data.state_dim if options.config else 0, np.float32)

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

    def has_checked(self, entry: Excluded) -> bool:
        """True if an entry of an exclusion list, of this file, is of rows that were all selected."""
        start = entry.first_row or 0
        return not inside(np.arange(start, start + (entry.rows or self.rows)), self.outside).any()

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
            if {fault.kind for fault in self.faults if fault.row is None} == {Kind.DEPTH}:
                return []  # it is the camera that has to be left out
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

    def run(self, progress: Progress) -> FileCheck:
        """Check everything. progress: called with the bytes done since its last call."""
        with self._collected():
            size = identify_file(self.path)[0]
            with open_file(self.path, stream=True) as file:
                layout, self.faults = file.survey()
                self.prompts_change |= file.prompts_change
                self.digest, self.rows, self.outside = hex_digest(file.digest()), int(file.bounds[-1]), file.outside
                broken = {fault.column for fault in self.faults}
                if self.rows and not broken & set(schema.FLAGS):
                    with self._collected():
                        self._check_flags(file)
                self._check_columns(file, layout, broken, size, progress)
                self.faults = [fault for fault in self.faults if fault.row is None or not self._is_outside(fault)]
                self.faults.sort(key=lambda fault: (-1 if fault.row is None else fault.row, fault.column or ""))
                self.layout = None if self.unusable else layout
        return self

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
        return bool(inside(np.arange(fault.row, fault.row + fault.rows), self.outside).all())

    def _check_flags(self, file: EpisodeFile) -> None:
        flags = read_flags(file)
        self.starts, _ = segment(flags, self.rows, NOTHING)
        self.faults += file.row_faults()
        self.faults += chain_faults(self.path, flags, self.rows, self.outside)
        known = file.flags_from_footer()
        if known is not None and not all(map(np.array_equal, known, (flags.first, flags.last, flags.terminal))):
            text = "the footer's statistics contradict them; write the file anew, or take it out of the data"
            self.faults.append(Fault(self.path, Kind.FLAGS, text, column=", ".join(schema.FLAGS)))

    def _check_columns(self, file: EpisodeFile, layout: Layout, broken: set[str | None], size: int, progress: Progress) -> None:
        """Values of every column that is not broken, of row groups that hold selected rows. size: bytes to progress by."""
        cameras = [schema.image_column(n + 1) for n in range(layout.cameras)]
        bounds = list(enumerate(pairwise(file.bounds.tolist())))
        groups = [group for group, (first, stop) in bounds if not inside(np.arange(first, stop), self.outside).all()]
        depth = list(depth_faults(file, [name for name in cameras if name not in broken], groups[0])) if groups else []
        self.faults += depth
        broken |= {fault.column for fault in depth}
        columns = [name for name in (schema.STATE, schema.ACTION, schema.PROMPT, *cameras) if name not in broken]
        config = self.options.config
        if config is not None and config.data.labels == "interventions" and schema.ACTOR in file.columns:
            columns.append(schema.ACTOR)
        jobs, videos = [(group, column) for group in groups for column in columns], VideoDecoders()
        for number, (group, column) in enumerate(jobs):
            with self._collected():
                for rows, values in self._batches(file, group, column):
                    if column in (schema.STATE, schema.ACTION):
                        matrix = to_matrix(values, layout.state_dim if column == schema.STATE else layout.action_dim)
                        self.faults += number_faults(self.path, column, values, matrix, rows)
                    elif column == schema.ACTOR:
                        self.faults += actor_faults(self.path, values, rows)
                    else:
                        pictures = None if column == schema.PROMPT else file.pictures(values, videos)
                        self._check_values(column, values, pictures, rows)
            progress(size * (number + 1) // len(jobs) - size * number // len(jobs))

    def _batches(self, file: EpisodeFile, group: int, column: str) -> Iterator[tuple[Rows, pa.Array]]:
        """One column of one row group, piece by piece (it may be as large as the file), with the numbers of its rows.

        Raises `FaultError` where it cannot be read further.
        """
        read, expected = 0, int(np.diff(file.bounds)[group])
        try:
            for rows, batch in file.batches([column], [group], BATCH_ROWS):
                yield rows, batch.column(0)
                read += batch.num_rows
            if read != expected:
                raise ValueError(f"got {read} rows, expected {expected}")
        except READ_ERRORS as error:
            raise FaultError(unreadable_group(self.path, group, file.bounds, first_line(error), column)) from error

    def _check_values(self, column: str, values: pa.Array, pictures: Pictures | None, rows: Rows) -> None:
        """Instructions or pictures of some rows; rows (R,): their numbers in the file."""
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
        if (encoder := self.options.prompts) is not None:
            check_prompt(prompt, encoder)
            check_prompt(encoder.text(prompt, self.longest_state), encoder)
        changed = before not in (None, prompt) and len(self.starts) > 0 and row not in self.starts
        if changed and not self.prompts_change:
            text = f"got {prompt[:60]!r}, expected {str(before)[:60]!r} as in the row before"
            remedy = f"two episodes glued? Mend the flags, {LEAVE_OUT}, or allow it with --allow_prompt_changes"
            raise Unusable(Kind.PROMPT_CHANGE, f"{text}; {remedy}")


@dataclass(frozen=True)
class Diagnosis:
    """Every file that was checked. misfits: what of the configuration fits none of them."""

    files: tuple[FileCheck, ...]
    misfits: tuple[Fault, ...]

    @property
    def faults(self) -> list[Fault]:
        return [*self.misfits, *(fault for file in self.files for fault in file.faults)]

    @property
    def excluded(self) -> list[Excluded]:
        return [entry for file in self.files for entry in file.excluded()]

    @property
    def copies(self) -> list[tuple[str, str]]:
        """Files with the content of another one, and that one."""
        return find_copies({file.path: file.digest for file in self.files if file.digest is not None})

    def find_check(self, entry: Excluded) -> FileCheck | None:
        """The check of all that an entry of an exclusion list names, None where that was not checked."""
        return next((file for file in self._by_name[entry.file] if file.has_checked(entry)), None)

    @cached_property
    def _by_name(self) -> defaultdict[str, list[FileCheck]]:
        """The files by their names without links; a name may be there with several selections."""
        found = defaultdict(list)
        for file in self.files:
            found[real_name(file.path)].append(file)
        return found

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
        checks = list(pool.map(lambda path: FileCheck(path, options).run(advance), files))
    finally:
        stop.set()  # an interrupt does not wait for the files under way
        pool.shutdown(cancel_futures=True)
    usable = [(check, check.layout) for check in checks if check.layout is not None]
    for check, layout in usable[1:]:
        if contradictions := list(robot_faults(check.path, layout, usable[0][0].path, usable[0][1])):
            check.faults[:0] = contradictions
            check.layout = None
    layouts = [check.layout for check in checks if check.layout is not None]
    misfits = layout_misfits(joint_layout(layouts), options.config) if options.config is not None and layouts else []
    return Diagnosis(tuple(checks), tuple(Fault(usable[0][0].path, Kind.CONFIG, text) for text in misfits))
