"""Memory does not grow with the data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from benchmarks import memory


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_peak_memory_at_four_gigabytes_is_that_at_one(tmp_path: Path) -> None:
    """Of the main process and of each loader, within 5 %; the index stays below 64 bytes per episode and row group."""
    needed = 6e9
    if shutil.disk_usage(tmp_path).free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of disk in {tmp_path}")
    small, large = memory.measure([1.0, 4.0], tmp_path)
    print(memory.table([small, large]))
    for name in ("main_mb", "worker_mb"):
        assert large[name] == pytest.approx(small[name], rel=0.05)
    shutil.rmtree(tmp_path / "episodes")
