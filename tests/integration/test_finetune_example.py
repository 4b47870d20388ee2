"""The worked example, as a reader runs it, in the small: from a LeRobot dataset with video to an exported policy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from paligemma_vla import Policy
from zygote import Zygote

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_lerobot" / "finetune.sh"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("learns", [False, pytest.param(True, marks=pytest.mark.long)])
def test_example_goes_from_a_lerobot_dataset_to_a_policy(zygote: Zygote, tmp_path: Path, learns: bool) -> None:
    demonstrations, steps, episodes = (16, 300, 5) if learns else (3, 10, 1)
    sizes = {"DEMONSTRATIONS": str(demonstrations), "STEPS": str(steps), "EPISODES": str(episodes), "SAMPLES": "32"}
    done = zygote.run_script(SCRIPT, tmp_path, {"WORK": "work", "WORKERS": "1", **sizes})
    assert done.returncode == 0, done.stderr[-4000:]
    work = tmp_path / "work"
    info = json.loads((work / "lerobot" / "meta" / "info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_tasks"] > 1) == ("v3.0", 2 * demonstrations, True)
    assert list((work / "lerobot" / "videos").rglob("*.mp4"))
    rollout = json.loads((work / "closed_loop" / "rollout.json").read_text())
    rates = {task: entry["rate"] for task, entry in rollout["tasks"].items()}
    assert set(rates) == {"drawer-open", "drawer-close"}
    # Loose: twenty times fewer demonstrations and steps than the demonstration. Random actions reach 0.02.
    assert not learns or sum(rates.values()) / 2 >= 0.3
    assert (work / "open_loop" / "report.html").is_file()
    observation = {"image_1": np.zeros((64, 64, 3), np.uint8), "state": np.zeros(4), "prompt": "open the drawer"}
    exported = Policy.from_checkpoint(work / "policy").infer(observation, seed=0)["actions"]
    checkpoint = work / "experiments" / "finetune" / "checkpoints" / "last.pth.tar"
    trained = Policy.from_checkpoint(checkpoint).infer(observation, seed=0)["actions"]
    assert np.array_equal(exported, trained)
