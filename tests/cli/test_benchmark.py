"""`paligemma-vla benchmark` on one task and a few steps: the whole chain, and what a repeated call does again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import call

SMALL = (
    *("training.max_steps=4", "training.stages=[]", "lr_scheduler.warmup_steps=0", "training.log_interval=1"),
    *("training.val_max_samples=8", "training.val_action_samples=0", "data.batch_size=8", "data.val_fraction=0.3"),
    *("model.action_head_config.embed_dim=32", "model.action_head_config.num_layers=1"),
)


def run(capfd: pytest.CaptureFixture[str], folder: Path, *more: object) -> tuple[int, str, str]:
    changes = [part for each in (*SMALL, f"training.checkpoint_dir={folder / 'runs'}") for part in ("--set", each)]
    small = ("--demonstrations", 3, "--episodes", 1, "--workers", 1, "--tasks", "reach")
    return call(capfd, "benchmark", "mt50", *small, "--data_dir", folder / "data", *changes, *more)


def test_a_benchmark_is_one_command_that_goes_on_where_it_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    status, _, err = run(capfd, tmp_path, "--set", "training.stop_after_step=2")
    assert status == 0, err
    # What was stopped half-way stands for a call that was killed: its policy is played as far as it got, then trained on.
    played = tmp_path / "runs" / "mt50" / "rollouts" / "mean_success" / "rollout.json"
    first = json.loads(played.read_text())
    status, _, err = run(capfd, tmp_path)
    assert status == 0, err
    assert json.loads(played.read_text())["settings"]["checkpoint_sha256"] != first["settings"]["checkpoint_sha256"]
    written = played.stat().st_mtime_ns
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/mt50/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 4 and steps.count(1) == 1
    status, _, err = run(capfd, tmp_path)
    assert status == 0, err
    assert played.stat().st_mtime_ns == written, "nothing has changed, so nothing is played again"
    summary = json.loads((tmp_path / "runs/mt50/mt50_summary.json").read_text())
    assert set(summary["tasks"]) == {"reach"} and summary["wall_s"].keys() >= {"training", "evaluation"}
    assert "MetaWorld MT50" in (tmp_path / "runs/mt50/report.html").read_text()
