"""Compute normalisation statistics (S1.2), in one process or under torchrun."""

from __future__ import annotations

import argparse
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

import numpy as np
from tqdm import tqdm

from paligemma_vla.action_settings import resolve_actions
from paligemma_vla.actions import ActionTransform
from paligemma_vla.config import load_config, parse_assignments, source_paths
from paligemma_vla.data.index import EpisodeIndex, ExclusionList, load_exclusions
from paligemma_vla.data.statistics import compute_part, merge_parts
from paligemma_vla.errors import VLAError
from paligemma_vla.normalization import DatasetStatistics

if TYPE_CHECKING:
    from paligemma_vla.training.distributed import Distributed

Result = TypeVar("Result")
PATIENCE = str(24 * 3600)  # seconds
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config_path", required=True, help="configuration that names the training data")
    parser.add_argument("--output_path", required=True, help="JSON file to write")
    parser.add_argument("--train_data_override", help="file, folder, glob or URL instead of data.train_parquet_files")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, as for train")


@dataclass(frozen=True)
class Job:
    """What to compute. excluded: the list of episodes to leave out, where there is one."""

    index: EpisodeIndex
    actions: ActionTransform
    excluded: ExclusionList | None


def main(args: argparse.Namespace) -> int:
    """Compute and write the statistics here, or as one process of torchrun's."""
    if "LOCAL_RANK" in os.environ:
        return _main_of_rank(args)
    job = _prepare(args)
    with _bar(job.index.steps) as bar:
        part = compute_part(job.index, job.actions, range(len(job.index.paths)), bar.update)
    _save(args, job, merge_parts(job.index, job.actions, [part]))
    return 0


def _main_of_rank(args: argparse.Namespace) -> int:
    """Each process reads every so-manieth file; rank 0 merges in the order of files, so their number changes nothing."""
    from paligemma_vla.training.distributed import join

    os.environ.setdefault("NCCL_TIMEOUT", PATIENCE)  # for the slowest; of one that is gone the launcher knows
    group = join("cpu")
    if not group.main:
        logging.getLogger().setLevel(logging.WARNING)

    def prepare() -> Job:
        with group.local_main_first():  # the others find its index on the disk
            return _prepare(args)

    job = _together(group, prepare)
    files = range(len(job.index.paths))[group.rank :: group.world_size]
    rows = int(job.index.length[np.isin(job.index.file, files)].sum())
    with _bar(rows, shown=group.main) as bar:
        part = _together(group, lambda: compute_part(job.index, job.actions, files, bar.update))
    parts = group.gather(part) if group.world_size > 1 else iter([part])
    _together(group, lambda: _save(args, job, merge_parts(job.index, job.actions, parts)) if group.main else deque(parts))
    group.close()
    return 0


def _together(group: Distributed, action: Callable[[], Result]) -> Result:
    """What `action` gives when it has succeeded on every process. An error of any is told once, and ends all of them."""
    try:
        result, error = action(), None
    except VLAError as met:
        error = met
    told = [text for text in group.all_gather(None if error is None else str(error)) if text is not None]
    if told:
        group.close()
        if group.main:
            raise VLAError(told[0]) from error
        raise SystemExit(2)
    return result


def _prepare(args: argparse.Namespace) -> Job:
    override = {"data.train_parquet_files": args.train_data_override} if args.train_data_override else {}
    config = load_config(args.config_path, {**override, **parse_assignments(args.set)})
    where = "--train_data_override" if override else "data.train_parquet_files"
    excluded = load_exclusions(config.data.exclude_episodes)
    index = EpisodeIndex.build(source_paths(config.data.train_parquet_files), where, excluded)
    layout = index.layout
    return Job(index, resolve_actions(config, layout.metadata, layout.state_dim, layout.action_dim), excluded)


def _bar(rows: int, shown: bool = True) -> tqdm[NoReturn]:
    return tqdm(total=rows, unit=" rows", desc="statistics", dynamic_ncols=True, disable=not shown)


def _save(args: argparse.Namespace, job: Job, statistics: DatasetStatistics) -> None:
    statistics.save(args.output_path)
    if job.excluded is not None:
        logger.info("%s: %d episodes (or whole files) left out", job.excluded.path, job.index.excluded)
    if job.actions.converts:
        steps, kind = statistics.action.count, job.actions.describe(job.index.layout.metadata)
        logger.info("actions, %d steps of chunks of %d: %s", steps, job.actions.horizon, kind)
    logger.info(
        "%s: %d rows of %d file(s), state %d, action %d dimensions",
        args.output_path,
        statistics.state.count,
        len(statistics.datasets),
        len(statistics.state.min),
        len(statistics.action.min),
    )
