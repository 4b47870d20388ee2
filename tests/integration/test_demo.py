"""The main job in miniature, through the demo command: two tasks, few episodes, a short training, the real simulator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zygote import Zygote


@pytest.mark.timeout(600)
def test_demo_of_the_drawer_pair_learns_to_follow_the_instruction(zygote: Zygote, tmp_path: Path) -> None:
    """In one process: those of `collect` and `rollout` are tested beside them, and would import everything once more."""
    command = [
        *("demo", "--config_path", str(Path(__file__).parents[2] / "configs" / "demo.yaml"), "--workers", "0"),
        *("--tasks", "drawer-open", "drawer-close", "--demonstrations", "16"),
        *("--episodes", "10", "--control_episodes", "5", "--data_dir", "data"),
        *("--set", "training.max_steps=250", "--set", "training.validate_every_n_steps=250"),
        *("--set", "training.stages=[{train: head, steps: 50}, {train: all}]"),
        *("--set", "model.action_head_config.num_inference_timesteps=4"),
    ]
    done = zygote.run(command, tmp_path, timeout=590)
    assert done.status == 0, done.stderr[-4000:]
    run = tmp_path / "experiments" / "demo"
    summary = json.loads((run / "demo_summary.json").read_text())
    assert set(summary["tasks"]) == {"drawer-open", "drawer-close"}
    # Loose: a full demonstration trains fifteen times as long, on twenty times as many episodes.
    assert summary["mean_success"] >= 0.5
    assert summary["wrong_prompt_mean_success"] <= 0.3
    assert summary["mean_success"] - summary["random_action_mean_success"] >= 0.4
    assert set(summary["wall_s"]) == {"install", "demonstrations", "statistics", "training", "evaluation"}
    assert (run / "report.html").stat().st_size > 100_000
