"""Two gloo processes equal one, started as a user starts them; an error in a rank is one message."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from machines import wait_for
from paligemma_vla.cli.train import find_checkpoint
from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import CommunicationError, ConfigError, VLAError
from paligemma_vla.training import distributed
from paligemma_vla.training.checkpoint import load_checkpoint
from paligemma_vla.training.distributed import Distributed
from ranks import ALONE, start_ranks, train_on
from support import distance, identical, read_metrics, train_here, write_episodes
from zygote import Zygote

ConfigFactory = Callable[..., VLAConfig]
ROOT = Path(__file__).parent.parent.parent


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def arguments(config: VLAConfig, folder: Path, *flags: str) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, str(ROOT / "main_train_ddp.py"), "--config_path", str(path), "--device", "cpu", "--nproc", "2"]
    return [*command, *flags]


def start(config: VLAConfig, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = arguments(config, folder, *flags)
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_two_processes_equal_one(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    """Two stages (DDP is wrapped anew), accumulation, and a last batch of one sample, which leaves a rank without any."""
    write_episodes(tmp_path / "train", lengths=(9, 2, 14, 8), cameras=2)  # 33 samples: the fifth batch of 8 has 1
    write_episodes(tmp_path / "val", lengths=(3, 38), cameras=2, seed=1)  # 41: a rank has more batches than the other
    overrides = {
        "data.train_parquet_files": str(tmp_path / "train"),
        "data.val_parquet_files": str(tmp_path / "val"),
        "data.batch_size": 8,
        "training.val_action_samples": 16,
        "training.stages": [{"train": "head", "steps": 3}, {"train": "all"}],
        "training.gradient_accumulation_steps": 2,
    }
    one = tiny_config({**overrides, "training.experiment_name": "one"}, cameras=2)
    two = tiny_config({**overrides, "training.experiment_name": "two"}, cameras=2)
    finished = start(two, tmp_path)
    assert finished.returncode == 0, finished.stderr
    train_here(one)

    lines = [read_metrics(config.run_dir) for config in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 10 + 2
    for a, b in zip(*lines, strict=True):
        assert a["step"] == b["step"]
        for key in ("train/batch_loss", "train/lr", "val/epoch_loss", "val/action_mae"):
            assert (key in a) == (key in b)
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-5), key
        if "train/grad_norm" in a:
            assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-4)
    saved = [load_checkpoint(config.run_dir / "checkpoints" / "last.pth.tar") for config in (one, two)]
    assert saved[0]["state_dict"].keys() == saved[1]["state_dict"].keys()
    assert distance(saved[1]["state_dict"].values(), saved[0]["state_dict"].values()) < 1e-4
    assert distance(saved[1]["ema"]["average"].values(), saved[0]["ema"]["average"].values()) < 1e-4
    log = (two.run_dir / "logs" / "train.log").read_text()
    assert log.count("finished;") == 1  # rank 0 alone speaks


def test_processes_that_are_terminated_save_together_and_go_on_exactly(
    zygote: Zygote, tiny_config: ConfigFactory, tmp_path: Path
) -> None:
    """SIGTERM to the whole group, so that a rank gets it twice: from whoever sent it, and from its launcher."""
    settings = {"training.epochs": 30, "training.validate_every_n_steps": 1000, "training.save_every_n_epochs": 3}
    configs = [tiny_config({**settings, "training.experiment_name": name}) for name in ("whole", "cut")]
    whole, cut = configs
    train_on(zygote, whole, 2, tmp_path)
    running = subprocess.Popen(
        arguments(cut, tmp_path), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for((cut.run_dir / "checkpoints" / "last.pth.tar").exists)
    os.killpg(running.pid, signal.SIGTERM)
    stderr = running.communicate(timeout=60)[1]
    assert running.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert stderr.count("stopped by ") == 1
    saved = load_checkpoint(cut.run_dir / "checkpoints" / "last.pth.tar")
    assert 0 < saved["step"] < 30 * 5
    train_on(zygote, cut, 2, tmp_path, "--resume_checkpoint", "auto")
    expected, got = (load_checkpoint(config.run_dir / "checkpoints" / "last.pth.tar") for config in configs)
    for key in ("state_dict", "optimizer", "ema", "step"):
        assert identical(got[key], expected[key]), key


def test_error_in_the_ranks_is_one_message(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    config = tiny_config({"data.normalization_stats_path": str(tmp_path / "missing.json")})
    failed = start(config, tmp_path)
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.startswith(f"error: {tmp_path / 'missing.json'}: ")
    assert "Traceback" not in failed.stderr


def started(config: VLAConfig) -> list[dict[str, Any]]:
    """The starts that a run has recorded."""
    path = config.run_dir / "environment.json"
    return json.loads(path.read_text())["starts"] if path.exists() else []


LONG_RUN = {"training.epochs": 2000, "training.validate_every_n_steps": 100_000, "training.save_every_n_epochs": 2000}


@pytest.mark.parametrize(("number", "patience"), [(signal.SIGKILL, "60"), (signal.SIGSTOP, "3")], ids=["dies", "hangs"])
def test_others_end_with_one_message_when_a_rank_is_gone(
    zygote: Zygote, tiny_config: ConfigFactory, tmp_path: Path, number: int, patience: str
) -> None:
    """NCCL_TIMEOUT is how long they wait for one that hangs."""
    config = tiny_config({**LONG_RUN, "training.save_every_n_steps": 1})
    ranks = start_ranks(zygote, config, 3, tmp_path, NCCL_TIMEOUT=patience)
    wait_for((config.run_dir / "checkpoints" / "last.pth.tar").exists)
    os.killpg(ranks[1].pid, number)
    results = [ranks[0].wait(40), ranks[2].wait(40)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(ranks[1].pid, signal.SIGKILL)
    ranks[1].wait(5)
    for result in results:
        assert result.status == 2, result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: communication between processes failed ")
        assert "Traceback" not in result.stderr


def test_launcher_starts_ranks_again_and_names_the_one_that_was_killed(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    config = tiny_config({**LONG_RUN, "training.save_every_n_steps": 1})
    command = arguments(config, tmp_path, "--max_restarts", "1")
    running = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    last = config.run_dir / "checkpoints" / "last.pth.tar"
    for start in (1, 2):
        wait_for(lambda start=start: len(started(config)) >= start and last.exists())
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        spawned = [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
        os.kill(max(spawned), signal.SIGKILL)
    stderr = running.communicate(timeout=60)[1]
    assert running.returncode == 2
    assert started(config)[1]["step"] > 0  # it went on by itself
    assert "rank 1 " in next(line for line in stderr.splitlines() if line.startswith("error: ")), stderr
    assert "Traceback" not in stderr


GROUP = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", ""), ("MASTER_PORT", "999999"), ("NCCL_TIMEOUT", "soon")])
def test_join_refuses_an_environment_that_no_launcher_makes(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for key, given in {**GROUP, name: value}.items():
        monkeypatch.setenv(key, given)
    with pytest.raises(ConfigError, match=name):
        distributed.join("cpu")


def test_rank_that_finds_nobody_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, given in {**GROUP, "MASTER_PORT": str(get_free_port()), "NCCL_TIMEOUT": "1"}.items():
        monkeypatch.setenv(key, given)
    with pytest.raises(CommunicationError, match=r"rank 1: the 2 processes did not find each other at MASTER_ADDR 127\.0"):
        distributed.join("cpu")


class Together(Distributed):
    """One of several threads that stand for processes of a machine. values: what each gives to `all_gather`."""

    values: ClassVar[list[Any]]
    meeting: ClassVar[threading.Barrier]

    def all_gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier()
        values = list(self.values)
        self.barrier()
        return values

    def barrier(self) -> None:
        self.meeting.wait(10)


@pytest.mark.parametrize("failing", [None, 0, 2])
def test_what_one_process_fails_with_ends_all(failing: int | None) -> None:
    """None waits for it somewhere else; one at a time, each has its turn before."""
    Together.values, Together.meeting = [None] * 3, threading.Barrier(3)
    begun: list[int] = []
    inside: list[int] = []

    def act(rank: int) -> str:
        process = Together(rank, 3, torch.device("cpu"), rank, 3)
        try:
            with process.all_or_none(), process.one_at_a_time():
                begun.append(rank)
                inside.append(rank)
                assert len(inside) == 1
                time.sleep(0.01)
                inside.remove(rank)
                if rank == failing:
                    raise ConfigError("its own")
        except VLAError as error:
            return str(error)
        return "done"

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(act, range(3)))
    assert begun == [0, 1, 2]
    if failing is None:
        assert results == ["done"] * 3
    else:
        assert results == [f"rank {failing}: its own" if rank != failing else "its own" for rank in range(3)]


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer",
        "Application timeout caused pair closure",
    ],
)
def test_what_gloo_says_of_a_peer_that_is_gone_is_known(text: str) -> None:
    with pytest.raises(CommunicationError, match=r"NCCL_TIMEOUT=1800"), distributed.explain_communication():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="size mismatch"), distributed.explain_communication():
        raise RuntimeError("size mismatch")


def test_restart_goes_on_with_its_own_run_alone(
    tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, trained_run: Path
) -> None:
    """A run of the same name that another launcher made is none to go on with unasked."""
    config = tiny_config({"training.checkpoint_dir": str(trained_run.parent), "training.experiment_name": trained_run.name})
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_1a2b/attempt_0/1/error.json")
    assert find_checkpoint(config, None, None, ALONE) == (None, False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_1a2b/attempt_1/0/error.json")
    own = {"starts": [{"launcher": distributed.launcher_id(), "data": {"fingerprint": {"training": "x"}}}]}
    before = (trained_run / "environment.json").read_bytes()
    (trained_run / "environment.json").write_text(json.dumps(own))
    try:
        assert find_checkpoint(config, None, None, ALONE)[0] == trained_run / "checkpoints" / "checkpoint_epoch_2.pth.tar"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_y/none_3c4d/attempt_1/0/error.json")
        assert find_checkpoint(config, None, None, ALONE) == (None, False)
    finally:
        (trained_run / "environment.json").write_bytes(before)


def test_join_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = distributed.join("cpu")
    assert (alone.rank, alone.world_size, alone.main, str(alone.device)) == (0, 1, True, "cpu")
    assert alone.all_reduce(torch.tensor(3.0)) == 3
    alone.barrier()
    alone.close()


def test_device_that_is_not_there_is_refused() -> None:
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ConfigError, match=f"--device {missing}: not available here; available: .*cpu"):
        distributed.choose_device(missing)
