"""What real-time chunking is worth: MetaWorld with answers that come late, five ways to deal with them.

    python -m benchmarks.realtime --output_dir experiments/realtime

Collects demonstrations at the simulator's 80 Hz; trains by the demo's recipe with a horizon of 24, three seeds, and goes on
from these weights with prefixes, for a quarter of the steps; plays every method at every delay from the same starts; prints the
tables of docs/realtime.md. Its plot is success.svg, its films are in report.html. Some two hours of two cores; what is there is
not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from markupsafe import Markup

from benchmarks.common import environment
from paligemma_vla.cli.demo import ENVIRONMENT, TASKS
from paligemma_vla.cli.main import log_to_stderr, main
from paligemma_vla.evaluation.charts import WIDTH, Line, line_chart
from paligemma_vla.evaluation.collect import CollectConfig, collect
from paligemma_vla.evaluation.compare import paired_interval, wilson_interval
from paligemma_vla.evaluation.execution import Execution
from paligemma_vla.evaluation.report import Report, write_report
from paligemma_vla.evaluation.rollout import RolloutConfig, RolloutPool
from paligemma_vla.model.tiny import write_tiny_paligemma
from paligemma_vla.policy import Continuation, Policy
from paligemma_vla.storage import atomic_write

HORIZON, EXECUTE, LIMIT = 24, 12, 300
DELAYS = (0, 2, 4, 8, 12)
PLAIN: Final = "plain"  # kinds of training
PREFIX: Final = "prefix"
METHODS: dict[Execution, str] = {
    "blocking": PLAIN,
    "asynchronous": PLAIN,
    "ensemble": PLAIN,
    "guidance": PLAIN,
    "prefix": PREFIX,
}
REFERENCE: Final = "blocking"
FURTHER = ("optimizer.lr=1.0e-3", "optimizer.vlm_lr=3.0e-4", "lr_scheduler.warmup_steps=50")  # of trained weights
FILMED_DELAY, FILMED = 8, ("prefix", "blocking", "guidance")
COLOURS = ("#2f5bd7", "#d9730d", "#1c8a5a", "#a33ea1", "#b93a32")
BOOTSTRAP = 10_000
Episodes = list[dict[str, Any]]


def prepare(folder: Path, demonstrations: int, workers: int) -> None:
    """Demonstrations, backbone and statistics."""
    collect(CollectConfig(ENVIRONMENT, TASKS, demonstrations, folder / "episodes", workers=workers))
    if not (folder / "tiny-paligemma").is_dir():
        write_tiny_paligemma(folder / "tiny-paligemma")
    if not (folder / "stats.json").is_file():
        run("stats", *settings(folder), "--output_path", str(folder / "stats.json"))


def run(command: str, *arguments: str) -> None:
    if main([command, "--config_path", "configs/demo.yaml", *arguments]) != 0:
        raise SystemExit(f"{command} {' '.join(arguments)}: failed")


def settings(folder: Path, *more: str) -> list[str]:
    values = [
        f"data.train_parquet_files={folder / 'episodes'}",
        f"data.normalization_stats_path={folder / 'stats.json'}",
        f"model.vlm_config.model_name_or_path={folder / 'tiny-paligemma'}",
        f"model.action_head_config.horizon={HORIZON}",
        f"training.checkpoint_dir={folder / 'runs'}",
        "data.cache_mb=1024",  # all of the data
        *more,
    ]
    return [word for value in values for word in ("--set", value)]


def train(folder: Path, seed: int, workers: int, steps: int) -> None:
    """A model by the demo's recipe, and one that goes on from its weights with prefixes, for a quarter of the steps."""
    plain = [f"training.max_steps={steps}"]
    prefix = [f"training.max_steps={steps // 4}", f"training.rtc_max_delay={max(DELAYS)}", "training.stages=[]", *FURTHER]
    prefix.append(f"training.init_from={checkpoint(folder, PLAIN, seed)}")
    for kind, values in ((PLAIN, plain), (PREFIX, prefix)):
        values += [f"training.experiment_name={kind}_{seed}", f"training.seed={seed}"]
        if not checkpoint(folder, kind, seed).is_file():
            run("train", *settings(folder, *values), "--device", "cpu", "--nproc", str(workers))


