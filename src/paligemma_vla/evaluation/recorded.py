"""Recorded episodes as numbers, without their pictures: what was done, what it led to, and how it began."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.faults import number_faults, raise_first, to_matrix
from paligemma_vla.data.formats import open_file, read_columns
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.evaluation.envs import Start
from paligemma_vla.schema import Layout


@dataclass(frozen=True)
class RecordedEpisode:
    """The numbers of one episode of L steps.

    file, row: where its first step is stored. state (L, P), action (L, A), executed (L, A): float32 in real units; executed is
    the column `executed_action`, or `action` where there is none. success: what the recording says of itself. start: in its
    simulator, None where it is not stored.
    """

    file: str
    row: int
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    executed: NDArray[np.float32]
    prompt: str
    success: bool
    start: Start | None


def read_recorded(index: EpisodeIndex) -> Iterator[RecordedEpisode]:
    """Every episode of an index. Raises `DataError` for a number that is not finite, and for a `reset` that is none."""
    needed = (schema.STATE, schema.ACTION, schema.PROMPT, schema.IS_TERMINAL)
    for number, path in enumerate(index.paths):
        with open_file(path) as file:
            further = [name for name in (schema.EXECUTED, schema.SUCCESS, schema.RESET) if name in file.columns]
            table = read_columns(file, [*needed, *further]).combine_chunks()
            index.check_unchanged(number, file.identity)
        for episode in np.flatnonzero(index.file == number).tolist():
            row, length = int(index.start[episode]), int(index.length[episode])
            yield _recorded(path, row, table.slice(row, length), index.layout)


def _recorded(path: str, row: int, table: pa.Table, layout: Layout) -> RecordedEpisode:
    def numbers(name: str, dimension: int) -> NDArray[np.float32]:
        column = table[name].combine_chunks()
        values = to_matrix(column, dimension)
        raise_first(number_faults(path, name, column, values, np.arange(row, row + len(values))))
        return values

    action = numbers(schema.ACTION, layout.action_dim)
    reset = table[schema.RESET][0].as_py() if schema.RESET in table.column_names else None
    success = table[schema.SUCCESS][-1].as_py() if schema.SUCCESS in table.column_names else None
    return RecordedEpisode(
        file=path,
        row=row,
        state=numbers(schema.STATE, layout.state_dim),
        action=action,
        executed=numbers(schema.EXECUTED, layout.action_dim) if schema.EXECUTED in table.column_names else action,
        prompt=str(table[schema.PROMPT][0].as_py()),
        success=bool(table[schema.IS_TERMINAL][-1].as_py() if success is None else success),
        start=Start.from_json(reset, f"{path}: row {row}, column {schema.RESET}") if isinstance(reset, str) else None,
    )
