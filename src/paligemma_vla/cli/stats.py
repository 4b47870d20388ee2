"""Compute normalisation statistics (S1.2)."""

from __future__ import annotations

import argparse
import logging

from tqdm import tqdm

from paligemma_vla.action_settings import resolve_actions
from paligemma_vla.config import load_config, parse_assignments, source_paths
from paligemma_vla.data.episodes import EpisodeIndex
from paligemma_vla.data.exclusions import load_exclusions
from paligemma_vla.data.statistics import compute_statistics

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config_path", required=True, help="configuration that names the training data")
    parser.add_argument("--output_path", required=True, help="JSON file to write")
    parser.add_argument("--train_data_override", help="file, folder or glob instead of data.train_parquet_files")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, as for train")


def main(args: argparse.Namespace) -> int:
    override = {"data.train_parquet_files": args.train_data_override} if args.train_data_override else {}
    config = load_config(args.config_path, {**override, **parse_assignments(args.set)})
    where = "--train_data_override" if override else "data.train_parquet_files"
    exclude = load_exclusions(config.data.exclude_episodes)
    index = EpisodeIndex.build(source_paths(config.data.train_parquet_files), where, exclude)
    layout = index.layout
    actions = resolve_actions(config, layout.metadata, layout.state_dim, layout.action_dim)
    with tqdm(total=index.steps, unit=" rows", desc="statistics", dynamic_ncols=True) as bar:
        statistics = compute_statistics(index, where, bar.update, actions=actions)
    statistics.save(args.output_path)
    if exclude is not None:
        logger.info("%s: %d episodes (or whole files) left out", exclude.path, index.excluded)
    if actions.converts:
        steps = statistics.action.count
        logger.info("actions, %d steps of chunks of %d: %s", steps, actions.horizon, actions.describe(layout.metadata))
    logger.info(
        "%s: %d rows of %d file(s), state %d, action %d dimensions",
        args.output_path,
        statistics.state.count,
        len(statistics.datasets),
        len(statistics.state.min),
        len(statistics.action.min),
    )
    return 0
