"""What can be wrong with episode files, and the rules for values in rows.

Readers raise the first fault they meet, `data check` collects them all: one copy of each rule, the same words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.errors import DataError, StorageError, first_line
from paligemma_vla.schema import Layout, Rows
from paligemma_vla.storage import is_url

if TYPE_CHECKING:
    from paligemma_vla.config import VLAConfig
    from paligemma_vla.preprocess import PromptEncoder

LEAVE_OUT = "leave the episode out"
HOW = (
    "`paligemma-vla data check` finds every fault, and writes a list of the episodes to leave out: give it as "
    "data.exclude_episodes, or `data convert --exclusion_list`"
)


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
    DEPTH = "depth map, no colour image"
    IMAGE_SIZE = "oversized image"
    FRAME = "missing video frame"
    PROMPT = "missing instruction"
    PROMPT_LENGTH = "instruction too long"
    PROMPT_CHANGE = "instruction changes"
    ACTOR = "unknown actor"
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
        where = [f"{name} {value}" for name, value in (("row", self.row), ("column", self.column)) if value is not None]
        return ": ".join([self.file, *([", ".join(where)] if where else []), self.text])


class FaultError(DataError):
    """A fault where reading cannot go on."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)  # the one argument, so that it can be pickled by a loader's worker
        self.fault = fault

    def __str__(self) -> str:
        return f"{self.fault}\n  {HOW}"


class Unusable(Exception):
    """A value that cannot be used; `located` makes a `FaultError` of it, which names file, row and column."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind, self.text = kind, text

    def at(self, file: str, row: int, column: str) -> Fault:
        return Fault(file, self.kind, self.text, row, column)


class located:
    """Turns `Unusable` into a `FaultError` that names file, row and column. No generator: that would cost each sample more."""

    def __init__(self, file: str, row: int, column: str) -> None:
        self.where = file, row, column

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Unusable):
            raise FaultError(error.at(*self.where)) from error


def raise_first(faults: Iterable[Fault]) -> None:
    """Raise `FaultError` for the first fault, if there is one."""
    for fault in faults:
        raise FaultError(fault)


def to_matrix(column: pa.Array, dimension: int) -> NDArray[np.float32]:
    """A list column as an array (rows, dimension); a row that is null or of another length is NaN."""
    lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # too large for float32 becomes inf, which is reported as a fault
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    fits = lengths == dimension
    if fits.all():
        return flat.reshape(-1, dimension)  # type: ignore[no-any-return]
    values = np.full((len(column), dimension), np.nan, np.float32)
    ends = np.cumsum(np.maximum(lengths, 0))
    values[fits] = flat[(ends - dimension)[fits, None] + np.arange(dimension)]
    return values


def number_faults(path: str, name: str, column: pa.Array, values: NDArray[np.float32], rows: Rows) -> Iterator[Fault]:
    """Rows of a list column that are null, of another length, or not all finite float32.

    values (R, dimension): `to_matrix` of the column. rows (R,): their numbers in the file.
    """
    for slot in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
        entry, dimension = column[slot].as_py(), values.shape[1]
        kind = Kind.LENGTH
        if entry is None or len(entry) != dimension:
            text = f"got {'null' if entry is None else f'{len(entry)} numbers'}, expected {dimension} numbers"
        else:
            kind, item = Kind.NUMBER, int(np.flatnonzero(~np.isfinite(values[slot]))[0])
            got = values[slot, item] if entry[item] is None else entry[item]
            text = f"dimension {item} is {got}, expected a finite float32"
        yield Fault(path, kind, f"{text}; mend it, or {LEAVE_OUT}", int(rows[slot]), name)


def actor_faults(path: str, column: pa.Array | pa.ChunkedArray, rows: Rows) -> Iterator[Fault]:
    """Rows of the column `actor` that say neither `policy` nor `intervention`. rows (R,): their numbers in the file."""
    known = pc.is_in(column, value_set=pa.array([schema.POLICY, schema.INTERVENTION])).to_numpy(zero_copy_only=False)
    for slot in np.flatnonzero(~known).tolist():
        text = f"got {column[slot].as_py()!r:.40}, expected {schema.POLICY} or {schema.INTERVENTION}; mend it, or {LEAVE_OUT}"
        yield Fault(path, Kind.ACTOR, text, int(rows[slot]), schema.ACTOR)


def missing_image() -> Unusable:
    """What is wrong with a first camera without a picture."""
    text = f"got null, expected an image: only further cameras may be absent; fill it in, or {LEAVE_OUT}"
    return Unusable(Kind.NO_IMAGE, text)


def depth_map(got: str) -> Unusable:
    """What is wrong with pixels that no colour picture has."""
    return Unusable(Kind.DEPTH, f"got {got}: a depth map, no colour image; leave this camera out")


def no_rotation() -> Unusable:
    """What is wrong with an action or a state whose rotation is none."""
    text = "the rotation here, in the next actions or in the state is none, as a quaternion of length 0"
    return Unusable(Kind.NUMBER, f"{text}; mend it, or {LEAVE_OUT}")


def prompt_of(column: pa.Array, row: int) -> str:
    """An instruction; raises `Unusable` when it is null, empty or no text."""
    try:
        prompt: Any = column[row].as_py()
    except UnicodeDecodeError as error:
        raise Unusable(Kind.PROMPT, f"got bytes that are not UTF-8, expected an instruction; {LEAVE_OUT}") from error
    if prompt is None or not prompt.strip():
        got = (
            "null (in LeRobot data, a task_index without a task, or no text in the column of ?prompt=)"
            if prompt is None
            else "an empty instruction"
        )
        raise Unusable(Kind.PROMPT, f"got {got}, expected some words; fill it in, or {LEAVE_OUT}")
    return str(prompt)


def check_prompt(prompt: str, encoder: PromptEncoder) -> None:
    """Raise `Unusable` when the backbone's tokens for an instruction are too many (`data.prompt_max_len`)."""
    try:
        encoder.text_ids(prompt)
    except DataError as error:
        raise Unusable(Kind.PROMPT_LENGTH, f"{' '.join(str(error).split())}, or {LEAVE_OUT}") from error


