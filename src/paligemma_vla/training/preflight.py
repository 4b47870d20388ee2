"""Before a weight is loaded: everything about data, statistics and tokenizer that cannot work, told at once."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.action_settings import taken_by_number
from paligemma_vla.config import DataSource, VLAConfig, source_paths
from paligemma_vla.data.formats import find_format
from paligemma_vla.data.index import EpisodeIndex, hex_digest, load_exclusions, real_name
from paligemma_vla.data.loader import AHEAD, VLADataset, check_actions, check_fit
from paligemma_vla.data.order import Order, SampleOrder, StreamedOrder
from paligemma_vla.data.reader import BlockReader, cut_blocks, pool_bytes
from paligemma_vla.data.statistics import model_numbers
from paligemma_vla.errors import ConfigError, DataError, Faults
from paligemma_vla.model.architectures import read_architecture
from paligemma_vla.model.memory_plan import MemoryPlan, plan_run
from paligemma_vla.normalization import DatasetStatistics, Statistics
from paligemma_vla.preprocess import Preprocessor, configured_prompt_and_image_spec
from paligemma_vla.schema import joint_layout
from paligemma_vla.storage import is_url
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.parallel import group_size

# The statistics are held against the first rows of some files, not against all: a start must not take a pass over the data.
FILES_SAMPLED, ROWS_SAMPLED = 64, 1024
# As a share of their range: more of the same task leaves it a little, which is told and does no harm.
SLACK = 0.1
logger = logging.getLogger(__name__)


@dataclass
class Data:
    """Training and validation sets, and the order of the run."""

    train: VLADataset
    validation: VLADataset | None
    order: Order

    @property
    def fingerprint(self) -> dict[str, str | None]:
        """What tells these episodes, and the order they come in, from others, wherever they lie."""
        validation = None if self.validation is None else self.validation.index.fingerprint
        names = {"training": self.train.index.fingerprint, "validation": validation}
        return names if self.order.version is None else {**names, "order": self.order.version}


def prepare(
    config: VLAConfig,
    distributed: Distributed,
    preprocessor: Preprocessor | None = None,
    architecture: dict[str, Any] | None = None,
) -> tuple[Preprocessor, Data, MemoryPlan]:
    """Read what a run starts from, and hold all of it against each other.

    preprocessor, architecture: those of a checkpoint; None reads them as configured. Raises one `VLAError` with every fault.
    """
    faults = Faults()
    found = _survey(config, distributed, preprocessor, architecture, faults)
    faults.raise_all("this run cannot begin")
    made, plan = found.preprocessor, found.plan
    assert made is not None and plan is not None
    index = EpisodeIndex.concatenate(found.indices)
    reader = _block_reader(index, config, distributed.world_size) if config.data.streamed else None
    train = VLADataset(index, made, config, training=True, reader=reader)
    if made.actions.converts:
        metadata = train.index.layout.metadata
        logger.info("actions as %s; the rest as recorded", made.actions.describe(metadata))
        if taken_by_number(config, metadata):
            logger.warning(
                "data.actions.state_dimensions: no converted action has a name of the state's, so each was taken from the "
                "number of the state in its own place; list them if that is another quantity"
            )
    validation = VLADataset(EpisodeIndex.concatenate(found.held_out), made, config) if found.held_out else None
    return made, Data(train, validation, _order(found.indices, config)), plan


@dataclass
class Found:
    """What a run starts from, as far as it is there. indices: episodes to train on, per source; held_out: to validate on."""

    preprocessor: Preprocessor | None
    plan: MemoryPlan | None = None
    indices: list[EpisodeIndex] = field(default_factory=list)
    held_out: list[EpisodeIndex] = field(default_factory=list)


def _survey(
    config: VLAConfig,
    distributed: Distributed,
    preprocessor: Preprocessor | None,
    architecture: dict[str, Any] | None,
    faults: Faults,
) -> Found:
    """Look at everything that a run needs; what is not as it should be goes to `faults`."""
    found = Found(preprocessor)
    with faults.collect():
        _check_division(config, distributed.world_size)
    with faults.collect():
        group_size(config.training, distributed)
    statistics = preprocessor.statistics if preprocessor else None
    if preprocessor is None:
        with faults.collect():
            statistics = DatasetStatistics.load(config.data.normalization_stats_path)
        with faults.collect():
            prompts, image = configured_prompt_and_image_spec(config)
            architecture = read_architecture(config.model.vlm_config)
    if architecture is not None:
        with faults.collect():
            processes = distributed.world_size, distributed.local_world_size
            found.plan = plan_run(config, architecture, distributed.device, *processes)
    with faults.collect():
        found.indices, found.held_out = _index_once(config, distributed)
    if found.indices:
        _check_sizes(found.indices, config, faults)
        with faults.collect():
            _check_reading(found.indices, config)
    for part in (found.indices, found.held_out):
        if part:
            with faults.collect():
                check_fit(EpisodeIndex.concatenate(part), statistics, config)
    if found.indices:
        with faults.collect():
            layout = joint_layout([index.layout for index in found.indices])
            check_actions(layout, statistics, config, trained=preprocessor is not None)
    if preprocessor is None and statistics is not None and not faults.errors:
        if not config.data.allow_other_statistics:
            with faults.collect():
                for index in found.indices:
                    _check_range(index, statistics, config.data.normalization_stats_path)
        found.preprocessor = Preprocessor(prompts, image, statistics, config.data.normalization)
    return found


def _index_once(config: VLAConfig, distributed: Distributed) -> tuple[list[EpisodeIndex], list[EpisodeIndex]]:
    """Ask a store about each of its files from one process for all: from every one it would be more than a store bears.

    Disks are looked at from each machine, whose files may be copies with dates of their own.
    """
    places = source_paths(config.data.train_parquet_files) + source_paths(config.data.val_parquet_files or [])
    if all(map(is_url, places)):
        return distributed.broadcast(partial(_index, config))
    with distributed.local_main_first():  # the others find the index in the cache
        return _index(config)


def _index(config: VLAConfig) -> tuple[list[EpisodeIndex], list[EpisodeIndex]]:
    """Episodes to train on, per source, and those held out."""
    settings = config.data
    exclude = load_exclusions(settings.exclude_episodes)
    sources = [source_paths([source]) for source in _sources(config)]
    indices = [EpisodeIndex.build(paths, "data.train_parquet_files", exclude) for paths in sources]
    if settings.val_parquet_files is not None:
        validation = EpisodeIndex.build(source_paths(settings.val_parquet_files), "data.val_parquet_files", exclude)
        shared = _shared_files([EpisodeIndex.concatenate(indices), validation])
        trained_on = {place for index in indices for place in _places(index, shared)}
        if seen := sum(place in trained_on for place in _places(validation, shared)):
            logger.warning("data.val_parquet_files: %d of %d episodes are trained on as well", seen, len(validation))
        return indices, [validation]
    if settings.val_fraction == 0:
        return indices, []
    pairs = [index.split(settings.val_fraction, config.training.seed) for index in indices]
    return _without_held_out(pairs), [validation for _, validation in pairs]


def _without_held_out(pairs: list[tuple[EpisodeIndex, EpisodeIndex]]) -> list[EpisodeIndex]:
    """Training episodes of each source. A source may lie in another, as a subset that is to weigh more: what one of them holds
    out, none trains on."""
    shared = _shared_files([train for train, _ in pairs])
    held_out = {place for _, validation in pairs for place in _places(validation, shared)}
    parts = []
    for number, (train, _) in enumerate(pairs):
        kept = np.array([place not in held_out for place in _places(train, shared)], bool)
        parts.append(train.select(np.flatnonzero(kept)) if len(kept) and not kept.all() else train)
        if len(parts[-1]) == 0:
            raise DataError(
                f"data.train_parquet_files.{number}: another source holds out all of its {len(train)} episodes; lower "
                f"data.val_fraction, or give data.val_parquet_files"
            )
    return parts


def _shared_files(indices: list[EpisodeIndex]) -> set[str]:
    """Files that more than one index has."""
    counts = Counter(file for index in indices for file in {real_name(path) for path in index.paths})
    return {file for file, count in counts.items() if count > 1}


def _places(index: EpisodeIndex, shared: set[str]) -> list[tuple[str, int]]:
    """File and first row of each episode; of none when no file is shared, which is the rule and costs nothing then."""
    if not shared:
        return []
    real = [real_name(path) for path in index.paths]
    return [(real[file], row) for file, row in zip(index.file.tolist(), index.start.tolist(), strict=True)]


def _sources(config: VLAConfig) -> list[str | DataSource]:
    files = config.data.train_parquet_files
    return [files] if isinstance(files, str) else list(files)


def _order(indices: list[EpisodeIndex], config: VLAConfig) -> Order:
    sources = _sources(config)
    weights = [source.weight if isinstance(source, DataSource) else 1.0 for source in sources]
    given = weights if any(isinstance(source, DataSource) for source in sources) else None
    batch_size, seed = config.data.batch_size, config.training.seed
    if not config.data.streamed:
        return SampleOrder([index.steps for index in indices], given, batch_size, seed)
    sets = [cut_blocks(index, config.data.stream_block_mb * 1e6).sizes for index in indices]
    return StreamedOrder(sets, given, batch_size, seed, config.data.stream_window)


def _block_reader(index: EpisodeIndex, config: VLAConfig, processes: int) -> BlockReader:
    """A reader with room for what one loader process needs at a time."""
    data = config.data
    blocks = cut_blocks(index, data.stream_block_mb * 1e6)
    parts = config.training.gradient_accumulation_steps
    slots = parts * math.ceil(math.ceil(data.batch_size / (processes * parts)) / max(1, data.num_workers))
    room = pool_bytes(blocks, slots, data.stream_window, AHEAD)
    logger.info(
        "data is streamed in %d blocks of %.3g MB; a loader process keeps up to %.3g MB of them",
        len(blocks),
        blocks.nbytes.mean() / 1e6,
        room / 1e6,
    )
    if len(blocks) < data.batch_size:
        logger.warning(
            "data.stream_block_mb: the data makes %d blocks, fewer than the %d samples of a batch, so batches repeat places of "
            "it; lower it, or set data.reading: random",
            len(blocks),
            data.batch_size,
        )
    return BlockReader(index, blocks, config.model.vlm_config.cameras, room)


def _check_division(config: VLAConfig, processes: int) -> None:
    parts = processes * config.training.gradient_accumulation_steps
    if config.data.batch_size < parts:
        raise ConfigError(
            f"data.batch_size: got {config.data.batch_size}, expected at least processes * gradient_accumulation_steps = "
            f"{parts}, or some would have nothing to do; it is the total over all of them"
        )
    if config.data.batch_size % parts:
        # Exact all the same: the loss is the mean over the whole batch, whoever holds how much of it.
        logger.info(
            "data.batch_size: %d is no multiple of processes * gradient_accumulation_steps = %d; some wait for others",
            config.data.batch_size,
            parts,
        )


def _check_reading(indices: list[EpisodeIndex], config: VLAConfig) -> None:
    foreign = next((path for index in indices for path in index.paths if find_format(path)[1] is not None), None)
    if config.data.streamed and foreign is not None:
        raise ConfigError(
            f"data.reading: got {config.data.reading or 'null with a URL'}, so data is streamed, but {foreign} is of a foreign "
            f"format, which is read in random order only; set it to random, or convert that (`paligemma-vla data convert`)"
        )


def _check_sizes(indices: list[EpisodeIndex], config: VLAConfig, faults: Faults) -> None:
    """The batch against the samples there are, the horizon against the longest episode."""
    samples = sum(index.steps for index in indices)
    longest = max(int(index.length.max()) for index in indices)
    horizon, batch_size = config.model.action_head_config.horizon, config.data.batch_size
    with faults.collect():
        if batch_size > samples:
            raise ConfigError(
                f"data.batch_size: got {batch_size}, expected at most {samples}, the number of training samples; reduce it"
            )
    with faults.collect():
        if horizon > longest:
            raise ConfigError(
                f"model.action_head_config.horizon: got {horizon}, expected at most {longest}, the steps of the longest "
                f"training episode; reduce it, or check where episodes end"
            )


def _check_range(index: EpisodeIndex, statistics: DatasetStatistics, where: str) -> None:
    """Refuse statistics of other data: what they were computed from lies between their minimum and maximum."""
    known_files = set(statistics.digests)
    others = sum(hex_digest(digest) not in known_files for digest in index.digests.tolist())
    if others:
        logger.warning("%s was not computed from %d of the %d training files", where, others, len(index.paths))
    metadata = index.layout.metadata
    for file in range(0, len(index.paths), max(1, len(index.paths) // FILES_SAMPLED)):
        for states, actions in islice(model_numbers(index, file, statistics.actions, ROWS_SAMPLED), 1):
            for name, values, known, names in [
                (schema.STATE, states, statistics.state, metadata.state_names),
                (schema.ACTION, actions, statistics.action, metadata.action_names),
            ]:
                _check_values(values, known, f"{index.paths[file]}: column {name}", names, where)


def _check_values(values: NDArray[np.float32], known: Statistics, column: str, names: tuple[str, ...], where: str) -> None:
    slack = SLACK * (known.max - known.min) + 1e-6
    outside = (values < known.min - slack) | (values > known.max + slack)
    if not outside.any():
        return
    row, dimension = (int(i) for i in np.argwhere(outside)[0])
    called = f" ({names[dimension]})" if dimension < len(names) else ""
    raise DataError(
        f"data.normalization_stats_path: {where} is of other data: {column}, dimension {dimension}{called}: got "
        f"{values[row, dimension]:g}, expected between {known.min[dimension]:g} and {known.max[dimension]:g}; compute the "
        f"statistics of this data (`paligemma-vla stats`), or set data.allow_other_statistics: true"
    )
