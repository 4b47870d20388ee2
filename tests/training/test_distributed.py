"""Two gloo processes equal one, started as a user starts them; an error in a rank is one message."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from conftest import ConfigFactory
from machines import children, wait_for
from paligemma_vla.cli.train import find_checkpoint
from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import CommunicationError, ConfigError, TrainingError, VLAError
from paligemma_vla.training import distributed
from paligemma_vla.training.distributed import Distributed
from ranks import ALONE, last, start_ranks, train_on
from support import identical
from zygote import Zygote

ROOT = Path(__file__).parent.parent.parent
MISSING = "mps" if not torch.backends.mps.is_available() else "cuda"
# Each of these runs is ended by its test.
LONG_RUN = {
    "training.epochs": 2000,
    "training.validate_every_n_steps": 100_000,
    "training.save_every_n_epochs": 2000,
    "training.save_every_n_steps": 1,
}


def start(config: VLAConfig, folder: Path, *flags: str) -> subprocess.Popen[str]:
    """`main_train_ddp.py --nproc 2`, in a process group of its own."""
    path = folder / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, str(ROOT / "main_train_ddp.py"), "--config_path", str(path), "--device", "cpu", "--nproc", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *flags], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def saved(config: VLAConfig) -> Path:
    return config.run_dir / "checkpoints" / "last.pth.tar"


def test_processes_that_are_terminated_save_together_and_go_on_exactly(
    zygote: Zygote, tiny_config: ConfigFactory, tmp_path: Path
) -> None:
    """SIGTERM to the whole group, so that a rank gets it twice: from whoever sent it, and from its launcher."""
    settings = {"training.epochs": 15, "training.validate_every_n_steps": 1000, "training.save_every_n_epochs": 3}
    undisturbed, cut = (tiny_config({**settings, "training.experiment_name": name}) for name in ("undisturbed", "cut"))
    train_on(zygote, undisturbed, 2, tmp_path)
    running = start(cut, tmp_path)
    wait_for(saved(cut).exists)
    os.killpg(running.pid, signal.SIGTERM)
    stderr = running.communicate(timeout=240)[1]
    assert running.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert stderr.count("stopped by ") == 1
    assert 0 < last(cut)["step"] < 15 * 5
    train_on(zygote, cut, 2, tmp_path, "--resume_checkpoint", "auto")
    for key in ("state_dict", "optimizer", "ema", "step"):
        assert identical(last(cut)[key], last(undisturbed)[key]), key


def test_error_in_the_ranks_is_one_message(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    failed = start(tiny_config(), tmp_path, "--device", MISSING)
    stderr = failed.communicate(timeout=240)[1]
    assert failed.returncode == 2, stderr
    assert stderr.startswith(f"error: --device {MISSING}: not available here")
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("number", "patience"), [(signal.SIGKILL, "60"), (signal.SIGSTOP, "3")], ids=["dies", "hangs"])
def test_others_end_with_one_message_when_a_rank_is_gone(
    zygote: Zygote, tiny_config: ConfigFactory, tmp_path: Path, number: int, patience: str
) -> None:
    """NCCL_TIMEOUT is how long they wait for one that hangs."""
    config = tiny_config(LONG_RUN)
    ranks = start_ranks(zygote, config, 3, tmp_path, NCCL_TIMEOUT=patience)
    wait_for(saved(config).exists)
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
    config = tiny_config(LONG_RUN)
    running = start(config, tmp_path, "--max_restarts", "1")

    def started() -> list[dict[str, Any]]:
        path = config.run_dir / "environment.json"
        return json.loads(path.read_text())["starts"] if path.exists() else []

    for count in (1, 2):
        wait_for(lambda count=count: len(started()) >= count and saved(config).exists())
        ranks = [each for each in children(running.pid) if "spawn_main" in Path(f"/proc/{each}/cmdline").read_text()]
        os.kill(max(ranks), signal.SIGKILL)
    stderr = running.communicate(timeout=240)[1]
    assert running.returncode == 2
    assert started()[1]["step"] > 0  # it went on by itself
    assert "rank 1 " in next(line for line in stderr.splitlines() if line.startswith("error: ")), stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"LOCAL_RANK": ""}, ConfigError, "LOCAL_RANK"),
        ({"MASTER_PORT": "999999"}, CommunicationError, "MASTER_PORT 999999"),
        ({"NCCL_TIMEOUT": "1"}, CommunicationError, r"rank 1: the 2 processes did not find each other at MASTER_ADDR 127\.0"),
    ],
)
def test_rank_that_finds_no_group_says_where_it_looked(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], error: type[VLAError], words: str
) -> None:
    group = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    for key, value in {**group, **changes}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(error, match=words):
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
    """One at a time, each has its turn before."""
    Together.values, Together.meeting = [None] * 3, threading.Barrier(3)
    begun: list[int] = []

    def act(rank: int) -> str:
        process = Together(rank, 3, torch.device("cpu"), rank, 3)

        def build() -> str:
            with process.one_at_a_time():
                begun.append(rank)
                if rank == failing:
                    raise RuntimeError("its own")
            return "done"

        try:
            return process.on_all(build) or ""
        except (RuntimeError, TrainingError) as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(act, range(3)))
    assert begun == [0, 1, 2]
    theirs = "done" if failing is None else f"rank {failing}: its own"
    assert results == ["its own" if rank == failing else theirs for rank in range(3)]


def test_what_gloo_says_of_a_peer_that_is_gone_is_known() -> None:
    for text in ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer", "Application timeout caused pair closure"):
        with pytest.raises(CommunicationError, match=r"NCCL_TIMEOUT=1800"), distributed.explain_communication():
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="size mismatch"), distributed.explain_communication():
        raise RuntimeError("size mismatch")


def test_restart_goes_on_with_its_own_run_alone(
    tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, trained_run: Path
) -> None:
    """A run of the same name that another launcher made is none to go on with unasked."""
    config = tiny_config()
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "checkpoints").symlink_to(trained_run / "checkpoints")

    def restarted_by(launcher: str) -> tuple[Any, bool]:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/torchelastic_x/{launcher}/attempt_1/0/error.json")
        return find_checkpoint(config, None, None, ALONE)

    assert restarted_by("none_1a2b") == (None, False)
    own = {"starts": [{"launcher": "none_1a2b", "data": {"fingerprint": {"training": "x"}}}]}
    (config.run_dir / "environment.json").write_text(json.dumps(own))
    assert restarted_by("none_1a2b") == (config.run_dir / "checkpoints" / "checkpoint_epoch_2.pth.tar", True)
    assert restarted_by("none_3c4d") == (None, False)


def test_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"--device {MISSING}: not available here; available: .*cpu"):
        distributed.choose_device(MISSING)
