"""Runs whose folder is behind a URL: S3 through pyarrow against a server of moto, and a file system of fsspec's."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import ConfigFactory
from paligemma_vla import Policy
from paligemma_vla.cli.train import add_arguments, resolve_config, train
from paligemma_vla.config import load_config
from paligemma_vla.errors import StorageError
from paligemma_vla.storage import ByteSource, file_system
from paligemma_vla.training.checkpoint import load_checkpoint, read_step
from paligemma_vla.training.run import RemoteRun
from store import Store
from support import checkpoint_payload, identical, read_metrics, write_checkpoint

Bucket = tuple[RemoteRun, Path]
SMALL = {"data.batch_size": 8, "data.val_fraction": 0.2}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URL of an empty bucket."""
    with Store("runs") as store:
        yield store.url("experiments")


def names(url: str) -> set[str]:
    system, root = file_system(url)
    system.invalidate_cache()
    return {name.removeprefix(root.rstrip("/") + "/") for name in system.find(root)}


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_run_on_a_url_goes_on_from_another_machine_bit_for_bit(
    tiny_config: ConfigFactory, s3: str, tmp_path: Path, kind: str
) -> None:
    location = f"{s3}/{tmp_path.name}" if kind == "s3" else f"file://{tmp_path}/store"
    straight = tiny_config({**SMALL, "training.experiment_name": "straight"})
    train(straight, "cpu")
    cut = tiny_config({**SMALL, "training.checkpoint_dir": location, "training.stop_after_step": 13})
    train(cut, "cpu", "auto")
    shutil.rmtree(cut.run_dir)  # another machine knows nothing
    rest = load_config(f"{location}/run/config.yaml", {"training.stop_after_step": None})
    train(rest, "cpu", "auto")
    for name in ("last", "checkpoint_epoch_2", "model_best"):
        expected = load_checkpoint(straight.run_dir / "checkpoints" / f"{name}.pth.tar")
        got = load_checkpoint(f"{location}/run/checkpoints/{name}.pth.tar")
        assert all(identical(got[key], expected[key]) for key in ("state_dict", "optimizer", "ema", "step", "watch"))
    assert read_metrics(rest.run_dir) == read_metrics(straight.run_dir)
    local = {path.relative_to(straight.run_dir).as_posix() for path in straight.run_dir.rglob("*") if path.is_file()}
    first = "checkpoints/checkpoint_epoch_1.pth.tar"
    assert names(f"{location}/run") == local | {first, f"{first}.sha256"}
    assert Policy.from_checkpoint(f"{location}/run/checkpoints/model_best.pth.tar").metadata["action_dim"] == 2


@pytest.fixture
def copied_bucket(tmp_path: Path) -> Bucket:
    """A run behind a URL, copied with its four checkpoints by a tool that gave the files other dates: (run, folder there)."""
    folder = tmp_path / "store" / "run" / "checkpoints"
    for number, name in enumerate(["epoch_1", "step_9", "step_13", "epoch_2"]):
        path = write_checkpoint(folder / f"checkpoint_{name}.pth.tar", checkpoint_payload(6 + 4 * number))
        os.utime(path, (1000 - 10 * number, 1000 - 10 * number))
    return RemoteRun(tmp_path / "here", f"file://{tmp_path}/store/run"), folder


