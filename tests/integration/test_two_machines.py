"""Two machines, as two network namespaces with an address each: their runs are those of one process, ranks killed or not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from machines import LENGTHS, SETTINGS, Node, assert_same
from paligemma_vla.config import VLAConfig
from ranks import Reference, assert_same_curve
from support import write_episodes
from zygote import Zygote

ConfigFactory = Callable[..., VLAConfig]
PORT = 29400  # of a network that nobody else is in
ADDRESSES, DEVICES = ("10.77.0.1", "10.77.0.2"), ("one", "two")
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif("CI" in os.environ, reason="a runner's network is not ours to divide"),
]


@contextlib.contextmanager
def keeper(*command: str) -> Iterator[int]:
    """A process that waits in the namespaces that `command` makes."""
    with subprocess.Popen(
        [*command, "sh", "-c", "echo && exec sleep infinity"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            if not process.stdout.readline():
                raise OSError(process.stderr.read().strip())
            yield process.pid
        finally:
            process.kill()


def enter(keeper: int) -> tuple[str, ...]:
    """What starts a command in the namespaces of a process."""
    return ("nsenter", "--target", str(keeper), "--user", "--preserve-credentials", "--net")


@pytest.fixture(scope="module")
def networks() -> Iterator[list[tuple[str, ...]]]:
    """What starts a command in either of two namespaces that a cable joins. They belong to a user namespace, so nobody needs to
    be root."""
    with contextlib.ExitStack() as stack:
        try:
            first = stack.enter_context(keeper("unshare", "--user", "--map-root-user", "--net"))
            second = stack.enter_context(keeper(*enter(first), "unshare", "--net"))
            ip(first, f"link add {DEVICES[0]} type veth peer name {DEVICES[1]} netns {second}")
            for process, device, address in zip((first, second), DEVICES, ADDRESSES, strict=True):
                ip(process, f"addr add {address}/24 dev {device}")
                ip(process, f"link set {device} up")
                ip(process, "link set lo up")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            pytest.skip(f"network namespaces are not allowed here: {reason.strip()}")
        yield [enter(process) for process in (first, second)]


def ip(process: int, words: str) -> None:
    subprocess.run([*enter(process), "ip", *words.split()], check=True, capture_output=True, text=True)


def train_on_two(networks: list[tuple[str, ...]], reference: Reference, name: str, kill: bool = False) -> tuple[VLAConfig, str]:
    """A run on an agent with two ranks in each network, one of which is killed on the second if so asked; its log."""
    config = reference.another(name)
    with contextlib.ExitStack() as stack:
        nodes = []
        for number, network in enumerate(networks):
            inside = (*network, "env", f"GLOO_SOCKET_IFNAME={DEVICES[number]}")
            place = {"address": ADDRESSES[number], "meeting": ADDRESSES[0]}
            node = Node(config, reference.folder, nodes="2", port=PORT, host=number == 0, inside=inside, **place)
            nodes.append(stack.enter_context(node))
        if kill:
            nodes[1].wait_for_step(10)
            os.kill(nodes[1].processes()[1], signal.SIGKILL)
        codes = [node.process.wait(300) for node in nodes]
        assert codes == [0, 0], nodes[0].log[-5000:]
    return config, nodes[0].log


def test_two_machines_compute_what_one_process_does_and_a_killed_rank_changes_no_bit(
    session_config: ConfigFactory, zygote: Zygote, tmp_path: Path, networks: list[tuple[str, ...]]
) -> None:
    write_episodes(tmp_path / "data", lengths=LENGTHS)
    changes = {"data.train_parquet_files": str(tmp_path / "data"), "training.experiment_name": "alone"}
    alone = Reference(session_config({**SETTINGS, **changes}), tmp_path, zygote)
    alone.train(alone.config, 1)
    together, log = train_on_two(networks, alone, "together")
    assert "on 4 process(es)" in log
    assert_same_curve(together, alone.config)
    killed, log = train_on_two(networks, alone, "killed", kill=True)
    assert "resumed " in log
    assert_same(killed, together)
