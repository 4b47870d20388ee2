"""The commands of the specification's section 11, as written, with flags for small data; and the files they promise."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from paligemma_vla import Policy
from paligemma_vla.config import load_config
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.schema import Episode
from support import METADATA, encode_image

ROOT = Path(__file__).parent.parent.parent

STATISTICS = (
    "utils/calculate_normalization_stats.py --config_path configs/vla_config_ddp.yaml --output_path normalization_stats.json"
)
TRAIN = "main_train.py --config_path configs/vla_config.yaml --epochs 2 --experiment_name test_run"
TRAIN_DDP = "main_train_ddp.py --config_path configs/vla_config_ddp.yaml --experiment_name production_training --use_wandb"
RESUME = (
    "main_train_ddp.py --config_path configs/vla_config_ddp.yaml --resume_checkpoint "
    "experiments/production_training/checkpoints/checkpoint_epoch_25.pth.tar"
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository's root, and episodes of the shipped configurations' dimensions (7 and 7)."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("configs", "utils", "main_train.py", "main_train_ddp.py"):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    with EpisodeWriter(folder / "episodes", replace(METADATA, state_names=(), action_names=())) as writer:
        for length in (9, 12, 5, 14):
            state, action = (rng.normal(size=(length, 7)).astype(np.float32) for _ in range(2))
            writer.write(Episode([[encode_image(rng) for _ in range(length)]], state, action, "open the drawer"))
    return folder


@pytest.fixture
def run(workplace: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command line in this process (an interpreter that imports torch costs seconds); returns what it printed."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("WANDB_SILENT", "true")
    small = (
        f"--train_data_override episodes --model_path_override {tiny_model_dir} --device cpu --batch_size 16 "
        "--set data.num_workers=0 --set model.action_head_config.embed_dim=32 --set model.action_head_config.num_layers=1 "
        "--set model.action_head_config.num_heads=2 --set training.val_action_samples=4 --set model.vlm_config.dtype=float32 "
        "--set model.action_head_config.num_inference_timesteps=2 --set training.log_interval=1 --set data.val_fraction=0.3"
    )

    def start(command: str, flags: str = "") -> str:
        script, *arguments = shlex.split(command)
        arguments += shlex.split(small if script.startswith("main_") else "--train_data_override episodes") + shlex.split(flags)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        printed = capfd.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out + printed.err

    return start


def test_statistics_command(run, workplace: Path) -> None:
    printed = run(STATISTICS)
    raw = json.loads((workplace / "normalization_stats.json").read_text())
    assert set(raw) == {"version", "state", "action", "datasets", "digests", "actions"}
    assert all(
        len(raw[name][field]) == 7 for name in ("state", "action") for field in ("min", "max", "mean", "std", "q01", "q99")
    )
    assert raw["state"]["count"] == 40
    assert "40 rows" in printed


def test_train_command_leaves_the_promised_files(run, workplace: Path) -> None:
    run(TRAIN)
    folder = workplace / "experiments" / "test_run"
    for name in ("config.yaml", "metrics.jsonl", "logs/train.log"):
        assert (folder / name).stat().st_size > 0
    checkpoints = {path.name for path in (folder / "checkpoints").glob("*.pth.tar")}
    assert checkpoints == {"checkpoint_epoch_1.pth.tar", "checkpoint_epoch_2.pth.tar", "model_best.pth.tar", "last.pth.tar"}
    config = load_config(folder / "config.yaml")  # complete, and runs again
    assert (config.training.epochs, config.training.experiment_name, config.data.batch_size) == (2, "test_run", 16)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = set().union(*lines)
    assert {"train/batch_loss", "train/lr", "train/grad_norm", "val/epoch_loss", "val/action_mae"} <= keys
    log = (folder / "logs" / "train.log").read_text()
    assert "finished;" in log and re.search(r"a chunk of \d+ actions covers \d\.\d\d s at [\d.]+ Hz", log)
    saved = torch.load(folder / "checkpoints" / "checkpoint_epoch_2.pth.tar", weights_only=True)
    assert {"epoch", "state_dict", "optimizer", "best_metric", "lr_scheduler"} <= set(saved)
    observation = {"image_1": np.zeros((50, 60, 3), np.uint8), "state": np.zeros(7), "prompt": "open the drawer"}
    policy = Policy.from_checkpoint(folder / "checkpoints" / "model_best.pth.tar")
    assert policy.infer(observation, seed=0)["actions"].shape == (8, 7)


def test_ddp_command_with_wandb_and_its_resume(run, workplace: Path) -> None:
    """The third and fourth command, to epoch 25 and from there on: in the folder that the checkpoint lies in."""
    run(TRAIN_DDP, "--epochs 26 --set training.stop_after_epoch=25 --set wandb.mode=offline --set training.log_interval=10")
    folder = workplace / "experiments" / "production_training"
    assert (folder / "checkpoints" / "checkpoint_epoch_25.pth.tar").exists()
    (wandb_run,) = (folder / "wandb").glob("offline-run-*")
    assert list(wandb_run.glob("*.wandb"))
    before = (folder / "metrics.jsonl").read_text().splitlines()

    run(RESUME, "--epochs 26 --set training.log_interval=1")
    assert (folder / "checkpoints" / "checkpoint_epoch_26.pth.tar").exists()
    assert (folder / "checkpoints" / "last.pth.tar").resolve().name == "checkpoint_epoch_26.pth.tar"
    after = (folder / "metrics.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert [path.name for path in (workplace / "experiments").glob("production_training*")] == ["production_training"]


def test_scripts_run_as_programs(workplace: Path) -> None:
    """In an interpreter of their own, from the root of the repository, as a person types them."""
    command = [sys.executable, *shlex.split(STATISTICS), "--train_data_override", "episodes"]
    finished = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert finished.returncode == 0, finished.stderr
    assert (workplace / "normalization_stats.json").exists()
