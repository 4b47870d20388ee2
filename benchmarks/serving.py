"""The server under load, against one that answers one request at a time: `python -m benchmarks.serving [--repeats 5]`.

That one is openpi's way: inference inside the event loop. Both have the same model, a core for torch and the same wire; clients
ask again as soon as they have their answer. Servers and numbers of clients take turns within each repeat, so that what else the
machine does meets all alike. `--widths` says of which models `Policy.infer_batch` is measured first, by size of the batch:
batching can only pay where 16 together take much less than 16 times one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # of both servers; the clients have the other cores

import numpy as np
import torch
from websockets.asyncio.server import ServerConnection, serve
from websockets.sync.client import connect

from benchmarks.common import best_seconds, demo_config, environment, write_episodes
from paligemma_vla import Policy
from paligemma_vla.model.tiny import TinySpec
from paligemma_vla.training.distributed import join
from paligemma_vla.training.trainer import Trainer
from paligemma_vla_client import pack, unpack

RESULTS = Path(__file__).parent / "results" / "serving.json"
SERVE = "import sys; from paligemma_vla.cli.main import main; sys.exit(main(['serve', *sys.argv[1:]]))"
CLIENTS, BATCHES = (1, 4, 16), (1, 2, 4, 8, 16)
SIDE, DIMENSION = 64, 7


def write_checkpoint(folder: Path, width: int) -> Path:
    """A policy of random weights: 4 image tokens, 4 layers of text, a head of half the width, 10 Euler steps."""
    folder.mkdir()
    write_episodes(folder / "episodes", 1, 16, SIDE, cameras=1, state_dim=DIMENSION, action_dim=DIMENSION)
    spec = TinySpec(image_size=SIDE, patch_size=SIDE // 2, vision_layers=2, text_layers=4, width=width, heads=8)
    config = demo_config(
        folder,
        spec,
        cameras=1,
        data__batch_size=2,
        training__max_steps=1,
        training__ema_decay=0.0,
        model__action_head_config__embed_dim=width // 2,
        model__action_head_config__num_inference_timesteps=10,
    )
    Trainer(config, join("cpu")).run()
    return config.run_dir / "checkpoints" / "last.pth.tar"


def observations(number: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image_1": rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8),
            "state": rng.standard_normal(DIMENSION).astype(np.float32),
            "prompt": "open the drawer",
        }
        for _ in range(number)
    ]


def batch_row(checkpoint: Path, width: int) -> dict[str, Any]:
    """Milliseconds of `infer_batch` by size of the batch."""
    policy = Policy.from_checkpoint(checkpoint)
    millions = sum(parameter.numel() for parameter in policy.model.parameters()) / 1e6
    taken = {size: 1e3 * best_seconds(lambda s=size: policy.infer_batch(observations(s), [0] * s), 10) for size in BATCHES}
    row = {"width": width, "parameters_m": round(millions, 1), "ms": {size: round(value, 2) for size, value in taken.items()}}
    row["gain_of_16"] = round(16 * taken[1] / taken[16], 2)
    print(row, flush=True)
    return row


def serve_one_at_a_time(checkpoint: Path, port: int) -> None:
    """openpi's way."""
    torch.set_num_threads(1)
    policy = Policy.from_checkpoint(checkpoint)

    async def handle(connection: ServerConnection) -> None:
        await connection.send(pack(policy.metadata))
        async for frame in connection:
            await connection.send(pack(policy.infer(unpack(frame))))

    async def run() -> None:
        async with serve(handle, "127.0.0.1", port, compression=None, max_size=None, ping_interval=None) as server:
            await server.serve_forever()

    asyncio.run(run())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def servers(checkpoint: Path) -> Iterator[dict[str, int]]:
    """Ports by name; both have answered."""
    ports = {"ours": free_port(), "one at a time": free_port()}
    command = [
        "--checkpoint_path",
        str(checkpoint),
        "--port",
        str(ports["ours"]),
        "--max_batch",
        str(max(CLIENTS)),
        "--device",
        "cpu",
    ]
    ours = subprocess.Popen([sys.executable, "-c", SERVE, *command], stderr=subprocess.DEVNULL)
    context = multiprocessing.get_context("spawn")
    other = context.Process(target=serve_one_at_a_time, args=(checkpoint, ports["one at a time"]), daemon=True)
    other.start()
    try:
        for port in ports.values():
            wait_for(port)
            load(port, 1, 1.0)
        yield ports
    finally:
        ours.terminate()
        other.terminate()
        ours.wait()
        other.join()


def wait_for(port: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"port {port}: no server after {seconds:.0f} s")
        time.sleep(0.1)


def load(port: int, clients: int, seconds: float) -> dict[str, float]:
    """Let clients ask for some seconds: latency in ms, and answers a second. Answers of the first fifth do not count."""
    frames = [pack(observation) for observation in observations(clients)]
    taken: list[tuple[float, float]] = []  # when it was asked, and the seconds until the answer
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(f"ws://127.0.0.1:{port}", compression=None)) for _ in range(clients)]
        for connection in connections:
            connection.recv()
        began = time.perf_counter()

        def ask(number: int) -> None:
            while (asked := time.perf_counter()) < began + seconds:
                connections[number].send(frames[number])
                reply = connections[number].recv()
                if not isinstance(reply, bytes):
                    raise SystemExit(f"refused: {reply}")
                taken.append((asked, time.perf_counter() - asked))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counted = sorted(latency for asked, latency in taken if seconds / 5 < asked + latency - began < seconds)
    percentiles = {f"p{share}_ms": 1e3 * counted[min(len(counted) - 1, len(counted) * share // 100)] for share in (50, 99)}
    return {**percentiles, "per_s": len(counted) / (seconds * 4 / 5)}


def measure(ports: dict[str, int], repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Medians over repeats, with all values."""
    turns = list(itertools.product(CLIENTS, ports))
    taken: dict[tuple[int, str], list[dict[str, float]]] = {turn: [] for turn in turns}
    for repeat in range(repeats):
        for clients, name in turns if repeat % 2 == 0 else turns[::-1]:
            taken[clients, name].append(load(ports[name], clients, seconds))
    rows = []
    for (clients, name), results in taken.items():
        row: dict[str, Any] = {"clients": clients, "server": name}
        for key in results[0]:
            values = [result[key] for result in results]
            row[key] = round(statistics.median(values), 2)
            row[f"{key}_all"] = [round(value, 2) for value in values]
        rows.append(row)
        spread = ", ".join(
            f"{key} {row[key]:.1f} ({min(row[f'{key}_all']):.1f} to {max(row[f'{key}_all']):.1f})" for key in results[0]
        )
        print(f"{clients:3d} clients, {name:14s} {spread}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of each load")
    parser.add_argument("--width", type=int, default=512, help="of the model that is served")
    parser.add_argument("--widths", type=int, nargs="*", default=[128, 256, 512, 1024], help="for the table of batches")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        checkpoints = {width: write_checkpoint(Path(name, str(width)), width) for width in {*args.widths, args.width}}
        batches = [batch_row(checkpoints[width], width) for width in args.widths]
        with servers(checkpoints[args.width]) as ports:
            rows = measure(ports, args.repeats, args.seconds)
    command = f"python -m benchmarks.serving --repeats {args.repeats} --seconds {args.seconds:g} --width {args.width}"
    result = {**environment(command), "load_before": load_before, "width": args.width, "infer_batch": batches, "rows": rows}
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"-> {args.output}")


if __name__ == "__main__":
    main()
