"""A run's folder says how it was made, and its config.yaml makes it again."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from conftest import ConfigFactory
from paligemma_vla.cli.main import main
from paligemma_vla.config import VLAConfig, config_from_dict, load_config
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.errors import CheckpointError
from paligemma_vla.storage import lock_file
from paligemma_vla.training.checkpoint import load_checkpoint
from paligemma_vla.training.run import check_same_run, git_state, read_starts
from paligemma_vla.training.trainer import Trainer
from support import identical, read_metrics, write_episodes


def started(config: VLAConfig, folder: Path, *flags: str) -> int:
    path = folder / "given.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return main(["train", "--config_path", str(path), "--device", "cpu", *flags])


def test_run_folder_repeats_the_run_although_its_statistics_file_is_gone(
    tiny_config: ConfigFactory, statistics_path: Path, tmp_path: Path
) -> None:
    """Also when it was moved: then its own statistics are not where its configuration says either."""
    mine = shutil.copy(statistics_path, tmp_path / "stats.json")
    config = tiny_config({"data.normalization_stats_path": str(mine)}, cameras=2)
    assert started(config, tmp_path) == 0
    Path(mine).unlink()
    saved = load_config(config.run_dir / "config.yaml")
    assert saved.data.model_copy(update={"normalization_stats_path": str(mine)}) == config.data
    assert saved.model_copy(update={"data": config.data}) == config

    moved = config.run_dir.rename(tmp_path / "elsewhere")
    assert main(["train", "--config_path", str(moved / "config.yaml"), "--device", "cpu"]) == 0
    first, second = (load_checkpoint(folder / "checkpoints" / "last.pth.tar") for folder in (moved, config.run_dir))
    for key in ("state_dict", "optimizer", "ema", "lr_scheduler", "preprocessor", "data"):
        assert identical(first[key], second[key]), key
    assert read_metrics(moved) == read_metrics(config.run_dir)


def test_run_folder_records_what_each_start_depended_on(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    config = tiny_config({"training.stop_after_epoch": 1, "data.val_fraction": 0.0})
    assert started(config, tmp_path) == 0
    assert started(tiny_config({"data.val_fraction": 0.0}), tmp_path, "--resume_checkpoint", "auto") == 0
    starts = json.loads((config.run_dir / "environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 6]
    index = EpisodeIndex.build(config.data.train_parquet_files)
    for start in starts:
        assert (start["packages"]["torch"], start["device"]) == (metadata.version("torch"), "cpu")
        assert start["data"]["fingerprint"] == {"training": index.fingerprint, "validation": None}
        assert (start["data"]["episodes"], start["data"]["steps"]) == (len(index), index.steps)


def test_git_state_is_the_commit_and_what_was_changed_since(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert git_state(tmp_path) is None
    git("init", "-q")
    code = tmp_path / "code.py"
    code.write_text("a = 1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD").strip(), "changed": False, "patch": ""}
    code.write_text("a = 2\n")
    state = git_state(tmp_path)
    assert state is not None and state["changed"]
    git("checkout", "-q", "code.py")
    subprocess.run(["git", "apply"], input=state["patch"], cwd=tmp_path, check=True, text=True)
    assert code.read_text() == "a = 2\n"


def test_run_that_is_repeated_on_other_data_is_told(
    tiny_config: ConfigFactory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_episodes(tmp_path / "data")
    config = tiny_config({"data.train_parquet_files": str(tmp_path / "data"), "data.allow_other_statistics": True})
    assert started(config, tmp_path) == 0
    write_episodes(tmp_path / "data", lengths=(4,), seed=5)
    assert main(["train", "--config_path", str(config.run_dir / "config.yaml"), "--device", "cpu"]) == 0
    assert "this run will not repeat it" in capfd.readouterr().err


def test_file_that_changes_during_training_stops_the_run(
    tiny_config: ConfigFactory, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved stays; with the old file back, the run goes on."""
    write_episodes(tmp_path / "data")
    write_episodes(tmp_path / "other", seed=8)
    file, other = (tmp_path / name / "episodes-00001.parquet" for name in ("data", "other"))
    settings = {"data.train_parquet_files": str(tmp_path / "data"), "data.cache_mb": 0, "data.allow_other_statistics": True}
    config = tiny_config({**settings, "training.save_every_n_steps": 1})
    step = Trainer._train_step

    def changes_then_steps(self: Trainer, stream: Any) -> Any:
        if self.step == 3:
            shutil.copy(other, file)
        return step(self, stream)

    old = shutil.copy2(file, tmp_path / "old.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", changes_then_steps)
        assert started(config, tmp_path) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {file}: ") and "changed" in message
    assert load_checkpoint(config.run_dir / "checkpoints" / "last.pth.tar")["step"] >= 3
    shutil.copy2(old, file)
    assert started(config, tmp_path, "--resume_checkpoint", "auto") == 0


