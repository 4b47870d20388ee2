"""The main job in miniature, through the demo command: two tasks, few episodes, a short training, the real simulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_demo_of_the_drawer_pair_learns_to_follow_the_instruction(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "paligemma_vla.cli.main", "demo"),
        *("--config_path", str(Path(__file__).parents[2] / "configs" / "demo.yaml")),
        *("--tasks", "drawer-open", "drawer-close", "--demonstrations", "16"),
        *("--episodes", "10", "--control_episodes", "5", "--data_dir", "data"),
        *("--set", "training.max_steps=400", "--set", "training.validate_every_n_steps=200"),
        *("--set", "training.stages=[{train: head, steps: 100}, {train: all}]"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "experiments" / "demo"
    summary = json.loads((run / "demo_summary.json").read_text())
    assert set(summary["tasks"]) == {"drawer-open", "drawer-close"}
    # Loose: a full demonstration trains fifteen times as long, on twenty times as many episodes.
    assert summary["mean_success"] >= 0.5
    assert summary["wrong_prompt_mean_success"] <= 0.3
    assert summary["mean_success"] - summary["random_action_mean_success"] >= 0.4
    assert set(summary["wall_s"]) == {"install", "demonstrations", "statistics", "training", "evaluation"}
    assert (run / "report.html").stat().st_size > 100_000
