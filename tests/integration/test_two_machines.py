"""Two machines, as two network namespaces with an address each: their runs are those of one process, ranks killed or not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from machines import LENGTHS, SETTINGS, Node, assert_same
from paligemma_vla.config import VLAConfig
from ranks import Reference, assert_same_curve, train_on
from support import write_episodes
from zygote import Zygote

ConfigFactory = Callable[..., VLAConfig]
PORT = 29400  # of a network that nobody else is in
ADDRESSES = ("10.77.0.1", "10.77.0.2")
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif("CI" in os.environ, reason="a runner's network is not ours to divide"),
]


@dataclass(frozen=True)
class Namespace:
    """A network of its own, which lives as long as the process that keeps it."""

    keeper: int
    device: str

    def enter(self, *command: str) -> tuple[str, ...]:
        """`command`, as it has to be started from outside."""
        return ("nsenter", "--target", str(self.keeper), "--user", "--preserve-credentials", "--net", *command)

    def run(self, *command: str) -> None:
        subprocess.run(self.enter(*command), check=True, capture_output=True, text=True)


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


@pytest.fixture(scope="module")
def networks() -> Iterator[list[Namespace]]:
    """Two namespaces that a cable joins. They belong to a user namespace, so nobody needs to be root."""
    with contextlib.ExitStack() as stack:
        try:
            first = stack.enter_context(keeper("unshare", "--user", "--map-root-user", "--net"))
            entered = Namespace(first, "").enter("unshare", "--net")
            ends = [Namespace(first, "one"), Namespace(stack.enter_context(keeper(*entered)), "two")]
            ends[0].run("ip", "link", "add", "one", "type", "veth", "peer", "name", "two", "netns", str(ends[1].keeper))
            for end, address in zip(ends, ADDRESSES, strict=True):
                end.run("ip", "addr", "add", f"{address}/24", "dev", end.device)
                end.run("ip", "link", "set", end.device, "up")
                end.run("ip", "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            pytest.skip(f"network namespaces are not allowed here: {reason.strip()}")
        yield ends


@pytest.fixture(scope="module")
def alone(session_config: ConfigFactory, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("two_machines")
    write_episodes(folder / "data", lengths=LENGTHS)
    changes = {"data.train_parquet_files": str(folder / "data"), "training.epochs": 12, "training.experiment_name": "alone"}
    config = session_config({**SETTINGS, **changes})
    train_on(zygote, config, 1, folder)
    return Reference(config, folder, zygote)


@contextlib.contextmanager
def two_machines(networks: list[Namespace], config: VLAConfig, folder: Path) -> Iterator[list[Node]]:
    """An agent with two ranks in each network."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Node(
                    config,
                    folder,
                    nodes="2",
                    port=PORT,
                    host=number == 0,
                    environment={"GLOO_SOCKET_IFNAME": network.device},
                    address=ADDRESSES[number],
                    meeting_address=ADDRESSES[0],
                    inside=network.enter(),
                )
            )
            for number, network in enumerate(networks)
        ]


def finish(nodes: list[Node]) -> None:
    codes = [node.process.wait(300) for node in nodes]
    assert codes == [0, 0], nodes[0].log[-5000:]


@pytest.fixture(scope="module")
def together(alone: Reference, networks: list[Namespace]) -> VLAConfig:
    """The run of `alone` on two machines."""
    config = alone.another("together")
    with two_machines(networks, config, alone.folder) as nodes:
        finish(nodes)
    assert "on 4 process(es)" in nodes[0].log
    return config


def test_two_machines_compute_what_one_process_does(alone: Reference, together: VLAConfig) -> None:
    assert_same_curve(together, alone.config)


def test_rank_killed_on_the_second_machine_changes_no_bit(
    alone: Reference, together: VLAConfig, networks: list[Namespace]
) -> None:
    config = alone.another("killed")
    with two_machines(networks, config, alone.folder) as nodes:
        nodes[1].wait_for_step(10)
        os.kill(nodes[1].processes()[1], signal.SIGKILL)
        finish(nodes)
    assert "resumed " in nodes[0].log
    assert_same(config, together)
