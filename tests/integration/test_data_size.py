"""Memory does not grow with the data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from benchmarks import memory


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_peak_memory_at_sixteen_gigabytes_is_that_at_one(tmp_path: Path) -> None:
    """Of the main process and of each loader: at most 5 % more."""
    needed = 3e9
    if shutil.disk_usage(tmp_path).free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of disk in {tmp_path}")
    lines = memory.measure([1.0, 16.0], tmp_path)
    print(memory.table(lines))
    for reading in ("random", "streamed"):
        small, large = (line for line in lines if line.reading == reading)
        assert large.steps > 14 * small.steps
        assert large.main_mb < 1.05 * small.main_mb
        assert large.worker_mb < 1.05 * small.worker_mb
    shutil.rmtree(tmp_path / "episodes")