def checkpoint(folder: Path, kind: str, seed: int) -> Path:
    return folder / "runs" / f"{kind}_{seed}" / "checkpoints" / "last.pth.tar"


def play(pool: RolloutPool, config: RolloutConfig, output: Path) -> Episodes:
    """The episodes of a condition, played once."""
    result = output / "rollout.json"
    if not result.is_file():
        pool.run(replace(config, output_dir=output))
    episodes: Episodes = json.loads(result.read_text())["episodes"]
    return episodes


def play_all(folder: Path, seeds: int, episodes: int, workers: int) -> dict[str, dict[str, Any]]:
    """Every method at every delay with the models of seed 0; and all models at delay 0, with twice the starts."""
    found: dict[str, Any] = {"delays": {}, "seeds": {}}
    for kind, seed in product((PLAIN, PREFIX), range(seeds)):
        base = RolloutConfig(tasks=TASKS, episodes=episodes, execute=EXECUTE, max_steps=LIMIT)
        with RolloutPool(ENVIRONMENT, str(checkpoint(folder, kind, seed)), workers=workers) as pool:
            for (method, of), delay in product(METHODS.items(), DELAYS):
                if of == kind and seed == 0:
                    films = 1 if delay == FILMED_DELAY and method in FILMED else 0
                    config = replace(base, execution=method, delay=delay, max_videos=films)
                    found["delays"][f"{method} {delay}"] = play(pool, config, folder / "rollouts" / f"{method}_{delay}")
            undelayed = replace(base, execution=PREFIX if kind == PREFIX else REFERENCE, seed=1, episodes=2 * episodes)
            found["seeds"][f"{kind} {seed}"] = play(pool, undelayed, folder / "rollouts" / f"undelayed_{kind}_{seed}")
    return found


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Rates with intervals; differences to the reference at the same delay, in pairs of the same start."""
    rows = []
    for (method, _), delay in product(METHODS.items(), DELAYS):
        here, reference = found["delays"][f"{method} {delay}"], found["delays"][f"{REFERENCE} {delay}"]
        solved, known = [one["success"] for one in here], [one["success"] for one in reference]
        row = {
            "method": method,
            "delay": delay,
            "rate": float(np.mean(solved)),
            "ci95": wilson_interval(sum(solved), len(solved)),
        }
        row["difference"] = paired_interval(known, solved)
        for name in ("steps", "jerk"):
            values, others = (np.array([cost(one, name) for one in each]) for each in (here, reference))
            row[name], row[f"{name}_difference"] = float(values.mean()), bootstrap(values - others)
        rows.append(row)
    count = len(found["seeds"]) // 2
    pooled = {
        kind: [one["success"] for seed in range(count) for one in found["seeds"][f"{kind} {seed}"]] for kind in (PLAIN, PREFIX)
    }
    undelayed: dict[str, Any] = {kind: float(np.mean(solved)) for kind, solved in pooled.items()}
    undelayed |= {"episodes": len(pooled[PLAIN]), "difference": paired_interval(pooled[PLAIN], pooled[PREFIX])}
    return {"rows": rows, "undelayed": undelayed}


def cost(episode: dict[str, Any], name: str) -> float:
    """Steps, where a failure took all of them; or jerk."""
    return float(LIMIT if name == "steps" and not episode["success"] else episode[name])


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences (percentile bootstrap)."""
    rng = np.random.default_rng(0)
    means = differences[rng.integers(0, len(differences), (BOOTSTRAP, len(differences)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def time_calls(folder: Path, repeats: int = 30) -> dict[str, float]:
    """Milliseconds of one answer, medians of interleaved calls on one core."""
    torch.set_num_threads(1)
    policies = {kind: Policy.from_checkpoint(checkpoint(folder, kind, 0)) for kind in (PLAIN, PREFIX)}
    observation = {"image_1": np.zeros((64, 64, 3), np.uint8), "state": np.array([0, 0.6, 0.2, 1]), "prompt": "open the drawer"}
    going_on = Continuation(np.zeros((HORIZON - EXECUTE, 4), np.float32), 4)
    calls = {"no chunk to continue": (PLAIN, None), "prefix": (PREFIX, going_on), "guidance": (PLAIN, going_on)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, (kind, continuation) in calls.items():
            began = time.perf_counter()
            policies[kind].infer(observation, seed=0, continuation=continuation)
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(each[3:]) for name, each in times.items()}


def overview(summary: dict[str, Any]) -> str:
    """Success by method and delay."""
    lines = [f"| success at a delay of | {' | '.join(map(str, DELAYS))} |", f"|---|{'---|' * len(DELAYS)}"]
    for method in METHODS:
        cells = [f"{row['rate']:.2f} {interval(row['ci95'], '.2f')}" for row in summary["rows"] if row["method"] == method]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(summary: dict[str, Any]) -> str:
    lines = ["| method | delay | success | difference to blocking | steps | difference | jerk, m/s³ | difference |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in summary["rows"]:
        cells = [row["method"], str(row["delay"]), f"{row['rate']:.2f}"]
        cells.append(interval(row["difference"], "+.2f") if row["method"] != REFERENCE else "")
        for name in ("steps", "jerk"):
            cells.append(f"{row[name]:.0f}")
            cells.append(interval(row[f"{name}_difference"], "+.0f") if row["method"] != REFERENCE else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(bounds: tuple[float, float], digits: str) -> str:
    return f"[{bounds[0]:{digits}}, {bounds[1]:{digits}}]"


def plot(rows: list[dict[str, Any]]) -> str:
    """Success by delay as an SVG file, a curve a method."""
    lines = [Line([DELAYS[0], DELAYS[-1]], [1, 1], "axis")]
    for number, method in enumerate(METHODS):
        mine = [row for row in rows if row["method"] == method]
        lines.append(Line([row["delay"] for row in mine], [row["rate"] for row in mine], f"c{number}"))
    chart = line_chart(lines, "delay, control steps", zero=True)
    style = "text { font: 11px sans-serif; fill: #666 } polyline { fill: none; stroke-width: 2 } .axis { stroke: #ccc }"
    style += "".join(f" .c{number} {{ stroke: {colour} }}" for number, colour in enumerate(COLOURS))
    entry = Markup('<text x="{}" y="14" style="fill: {}; font-weight: bold">{}</text>')
    names = [
        entry.format(x, colour, method) for x, colour, method in zip((44, 112, 212, 290, 366), COLOURS, METHODS, strict=True)
    ]
    frame = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} 215"><style>{}</style>{}'
    frame += '<g transform="translate(0 10)">{}</g></svg>\n'
    return str(Markup(frame).format(WIDTH, Markup(style), Markup().join(names), chart))


def show_films(folder: Path) -> None:
    """A page of films beside the robot's speed: waiting, and going on."""
    late = f"each answer {FILMED_DELAY} control steps late, a chunk every {EXECUTE}"
    page = Report(
        title="Answers that come late",
        subtitle=f"The robot waits for them, or goes on with the chunk it has: {late}.",
        rollouts=[(method, late, folder / "rollouts" / f"{method}_{FILMED_DELAY}") for method in FILMED],
    )
    write_report(folder / "report.html", page)


def cli() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("experiments/realtime"))
    parser.add_argument("--demonstrations", type=int, default=340, help="per task")
    parser.add_argument("--steps", type=int, default=1800, help="of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20, help="per task, method and delay")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    log_to_stderr()
    folder = args.output_dir
    prepare(folder, args.demonstrations, args.workers)
    for seed in range(args.seeds):
        train(folder, seed, args.workers, args.steps)
    summary = summarize(play_all(folder, args.seeds, args.episodes, args.workers))
    summary |= {"ms_per_call": time_calls(folder), "environment": environment("python -m benchmarks.realtime")}
    atomic_write(folder / "realtime.json", json.dumps(summary, indent=1) + "\n")
    atomic_write(folder / "success.svg", plot(summary["rows"]))
    show_films(folder)
    print(overview(summary), table(summary), sep="\n\n")
    print(json.dumps({name: summary[name] for name in ("undelayed", "ms_per_call")}, indent=2))


if __name__ == "__main__":
    cli()
