"""Two gloo processes equal one, started as a user starts them; an error in a rank is one message."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from paligemma_vla.cli.train import find_resume_again
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
    deadline = time.monotonic() + 60
    while not (cut.run_dir / "checkpoints" / "last.pth.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
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
    assert "missing.json: no such statistics file" in failed.stderr
    assert "Traceback" not in failed.stderr


def wait_for_save(config: VLAConfig) -> None:
    deadline = time.monotonic() + 60
    while not (config.run_dir / "checkpoints" / "last.pth.tar").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def started(config: VLAConfig) -> list[dict[str, Any]]:
    """The starts that a run has recorded."""
    path = config.run_dir / "environment.json"
    return json.loads(path.read_text())["starts"] if path.exists() else []


LONG_RUN = {"training.epochs": 2000, "training.validate_every_n_steps": 100_000, "training.save_every_n_epochs": 2000}


@pytest.mark.parametrize(("number", "patience"), [(signal.SIGKILL, "60"), (signal.SIGSTOP, "3")], ids=["dies", "hangs"])
def test_others_name_the_rank_that_is_gone(
    zygote: Zygote, tiny_config: ConfigFactory, tmp_path: Path, number: int, patience: str
) -> None:
    """NCCL_TIMEOUT is how long they wait for one that hangs."""
    config = tiny_config({**LONG_RUN, "training.save_every_n_steps": 1})
    ranks = start_ranks(zygote, config, 3, tmp_path, NCCL_TIMEOUT=patience)
    wait_for_save(config)
    os.killpg(ranks[1].pid, number)
    results = [ranks[0].wait(40), ranks[2].wait(40)]
    os.killpg(ranks[1].pid, signal.SIGKILL)
    ranks[1].wait(5)
    for result in results:
        assert result.status == 2, result.stderr
        named = f"rank 1 ({socket.gethostname()}, process {ranks[1].pid})"
        assert f"{named} does not answer: it was killed, or hangs" in result.stderr
        assert "Traceback" not in result.stderr


def test_others_tell_why_a_rank_ended(zygote: Zygote, tiny_config: ConfigFactory, tmp_path: Path) -> None:
    """Each rank reads its own samples, so one alone meets a damaged one."""
    write_episodes(tmp_path / "train", lengths=(40, 40))
    own = {"data.train_parquet_files": str(tmp_path / "train"), "data.val_fraction": 0.0, "data.allow_other_statistics": True}
    config = tiny_config({**LONG_RUN, **own, "data.batch_size": 2})
    table = pq.read_table(path := next((tmp_path / "train").glob("*.parquet")))
    images = table["image_1_bytes"].to_pylist()
    images[5:15] = [b"no image"] * 10
    place = table.column_names.index("image_1_bytes")
    pq.write_table(table.set_column(place, "image_1_bytes", pa.array(images, pa.binary())), path)
    results = [child.wait(20) for child in start_ranks(zygote, config, 2, tmp_path)]
    assert [result.status for result in results] == [2, 2], [result.stderr for result in results]
    told = "image_1_bytes"
    met = next(number for number, result in enumerate(results) if "communication between processes" not in result.stderr)
    assert told in results[met].stderr
    assert f"rank {met} ({socket.gethostname()}" in results[1 - met].stderr
    assert told in results[1 - met].stderr


def test_launcher_starts_ranks_again_and_names_the_one_that_was_killed(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    config = tiny_config({**LONG_RUN, "training.save_every_n_steps": 1})
    command = arguments(config, tmp_path, "--max_restarts", "1")
    running = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    for start in (1, 2):
        deadline = time.monotonic() + 90
        while len(started(config)) < start or not (config.run_dir / "checkpoints" / "last.pth.tar").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        spawned = [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
        os.kill(max(spawned), signal.SIGKILL)
    stderr = running.communicate(timeout=60)[1]
    assert running.returncode == 2
    assert started(config)[1]["step"] > 0  # it went on by itself
    assert "rank 1 " in next(line for line in stderr.splitlines() if line.startswith("error: ")), stderr
    assert "Traceback" not in stderr


GROUP = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "5", "RANK: got '5' in the environment, expected a whole number from 0 to 1"),
        ("LOCAL_RANK", "", "LOCAL_RANK: not set, but WORLD_SIZE is 2"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE: got '0'"),
        ("MASTER_PORT", "999999", "MASTER_PORT: got '999999'"),
        ("NCCL_TIMEOUT", "0", "NCCL_TIMEOUT: got '0'"),
        ("NCCL_TIMEOUT", "99999999999999", "NCCL_TIMEOUT: got '99999999999999'"),
        ("WORLD_SIZE", "-2", "WORLD_SIZE: got '-2'"),
    ],
)
def test_join_refuses_an_environment_that_no_launcher_makes(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    for key, given in {**GROUP, name: value}.items():
        monkeypatch.setenv(key, given)
    with pytest.raises(ConfigError) as caught:
        distributed.join("cpu")
    assert words in str(caught.value)


def test_rank_that_finds_nobody_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, given in {**GROUP, "MASTER_PORT": str(get_free_port()), "NCCL_TIMEOUT": "1"}.items():
        monkeypatch.setenv(key, given)
    with pytest.raises(CommunicationError, match=r"rank 1: the 2 processes did not find each other at MASTER_ADDR 127\.0"):
        distributed.join("cpu")


class Together(Distributed):
    """One of several threads that stand for processes of a machine. said: what each gives to `gather`."""

    said: ClassVar[list[Any]]
    meeting: ClassVar[threading.Barrier]

    def all_gather(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.meeting.wait(10)
        values = list(self.said)
        self.meeting.wait(10)
        return values


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("failing", [None, 0, 1, 2])
def test_what_one_process_fails_with_ends_all(in_turn: bool, failing: int | None) -> None:
    """At once: none waits for it somewhere else. In turn, those whose turn has not come do not begin."""
    Together.said, Together.meeting = [None] * 3, threading.Barrier(3)
    begun: list[int] = []
    inside: list[int] = []

    def act(rank: int) -> str:
        process = Together(rank, 3, torch.device("cpu"), rank, 3)
        try:
            with process.in_turn_here() if in_turn else process.all_or_none():
                begun.append(rank)
                inside.append(rank)
                assert not in_turn or len(inside) == 1
                time.sleep(0.01)
                inside.remove(rank)
                if rank == failing:
                    raise ConfigError("its own")
        except VLAError as error:
            return str(error)
        return "done"

    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(act, range(3)))
    if failing is None:
        assert told == ["done"] * 3
        assert not in_turn or begun == [0, 1, 2]
    else:
        assert told == [f"rank {failing}: its own" if rank != failing else "its own" for rank in range(3)]
        assert not in_turn or begun == list(range(failing + 1))


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer",
        "Application timeout caused pair closure",
    ],
)
def test_what_gloo_says_of_a_peer_that_is_gone_is_known(text: str) -> None:
    assert distributed.is_communication(RuntimeError(text))
    assert not distributed.is_communication(ValueError(text))
    assert not distributed.is_communication(RuntimeError("size mismatch"))


def test_machines_of_unlike_size_are_told_before_anything_is_loaded(
    zygote: Zygote, tiny_config: ConfigFactory, tmp_path: Path
) -> None:
    """Each would choose other groups, and wait for the others."""
    config = tiny_config({"training.parallel": "hsdp"})
    (path := tmp_path / "c.yaml").write_text(config.to_yaml())
    shared = {**GROUP, "MASTER_PORT": str(get_free_port()), "LOCAL_RANK": "0"}
    command = ["train", "--config_path", str(path), "--device", "cpu"]
    ranks = [
        zygote.start(command, tmp_path, {**shared, "RANK": str(rank), "LOCAL_WORLD_SIZE": str(2 - rank)}) for rank in range(2)
    ]
    for result in [rank.wait(60) for rank in ranks]:
        assert result.status == 2, result.stderr
        assert "training.shard_processes: got null, expected a number: the machines have 1 to 2 processes each" in result.stderr


def test_checkpoint_that_one_rank_finds_damaged_is_told_by_all(
    zygote: Zygote, tiny_config: ConfigFactory, tmp_path: Path, checkpoint: Path
) -> None:
    damaged = tmp_path / "damaged.pth.tar"
    damaged.write_bytes(checkpoint.read_bytes()[:-1000])
    ranks = start_ranks(zygote, tiny_config(), 2, tmp_path, "--resume_checkpoint", str(damaged))
    for result in [rank.wait(60) for rank in ranks]:
        assert result.status == 2
        assert "damaged.pth.tar: cannot be read" in result.stderr
        assert "internal error" not in result.stderr


def test_restart_goes_on_with_its_own_run_alone(
    tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, trained_run: Path
) -> None:
    """A run of the same name that another launcher made is none to go on with unasked."""
    config = tiny_config({"training.checkpoint_dir": str(trained_run.parent), "training.experiment_name": trained_run.name})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert find_resume_again(config, None, None, ALONE).resume is None
    own = {"starts": [{"launcher": distributed.launcher(), "data": {"fingerprint": {"training": "x"}}}]}
    before = (trained_run / "environment.json").read_bytes()
    (trained_run / "environment.json").write_text(json.dumps(own))
    try:
        assert find_resume_again(config, None, None, ALONE).resume == trained_run / "checkpoints" / "checkpoint_epoch_2.pth.tar"
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        assert find_resume_again(config, None, None, ALONE).resume is None
    finally:
        (trained_run / "environment.json").write_bytes(before)


def test_join_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = distributed.join("cpu")
    assert (alone.rank, alone.world_size, alone.main, str(alone.device)) == (0, 1, True, "cpu")
    assert alone.sum(torch.tensor(3.0)) == 3
    alone.barrier()
    alone.close()


def test_device_that_is_not_there_is_refused() -> None:
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ConfigError, match=f"--device {missing}: not available here; available: .*cpu"):
        distributed.choose_device(missing)
