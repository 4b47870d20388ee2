"""The whole job on a simulator, stage by stage: what `demo` and `benchmark` have in common."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paligemma_vla.storage import atomic_write

if TYPE_CHECKING:
    from paligemma_vla.config import VLAConfig

MAX_PROCESSES = 8  # of training: with more, each has too few of the 128 samples of a step
logger = logging.getLogger(__name__)


class NamedCondition(NamedTuple):
    """One way of playing the policy. key: in the summary; note: what it controls for; changes: of the plain rollout, its tasks
    and its number of episodes among them; videos: per task and outcome; env: a simulator other than the others'."""

    key: str
    label: str
    note: str
    changes: Mapping[str, Any] = {}
    videos: int = 0
    env: str = ""

    def output(self, config: VLAConfig) -> Path:
        return config.run_dir / "rollouts" / self.key.removesuffix("_mean_success")


def keys_of(data: Path, seed: int) -> dict[str, Any]:
    """Configuration keys of a job whose data lie in one folder."""
    return {
        "data.train_parquet_files": str(data / "episodes"),
        "data.normalization_stats_path": str(data / "normalization_stats.json"),
        "model.vlm_config.model_name_or_path": str(data / "tiny-paligemma"),
        "training.seed": seed,
    }


@contextmanager
def stage(wall: dict[str, float], name: str, keep: Path | None = None) -> Iterator[None]:
    """Announce a stage, and put its seconds into `wall`. keep: file of `wall`, where calls that continue a job add theirs."""
    logger.info("\n=== %s", name)
    began = time.monotonic()
    try:
        yield
    finally:
        wall[name] = round(wall.get(name, 0.0) + time.monotonic() - began, 1)
        if keep is not None:
            atomic_write(keep, json.dumps(wall) + "\n")


def train_on_cpu(config: VLAConfig, workers: int, resume: str | None = None) -> None:
    """In as many processes as there are workers: at this size, processes use cores better than threads do."""
    from paligemma_vla.cli.train import run_rank, train
    from paligemma_vla.training.distributed import launch

    job = partial(train, config, device="cpu", resume_checkpoint=resume)
    processes = min(workers, MAX_PROCESSES)
    if processes > 1:
        launch(run_rank, job, processes)
    else:
        job()


def last_checkpoint(config: VLAConfig) -> Path:
    from paligemma_vla.training.checkpoint import LAST

    return config.run_dir / "checkpoints" / LAST


def play_conditions(
    config: VLAConfig,
    conditions: Sequence[NamedCondition],
    env: str,
    common: Mapping[str, Any],
    *,
    workers: int,
    image_size: int = 64,
    again: bool = True,
) -> dict[str, dict[str, Any]]:
    """Play every condition with the run's last checkpoint; results by key, as in rollout.json. common: of all their rollouts.

    again: also one that has been played already, of this very checkpoint with these settings.
    """
    from paligemma_vla.evaluation.rollout import RolloutConfig, RolloutPool

    results = {}
    for name, group in groupby(conditions, lambda condition: condition.env or env):
        with RolloutPool(name, str(last_checkpoint(config)), workers=workers, image_size=image_size) as pool:
            for condition in group:
                settings = {**common, "max_videos": condition.videos, **condition.changes}
                rollout = RolloutConfig(output_dir=condition.output(config), **settings)
                found = None if again else pool.played(rollout)
                results[condition.key] = found or pool.run(rollout)
    return results


def totals(result: Mapping[str, Any]) -> tuple[int, int]:
    """Successes and episodes of all tasks of a rollout."""
    successes, episodes = (sum(entry[field] for entry in result["tasks"].values()) for field in ("successes", "episodes"))
    return successes, episodes


def write_summary(
    path: Path,
    conditions: Sequence[NamedCondition],
    results: Mapping[str, dict[str, Any]],
    wall: Mapping[str, float],
    page: Path,
) -> None:
    """Write what came out as JSON, and say it. page: what to look at."""
    headline = results[conditions[0].key]
    fields = ("successes", "episodes", "rate", "ci95")
    summary = {
        "tasks": {task: {name: entry[name] for name in fields} for task, entry in headline["tasks"].items()},
        **{key: result["mean_success"] for key, result in results.items()},
        "wall_s": wall,
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")
    rows = []
    for condition in conditions:
        successes, episodes = totals(results[condition.key])
        rate = results[condition.key]["mean_success"]
        rows.append(f"{condition.label:<24} {successes:>4}/{episodes:<4} {rate:>5.2f}  {condition.note}")
    logger.info("\n%s\n%s", "\n".join(rows), path)
    logger.info("%s: open it in a browser", page)


def write_page(
    config: VLAConfig, conditions: Sequence[NamedCondition], wall: Mapping[str, float], title: str, subtitle: str
) -> Path:
    """The report of a run whose conditions have been played; returns its path."""
    from paligemma_vla import versions
    from paligemma_vla.config import source_paths
    from paligemma_vla.data.index import EpisodeIndex
    from paligemma_vla.evaluation.open_loop import OpenLoopConfig, evaluate
    from paligemma_vla.evaluation.report import Report, write_report
    from paligemma_vla.policy import Policy

    policy = Policy.from_checkpoint(last_checkpoint(config))
    index = EpisodeIndex.build(source_paths(config.data.train_parquet_files))
    held_out = index.split(config.data.val_fraction, config.training.seed)[1]
    report = Report(
        title=title,
        subtitle=subtitle,
        run_dir=config.run_dir,
        dataset=index,
        evaluation=evaluate(policy, held_out, OpenLoopConfig(max_samples=256, euler_samples=64)),
        rollouts=[(condition.label, condition.note, condition.output(config)) for condition in conditions],
        facts={
            "wall_s": wall,
            "parameters": f"{sum(p.numel() for p in policy.model.parameters()) / 1e6:.1f} M",
            "hardware": f"{os.cpu_count()} CPU cores",
            "versions": versions(),
        },
    )
    return write_report(config.run_dir / "report.html", report)
