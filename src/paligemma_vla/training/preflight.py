"""Before a weight is loaded: the data of a run, its order, its preprocessor, its memory plan, and every fault among them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.actions import matched_by_number
from paligemma_vla.config import DataSource, VLAConfig, source_paths
from paligemma_vla.data.formats import find_format
from paligemma_vla.data.index import EpisodeIndex, find_copies, hex_digest, load_exclusions, real_name
from paligemma_vla.data.loader import AHEAD, VLADataset, check_actions, check_fit
from paligemma_vla.data.order import Order, SampleOrder, StreamedOrder
from paligemma_vla.data.reader import EpisodeReader, check_cameras, cut_blocks, streaming_cache_bytes
from paligemma_vla.errors import ConfigError, DataError, Faults
from paligemma_vla.model.architectures import read_architecture
from paligemma_vla.model.memory_plan import MemoryPlan, plan_run
from paligemma_vla.normalization import DatasetStatistics, Statistics
from paligemma_vla.preprocess import Preprocessor, load_prompt_and_image_spec
from paligemma_vla.storage import is_url
from paligemma_vla.training.distributed import Distributed

if TYPE_CHECKING:
    from paligemma_vla.training.init_from import SourcePolicy

# The statistics are compared with the first rows of some files, not of all: a start must not take a pass over the data.
FILES_SAMPLED, ROWS_SAMPLED = 64, 1024
# As a share of their range: more data of the same task leaves it a little, which does no harm.
SLACK = 0.1
COMPUTE = "compute the statistics of this data (`paligemma-vla stats`)"
logger = logging.getLogger(__name__)


@dataclass
class Data:
    """Training and validation sets, and the order of the run."""

    train: VLADataset
    validation: VLADataset | None
    order: Order

    @property
    def fingerprint(self) -> dict[str, str | None]:
        """Of the episodes, and of the order they come in, wherever they lie."""
        validation = None if self.validation is None else self.validation.index.fingerprint
        names = {"training": self.train.index.fingerprint, "validation": validation}
        return names if self.order.version is None else {**names, "order": self.order.version}


def prepare(
    config: VLAConfig,
    distributed: Distributed,
    preprocessor: Preprocessor | None = None,
    architecture: dict[str, Any] | None = None,
    source: SourcePolicy | None = None,
) -> tuple[Preprocessor, Data, MemoryPlan]:
    """Index the data, read statistics and tokenizer, plan the memory, and check all of it together.

    preprocessor: of the checkpoint that is resumed. architecture: of a checkpoint's backbone. None reads them as configured.
    source: the policy that a new run begins with. Raises one `VLAError` with every fault.
    """
    faults = Faults()
    trained = preprocessor is not None
    kept = source if source is not None and source.keeps_statistics else None
    statistics = None
    with faults.collect():
        check_processes(config, distributed)
    with faults.collect():
        if source is not None:
            source.check()
    with faults.collect():
        own = preprocessor or (kept.preprocessor if kept else None)
        statistics = own.statistics if own else DatasetStatistics.load(config.data.normalization_stats_path)
    with faults.collect():
        if preprocessor is None:
            prompts, image = source.prompt_and_image_spec() if source else load_prompt_and_image_spec(config)
        if architecture is None:
            architecture = read_architecture(config.model.vlm_config)
        plan = plan_run(config, architecture, distributed.device, distributed.world_size, distributed.local_world_size)
    with faults.collect():
        sources, validation = _index_once(config, distributed)
        train = EpisodeIndex.concatenate(sources)
        warn_of_copies([train] if validation is None else [train, validation])
        other_actions = "start a run of its own" if trained else kept.other_statistics if kept else None
        checks = [partial(check_episodes, train, config)]
        checks += [partial(check_actions, train.layout, statistics, config, other_actions)]
        checks += [partial(kept.check_dimensions, train.layout)] if kept else []
        for index in (train, validation):
            checks += [partial(check_fit, index, None if kept else statistics, config)] if index is not None else []
        cameras = range(config.model.vlm_config.cameras)
        checks += [partial(check_cameras, index, cameras) for index in (*sources, validation) if index is not None]
        for check in checks:
            with faults.collect():
                check()
    if not (faults.errors or trained or config.data.allow_other_statistics):
        assert statistics is not None
        path = config.data.normalization_stats_path
        where = f"training.init_statistics: kept: {kept.location}" if kept else f"data.normalization_stats_path: {path}"
        for index in sources:
            if kept is None:
                warn_of_other_files(index, statistics, path)
            with faults.collect():
                check_range(index, statistics, where, kept.other_statistics if kept else COMPUTE)
    faults.raise_all("this run cannot begin")
    if preprocessor is None:
        assert statistics is not None
        preprocessor = Preprocessor(prompts, image, statistics, config.data.normalization)
    _log_actions(config, preprocessor, train)
    reader = build_streaming_reader(train, config, distributed.world_size) if config.data.streamed else None
    data = Data(
        VLADataset(train, preprocessor, config, training=True, reader=reader),
        None if validation is None else VLADataset(validation, preprocessor, config),
        build_order(sources, config),
    )
    return preprocessor, data, plan


def _index_once(config: VLAConfig, distributed: Distributed) -> tuple[list[EpisodeIndex], EpisodeIndex | None]:
    """`index_sources` for all processes. Files behind URLs are listed by one of them: hundreds would overload a store.

    Disks are read on each machine: its files may be copies with dates of their own.
    """
    locations = source_paths(config.data.train_parquet_files) + source_paths(config.data.val_parquet_files or [])
    if all(map(is_url, locations)):
        return distributed.broadcast(partial(index_sources, config))
    with distributed.one_at_a_time():  # the others find the index in the cache
        return index_sources(config)


def index_sources(config: VLAConfig) -> tuple[list[EpisodeIndex], EpisodeIndex | None]:
    """The episodes to train on, per source, and those to validate on."""
    from paligemma_vla.data.labels import build_index  # the trainer is light to import without

    data, horizon = config.data, config.model.action_head_config.horizon
    build = partial(build_index, exclude=load_exclusions(data.exclude_episodes), labels=data.labels, horizon=horizon)
    paths = [source_paths([source]) for source in _configured_sources(config)]
    sources = [build(each, "data.train_parquet_files") for each in paths]
    if data.val_parquet_files is not None:
        validation = build(source_paths(data.val_parquet_files), "data.val_parquet_files")
        if seen := int(_shared_episodes(validation, sources).sum()):
            logger.warning("data.val_parquet_files: %d of %d episodes are trained on as well", seen, len(validation))
        return sources, validation
    if data.val_fraction == 0:
        return sources, None
    pairs = [index.split(data.val_fraction, config.training.seed) for index in sources]
    held_out = [validation for _, validation in pairs]
    kept = [_without(train, held_out, number) for number, (train, _) in enumerate(pairs)]
    return kept, EpisodeIndex.concatenate(held_out)


def _configured_sources(config: VLAConfig) -> list[str | DataSource]:
    files = config.data.train_parquet_files
    return [files] if isinstance(files, str) else list(files)


def _without(train: EpisodeIndex, held_out: Sequence[EpisodeIndex], number: int) -> EpisodeIndex:
    """Source `number` without episodes that another holds out: it may be a subset of that one, with a weight of its own."""
    shared = _shared_episodes(train, [*held_out[:number], *held_out[number + 1 :]])
    if shared.all():
        raise DataError(
            f"data.train_parquet_files.{number}: another source holds out all of its {len(train)} episodes; lower "
            f"data.val_fraction, or give data.val_parquet_files"
        )
    return train.select(np.flatnonzero(~shared)) if shared.any() else train


def _shared_episodes(index: EpisodeIndex, others: Sequence[EpisodeIndex]) -> NDArray[np.bool_]:
    """Which episodes of an index (N,) are also in one of `others`: the same rows of the same file."""
    numbers: dict[str, int] = {}  # of files, whatever they are called

    def keys(index: EpisodeIndex) -> NDArray[np.int64]:
        files = [numbers.setdefault(real_name(path), len(numbers)) for path in index.paths]
        return np.array(files, np.int64)[index.file] << 40 | index.start

    return np.isin(keys(index), np.concatenate([keys(other) for other in others])) if others else np.zeros(len(index), bool)


def warn_of_copies(indices: Sequence[EpisodeIndex]) -> None:
    """Log which files were copied: their episodes count twice, and may be both trained on and validated on."""
    digests = [pair for index in indices for pair in zip(index.paths, index.digests.tolist(), strict=True)]
    if copies := find_copies(dict(digests)):
        logger.warning(
            "%s: has the same content as %s%s, so its episodes count twice, or are both trained on and validated on; take "
            "copies out of the data",
            *copies[0],
            f", and {len(copies) - 1} more files are copies" if len(copies) > 1 else "",
        )


def build_order(sources: Sequence[EpisodeIndex], config: VLAConfig) -> Order:
    """The order of a run over the episodes of each source."""
    data, configured = config.data, _configured_sources(config)
    weights = None
    if any(isinstance(source, DataSource) for source in configured):
        weights = [source.weight if isinstance(source, DataSource) else 1.0 for source in configured]
    if not data.streamed:
        return SampleOrder([index.steps for index in sources], weights, data.batch_size, config.training.seed)
    blocks = [cut_blocks(index, data.stream_block_mb * 1e6).sizes for index in sources]
    return StreamedOrder(blocks, weights, data.batch_size, config.training.seed, data.stream_window)


def build_streaming_reader(index: EpisodeIndex, config: VLAConfig, processes: int) -> EpisodeReader:
    """A reader with memory for the blocks that one loader process needs at a time."""
    data = config.data
    blocks = cut_blocks(index, data.stream_block_mb * 1e6)
    parts = config.training.gradient_accumulation_steps
    slots = parts * math.ceil(math.ceil(data.batch_size / (processes * parts)) / max(1, data.num_workers))
    room = streaming_cache_bytes(blocks, slots, data.stream_window, AHEAD)
    size = blocks.nbytes.mean()
    logger.info(
        "data is streamed in %d blocks of %.3g MB; a loader process keeps up to %.3g MB", len(blocks), size / 1e6, room / 1e6
    )
    if len(blocks) < data.batch_size:
        logger.warning(
            "data.stream_block_mb: the data has %d blocks, fewer than the %d samples of a batch, so samples of one batch come "
            "from the same blocks; lower it, or set data.reading: random",
            len(blocks),
            data.batch_size,
        )
    return EpisodeReader(index, config.model.vlm_config.cameras, room, blocks)


def check_processes(config: VLAConfig, distributed: Distributed) -> None:
    """The batch and the shards against the number of processes."""
    world, batch_size = distributed.world_size, config.data.batch_size
    group = config.training.processes_per_copy(world, distributed.local_world_size)
    if world % group:
        raise ConfigError(
            f"training.shard_processes: got {group}, expected a divisor of the {world} processes; give one of "
            f"{', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}"
        )
    parts = world * config.training.gradient_accumulation_steps
    if batch_size < parts:
        raise ConfigError(
            f"data.batch_size: got {batch_size}, expected at least processes * gradient_accumulation_steps = {parts}, one "
            f"sample for each; it is the total over all of them"
        )


def check_episodes(train: EpisodeIndex, config: VLAConfig) -> None:
    """The batch against the number of samples, the horizon against the longest episode, streamed reading against formats
    that have no blocks."""
    horizon, batch_size, longest = config.model.action_head_config.horizon, config.data.batch_size, int(train.length.max())
    faults = []
    if batch_size > train.steps:
        faults.append(f"data.batch_size: got {batch_size}, expected at most {train.steps}, the training samples; reduce it")
    if horizon > longest:
        faults.append(
            f"model.action_head_config.horizon: got {horizon}, expected at most {longest}, the steps of the longest training "
            f"episode; reduce it, or check where episodes end"
        )
    foreign = next((path for path in train.paths if find_format(path)[1] is not None), None)
    if config.data.streamed and foreign is not None:
        faults.append(
            f"data.reading: got {config.data.reading or 'null with a URL'}, so data is streamed, but {foreign} is of a foreign "
            f"format, which is read in random order only; set it to random, or convert that (`paligemma-vla data convert`)"
        )
    if faults:
        raise ConfigError("\n".join(faults))


def warn_of_other_files(index: EpisodeIndex, statistics: DatasetStatistics, path: str) -> None:
    """Log how many files the statistics of `path` were not computed from."""
    known_files = set(statistics.digests)
    others = sum(hex_digest(digest) not in known_files for digest in index.digests.tolist())
    if others:
        logger.warning("%s was not computed from %d of the %d training files", path, others, len(index.paths))


def check_range(index: EpisodeIndex, statistics: DatasetStatistics, where: str, remedy: str) -> None:
    """Refuse statistics of other data: what they were computed from lies between their minimum and maximum.

    where: key and name of the statistics. Raises `DataError`.
    """
    from paligemma_vla.data.statistics import model_numbers  # a run that goes on has no use for it

    metadata = index.layout.metadata
    for file in range(0, len(index.paths), max(1, len(index.paths) // FILES_SAMPLED)):
        for states, actions in islice(model_numbers(index, file, statistics.actions, ROWS_SAMPLED), 1):
            for name, values, known, names in [
                (schema.STATE, states, statistics.state, metadata.state_names),
                (schema.ACTION, actions, statistics.action, metadata.action_names),
            ]:
                if fault := _first_outside(values, known, names):
                    raise DataError(
                        f"{where} is of other data: {index.paths[file]}: column {name}, {fault}; {remedy}, or set "
                        f"data.allow_other_statistics: true"
                    )


def _first_outside(values: NDArray[np.float32], known: Statistics, names: tuple[str, ...]) -> str | None:
    """The first of the numbers (R, dimensions) that is far from the range of the statistics: got, expected."""
    slack = SLACK * (known.max - known.min) + 1e-6
    outside = (values < known.min - slack) | (values > known.max + slack)
    if not outside.any():
        return None
    row, dimension = (int(i) for i in np.argwhere(outside)[0])
    name = f" ({names[dimension]})" if dimension < len(names) else ""
    got, low, high = values[row, dimension], known.min[dimension], known.max[dimension]
    return f"dimension {dimension}{name}: got {got:g}, expected between {low:g} and {high:g}"


def _log_actions(config: VLAConfig, preprocessor: Preprocessor, train: EpisodeIndex) -> None:
    if not preprocessor.actions.converts:
        return
    metadata = train.layout.metadata
    logger.info("actions as %s; the rest as recorded", preprocessor.actions.describe(metadata))
    if matched_by_number(config, metadata):
        logger.warning(
            "data.actions.state_dimensions: no converted action has a name of the state's, so each was taken from the "
            "number of the state in its own place; list them if that is another quantity"
        )
