"""Checkpoints: the specification's keys, whole or refused, readable without pickle."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from paligemma_vla.config import config_from_dict
from paligemma_vla.errors import CheckpointError
from paligemma_vla.training import checkpoint as ckpt
from paligemma_vla.training.checkpoint import link_checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from ranks import ALONE

PAYLOAD: dict[str, Any] = dict.fromkeys((*ckpt.SPEC_KEYS, *ckpt.RESUME_KEYS), 0)


def payload(epoch: int) -> dict[str, Any]:
    return {**PAYLOAD, "epoch": epoch, "state_dict": {"w": torch.full((1000,), float(epoch))}}


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


def test_flipped_byte_is_found(trained_run: Path, tmp_path: Path) -> None:
    for suffix in ("", ".sha256"):
        shutil.copy(trained_run / "checkpoints" / f"checkpoint_epoch_2.pth.tar{suffix}", tmp_path)
    path = tmp_path / "checkpoint_epoch_2.pth.tar"
    load_checkpoint(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch itself does not notice
    with pytest.raises(CheckpointError, match=r"checkpoint_epoch_2\.pth\.tar: damaged"):
        load_checkpoint(path)


def test_checkpoint_copied_alone_is_verified_by_the_checksums_inside(trained_run: Path, tmp_path: Path) -> None:
    """A copy of the link `last.pth.tar` has another name than the file whose sha256 there is."""
    path = Path(shutil.copy(trained_run / "checkpoints" / "last.pth.tar", tmp_path))
    assert load_checkpoint(path)["epoch"] == 2
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pth\.tar: damaged: the checksum of '.*' in it is wrong"):
        load_checkpoint(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is it a whole checkpoint"):
        load_checkpoint(path)


def test_missing_checkpoint_lists_its_neighbours(trained_run: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(trained_run / "checkpoints" / "checkpoint_epoch_7.pth.tar")
    assert "no such checkpoint" in str(caught.value)
    for name in ("checkpoint_epoch_1.pth.tar", "checkpoint_epoch_2.pth.tar", "model_best.pth.tar"):
        assert name in str(caught.value)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint("no/such/folder/x.pth.tar")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 not a zip", None])
def test_file_that_is_no_checkpoint_is_refused(trained_run: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.pth.tar"
    whole = (trained_run / "checkpoints" / "checkpoint_epoch_2.pth.tar").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(CheckpointError, match=r"x\.pth\.tar"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {**PAYLOAD, "optimizer": None}])
def test_foreign_checkpoint_names_what_it_lacks(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "x.pth.tar"
    if isinstance(content, dict) and "optimizer" in content:
        del content["optimizer"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"missing .*optimizer"):
        load_checkpoint(path)


def test_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**PAYLOAD, "epoch": Attack()}, tmp_path / "x.pth.tar")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "x.pth.tar")
    assert not (tmp_path / "ran").exists()


def test_save_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "a.pth.tar"
    for epoch in (1, 2):
        save_checkpoint(path, payload(epoch))
        assert load_checkpoint(path)["epoch"] == epoch
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.pth.tar", "a.pth.tar.sha256"]


@pytest.mark.parametrize("step", ["save", "fsync", "first rename", "last rename"])
def test_save_that_is_interrupted_leaves_the_old_file_good(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth.tar"
    save_checkpoint(path, payload(1))
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
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"no space .*checkpoints before it are whole"):
        patch.setattr(*patches[step])
        save_checkpoint(path, payload(2))
    assert load_checkpoint(path)["epoch"] == 1
    assert not list(tmp_path.glob(".*"))
    save_checkpoint(path, payload(3))
    assert load_checkpoint(path)["epoch"] == 3
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_link_points_at_its_target_and_moves(tmp_path: Path) -> None:
    for epoch in (1, 2):
        save_checkpoint(tmp_path / f"checkpoint_epoch_{epoch}.pth.tar", payload(epoch))
        link_checkpoint(tmp_path / f"checkpoint_epoch_{epoch}.pth.tar", ckpt.LAST)
        assert load_checkpoint(tmp_path / ckpt.LAST)["epoch"] == epoch
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load_checkpoint(moved / ckpt.LAST)["epoch"] == 2


def test_newest_checkpoint_passes_over_damaged_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_checkpoint(tmp_path, ALONE) is None
    for epoch in (1, 2, 3):
        path = tmp_path / f"checkpoint_epoch_{epoch}.pth.tar"
        save_checkpoint(path, payload(epoch))
        os.utime(path, (epoch, epoch))
    assert newest_checkpoint(tmp_path, ALONE) == tmp_path / "checkpoint_epoch_3.pth.tar"
    path.write_bytes(path.read_bytes()[:-50])
    os.utime(path, (3, 3))
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path, ALONE) == tmp_path / "checkpoint_epoch_2.pth.tar"
    assert "passed over" in caplog.text


@pytest.mark.parametrize("key", [*ckpt.SPEC_KEYS, *ckpt.RESUME_KEYS])
def test_key_that_a_resume_needs_is_missed_by_name(tmp_path: Path, key: str) -> None:
    save_checkpoint(tmp_path / "a.pth.tar", {name: value for name, value in payload(1).items() if name != key})
    with pytest.raises(CheckpointError, match=rf"a\.pth\.tar: missing {key};"):
        load_checkpoint(tmp_path / "a.pth.tar", keys=ckpt.RESUME_KEYS)


@pytest.mark.parametrize(
    ("keep_last", "left"),
    [
        (None, {"checkpoint_epoch_1", "checkpoint_epoch_2", "checkpoint_step_7"}),
        (1, {"checkpoint_step_7", "checkpoint_epoch_1"}),
        (2, {"checkpoint_step_7", "checkpoint_epoch_2", "checkpoint_epoch_1"}),
        (9, {"checkpoint_step_3", "checkpoint_step_7", "checkpoint_epoch_1", "checkpoint_epoch_2"}),
    ],
)
def test_prune_keeps_the_newest_and_what_is_linked(tmp_path: Path, keep_last: int | None, left: set[str]) -> None:
    """In the order of writing: epoch 1 (the best), step 3, epoch 2, step 7 (the last)."""
    for age, name in enumerate(("epoch_1", "step_3", "epoch_2", "step_7")):
        path = tmp_path / f"checkpoint_{name}.pth.tar"
        save_checkpoint(path, payload(age))
        os.utime(path, (age, age))
        ckpt.link_checkpoint(path, ckpt.LAST)
        if name == "epoch_1":
            ckpt.link_checkpoint(path, ckpt.BEST)
    ckpt.prune_checkpoints(tmp_path, keep_last)
    for suffix in (".pth.tar", ".pth.tar.sha256"):
        assert {p.name.removesuffix(suffix) for p in tmp_path.glob(f"checkpoint_*{suffix}")} == left


def test_prune_does_not_count_what_cannot_be_read_among_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path / f"checkpoint_epoch_{step}.pth.tar", {**payload(step), "step": step})
    for step in (3, 4):
        (tmp_path / f"checkpoint_epoch_{step}.pth.tar").write_bytes(b"damaged")
    ckpt.prune_checkpoints(tmp_path, keep_last=1)
    assert {path.name for path in tmp_path.glob("*.pth.tar")} == {f"checkpoint_epoch_{step}.pth.tar" for step in (2, 3, 4)}
