"""Corrections of a policy's failures, from demonstrations to the report, as a reader runs the example, in the small."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pyarrow.dataset as ds
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "improve" / "improve.py"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_example_corrects_what_failed_and_compares_the_same_fresh_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A policy of two steps fails everywhere, and the expert solves what it failed."""
    improve = runpy.run_path(str(SCRIPT))["main"]
    sizes = ["--tasks", "faucet-open", "--demonstrations", "3", "--correction_starts", "1", "--episodes", "1", "--workers", "0"]
    short = [
        "--base_steps",
        "2",
        "--steps",
        "2",
        "--take_over_after",
        "4",
        "6",
        "--max_videos",
        "0",
        "--set",
        "data.batch_size=8",
    ]
    short += [
        "model.action_head_config.num_inference_timesteps=1",
        "training.val_max_samples=8",
        "training.val_action_samples=8",
    ]
    arguments = ["improve.py", "--work", str(tmp_path), *sizes, *short]
    monkeypatch.setattr("sys.argv", arguments)
    assert improve() == 0
    found = json.loads((tmp_path / "improve.json").read_text())
    assert found["weakest"] == ["faucet-open"] and found["failed_starts"] == {"episodes": 1, "solved_after": 0}
    helped = json.loads((tmp_path / "corrections" / "after_04" / "rollout.json").read_text())
    assert helped["tasks"]["faucet-open"]["solved_with_help"] == 1
    rows = ds.dataset(tmp_path / "corrections" / "after_04" / "episodes").to_table(["actor"])["actor"].to_pylist()
    assert rows[:5] == ["policy"] * 4 + ["intervention"] and set(rows[4:]) == {"intervention"}
    starts = [json.loads((tmp_path / folder / "rollout.json").read_text())["episodes"][0]["seed"] for folder in
              ("own", "again", "fresh/before", "fresh/corrections", "fresh/plain")]  # fmt: skip
    assert starts[0] == starts[1] != starts[2] == starts[3] == starts[4], "fresh starts are others than those of corrections"
    assert "against as much plain training" in (tmp_path / "report.html").read_text()
    labels, recorded = map(int, re.findall(r"interventions: (\d+) of (\d+) steps", capfd.readouterr().err)[-1])
    assert recorded - labels == 4 + 6, "what the policy did is not learnt"
    (tmp_path / "improve.json").unlink()
    assert improve() == 0 and (tmp_path / "improve.json").exists()
    assert "=== " not in capfd.readouterr().err, "what has ended is not done again"
    monkeypatch.setattr("sys.argv", [*arguments, "--seed", "1"])
    with pytest.raises(SystemExit, match=r"demonstrations: made by another command(.|\n)*--seed 0(.|\n)*--seed 1"):
        improve()
