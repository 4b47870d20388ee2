"""Checkpoints: the specification's keys, complete or refused, readable without pickle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paligemma_vla.config import config_from_dict
from paligemma_vla.errors import CheckpointError
from paligemma_vla.storage import POINTER
from paligemma_vla.training.checkpoint import load_checkpoint, save_checkpoint
from support import checkpoint_payload


def test_checkpoint_of_a_run_has_the_specifications_keys_and_needs_no_pickle(checkpoint: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    assert {"epoch", "state_dict", "optimizer", "best_metric", "lr_scheduler"} <= set(saved)
    assert (saved["epoch"], type(saved["best_metric"])) == (2, float)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"paligemma_vlm", "action_head"}
    assert saved["ema"]["average"].keys() <= saved["state_dict"].keys()
    assert config_from_dict(saved["config"]).training.experiment_name == "trained"
    assert saved["preprocessor"]["statistics"]["action"]["count"] > 0
    assert '"control_hz": 12.5' in saved["metadata"]
    assert '"cameras": ["front", "wrist"]' in saved["metadata"]
    assert set(saved["versions"]) >= {"torch", "transformers", "paligemma-vla"}


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


@pytest.mark.parametrize("kept", ["a.pth.tar", "a.pth.tar*"])
def test_pointer_of_git_lfs_is_named(tmp_path: Path, kept: str) -> None:
    """With the digest of the checkpoint beside it, or without."""
    save_checkpoint(tmp_path / "written" / "a.pth.tar", checkpoint_payload(1))
    for path in (tmp_path / "written").glob(kept):
        path.rename(tmp_path / path.name)
    (tmp_path / "a.pth.tar").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"a\.pth\.tar: cannot be read \(it is a pointer of git-lfs"):
        load_checkpoint(tmp_path / "a.pth.tar")


def test_save_that_ends_before_its_last_rename_leaves_the_old_file_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the digests of both stand beside it."""
    save_checkpoint(path := tmp_path / "a.pth.tar", checkpoint_payload(1))
    rename = Path.replace

    def fails_at_the_checkpoint(self: Path, target: Path) -> Path:
        if Path(target) == path:
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fails_at_the_checkpoint)
    with pytest.raises(CheckpointError, match=r"no space .*checkpoints before it are intact"):
        save_checkpoint(path, checkpoint_payload(2))
    assert load_checkpoint(path)["step"] == 1
