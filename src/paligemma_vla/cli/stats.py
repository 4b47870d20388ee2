"""Compute normalisation statistics (S1.2), in one process or under torchrun."""

from __future__ import annotations

import argparse
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from paligemma_vla.actions import resolve_actions
from paligemma_vla.cli.arguments import add_config_arguments, configured
from paligemma_vla.config import VLAConfig, source_paths
from paligemma_vla.data.index import load_exclusions
from paligemma_vla.data.labels import build_index
from paligemma_vla.data.statistics import compute_part, merge_parts
from paligemma_vla.errors import VLAError
from paligemma_vla.progress import progress_bar

if TYPE_CHECKING:
    from paligemma_vla.training.distributed import Distributed

DAY = str(24 * 3600)  # seconds
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--output_path", required=True, help="JSON file to write")
    parser.add_argument("--train_data_override", help="file, folder, glob or URL instead of data.train_parquet_files")


def main(args: argparse.Namespace) -> int:
    """Compute and write the statistics, alone or as one process of torchrun's."""
    from paligemma_vla.training.distributed import join

    os.environ.setdefault("NCCL_TIMEOUT", DAY)  # the slowest may take long; the launcher notices one that died
    group = join("cpu")
    if not group.main:
        logging.getLogger().setLevel(logging.WARNING)
    where = "data.train_parquet_files" if args.train_data_override is None else "--train_data_override"
    overrides = {"data.train_parquet_files": args.train_data_override}
    write_statistics(lambda: configured(args, overrides), args.output_path, group, where)
    group.close()
    return 0


def write_statistics(
    configure: Callable[[], VLAConfig], output: str, group: Distributed, where: str = "data.train_parquet_files"
) -> None:
    """Compute and write the statistics of the training data. where: the flag or key that names the data.

    Each process reads every world_size-th file. Rank 0 merges in the order of files, so their number changes nothing.
    """

    with _together(group):
        config = configure()
        with group.one_at_a_time():  # the others find its index on the disk
            excluded = load_exclusions(config.data.exclude_episodes)
            horizon = config.model.action_head_config.horizon
            index = build_index(source_paths(config.data.train_parquet_files), where, excluded, config.data.labels, horizon)
        layout = index.layout
        actions = resolve_actions(config, layout.metadata, layout.state_dim, layout.action_dim)
    files = range(len(index.paths))[group.rank :: group.world_size]
    rows = int(index.length[np.isin(index.file, files)].sum())
    bar = progress_bar(rows, "statistics", "row", hidden=not group.main)
    with _together(group), bar:
        part = compute_part(index, actions, files, bar.update)
    parts = group.gather(part)
    with _together(group):
        if not group.main:
            deque(parts)  # sends what this process has
            return
        statistics = merge_parts(index, actions, parts)
        statistics.save(output)
        if config.data.exclude_episodes is not None:
            logger.info("%s: %d episodes (or whole files) left out", config.data.exclude_episodes, index.excluded)
        if actions.converts:
            kind = actions.describe(layout.metadata)
            logger.info("actions, %d steps of chunks of %d: %s", statistics.action.count, actions.horizon, kind)
        sizes = statistics.state.count, len(statistics.datasets), len(statistics.state.min), len(statistics.action.min)
        logger.info("%s: %d rows of %d file(s), state %d, action %d dimensions", output, *sizes)


@contextmanager
def _together(group: Distributed) -> Iterator[None]:
    """Wait until every process has done the block. The first error of any is printed once and ends all."""
    error = None
    try:
        yield
    except VLAError as met:
        error = met
    errors = [text for text in group.all_gather(None if error is None else str(error)) if text is not None]
    if errors:
        group.close()
        if group.main:
            raise VLAError(errors[0]) from error
        raise SystemExit(2)
