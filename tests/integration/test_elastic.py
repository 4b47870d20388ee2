"""Ranks and whole launchers that are killed under torchrun: the run ends with the weights of one that nothing happened to."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

from machines import LENGTHS, SETTINGS, Node, assert_same, saved_step, wait_for
from paligemma_vla.config import VLAConfig
from ranks import Reference, last, train_on
from support import distance, write_episodes
from zygote import Zygote

ConfigFactory = Callable[..., VLAConfig]


@pytest.fixture(scope="module")
def undisturbed(session_config: ConfigFactory, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("elastic")
    write_episodes(folder / "data", lengths=LENGTHS)
    data = {"data.train_parquet_files": str(folder / "data"), "training.experiment_name": "undisturbed"}
    config = session_config({**SETTINGS, **data})
    train_on(zygote, config, 2, folder)
    return Reference(config, folder, zygote)


def alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def kill_one(node: Node, rng: np.random.Generator) -> bool:
    """Kill -9 one of the ranks; False when the run is over."""
    ranks = node.processes()
    if not ranks or node.ended:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(rng.choice(ranks)), signal.SIGKILL)
    wait_for(lambda: node.ended or not set(node.processes()) & set(ranks))
    return True


def kill_campaign(
    undisturbed: Reference, name: str, kills: int, expected: VLAConfig, changes: dict[str, Any] | None = None
) -> None:
    """Kill one rank or the other: at random moments of training, and now and then at any other; then let the run end, as the
    one that is expected has."""
    config = undisturbed.another(name, changes)
    rng, done = np.random.default_rng(kills), 0
    while True:
        with Node(config, undisturbed.folder, plain=True, port=get_free_port()) as node:
            while done < kills and not node.ended:
                node.wait_for_ranks()
                if rng.random() < 0.7:
                    node.wait_for_step(saved_step(config) + 1)
                    time.sleep(rng.uniform(0, 0.3))
                else:
                    time.sleep(rng.uniform(0, 12))
                done += kill_one(node, rng)
            assert node.process.wait(120) == 0, node.log[-5000:]
        assert_same(config, expected)
        if done >= kills:
            return
        shutil.rmtree(config.run_dir)  # it got to its end: once more from the start


@pytest.mark.timeout(300)
def test_ranks_killed_under_torchrun_end_bit_for_bit_like_undisturbed_ones(undisturbed: Reference) -> None:
    kill_campaign(undisturbed, "killed", 1, undisturbed.config)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("changes", [{}, {"training.parallel": "fsdp"}], ids=["ddp", "fsdp"])
def test_ranks_killed_thirty_times_end_bit_for_bit_like_undisturbed_ones(
    undisturbed: Reference, changes: dict[str, Any]
) -> None:
    expected = undisturbed.config
    if changes:
        expected = undisturbed.another("undisturbed_fsdp", changes)
        undisturbed.train(expected, 2)
    kill_campaign(undisturbed, f"killed_thirty_{len(changes)}", 30, expected, changes)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", [pytest.param(0, id="host", marks=pytest.mark.long), pytest.param(1, id="other")])
def test_launcher_of_a_whole_machine_is_killed_and_comes_back(undisturbed: Reference, victim: int) -> None:
    """Two machines of one rank each. The first keeps the rendezvous: without it the other gives up, and a scheduler starts
    both again."""
    config = undisturbed.another(f"agents_{victim}")
    port = get_free_port()
    machines = [Node(config, undisturbed.folder, nodes="2", port=port, host=number == 0, ranks=1) for number in range(2)]
    with machines[0] as first, machines[1] as second:
        first.wait_for_step(10)
        orphans = machines[victim].processes()
        machines[victim].process.kill()
        machines[victim].process.wait()
        wait_for(lambda: not any(alive(process) for process in orphans))
        if victim == 0:
            assert second.process.wait(120) != 0
        for machine in machines if victim == 0 else [second]:
            machine.__enter__()
        codes = [machine.process.wait(120) for machine in (first, second)]
        assert codes == [0, 0], first.log[-5000:]
    assert_same(config, undisturbed.config)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_run_goes_on_with_the_machines_that_are_left(undisturbed: Reference) -> None:
    """`--nnodes 1:2`: what remains takes the whole batch; the curve is the same."""
    config = undisturbed.another("shrinks")
    port = get_free_port()
    machines = [Node(config, undisturbed.folder, nodes="1:2", port=port, host=number == 0, ranks=1) for number in range(2)]
    with machines[0] as first, machines[1] as second:
        first.wait_for_step(10)
        for process in [second.process.pid, *second.processes()]:
            os.kill(process, signal.SIGKILL)
        assert first.process.wait(180) == 0, first.log[-5000:]
    text = first.log
    assert "on 2 process(es)" in text
    assert "on 1 process(es)" in text
    got, want = last(config), last(undisturbed.config)
    assert got["step"] == want["step"]
    assert distance(got["state_dict"].values(), want["state_dict"].values()) < 1e-4


@pytest.mark.timeout(300)
@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"training.parallel": "fsdp"}], ids=["ddp", "fsdp"])
def test_pre_empted_machine_saves_on_every_rank_together(undisturbed: Reference, changes: dict[str, Any]) -> None:
    """SIGTERM to the launcher, as a scheduler sends it; what was saved goes on to the same end."""
    name = f"preempted_{len(changes)}"
    config = undisturbed.another(name, {**changes, "training.save_every_n_steps": 1000})
    with Node(config, undisturbed.folder) as node:
        node.wait_for_step(1)
        began = time.monotonic()
        node.process.terminate()
        node.process.wait(60)
        assert time.monotonic() - began < 25, "torchrun kills after 30 s"
    text = node.log
    assert text.count("stopped by ") == 1, text[-5000:]
    stopped = saved_step(config)
    assert 0 < stopped < 100
    finished = undisturbed.another(name, changes)
    undisturbed.train(finished, 2, "--resume_checkpoint", "auto")
    got, want = last(config), last(undisturbed.config)
    assert distance(got["state_dict"].values(), want["state_dict"].values()) < 1e-4
