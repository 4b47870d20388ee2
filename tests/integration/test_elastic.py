"""Ranks and whole launchers that are killed under torchrun: the run ends with the weights of one that nothing happened to."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

from machines import LENGTHS, SETTINGS, STEPS_PER_EPOCH, Node, assert_same, saved_step, wait_for
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


def assert_same_end(config: VLAConfig, expected: VLAConfig) -> None:
    """Up to errors of rounding, which grow with the steps."""
    got, want = last(config), last(expected)
    assert got["step"] == want["step"]
    assert distance(got["state_dict"].values(), want["state_dict"].values()) < 1e-4


def kill_one(node: Node, rng: np.random.Generator) -> bool:
    """Kill -9 one of the ranks; False when the run is over."""
    ranks = node.processes()
    if not ranks or node.ended:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(rng.choice(ranks)), signal.SIGKILL)
    wait_for(lambda: node.ended or not set(node.processes()) & set(ranks))
    return True


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kills", "changes"),
    [
        (1, {}),
        pytest.param(30, {}, marks=pytest.mark.long, id="thirty-ddp"),
        pytest.param(30, {"training.parallel": "fsdp"}, marks=pytest.mark.long, id="thirty-fsdp"),
    ],
)
def test_ranks_killed_under_torchrun_end_bit_for_bit_like_undisturbed_ones(
    undisturbed: Reference, kills: int, changes: dict[str, Any]
) -> None:
    """One rank or the other: at random moments of training, and now and then at any other."""
    name = f"killed_{kills}_{len(changes)}"
    config, expected = undisturbed.another(name, changes), undisturbed.config
    if changes:
        expected = undisturbed.another(f"un{name}", changes)
        undisturbed.train(expected, 2)
    rng, done = np.random.default_rng(kills), 0
    while done < kills:
        shutil.rmtree(config.run_dir, ignore_errors=True)  # it got to its end: once more from the start
        with Node(config, undisturbed.folder, nodes=None, port=get_free_port()) as node:
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
        wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in orphans))
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
    assert "on 2 process(es)" in first.log
    assert "on 1 process(es)" in first.log
    assert_same_end(config, undisturbed.config)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_pre_empted_machine_saves_on_every_rank_together(undisturbed: Reference) -> None:
    """SIGTERM to the launcher, as a scheduler sends it, of a run in shards; what was saved goes on to the same end."""
    config = undisturbed.another("preempted", {"training.parallel": "fsdp"})
    with Node(
        undisturbed.another("preempted", {"training.parallel": "fsdp", "training.save_every_n_steps": 1000}), undisturbed.folder
    ) as node:
        node.wait_for_step(1)
        node.process.terminate()
        node.process.wait(25)  # torchrun kills after 30 s
    assert node.log.count("stopped by ") == 1, node.log[-5000:]
    assert 0 < saved_step(config) < 12 * STEPS_PER_EPOCH
    undisturbed.train(config, 2, "--resume_checkpoint", "auto")
    assert_same_end(config, undisturbed.config)
