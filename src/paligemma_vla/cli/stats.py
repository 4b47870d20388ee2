"""Compute normalisation statistics (S1.2), in one process or under torchrun."""

from __future__ import annotations

import argparse
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from tqdm import tqdm

from paligemma_vla.actions import ActionTransform, resolve_actions
from paligemma_vla.cli.arguments import add_config_arguments, configured
from paligemma_vla.config import VLAConfig, source_paths
from paligemma_vla.data.index import EpisodeIndex, ExclusionList, load_exclusions
from paligemma_vla.data.statistics import compute_part, merge_parts
from paligemma_vla.errors import VLAError
from paligemma_vla.normalization import DatasetStatistics

if TYPE_CHECKING:
    from paligemma_vla.training.distributed import Distributed

Result = TypeVar("Result")
DAY = str(24 * 3600)  # seconds
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--output_path", required=True, help="JSON file to write")
    parser.add_argument("--train_data_override", help="file, folder, glob or URL instead of data.train_parquet_files")


@dataclass(frozen=True)
class Job:
    """What to compute. excluded: the list of episodes to leave out, if the configuration names one."""

    index: EpisodeIndex
    actions: ActionTransform
    excluded: ExclusionList | None

    @classmethod
    def of(cls, config: VLAConfig, where: str) -> Job:
        excluded = load_exclusions(config.data.exclude_episodes)
        index = EpisodeIndex.build(source_paths(config.data.train_parquet_files), where, excluded)
        layout = index.layout
        return cls(index, resolve_actions(config, layout.metadata, layout.state_dim, layout.action_dim), excluded)

    def save(self, statistics: DatasetStatistics, output: str) -> None:
        statistics.save(output)
        if self.excluded is not None:
            logger.info("%s: %d episodes (or whole files) left out", self.excluded.path, self.index.excluded)
        if self.actions.converts:
            steps, kind = statistics.action.count, self.actions.describe(self.index.layout.metadata)
            logger.info("actions, %d steps of chunks of %d: %s", steps, self.actions.horizon, kind)
        logger.info(
            "%s: %d rows of %d file(s), state %d, action %d dimensions",
            output,
            statistics.state.count,
            len(statistics.datasets),
            len(statistics.state.min),
            len(statistics.action.min),
        )


def main(args: argparse.Namespace) -> int:
    """Compute and write the statistics, alone or as one process of torchrun's."""
    from paligemma_vla.training.distributed import join

    os.environ.setdefault("NCCL_TIMEOUT", DAY)  # the slowest may take long; the launcher notices one that died
    group = join("cpu")
    if not group.main:
        logging.getLogger().setLevel(logging.WARNING)

    def prepare() -> Job:
        config = configured(args, {"data.train_parquet_files": args.train_data_override})
        where = "data.train_parquet_files" if args.train_data_override is None else "--train_data_override"
        with group.local_main_first():  # the others find its index on the disk
            return Job.of(config, where)

    _compute(_together(group, prepare), group, args.output_path)
    group.close()
    return 0


def write_statistics(config: VLAConfig, output: str) -> None:
    """Compute and write the statistics in this process."""
    from paligemma_vla.training.distributed import Distributed, choose_device

    _compute(Job.of(config, "data.train_parquet_files"), Distributed(0, 1, choose_device("cpu")), output)


def _compute(job: Job, group: Distributed, output: str) -> None:
    """Each process reads every world_size-th file; rank 0 merges in the order of files, so their number changes nothing."""
    files = range(len(job.index.paths))[group.rank :: group.world_size]
    rows = int(job.index.length[np.isin(job.index.file, files)].sum())
    with tqdm(total=rows, unit=" rows", desc="statistics", dynamic_ncols=True, disable=not group.main) as bar:
        part = _together(group, lambda: compute_part(job.index, job.actions, files, bar.update))
    parts = group.gather(part)
    _together(group, lambda: job.save(merge_parts(job.index, job.actions, parts), output) if group.main else deque(parts))


def _together(group: Distributed, action: Callable[[], Result]) -> Result:
    """The result of `action` when it has succeeded on every process. The first error of any is printed once and ends all."""
    try:
        result, error = action(), None
    except VLAError as met:
        error = met
    errors = [text for text in group.all_gather(None if error is None else str(error)) if text is not None]
    if errors:
        group.close()
        if group.main:
            raise VLAError(errors[0]) from error
        raise SystemExit(2)
    return result
