"""The worked example, as a reader runs it, in the small: from a LeRobot dataset with video to an exported policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paligemma_vla import Policy
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.schema import DatasetMetadata
from support import call, make_episode
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


def test_example_takes_a_dataset_of_any_dimensions(zygote: Zygote, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Seven numbers in the state, five in an action, two cameras; the configuration beside the script says 4, 4 and 1."""
    rng = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "native", DatasetMetadata(control_hz=10.0)) as writer:
        for number in range(3):
            numbers = {"state": rng.normal(size=(16, 7)), "action": rng.normal(size=(16, 5))}
            episode = replace(make_episode(rng, 16, cameras=2), prompt=f"task {number}")
            writer.write(replace(episode, **{name: values.astype(np.float32) for name, values in numbers.items()}))
    convert = ["data", "convert", "--to", "lerobot", "--input", tmp_path / "native", "--output_dir", tmp_path / "dataset"]
    assert call(capfd, *convert)[0] == 0
    sizes = {"DATASET": str(tmp_path / "dataset"), "STEPS": "1", "SAMPLES": "1"}
    done = zygote.run_script(SCRIPT, tmp_path, {"WORK": "work", **sizes})
    assert done.returncode == 0, done.stderr[-4000:]
    policy = Policy.from_checkpoint(tmp_path / "work" / "policy")
    names = ("cameras", "state_dim", "action_dim", "horizon")
    assert [policy.metadata[name] for name in names] == [["image_1", "image_2"], 7, 5, 8]
    observation = {"image_1": np.zeros((64, 64, 3), np.uint8), "state": np.zeros(7), "prompt": "task 0"}
    assert policy.infer(observation, seed=0)["actions"].shape == (8, 5)
