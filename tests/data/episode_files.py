"""Episode files written by hand, so that they can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from support import encode_image

Columns = dict[str, Any]


def columns(lengths: tuple[int, ...] = (3, 1, 4)) -> Columns:
    """Columns of an episode file as plain Python lists."""
    rng = np.random.default_rng(0)
    rows = sum(lengths)
    last = set(np.cumsum(lengths) - 1)
    first = {0, *(row + 1 for row in last)} - {rows}
    return {
        "image_1_bytes": [encode_image(rng) for _ in range(rows)],
        "state": rng.normal(size=(rows, 3)).tolist(),
        "action": rng.normal(size=(rows, 2)).tolist(),
        "prompt": ["open the drawer"] * rows,
        "is_first": [row in first for row in range(rows)],
        "is_last": [row in last for row in range(rows)],
        "is_terminal": [False] * rows,
    }


TYPES = {"image_1_bytes": pa.binary(), "state": pa.list_(pa.float32()), "action": pa.list_(pa.float32())}


def write(
    path: Path, content: Columns, types: dict[str, pa.DataType] | None = None, metadata: bytes | None = None, **options: Any
) -> str:
    kinds = {**TYPES, **(types or {})}
    table = pa.table({name: pa.array(values, kinds.get(name)) for name, values in content.items()})
    pq.write_table(table.replace_schema_metadata({"paligemma_vla": metadata} if metadata else None), path, **options)
    return str(path)


def flags(change: Callable[[Columns], None]) -> Columns:
    content = columns()
    change(content)
    return content


def put(name: str, row: int, value: Any) -> Callable[[Columns], None]:
    def change(content: Columns) -> None:
        content[name][row] = value

    return change
