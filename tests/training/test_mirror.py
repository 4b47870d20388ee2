"""Runs whose folder is behind a URL: S3 through pyarrow against a server of moto, and a file system of fsspec's."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paligemma_vla import Policy
from paligemma_vla.cli.train import find_checkpoint, resolve_config, train
from paligemma_vla.config import VLAConfig, load_config
from paligemma_vla.errors import StorageError, UnreadableCheckpointError
from paligemma_vla.storage import file_system
from paligemma_vla.training import checkpoint
from paligemma_vla.training.checkpoint import load_checkpoint
from paligemma_vla.training.mirror import Mirror
from ranks import ALONE
from store import Store
from support import identical, read_metrics

ConfigFactory = Callable[..., VLAConfig]
SMALL = {"data.batch_size": 8, "data.val_fraction": 0.2}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URL of an empty bucket."""
    with Store("runs") as store:
        yield store.url("experiments")


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder for runs behind a URL."""
    if request.param == "s3":
        url = request.getfixturevalue("s3")
        return f"{url}/{tmp_path.name}"
    return f"file://{tmp_path}/store"


def names(url: str) -> set[str]:
    system, root = file_system(url)
    system.invalidate_cache()
    return {name.removeprefix(root.rstrip("/") + "/") for name in system.find(root)}


def forget(config: VLAConfig) -> None:
    """What another machine knows: nothing."""
    shutil.rmtree(config.run_dir)


def test_run_on_a_url_goes_on_from_another_machine_bit_for_bit(tiny_config: ConfigFactory, place: str) -> None:
    whole = tiny_config({**SMALL, "training.experiment_name": "whole"})
    train(whole, "cpu")
    cut = tiny_config({**SMALL, "training.checkpoint_dir": place, "training.stop_after_step": 13})
    train(cut, "cpu", "auto")
    forget(cut)
    rest = load_config(f"{place}/run/config.yaml", {"training.stop_after_step": None})
    train(rest, "cpu", "auto")
    expected = load_checkpoint(whole.run_dir / "checkpoints" / "last.pth.tar")
    for name in ("last", "checkpoint_epoch_2"):
        got = load_checkpoint(f"{place}/run/checkpoints/{name}.pth.tar")
        assert all(identical(got[key], expected[key]) for key in ("state_dict", "optimizer", "ema", "step", "watch"))
    assert read_metrics(rest.run_dir) == read_metrics(whole.run_dir)
    local = {path.relative_to(whole.run_dir).as_posix() for path in whole.run_dir.rglob("*") if path.is_file()}
    assert names(f"{place}/run") == local | {
        "checkpoints/checkpoint_epoch_1.pth.tar",
        "checkpoints/checkpoint_epoch_1.pth.tar.sha256",
    }
    assert Policy.from_checkpoint(f"{place}/run/checkpoints/model_best.pth.tar").metadata["action_dim"] == 2


def test_auto_passes_over_what_is_damaged_behind_the_url(
    tiny_config: ConfigFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = f"file://{tmp_path}/store"
    config = tiny_config({**SMALL, "training.checkpoint_dir": place})
    train(config, "cpu")
    forget(config)
    newest = tmp_path / "store" / "run" / "checkpoints" / "checkpoint_epoch_2.pth.tar"
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(config, "auto", Mirror.of(config), ALONE)[0]
    assert found == config.run_dir / "checkpoints" / "checkpoint_epoch_1.pth.tar"
    assert "passed over" in caplog.text
    assert "checkpoint_epoch_2" in caplog.text


def test_auto_does_not_pass_over_what_may_be_whole_behind_the_url(
    tiny_config: ConfigFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config({**SMALL, "training.checkpoint_dir": f"file://{tmp_path}/store"})
    train(config, "cpu")

    def fails(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "sha256", fails)
    with pytest.raises(UnreadableCheckpointError, match="it may be whole"):
        find_checkpoint(config, "auto", Mirror.of(config), ALONE)


def test_keep_last_holds_behind_the_url_over_several_starts(tiny_config: ConfigFactory, place: str) -> None:
    settings = {**SMALL, "training.checkpoint_dir": place, "training.keep_last": 2, "data.val_fraction": 0.0}
    config = tiny_config({**settings, "training.epochs": 4, "training.stop_after_epoch": 2})
    train(config, "cpu")
    forget(config)
    train(tiny_config({**settings, "training.epochs": 4}), "cpu", "auto")
    kept = {name for name in names(f"{place}/run") if name.startswith("checkpoints/checkpoint_") and name.endswith("tar")}
    assert kept == {"checkpoints/checkpoint_epoch_3.pth.tar", "checkpoints/checkpoint_epoch_4.pth.tar"}


def test_second_run_of_the_same_name_moves_the_first_aside_behind_the_url(tiny_config: ConfigFactory, place: str) -> None:
    config = tiny_config({**SMALL, "training.checkpoint_dir": place, "training.max_steps": 1})
    train(config, "cpu")
    first = load_checkpoint(f"{place}/run/checkpoints/last.pth.tar")
    train(config, "cpu")
    runs = {name.split("/")[0] for name in names(place)}
    (aside,) = runs - {"run"}
    assert aside.startswith("run.")
    assert identical(load_checkpoint(f"{place}/{aside}/checkpoints/last.pth.tar")["state_dict"], first["state_dict"])


def test_named_checkpoint_behind_a_url_goes_on_in_its_own_folder(
    tiny_config: ConfigFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    from paligemma_vla.cli.train import add_arguments

    config = tiny_config()
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    url = "s3://bucket/some/where/name/checkpoints/last.pth.tar"
    resolved = resolve_config(parser.parse_args(["--config_path", str(tmp_path / "c.yaml"), "--resume_checkpoint", url]))
    assert (resolved.training.checkpoint_dir, resolved.training.experiment_name) == ("s3://bucket/some/where", "name")
    assert resolved.run_url == "s3://bucket/some/where/name"


def test_store_that_fails_in_mid_run_is_told_and_made_up_for(
    tiny_config: ConfigFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy, calls = Mirror._copy, []

    def fails_at_first(self: Mirror, path: Path, name: str) -> None:
        calls.append(name)
        if len(calls) < 2:
            raise StorageError(f"{name}: no route to host")
        copy(self, path, name)

    monkeypatch.setattr(Mirror, "_copy", fails_at_first)
    place = f"file://{tmp_path}/store"
    with caplog.at_level(logging.ERROR):
        train(tiny_config({**SMALL, "training.checkpoint_dir": place}), "cpu")
    assert "no route to host; training goes on" in caplog.text
    assert load_checkpoint(f"{place}/run/checkpoints/last.pth.tar")["epoch"] == 2


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s3://no-such-bucket-here/x"])
def test_url_that_cannot_be_reached_is_one_error(tiny_config: ConfigFactory, s3: str, url: str) -> None:
    with pytest.raises(StorageError, match=f"{url}.*cannot be reached"):
        train(tiny_config({"training.checkpoint_dir": url}), "cpu", "auto")
