"""`paligemma-vla benchmark libero` and `mt50`: the field's own benchmarks, from scratch, with a small model on a few CPU cores.

Demonstrations by our own experts, statistics, training, closed-loop evaluation by the published protocol, page. A call that was
interrupted is repeated: what is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paligemma_vla.cli.arguments import add_config_arguments, add_workers, configured, natural, positive
from paligemma_vla.cli.pipeline import NamedCondition, keys_of, play_conditions, stage, train_on_cpu, write_page, write_summary

STARTS = "the official starts"
SUITES = ("libero_spatial", "libero_object")
CHANGES = {
    "lan": "instructions reworded",
    "object": "another object",
    "swap": "objects in each other's places",
    "task": "another task in the same scene",
}


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark is made of.

    title: of the page. env: where demonstrations are recorded. played: where the policy is evaluated. tasks: names of tasks or
    suites. collection: of `CollectConfig`, beside what flags say. backbone: of `TinySpec`. conditions: the first one is the
    headline; long: those of the long mode.
    """

    title: str
    env: str
    played: str
    tasks: tuple[str, ...]
    collection: Mapping[str, Any]
    backbone: Mapping[str, Any]
    conditions: tuple[NamedCondition, ...]
    long: tuple[NamedCondition, ...] = ()


def _of_suite(suite: str, label: str, note: str, videos: int = 0) -> NamedCondition:
    return NamedCondition(suite, label, note, {"tasks": (suite,)}, videos)


def _all_starts(suite: str, label: str) -> NamedCondition:
    return NamedCondition(f"{suite}_50", f"{label}, all 50 starts", STARTS, {"tasks": (suite,), "episodes": 50})


def _variants(suite: str) -> tuple[NamedCondition, ...]:
    """What LIBERO-PRO asks: does the policy look and read, or remember?"""
    title = suite.removeprefix("libero_").capitalize()
    return tuple(_of_suite(f"{suite}_{change}", f"{title}, {change}", note) for change, note in CHANGES.items())


BENCHMARKS = {
    "libero": Benchmark(
        title="PaliGemma-VLA on LIBERO",
        env="libero:fast",
        played="libero",
        tasks=SUITES,
        collection={"image_size": 128, "action_repeat": 2, "within": 0.8, "noise_scale": (0.05, 0.15), "slip_share": 0.3},
        backbone={"image_size": 96, "vocabulary": 768},
        conditions=(
            _of_suite("libero_spatial", "Spatial", STARTS, videos=1),
            _of_suite("libero_object", "Object", STARTS, videos=1),
        ),
        long=(
            _all_starts("libero_spatial", "Spatial"),
            _all_starts("libero_object", "Object"),
            *_variants("libero_spatial"),
            *_variants("libero_object"),
            NamedCondition("grey_images", "grey pictures", "low if the cameras are used", {"tasks": SUITES, "image": "grey"}),
            NamedCondition(
                "fast", "drawn faster", "without reflections and multisampling", {"tasks": SUITES}, env="libero:fast"
            ),
        ),
    ),
    "mt50": Benchmark(
        title="PaliGemma-VLA on MetaWorld MT50",
        env="metaworld:mt50",
        played="metaworld:mt50",
        tasks=("mt50",),
        collection={"image_size": 96, "action_repeat": 4},
        backbone={"image_size": 96, "vocabulary": 768},
        conditions=tuple(
            _of_suite(f"mt50_{group}", group.replace("_", " "), f"{tasks} tasks", videos=1)
            for group, tasks in (("easy", 28), ("medium", 11), ("hard", 6), ("very_hard", 5))
        ),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=BENCHMARKS, help="which")
    add_config_arguments(parser, "")
    add_workers(parser)
    parser.add_argument("--tasks", nargs="+", metavar="T", help="to learn, instead of the benchmark's")
    parser.add_argument("--demonstrations", type=positive, default=50, help="recorded per task (default: %(default)s)")
    parser.add_argument("--episodes", type=positive, default=10, help="evaluation episodes per task (default: %(default)s)")
    parser.add_argument("--long", action="store_true", help="also what takes hours more: all starts, changed suites, controls")
    parser.add_argument("--data_dir", type=Path, metavar="D", help="kept between calls (default: experiments/NAME_data)")
    parser.add_argument("--seed", type=natural, default=0, help="of demonstrations, training and evaluation")


def main(args: argparse.Namespace) -> int:
    from paligemma_vla.cli.stats import write_statistics
    from paligemma_vla.evaluation.collect import CollectConfig, collect
    from paligemma_vla.evaluation.envs import make_environment, named_tasks
    from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma
    from paligemma_vla.training.distributed import Distributed, choose_device

    benchmark, suffix = BENCHMARKS[args.name], f"-seed{args.seed}" if args.seed else ""
    data = args.data_dir or Path(f"experiments/{args.name}_data{suffix}")
    args.config_path = args.config_path or f"configs/{args.name}.yaml"
    config = configured(args, {**keys_of(data, args.seed), "training.experiment_name": f"{args.name}{suffix}"})
    data.mkdir(parents=True, exist_ok=True)
    keep = data / f"{config.training.experiment_name}-seconds.json"
    wall: dict[str, float] = json.loads(keep.read_text()) if keep.exists() else {}
    with stage(wall, "demonstrations", keep):
        env = make_environment(benchmark.env)
        tasks = named_tasks(env, args.tasks or benchmark.tasks)
        known = tuple(dict.fromkeys(text for task in tasks for text in env.prompts(task, "own")))
        env.close()
        spec = TinySpec(**benchmark.backbone, instructions=known)
        write_tiny_paligemma(config.model.vlm_config.model_name_or_path, spec)
        job = CollectConfig(
            benchmark.env, tasks, args.demonstrations, data / "episodes", args.seed, args.workers, **benchmark.collection
        )
        collect(job)
    with stage(wall, "statistics", keep):
        write_statistics(lambda: config, config.data.normalization_stats_path, Distributed(0, 1, choose_device("cpu")))
    with stage(wall, "training", keep):
        train_on_cpu(config, args.workers, resume="auto")
    conditions = benchmark.conditions + (benchmark.long if args.long else ())
    if args.tasks is not None:
        conditions = (NamedCondition("mean_success", "these tasks", STARTS, {"tasks": tasks}, videos=1),)
    with stage(wall, "evaluation", keep):
        common = {"seed": args.seed, "episodes": args.episodes, "resets": "protocol"}
        size = benchmark.collection["image_size"]
        played = play_conditions(
            config, conditions, benchmark.played, common, workers=args.workers, image_size=size, again=False
        )
    page = write_page(
        config, conditions, wall, benchmark.title, f"A small PaliGemma, from scratch on {os.cpu_count()} CPU cores."
    )
    write_summary(config.run_dir / f"{args.name}_summary.json", conditions, played, wall, page)
    return 0
