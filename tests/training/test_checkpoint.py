"""Checkpoints: the specification's keys, complete or refused, readable without pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from paligemma_vla.config import config_from_dict
from paligemma_vla.errors import CheckpointError
from paligemma_vla.training.checkpoint import load_checkpoint, save_checkpoint
from support import checkpoint_payload


def test_checkpoint_of_a_run_has_the_specifications_keys_and_needs_no_pickle(trained_run: Path) -> None:
    saved = torch.load(trained_run / "checkpoints" / "checkpoint_epoch_2.pth.tar", weights_only=True)
    assert {"epoch", "state_dict", "optimizer", "best_metric", "lr_scheduler"} <= set(saved)
    assert saved["epoch"] == 2
    assert isinstance(saved["best_metric"], float)
    assert saved["state_dict"]
    assert not any(name.startswith("module.") for name in saved["state_dict"])
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"paligemma_vlm", "action_head"}


def test_checkpoint_describes_itself(trained_run: Path) -> None:
    saved = load_checkpoint(trained_run / "checkpoints" / "last.pth.tar")
    config = config_from_dict(saved["config"])
    assert config.training.experiment_name == "trained"
    assert saved["preprocessor"]["statistics"]["action"]["count"] > 0
    assert '"control_hz": 12.5' in saved["metadata"]
    assert '"cameras": ["front", "wrist"]' in saved["metadata"]
    assert set(saved["versions"]) >= {"torch", "transformers", "paligemma-vla"}
    assert saved["ema"]["average"].keys() <= saved["state_dict"].keys()


def test_run_folder_has_a_checkpoint_per_epoch_and_links_to_last_and_best(trained_run: Path) -> None:
    folder = trained_run / "checkpoints"
    numbered = {p.name for p in folder.glob("checkpoint_*.pth.tar")}
    assert numbered == {"checkpoint_epoch_1.pth.tar", "checkpoint_epoch_2.pth.tar"}
    assert (folder / "last.pth.tar").resolve().name == "checkpoint_epoch_2.pth.tar"
    assert (folder / "model_best.pth.tar").resolve().name in numbered
    assert all((folder / f"{name}.sha256").exists() for name in numbered)
    assert not list(folder.glob(".*"))


def test_missing_checkpoint_lists_its_neighbours(trained_run: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(trained_run / "checkpoints" / "checkpoint_epoch_7.pth.tar")
    assert "no such checkpoint" in str(caught.value)
    for name in ("checkpoint_epoch_1.pth.tar", "checkpoint_epoch_2.pth.tar", "model_best.pth.tar"):
        assert name in str(caught.value)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint("no/such/folder/x.pth.tar")


@pytest.mark.parametrize("step", ["save", "fsync", "first rename", "last rename"])
def test_save_that_is_interrupted_leaves_the_old_file_good(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth.tar"
    save_checkpoint(path, checkpoint_payload(1))
    rename = Path.replace

    def dies(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    def dies_at_the_checkpoint(self: Path, target: Path) -> Path:
        return dies() if Path(target) == path else rename(self, target)  # type: ignore[func-returns-value, return-value]

    patches: dict[str, tuple[Any, str, Any]] = {
        "save": (torch, "save", dies),
        "fsync": (os, "fsync", dies),
        "first rename": (Path, "replace", dies),
        "last rename": (Path, "replace", dies_at_the_checkpoint),
    }
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"no space .*checkpoints before it are intact"):
        patch.setattr(*patches[step])
        save_checkpoint(path, checkpoint_payload(2))
    assert load_checkpoint(path)["step"] == 1
    assert not list(tmp_path.glob(".*"))
    save_checkpoint(path, checkpoint_payload(3))
    assert load_checkpoint(path)["step"] == 3
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