def test_copied_bucket_goes_on_from_its_highest_step_that_verifies(
    copied_bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    run, folder = copied_bucket
    newest = run.newest_checkpoint()
    assert newest == run.local / "checkpoints" / "checkpoint_epoch_2.pth.tar"
    assert load_checkpoint(newest)["step"] == 18
    (folder / newest.name).write_bytes(b"damaged")
    assert RemoteRun(run.local, run.url).newest_checkpoint() == newest.with_name("checkpoint_step_13.pth.tar")
    assert f"passed over: {newest}" in caplog.text


@pytest.mark.parametrize(
    ("keep_last", "left"), [(1, {"epoch_2"}), (3, {"step_9", "step_13", "epoch_2"}), (None, {"epoch_1", "epoch_2"})]
)
def test_copied_bucket_loses_its_lowest_steps(copied_bucket: Bucket, keep_last: int | None, left: set[str]) -> None:
    run, folder = copied_bucket
    run.publish(keep_last)
    names = {path.name.removeprefix("checkpoint_") for path in folder.iterdir()}
    assert names == {f"{name}.pth.tar{suffix}" for name in left for suffix in ("", ".sha256")}


def test_step_behind_a_url_is_read_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {**checkpoint_payload(5), "state_dict": {f"w{number}": torch.zeros(1000, 100) for number in range(50)}}
    path, read = write_checkpoint(tmp_path / "checkpoint_step_5.pth.tar", content), []
    read_at = ByteSource.read_at
    monkeypatch.setattr(ByteSource, "read_at", lambda *asked: (read.append(asked[2]), read_at(*asked))[1])
    assert read_step(f"file://{path}") == 5
    assert sum(read) < 0.05 * path.stat().st_size
    path.write_bytes(b"damaged")
    assert read_step(f"file://{path}") == float("inf")


def test_run_that_goes_on_from_an_older_checkpoint_moves_the_later_ones_aside_there(
    copied_bucket: Bucket,
) -> None:
    """Killed before its first save, `auto` must go on from the older one, not from what was given up."""
    run, folder = copied_bucket
    shutil.copy(folder / "checkpoint_epoch_2.pth.tar", folder / "model_best.pth.tar")
    run.take_over(run.fetch_checkpoint("checkpoint_step_9.pth.tar").name, 10)
    (aside,) = folder.glob("after_step_10.*")
    assert {path.name.removeprefix("checkpoint_") for path in aside.iterdir()} == {
        *("step_13.pth.tar", "step_13.pth.tar.sha256", "epoch_2.pth.tar", "epoch_2.pth.tar.sha256", "model_best.pth.tar")
    }
    again = RemoteRun(run.local, run.url).newest_checkpoint()
    assert again is not None
    assert again.name == "checkpoint_step_9.pth.tar"


def test_second_run_of_the_same_name_moves_the_first_aside_in_the_store(
    tiny_config: ConfigFactory, s3: str, tmp_path: Path
) -> None:
    location = f"{s3}/{tmp_path.name}"
    config = tiny_config({**SMALL, "training.checkpoint_dir": location, "training.keep_last": 1, "data.val_fraction": 0.0})
    train(config, "cpu")
    kept = {name for name in names(f"{location}/run") if name.startswith("checkpoints/checkpoint_")}
    assert kept == {f"checkpoints/checkpoint_epoch_2.pth.tar{suffix}" for suffix in ("", ".sha256")}
    first = load_checkpoint(f"{location}/run/checkpoints/last.pth.tar")
    train(config, "cpu")
    (aside,) = {name.split("/")[0] for name in names(location)} - {"run"}
    assert aside.startswith("run.")
    assert identical(load_checkpoint(f"{location}/{aside}/checkpoints/last.pth.tar")["state_dict"], first["state_dict"])


def test_named_checkpoint_behind_a_url_goes_on_in_its_own_folder(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(tiny_config().to_yaml())
    add_arguments(parser := argparse.ArgumentParser())
    url = "s3://bucket/some/where/name/checkpoints/last.pth.tar"
    resolved = resolve_config(parser.parse_args(["--config_path", str(tmp_path / "c.yaml"), "--resume_checkpoint", url]))
    assert resolved.run_url == "s3://bucket/some/where/name"


def test_store_that_fails_in_mid_run_is_told_and_made_up_for(
    tiny_config: ConfigFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy, calls = RemoteRun._copy, []

    def fails_at_first(self: RemoteRun, path: Path, name: str) -> None:
        calls.append(name)
        if len(calls) < 2:
            raise StorageError(f"{name}: no route to host")
        copy(self, path, name)

    monkeypatch.setattr(RemoteRun, "_copy", fails_at_first)
    location = f"file://{tmp_path}/store"
    with caplog.at_level(logging.ERROR):
        train(tiny_config({**SMALL, "training.checkpoint_dir": location}), "cpu")
    assert "no route to host; training goes on" in caplog.text
    assert load_checkpoint(f"{location}/run/checkpoints/last.pth.tar")["epoch"] == 2


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s3://no-such-bucket-here/x"])
def test_url_that_cannot_be_reached_is_one_error(tiny_config: ConfigFactory, s3: str, url: str) -> None:
    with pytest.raises(StorageError, match=f"{url}.*cannot be reached"):
        train(tiny_config({"training.checkpoint_dir": url}), "cpu", "auto")
