"""A run that is killed, terminated or interrupted, and goes on, ends where an undisturbed one ends, to the last bit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_vla.config import VLAConfig
from paligemma_vla.training.checkpoint import load_checkpoint
from support import identical, read_metrics
from zygote import Child, Zygote

ConfigFactory = Callable[..., VLAConfig]
SETTINGS = {
    "training.epochs": 4,
    "training.save_every_n_steps": 2,
    "training.gradient_accumulation_steps": 2,
    "training.stages": [{"train": "head", "steps": 7}, {"train": "all"}],
    "training.validate_every_n_steps": 6,
    "data.batch_size": 8,
}
EXACT = ("state_dict", "optimizer", "ema", "lr_scheduler", "rng", "watch", "best_metric", "stale", "step", "epoch", "data")


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to: its folder, and the seconds it took."""

    config: VLAConfig
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(session_config: ConfigFactory, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    config = session_config({**SETTINGS, "training.experiment_name": "undisturbed"}, cameras=2)
    result = zygote.run(arguments(config, tmp_path_factory.mktemp("configs")), Path.cwd())
    assert result.status == 0, result.stderr
    return Undisturbed(config, result.seconds)


def arguments(config: VLAConfig, folder: Path, *flags: str) -> list[str]:
    path = folder / f"{config.training.experiment_name}.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return ["train", "--config_path", str(path), "--device", "cpu", "--resume_checkpoint", "auto", *flags]


def named(undisturbed: Undisturbed, name: str, checkpoint_format: str | None = None, **data: Any) -> VLAConfig:
    """The undisturbed run's configuration under another name."""
    config = undisturbed.config
    training = config.training.model_copy(update={"experiment_name": name, "checkpoint_format": checkpoint_format})
    return config.model_copy(update={"training": training, "data": config.data.model_copy(update=data)})


def assert_same_run(run_dir: Path, undisturbed: Undisturbed) -> None:
    runs = (undisturbed.config.run_dir, run_dir)
    for name in ("last", "model_best"):
        expected, got = (load_checkpoint(folder / "checkpoints" / f"{name}.pth.tar") for folder in runs)
        for key in EXACT:
            assert identical(got[key], expected[key]), (name, key)
    assert read_metrics(run_dir) == read_metrics(undisturbed.config.run_dir)


def wait_for_step(run_dir: Path, step: int) -> None:
    """Until the run has logged `step`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, IndexError, ValueError):
            if json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] >= step:
                return
        time.sleep(0.005)
    raise AssertionError(f"{run_dir}: step {step} was not reached")


def wait_for_path(path: Path) -> None:
    """Until it is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for(path: Path, text: str) -> None:
    """Until the file has `text` in it."""
    deadline = time.monotonic() + 60
    while text not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill(child: Child, run_dir: Path, rng: np.random.Generator, seconds: float, in_a_save: bool) -> bool:
    """Kill -9 at a random moment, or as soon as a checkpoint is being written. False when it had ended before."""
    deadline = time.monotonic() + rng.uniform(0.0, seconds)
    while time.monotonic() < deadline or in_a_save:
        if in_a_save and any((run_dir / "checkpoints").glob(".*.tmp")):
            break
        if time.monotonic() > deadline + seconds:  # it does not save any more
            break
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait(60).status == -signal.SIGKILL


def kill_campaign(undisturbed: Undisturbed, zygote: Zygote, folder: Path, kills: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = named(undisturbed, f"killed_{seed}")
    checkpoints = config.run_dir / "checkpoints"
    command = arguments(config, folder)
    done = in_saves = 0
    while done < kills:
        before = {path.name for path in checkpoints.glob("checkpoint_epoch_*.pth.tar")}
        child = zygote.start(command, folder)
        if not kill(child, config.run_dir, rng, 0.9 * undisturbed.seconds, in_a_save=done % 2 == 1):
            assert_same_run(config.run_dir, undisturbed)  # it got to its end: once more from the start
            shutil.rmtree(config.run_dir)
            continue
        done += 1
        in_saves += any(checkpoints.glob(".*.tmp"))
        names = {path.name for path in checkpoints.glob("checkpoint_epoch_*.pth.tar")}
        assert before <= names, "a finished checkpoint is gone"
        for name in names:
            expected = load_checkpoint(undisturbed.config.run_dir / "checkpoints" / name)
            assert identical(load_checkpoint(checkpoints / name)["state_dict"], expected["state_dict"])
    assert in_saves, "no kill came while a checkpoint was being written"
    finished = zygote.run(command, folder)
    assert finished.status == 0, finished.stderr
    assert_same_run(config.run_dir, undisturbed)
    assert not list(checkpoints.glob(".*"))


def test_run_killed_at_random_moments_ends_bit_for_bit_like_an_undisturbed_one(
    undisturbed: Undisturbed, zygote: Zygote, tmp_path: Path
) -> None:
    kill_campaign(undisturbed, zygote, tmp_path, kills=3, seed=0)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_run_killed_twenty_times_ends_bit_for_bit_like_an_undisturbed_one(
    undisturbed: Undisturbed, zygote: Zygote, tmp_path: Path, seed: int
) -> None:
    kill_campaign(undisturbed, zygote, tmp_path, kills=20, seed=seed)


@pytest.mark.parametrize(
    ("number", "status", "word", "workers"), [(signal.SIGTERM, 143, "SIGTERM", 1), (signal.SIGINT, 130, "Ctrl-C", 0)]
)
def test_run_that_is_told_to_stop_saves_and_says_how_to_go_on(
    undisturbed: Undisturbed, zygote: Zygote, tmp_path: Path, number: int, status: int, word: str, workers: int
) -> None:
    """The signal goes to the whole group, as a terminal and a scheduler send it. What the message says is then done."""
    config = named(undisturbed, f"told_{status}", num_workers=workers)
    child = zygote.start(arguments(config, tmp_path), tmp_path)
    wait_for_step(config.run_dir, 9)
    os.killpg(child.pid, number)
    stopped = child.wait(60)
    assert stopped.status == status, stopped.stderr
    message = re.search(
        rf"stopped by {word} after step (\d+) of \d+; saved as (\S+); go on with\n  paligemma-vla (.*)", stopped.stderr
    )
    assert message is not None, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert load_checkpoint(message[2])["step"] == int(message[1]) >= 9
    finished = zygote.run([*shlex.split(message[3]), "--device", "cpu"], tmp_path)
    assert finished.status == 0, finished.stderr
    assert_same_run(config.run_dir, undisturbed)


def test_killed_run_leaves_no_loader_behind(undisturbed: Undisturbed, zygote: Zygote, tmp_path: Path) -> None:
    config = named(undisturbed, "orphans", num_workers=2)
    child = zygote.start(arguments(config, tmp_path), tmp_path)
    wait_for_step(config.run_dir, 1)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(60)
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(child.pid, 0)
            time.sleep(0.1)


@contextlib.contextmanager
def full_disk(child: Child) -> Iterator[None]:
    """Within the block `child` can write small files, but no checkpoint: a limit on file sizes stands for the full disk."""
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    yield
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, free)


@pytest.mark.parametrize(("kind", "suffix"), [("file", "pth.tar"), ("sharded", "dcp")])
def test_run_on_a_full_disk_says_so_and_goes_on(
    undisturbed: Undisturbed, zygote: Zygote, tmp_path: Path, kind: str, suffix: str
) -> None:
    config = named(undisturbed, f"full_{kind}", kind)
    child = zygote.start(arguments(config, tmp_path), tmp_path)
    wait_for_step(config.run_dir, 3)
    wait_for_path(config.run_dir / "checkpoints" / f"last.{suffix}")
    with full_disk(child):
        wait_for(config.run_dir / "logs" / "train.log", "cannot be written")
        assert load_checkpoint(config.run_dir / "checkpoints" / f"last.{suffix}")["step"] >= 2
    finished = child.wait(60)
    assert finished.status == 0, finished.stderr
    assert re.search(rf"checkpoint_\w+\.{suffix}: cannot be written \(.*File too large.*training goes on", finished.stderr)
    assert "Traceback" not in finished.stderr
    assert_same_run(config.run_dir, undisturbed)


@pytest.mark.parametrize(
    ("kind", "suffix", "flags"), [("file", "pth.tar", ("--set", "training.stop_when_save_fails=true")), ("sharded", "dcp", ())]
)
def test_run_that_cannot_be_saved_stops_with_its_old_checkpoints(
    undisturbed: Undisturbed, zygote: Zygote, tmp_path: Path, kind: str, suffix: str, flags: tuple[str, ...]
) -> None:
    """At once when configured so; at its end in any case."""
    config = named(undisturbed, f"unsaved_{kind}", kind)
    child = zygote.start(arguments(config, tmp_path, *flags), tmp_path)
    wait_for_step(config.run_dir, 3)
    wait_for_path(config.run_dir / "checkpoints" / f"last.{suffix}")
    with full_disk(child):
        stopped = child.wait(60)
    assert stopped.status == 2
    assert stopped.stderr.splitlines()[-1].startswith("error: ")
    assert re.search(r"cannot be written \(.*File too large", stopped.stderr.splitlines()[-1])
    assert load_checkpoint(config.run_dir / "checkpoints" / f"last.{suffix}")["step"] >= 2
    assert not list((config.run_dir / "checkpoints").glob(".*"))
    finished = zygote.run(arguments(config, tmp_path), tmp_path)
    assert finished.status == 0, finished.stderr
    assert_same_run(config.run_dir, undisturbed)
