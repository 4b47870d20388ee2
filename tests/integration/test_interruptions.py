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

from machines import wait_for
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


def logged_step(config: VLAConfig) -> int:
    """The last step that a run has logged."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


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


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 0), pytest.param(20, 1, marks=pytest.mark.long), pytest.param(20, 2, marks=pytest.mark.long)]
)
def test_run_killed_at_random_moments_ends_bit_for_bit_like_an_undisturbed_one(
    undisturbed: Undisturbed, zygote: Zygote, tmp_path: Path, kills: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    config = named(undisturbed, f"killed_{seed}")
    checkpoints = config.run_dir / "checkpoints"
    command = arguments(config, tmp_path)
    done = in_saves = 0
    while done < kills:
        before = {path.name for path in checkpoints.glob("checkpoint_epoch_*.pth.tar")}
        child = zygote.start(command, tmp_path)
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
    finished = zygote.run(command, tmp_path)
    assert finished.status == 0, finished.stderr
    assert_same_run(config.run_dir, undisturbed)
    assert not list(checkpoints.glob(".*"))


@pytest.mark.parametrize(
    ("number", "status", "word", "workers", "hangs"),
    [(signal.SIGTERM, 143, "SIGTERM", 2, True), (signal.SIGINT, 130, "Ctrl-C", 1, False)],
)
def test_run_that_is_told_to_stop_saves_and_says_how_to_go_on(
    undisturbed: Undisturbed, zygote: Zygote, tmp_path: Path, number: int, status: int, word: str, workers: int, hangs: bool
) -> None:
    """The signal goes to the whole group, as a terminal and a scheduler send it. What the message says is then done.

    hangs: the loader processes, as on a disk that does not answer.
    """
    config = named(undisturbed, f"told_{status}_{workers}", num_workers=workers)
    child = zygote.start(arguments(config, tmp_path), tmp_path)
    wait_for(lambda: logged_step(config) >= 9)
    if hangs:
        facts = {int(path.parent.name): path.read_text() for path in Path("/proc").glob("[0-9]*/stat")}
        parents = {pid: tuple(map(int, fact.rpartition(")")[2].split()[1:3])) for pid, fact in facts.items()}
        loaders = [pid for pid, (parent, group) in parents.items() if group == child.pid not in (pid, parent)]
        assert len(loaders) == workers
        for pid in loaders:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1)  # until what they had prepared is used up
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
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what is stopped does not end by itself


def test_killed_run_leaves_no_loader_behind(undisturbed: Undisturbed, zygote: Zygote, tmp_path: Path) -> None:
    config = named(undisturbed, "orphans", num_workers=2)
    child = zygote.start(arguments(config, tmp_path), tmp_path)
    wait_for(lambda: logged_step(config) >= 1)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(60)
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.killpg(child.pid, 0) is not None, seconds=30)


@contextlib.contextmanager
def full_disk(child: Child) -> Iterator[None]:
    """Within the block `child` can write small files, but no checkpoint: a limit on file sizes stands for the full disk."""
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    yield
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, free)


@pytest.mark.parametrize(
    ("kind", "suffix", "ends"),
    [("file", "pth.tar", False), ("file", "pth.tar", True), ("sharded", "dcp", False), ("sharded", "dcp", True)],
)
def test_run_on_a_full_disk_loses_no_checkpoint(
    undisturbed: Undisturbed, zygote: Zygote, tmp_path: Path, kind: str, suffix: str, ends: bool
) -> None:
    """It says so and goes on. It ends when the disk is full to its end, or at once when it was so configured."""
    config = named(undisturbed, f"full_{kind}_{ends}", kind)
    stop = ["--set", f"training.stop_when_save_fails={str(ends and kind == 'file').lower()}"]
    child = zygote.start(arguments(config, tmp_path, *stop), tmp_path)
    saved, log = config.run_dir / "checkpoints" / f"last.{suffix}", config.run_dir / "logs" / "train.log"
    wait_for(lambda: logged_step(config) >= 3 and saved.exists())
    with full_disk(child):
        if ends:
            result = child.wait(60)
        else:
            wait_for(lambda: "cannot be written" in log.read_text())
        assert load_checkpoint(saved)["step"] >= 2
    if ends:
        assert not list(saved.parent.glob(".*"))
        finished = zygote.run(arguments(config, tmp_path), tmp_path)
        assert finished.status == 0, finished.stderr
    else:
        result = child.wait(60)
    assert result.status == (2 if ends else 0), result.stderr
    assert re.search(rf"checkpoint_\w+\.{suffix}: cannot be written \(.*File too large", result.stderr)
    assert "Traceback" not in result.stderr
    assert_same_run(config.run_dir, undisturbed)
