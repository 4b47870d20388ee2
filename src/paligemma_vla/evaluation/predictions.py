"""`predictions.parquet`: every predicted chunk beside the recorded one, for tools of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paligemma_vla.storage import atomic_file

if TYPE_CHECKING:
    from paligemma_vla.evaluation.samples import Sample

EPISODE, STEP, PREDICTED, TRUE, MASK, PROMPT = "episode", "step", "predicted", "true", "mask", "prompt"


class PredictionWriter:
    """Append batches to a hidden file beside `path`, which is renamed to it when all went well.

    Columns: episode, step (int32); predicted, true (K lists of A float32, real units); mask (K bool, False past the
    episode's end, where `true` repeats the last action); prompt.
    """

    def __init__(self, path: Path, horizon: int, action_names: Sequence[str]) -> None:
        self.path, self.horizon, self.action_names = path, horizon, list(action_names)
        self._stack = ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, samples: Sequence[Sample], predicted: NDArray[np.float32]) -> None:
        """Append samples with their predicted chunks (B, K, A)."""
        columns = {
            EPISODE: pa.array([sample.episode for sample in samples], pa.int32()),
            STEP: pa.array([sample.step for sample in samples], pa.int32()),
            PREDICTED: _chunks(predicted),
            TRUE: _chunks(np.stack([sample.actions for sample in samples])),
            MASK: _lists(pa.array(np.stack([sample.mask for sample in samples]).reshape(-1)), self.horizon),
            PROMPT: pa.array([sample.observation["prompt"] for sample in samples], pa.string()),
        }
        table = pa.table(columns, metadata={"action_names": json.dumps(self.action_names)})
        if self._writer is None:
            file = self._stack.enter_context(atomic_file(self.path))
            self._writer = self._stack.enter_context(pq.ParquetWriter(file, table.schema, compression="ZSTD"))
        self._writer.write_table(table)


def _chunks(values: NDArray[np.float32]) -> Any:
    """(B, K, A) as B lists of K lists of A numbers."""
    _, horizon, width = values.shape
    return _lists(_lists(pa.array(values.astype(np.float32, copy=False).reshape(-1)), width), horizon)


def _lists(values: Any, size: int) -> Any:
    return pa.FixedSizeListArray.from_arrays(values, size)