def test_two_starts_of_one_run_at_once_are_refused(
    tiny_config: ConfigFactory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config({"training.max_steps": 2})
    assert started(config, tmp_path) == 0
    lock = lock_file(config.run_dir.with_name(".run.lock"))
    assert lock is not None
    for flags in ([], ["--resume_checkpoint", "auto"]):
        assert started(config, tmp_path, *flags) == 2
        assert f"{config.run_dir} is being trained by another process" in capfd.readouterr().err
    assert [path.name for path in config.run_dir.parent.iterdir() if not path.name.startswith(".")] == ["run"]
    lock.release()
    assert started(config, tmp_path) == 0


def test_resume_into_the_folder_of_another_run_moves_that_one_aside(
    tiny_config: ConfigFactory, trained_run: Path, tmp_path: Path
) -> None:
    other = tiny_config({"training.experiment_name": "other", "training.seed": 1, "training.max_steps": 2})
    assert started(other, tmp_path) == 0
    into = tiny_config({"training.experiment_name": "other", "optimizer.lr": 5e-3, "training.epochs": 3}, cameras=2)
    resume = str(trained_run / "checkpoints" / "last.pth.tar")
    assert started(into, tmp_path, "--resume_checkpoint", resume, "--experiment_name", "other") == 0
    (aside,) = other.run_dir.parent.glob("other.*")
    assert load_checkpoint(aside / "checkpoints" / "last.pth.tar")["step"] == 2


def test_resume_from_an_older_checkpoint_sets_the_later_ones_aside(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    """Killed before its first save, `auto` must go on from the older one, not from what was given up."""
    config = tiny_config({"training.epochs": 3})
    assert started(config, tmp_path) == 0
    folder = config.run_dir / "checkpoints"
    expected, lines = load_checkpoint(folder / "last.pth.tar"), read_metrics(config.run_dir)
    older = str(folder / "checkpoint_epoch_1.pth.tar")
    assert started(config, tmp_path, "--resume_checkpoint", older, "--set", "training.stop_after_epoch=1") == 0
    left = {"checkpoint_epoch_1.pth.tar", "last.pth.tar", "model_best.pth.tar"}
    assert {path.name for path in folder.glob("*.pth.tar")} == left
    assert len(list(folder.glob("after_step_5.*/checkpoint_epoch_3.pth.tar"))) == 1
    assert started(config, tmp_path, "--resume_checkpoint", "auto") == 0
    assert identical(load_checkpoint(folder / "last.pth.tar")["state_dict"], expected["state_dict"])
    assert read_metrics(config.run_dir) == lines


STREAMED, BLOCKS = {"data.reading": "streamed"}, {"data.stream_block_mb": 0.01, "data.stream_window": 9}
OTHER_HEAD = {"model.action_head_config.embed_dim": 64, "model.vlm_config.freeze_vision_tower": True}
OTHER_TRAINING = {"data.augmentation.enabled": False, "optimizer.betas": [0.9, 0.99], "training.best_metric": "val/action_mae"}
OTHER_STAGES = {"training.stages": [{"train": "head", "steps": 2}, {"train": "all"}], "training.ema_decay": 0.5}
OTHER_SPLIT = {"data.batch_size": 8, "data.normalization": "mean_std", "data.val_fraction": 0.4, "training.seed": 3}


@pytest.mark.parametrize(
    ("before", "now", "differing"),
    [
        ({}, {"data.reading": "random", **BLOCKS}, []),  # blocks are of no account in random order
        ({}, STREAMED, ["data.reading", *BLOCKS]),
        (STREAMED, {}, ["data.reading", *BLOCKS]),
        (STREAMED, STREAMED, []),
        (STREAMED, STREAMED | BLOCKS, [*BLOCKS]),
        *(({}, change, sorted(change)) for change in (OTHER_HEAD, OTHER_TRAINING, OTHER_STAGES, OTHER_SPLIT)),
    ],
)
def test_resume_that_would_be_another_run_lists_what_differs(
    tiny_config: ConfigFactory, checkpoint: Path, before: dict[str, Any], now: dict[str, Any], differing: list[str]
) -> None:
    saved = load_checkpoint(checkpoint)
    saved["config"] = config_from_dict(saved["config"], before).model_dump(mode="json")
    if not before:  # as in older checkpoints, which know random order alone
        for name in ("reading", "stream_block_mb", "stream_window"):
            del saved["config"]["data"][name]
    config = tiny_config({"optimizer.lr": 5e-3, **now}, cameras=2)
    lines = []
    try:
        check_same_run(saved, config, saved["data"], "x")
    except CheckpointError as error:
        lines = str(error).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == differing


@pytest.mark.parametrize("content", [b"\xff\xfe\n5\n", b'{"starts": [{}]}'])
def test_damaged_record_of_starts_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    assert read_starts(tmp_path) == []
    (tmp_path / "environment.json").write_bytes(content)
    assert read_starts(tmp_path) == []
    assert "environment.json: cannot be read" in caplog.text
