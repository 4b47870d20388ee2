"""Scaling from one process to two, data included: `python -m benchmarks.scaling [--repeats 9] [--workers 0 1]`.

Two processes of one thread each, gloo, the model and settings of configs/demo.yaml, the real loader and training loop. They
train in turns: one alone, both alone at the same time (what the machine itself gives), both together at the same total batch,
both together at the same batch per process; and all but the third again with a larger batch, which tells what is paid for each
step from what is paid for each sample. Turns are short and repeated, so that what else the machine does meets all alike.

Efficiency is samples a second of both over twice those of one with as large a batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed.elastic.utils.distributed import get_free_port

from benchmarks.common import environment, write_episodes
from paligemma_vla.config import VLAConfig, load_config
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
BATCH, LARGE, STEPS, WARM_UP = 32, 128, 50, 10


@dataclass(frozen=True)
class Turn:
    """What both processes do at a time.

    alone: how many of them train by themselves, 0: they train together. batch: of a step, over all that train together.
    against: the batch of the one process that it is held against.
    """

    name: str
    alone: int
    batch: int
    against: int


TURNS = (
    Turn("one process", 1, BATCH, BATCH),
    Turn("two that do not talk", 2, BATCH, BATCH),
    Turn("two, same total batch", 0, BATCH, BATCH),
    Turn("two, same batch per process", 0, 2 * BATCH, BATCH),
    Turn("one process", 1, LARGE, LARGE),
    Turn("two that do not talk", 2, LARGE, LARGE),
    Turn("two, same batch per process", 0, 2 * LARGE, LARGE),
)


@dataclass(frozen=True)
class Line:
    """Of one kind of turn: medians over all repeats, with the quartiles of the efficiency."""

    turn: str
    workers: int
    total_batch: int
    samples_per_s: float
    efficiency: float
    quartiles: tuple[float, float]


def train(config: VLAConfig) -> float:
    """Samples a second of a run of this process, or of the group it is in, after its first steps."""
    from paligemma_vla.training.distributed import join
    from paligemma_vla.training.trainer import Trainer

    distributed = join("cpu")
    Trainer(config, distributed).run()
    distributed.close()
    if not distributed.main:
        return 0.0
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/samples_per_s"] for line in lines if line["step"] > WARM_UP]
    return statistics.harmonic_mean(rates)


def serve(pipe: Connection) -> None:
    """Run what is asked for: an environment and a configuration. Until there is nothing more."""
    while (asked := pipe.recv()) is not None:
        variables, config = asked
        os.environ.update(variables)
        pipe.send(train(config))


@contextmanager
def process() -> Iterator[Connection]:
    """A process of one thread that trains as it is asked to."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    started = context.Process(target=serve, args=(theirs,))
    started.start()
    theirs.close()
    yield ours
    ours.send(None)
    started.join()


def take(turn: Turn, config: VLAConfig, pipes: Sequence[Connection]) -> float:
    """Samples a second of all that train in a turn."""
    busy = pipes[: turn.alone] or pipes
    world = 1 if turn.alone else len(busy)
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
    }
    for number, pipe in enumerate(busy):
        rank = "0" if turn.alone else str(number)
        training = config.training.model_copy(update={"experiment_name": f"process_{number}" if turn.alone else "together"})
        data = config.data.model_copy(update={"batch_size": turn.batch})
        named = config.model_copy(update={"training": training, "data": data})
        pipe.send(({**shared, "RANK": rank, "LOCAL_RANK": rank}, named))
    return sum(pipe.recv() for pipe in busy)


def configure(folder: Path) -> VLAConfig:
    """The demonstration's configuration over synthetic episodes like its own."""
    write_episodes(folder / "episodes", episodes=48, length=100, side=64, cameras=1, state_dim=4, action_dim=4)
    write_tiny_paligemma(folder / "backbone", TinySpec())
    compute_statistics(str(folder / "episodes"), "benchmark").save(folder / "stats.json")
    changes: dict[str, Any] = {
        "data.train_parquet_files": str(folder / "episodes"),
        "data.normalization_stats_path": str(folder / "stats.json"),
        "data.val_fraction": 0.0,
        "model.vlm_config.model_name_or_path": str(folder / "backbone"),
        "training.stages": [],
        "training.max_steps": STEPS,
        "training.log_interval": 10,
        "training.checkpoint_dir": str(folder / "runs"),
    }
    return load_config(ROOT / "configs" / "demo.yaml", changes)


def measure(repeats: int, workers: Sequence[int]) -> list[Line]:
    """A line per kind of turn and number of loader processes for each process."""
    rates: dict[tuple[int, Turn], list[float]] = {(number, turn): [] for number in workers for turn in TURNS}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        config = configure(Path(name))
        pipes = [stack.enter_context(process()) for _ in range(2)]
        for _ in range(repeats):
            for (number, turn), taken in rates.items():
                data = config.data.model_copy(update={"num_workers": number})
                taken.append(take(turn, config.model_copy(update={"data": data}), pipes))
    single = {(number, turn.batch): taken for (number, turn), taken in rates.items() if turn.alone == 1}
    return [summary(turn, number, taken, single[number, turn.against]) for (number, turn), taken in rates.items()]


def summary(turn: Turn, workers: int, rates: Sequence[float], one: Sequence[float]) -> Line:
    """Each turn is held against the one of the same repeat."""
    processes = turn.alone or 2
    efficiency = [rate / (processes * single) for rate, single in zip(rates, one, strict=True)]
    low, _, high = statistics.quantiles(efficiency, n=4)
    return Line(turn.name, workers, turn.batch, statistics.median(rates), statistics.median(efficiency), (low, high))


def table(lines: Sequence[Line]) -> str:
    """The lines as Markdown."""
    rows = ["| turn | loader processes each | total batch | samples/s | efficiency | quartiles |", "|---|---|---|---|---|---|"]
    for line in lines:
        low, high = line.quartiles
        figures = f"{line.samples_per_s:.0f} | {line.efficiency:.3f} | {low:.3f} to {high:.3f}"
        rows.append(f"| {line.turn} | {line.workers} | {line.total_batch} | {figures} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="loader processes of each process (default: 0)")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    began = os.getloadavg()
    lines = measure(given.repeats, given.workers)
    print(table(lines))
    command = f"python -m benchmarks.scaling --repeats {given.repeats} --workers {' '.join(map(str, given.workers))}"
    result = {**environment(command), "load_before": began[0], "rows": [asdict(line) for line in lines]}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
