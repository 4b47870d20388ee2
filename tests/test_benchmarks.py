"""Benchmarks that need another machine run here in the small, so that they run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_gpu_benchmark_runs_on_the_tiny_model(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    small = ("model.action_head_config.embed_dim=64", "data.batch_size=2")
    options = ["--device", "cpu", "--model", "tiny", "--repeats", "1", "--output", str(output)]
    options += [word for setting in small for word in ("--set", setting)]
    table = run(sys.executable, "-m", "benchmarks.gpu.full_size", *options)
    rows = {row["name"]: row["value"] for row in json.loads(output.read_text())["rows"]}
    for name in rows:
        assert name in table
    assert rows["tiny model, GPU against CPU: actions, absolute"] == 0.0
    for cameras in ("1 camera", "2 cameras"):
        assert rows[f"one observation, {cameras}, 50 Euler steps"] > rows[f"one observation, {cameras}, 10 Euler steps"]
    for kind in ("head only", "LoRA", "full"):
        assert rows[f"training, {kind}, batch 2, 2 cameras"] > 0
        assert rows[f"training, {kind}, batch 2, 2 cameras: planned"] > 0


def test_gpu_script_is_valid_shell() -> None:
    run("bash", "-n", "benchmarks/gpu/full_size.sh")
