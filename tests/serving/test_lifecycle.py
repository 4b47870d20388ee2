"""From the command to its end: warmed up before the port opens, pages, and a stop that answers what was asked."""

from __future__ import annotations

import copy
import os
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from signal import SIGINT, SIGTERM

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from observations import draw, local
from paligemma_vla import Policy
from paligemma_vla.errors import VLAError
from paligemma_vla.serving import server as server_module
from paligemma_vla.serving.build import warm_up
from paligemma_vla.serving.server import PolicyServer
from paligemma_vla.training.checkpoint import load_checkpoint, save_checkpoint
from paligemma_vla_client import pack, unpack
from support import call


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def slow_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy of the suite with so many Euler steps that an answer takes half a second."""
    saved = load_checkpoint(checkpoint)
    saved["config"]["model"]["action_head_config"]["num_inference_timesteps"] = 1000
    path = tmp_path_factory.mktemp("slow") / "slow.pth.tar"
    save_checkpoint(path, saved)
    return path


@pytest.fixture
def command(slow_checkpoint, zygote, tmp_path):
    """Start `paligemma-vla serve` in a process of its own; returns it and its port, which answers."""

    def start():
        port = free_port()
        argv = ["serve", "--checkpoint_path", slow_checkpoint, "--port", port, "--seed", 3, "--no_limits"]
        child = zygote.start([str(word) for word in argv], tmp_path)
        deadline = time.monotonic() + 20
        while not is_open(port):
            assert time.monotonic() < deadline, child.wait(0)
            time.sleep(0.02)
        return child, port

    return start


def test_every_kind_of_answer_is_warmed_up(policy, monkeypatch):
    answered = []

    def infer_batch(observations, seeds, num_steps=None, continuations=None, realtime=None):
        answered.append((len(observations), realtime))
        return np.zeros((len(observations), policy.metadata["horizon"], policy.metadata["action_dim"]), np.float32)

    learned = copy.copy(policy)
    learned.infer_batch = infer_batch
    warm_up(learned, 0)
    assert answered == [(1, None), (1, "guidance")]
    answered.clear()
    learned.metadata = policy.metadata | {"rtc_max_delay": 2}
    warm_up(learned, 2)
    assert answered == [(1, None), (1, "prefix"), (1, "guidance"), (2, None), (2, "prefix")]


@pytest.mark.parametrize("device, flags, graphs", [("cuda", [], 8), ("cuda", ["--no_compile"], 0), ("cpu", [], 0)])
def test_graphs_are_for_cuda_and_can_be_switched_off(monkeypatch, capfd, device, flags, graphs):
    asked = []

    def build_service(path, on, **options):
        asked.append((on, options["graphs"]))
        raise VLAError("enough")

    monkeypatch.setattr("paligemma_vla.training.distributed.choose_device", torch.device)
    monkeypatch.setattr("paligemma_vla.serving.build.build_service", build_service)
    call(capfd, "serve", "--checkpoint_path", "any", "--device", device, *flags)
    assert asked == [(device, graphs)]


def test_sigterm_lets_what_was_asked_be_answered_and_refuses_the_rest(command, slow_checkpoint):
    child, port = command()
    policy = Policy.from_checkpoint(slow_checkpoint)
    url = f"ws://127.0.0.1:{port}"
    with connect(url) as asks, connect(url) as idle, socket.create_connection(("127.0.0.1", port)):
        asks.recv(), idle.recv()
        asks.send(pack(draw(policy)))
        time.sleep(0.1)
        os.kill(child.pid, SIGTERM)
        with pytest.raises(ConnectionClosed, match=r"1001.*the server stops"):
            idle.recv(10)
        assert not is_open(port)
        np.testing.assert_array_equal(unpack(asks.recv(30))["actions"], local(policy, draw(policy), 3))
        with pytest.raises(ConnectionClosed, match=r"1001.*the server stops"):
            asks.recv(10)
    ended = child.wait(10)
    assert ended.status == 0, ended.stderr
    assert "stopping: what was asked is answered" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("second", [SIGTERM, SIGINT])
def test_second_signal_ends_it_at_once(command, slow_checkpoint, second):
    child, port = command()
    policy = Policy.from_checkpoint(slow_checkpoint)
    seen = draw(policy)
    began = time.monotonic()
    policy.infer(seen)
    pause = min(0.1, (time.monotonic() - began) / 4)  # both signals come while it computes, however fast it does
    with connect(f"ws://127.0.0.1:{port}") as asks:
        asks.recv()
        asks.send(pack(seen))
        time.sleep(pause)
        os.kill(child.pid, SIGINT)
        time.sleep(pause)
        began = time.monotonic()
        os.kill(child.pid, second)
        ended = child.wait(10)
        assert time.monotonic() - began < 0.5
    assert ended.status == -second


def test_stop_is_bounded_where_the_model_hangs(serve, policy, monkeypatch):
    monkeypatch.setattr(server_module, "DRAIN_SECONDS", 0.3)
    server = serve()
    compute = server.service.policy.infer_batch
    server.service.policy.infer_batch = lambda *arguments: time.sleep(2) or compute(*arguments)
    with connect(server.url) as asks:
        asks.recv()
        asks.send(pack(draw(policy)))
        time.sleep(0.1)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 2
        with pytest.raises(ConnectionClosed):
            asks.recv(10)


def test_checkpoint_is_loaded_once_and_answers_before_the_port_opens(checkpoint, capfd, monkeypatch):
    port, events = free_port(), []
    load, infer, run = Policy.from_checkpoint, Policy.infer, PolicyServer.run

    async def run_and_stop(self, ready):
        def opened() -> None:
            ready()
            events.append(("ready", is_open(port)))
            self.stop()

        await run(self, opened)

    monkeypatch.setattr(Policy, "from_checkpoint", lambda *a, **k: events.append(("load", is_open(port))) or load(*a, **k))
    monkeypatch.setattr(Policy, "infer", lambda *a, **k: (infer(*a, **k), events.append(("answer", is_open(port))))[0])
    monkeypatch.setattr(PolicyServer, "run", run_and_stop)
    code, _, printed = call(capfd, "serve", "--checkpoint_path", checkpoint, "--port", port)
    assert code == 0, printed
    assert events == [("load", False), ("answer", False), ("ready", True)]
    assert f"serving at ws://127.0.0.1:{port}" in printed


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--execute", 99], "--execute 99: this policy's chunks have 4 actions; take at most as many"),
        (["--set", "control.action_rate=0.1"], "control.action_rate: got 0.1, expected: a list"),
        (["--device", "mps"], "--device mps: not available here; available: cpu"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_a_line(checkpoint, capfd, monkeypatch, arguments, said):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, printed = call(capfd, "serve", "--checkpoint_path", checkpoint, "--port", 0, *arguments)
    assert code == 2 and said in printed, printed


def test_pages_say_that_it_lives_and_what_it_counted(serve, policy):
    server = serve()
    page = server.url.replace("ws", "http")
    with connect(server.url) as connection:
        connection.recv()
        for message in (pack(draw(policy)), b"nonsense", pack(draw(policy)), pack({"prompt": "look"})):
            connection.send(message)
            connection.recv()
        with urllib.request.urlopen(f"{page}/healthz") as reply:
            assert (reply.status, reply.read()) == (200, b"OK\n")
        with urllib.request.urlopen(f"{page}/metrics") as reply:
            assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            families = list(text_string_to_metric_families(reply.read().decode()))
    samples = {(sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples}
    assert samples["paligemma_vla_latency_seconds_count", "openpi"] == 2
    assert samples["paligemma_vla_latency_seconds_bucket", "+Inf", "openpi"] == 2
    assert 0 < samples["paligemma_vla_latency_seconds_sum", "openpi"] < 10
    assert (samples["paligemma_vla_batch_size_count",], samples["paligemma_vla_batch_size_sum",]) == (2, 2)
    assert samples["paligemma_vla_errors_total", "openpi"] == 2
    assert (samples["paligemma_vla_queue",], samples["paligemma_vla_clients", "openpi"]) == (0, 1)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{page}/etc/passwd")
