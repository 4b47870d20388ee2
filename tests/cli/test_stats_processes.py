"""Statistics under torchrun: the same file to the last bit, and one message where a process fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paligemma_vla.config import VLAConfig
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.statistics import compute_part, compute_statistics, merge_parts
from support import call, write_episodes

ConfigFactory = Callable[..., VLAConfig]
ROOT = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def job(tiny_config: ConfigFactory, tmp_path: Path) -> list[str]:
    """Arguments for five files of uneven size."""
    write_episodes(tmp_path / "data", lengths=(40, 3, 17, 1, 28), per_file=1)
    config = tiny_config({"data.train_parquet_files": str(tmp_path / "data")})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    return ["--config_path", str(tmp_path / "config.yaml"), "--output_path", str(tmp_path / "together.json")]


def run(job: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, str(ROOT / "utils" / "calculate_normalization_stats.py"), *job]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_two_processes_write_what_one_writes(job: list[str], tmp_path: Path, capfd: Any) -> None:
    together = run(job, tmp_path)
    assert together.returncode == 0, together.stderr
    assert together.stderr.count("89 rows of 5 file(s)") == 1
    status, _, error = call(capfd, "stats", *job[:2], "--output_path", tmp_path / "alone.json")
    assert status == 0, error
    assert (tmp_path / "together.json").read_bytes() == (tmp_path / "alone.json").read_bytes()


def test_error_of_one_process_is_one_message_and_ends_all(job: list[str], tmp_path: Path) -> None:
    path = sorted((tmp_path / "data").glob("*.parquet"))[1]  # which the second process reads
    table = pq.read_table(path)
    values = table["state"].to_pylist()
    values[1][2] = float("nan")
    number, kind = table.schema.get_field_index("state"), table.schema.field("state").type
    pq.write_table(table.set_column(number, "state", pa.array(values, kind)), path)
    failed = run(job, tmp_path)
    assert failed.returncode != 0
    assert re.findall("^error: .*column state", failed.stderr, re.MULTILINE) == [f"error: {path}: row 1, column state"]
    assert not (tmp_path / "together.json").exists()


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_parts_merge_to_the_same_bits_whatever_their_number(tmp_path: Path, processes: int) -> None:
    write_episodes(tmp_path, lengths=tuple(range(1, 40)), per_file=4)
    index = EpisodeIndex.build(str(tmp_path))
    whole = compute_statistics(index, "x")
    files = range(len(index.paths))
    parts = [compute_part(index, whole.actions, files[rank::processes]) for rank in range(processes)]
    assert merge_parts(index, whole.actions, parts).to_dict() == whole.to_dict()
    assert merge_parts(index, whole.actions, reversed(parts)).to_dict() == whole.to_dict()