def layout_misfits(layout: Layout, config: VLAConfig) -> list[str]:
    """What of a configuration does not fit the data's columns: key, got, expected."""
    head, cameras = config.model.action_head_config, config.model.vlm_config.cameras
    misfits = []
    if layout.state_dim != config.data.state_dim:
        misfits.append(f"data.state_dim: got {config.data.state_dim}, expected {layout.state_dim} as in column state")
    if layout.action_dim > head.per_action_dim or (layout.action_dim < head.per_action_dim and not config.data.pad_action_dim):
        misfits.append(
            f"model.action_head_config.per_action_dim: got {head.per_action_dim}, expected {layout.action_dim} as in column "
            f"action (data.pad_action_dim: true pads narrower data)"
        )
    if layout.cameras < cameras:
        misfits.append(
            f"model.vlm_config: expects {cameras} cameras, the data has {layout.cameras}; add columns (null where a camera "
            f"is absent), or set use_aux_camera: false"
        )
    return misfits


@contextmanager
def file_faults(path: str) -> Iterator[None]:
    """Turn a file that is not there, or a disk that cannot read it, into a `FaultError`; a store that fails stays its own."""
    try:
        yield
    except StorageError as error:
        cause = error.__cause__
        if is_url(path) and not isinstance(cause, FileNotFoundError):
            raise
        why = str(error) if cause is None else f"{path}: cannot be read ({first_line(cause)}); restore it"
        raise FaultError(Fault(path, Kind.FILE, why.removeprefix(f"{path}: "))) from cause


def unreadable_group(path: str, group: int, groups: Rows, why: str, column: str | None = None) -> Fault:
    """Row group `group` of a file whose row groups begin at `groups` cannot be read."""
    first, stop = int(groups[group]), int(groups[group + 1])
    text = f"row group {group} (rows {first} to {stop - 1}) cannot be read ({why}); restore the file, or {LEAVE_OUT}"
    return Fault(path, Kind.GROUP, text, first, column, stop - first)


def robot_faults(path: str, layout: Layout, first_path: str, first: Layout) -> Iterator[Fault]:
    """Files that differ in dimensions, or that both say what their numbers and pixels mean and contradict."""
    remedy = f"as in {first_path}; train on one robot's data at a time"
    for name, text in schema.robot_differences(layout, first).items():
        if name in (schema.STATE, schema.ACTION):
            yield Fault(path, Kind.ROBOT, f"{text} {remedy}", column=name)
        else:
            yield Fault(path, Kind.ROBOT, f"metadata {name}: {text} {remedy}")
