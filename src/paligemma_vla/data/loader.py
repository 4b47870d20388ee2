"""VLADataset: every time step of every episode is a sample; samples to batches; batches through loader processes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain, islice, pairwise, tee
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.queues import Queue
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from paligemma_vla import flow, schema
from paligemma_vla.actions import resolve_actions
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.faults import FaultError, check_prompt, layout_misfits, located, missing_image, no_rotation
from paligemma_vla.data.images import jitter_colour, random_crop
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.order import RunSampler, SampleRef
from paligemma_vla.data.reader import Blocks, EpisodeReader, Picture
from paligemma_vla.data.video import OPEN_VIDEOS
from paligemma_vla.errors import ConfigError, DataError, VLAError, first_line
from paligemma_vla.normalization import DatasetStatistics, recompute
from paligemma_vla.preprocess import Preprocessor, PromptEncoder, load_prompt_and_image_spec
from paligemma_vla.schema import Layout, Pixels
from paligemma_vla.seeding import derive_seed
from paligemma_vla.workers import end_with

AHEAD = 16  # optimiser steps between reading a block and its need
MISFIT = "data and configuration do not fit"
Batch = dict[str, Any]
logger = logging.getLogger(__name__)


class Item(TypedDict, total=False):
    """One sample; shapes as in a batch, without B. Further cameras follow as image_2 .. image_N."""

    image_1: Tensor
    image_mask: Tensor
    raw_prompt_text: str
    input_ids: Tensor
    vlm_attention_mask: Tensor
    state: Tensor
    action: Tensor
    action_mask: Tensor
    flow_time: Tensor
    flow_noise: Tensor
    flow_prefix: Tensor
    position: int


class VLADataset(Dataset[Item]):
    """Samples of a set of episode files (S2.1).

    A sample is the window of `max_seq_len` frames that ends at step t of an episode. Of its images only the last is decoded,
    since that is what the model uses (D6). Its label is `action[t : t + horizon]`, padded past the episode's end, with
    `action_mask` False there (D7), and at steps that are no labels (`data.labels`).

    parquet_files: file, folder, glob, list, or an `EpisodeIndex`. processor: hub id or folder of the backbone, or a
    `Preprocessor`. training: with augmentation, and random draws of their own. reader: of the rows; None: in random order.
    Raises `DataError` or `ModelError` when they do not fit the configuration.
    """

    def __init__(
        self,
        parquet_files: str | Sequence[str] | EpisodeIndex,
        processor: str | Preprocessor,
        config: VLAConfig,
        training: bool = False,
        reader: EpisodeReader | None = None,
    ) -> None:
        self.index = parquet_files if isinstance(parquet_files, EpisodeIndex) else EpisodeIndex.build(parquet_files)
        self.preprocessor = processor if isinstance(processor, Preprocessor) else build_preprocessor(config, processor)
        self.config, self.stream = config, "training" if training else "validation"
        self.max_prefix = config.training.rtc_max_delay if training else 0
        self.augmentation = config.data.augmentation if training and config.data.augmentation.enabled else None
        check_fit(self.index, self.preprocessor.statistics, config)
        if self.preprocessor is not processor:
            check_actions(self.index.layout, self.preprocessor.statistics, config)
        self.reader = reader or EpisodeReader(self.index, config.model.vlm_config.cameras, config.data.cache_mb * 2**20)
        self._ends = np.cumsum(self.index.length, dtype=np.int64)

    def __len__(self) -> int:
        return self.index.steps

    def locate(self, index: int) -> tuple[int, int]:
        """Episode number and step in it of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        episode = int(np.searchsorted(self._ends, index, side="right"))
        return episode, int(index - (self._ends[episode] - self.index.length[episode]))

    def where(self, index: int) -> str:
        """File and row of a sample, for messages."""
        episode, step = self.locate(index)
        return f"{self.index.paths[self.index.file[episode]]}: row {self.index.start[episode] + step}"

    def __getitem__(self, ref: int | SampleRef) -> Item:
        """One sample; an int is at the position of the same number."""
        ref = ref if isinstance(ref, tuple) else SampleRef(ref, ref)
        head, seed, preprocessor = self.config.model.action_head_config, self.config.training.seed, self.preprocessor
        episode, step = self.locate(ref.sample)
        file, row = int(self.index.file[episode]), int(self.index.start[episode]) + step
        where = self.index.paths[file], row
        group, number = self.reader.group_of(file, row)
        prompt = group.instruction(number)
        with located(*where, schema.PROMPT):
            check_prompt(prompt, preprocessor.prompts)
        images, present = self._images(group.pictures(number), where, ref.position)
        state = preprocessor.state.normalize(group.state[number])
        prompt = preprocessor.prompts.text(prompt, state)
        with located(*where, schema.PROMPT):
            check_prompt(prompt, preprocessor.prompts)
        input_ids, attention_mask = preprocessor.prompts.encode([prompt], present[None])
        recorded, labels = read_chunk(self.reader, episode, step, head.horizon)
        values = preprocessor.encode_actions(recorded, group.state[number])
        if not np.isfinite(values).all():
            raise FaultError(no_rotation().at(*where, schema.ACTION))
        action = np.zeros((head.horizon, head.per_action_dim), np.float32)
        action_mask = np.zeros((head.horizon, head.per_action_dim), bool)
        action[:, : values.shape[1]] = values
        action_mask[labels, : values.shape[1]] = ref.valid
        generator = torch.Generator().manual_seed(derive_seed(seed, f"{self.stream} flow", ref.position))
        item: dict[str, Any] = {
            **{schema.image_key(n + 1): torch.from_numpy(image) for n, image in enumerate(images)},
            "image_mask": torch.from_numpy(present),
            "raw_prompt_text": prompt,
            "input_ids": torch.from_numpy(input_ids[0]),
            "vlm_attention_mask": torch.from_numpy(attention_mask[0]),
            "state": torch.from_numpy(state),
            "action": torch.from_numpy(action.reshape(-1)),
            "action_mask": torch.from_numpy(action_mask),
            "flow_time": flow.draw_time((head.num_flow_samples,), generator, head.noise),
            "flow_noise": flow.draw_noise((head.num_flow_samples, *action.shape), generator, head.noise),
            "position": ref.position,
        }
        if self.max_prefix:  # from a generator of its own: time and noise are as without
            generator.manual_seed(derive_seed(seed, f"{self.stream} prefix", ref.position))
            item["flow_prefix"] = flow.draw_prefix((head.num_flow_samples,), self.max_prefix, generator)
        return item  # type: ignore[return-value]

    def __getitems__(self, refs: list[SampleRef] | Part) -> list[Item] | VLAError:
        """A micro-batch or a part of one, called by torch's fetcher. An error that a user should read is returned, not raised:
        raised in a worker it would come wrapped in two tracebacks."""
        if isinstance(refs, Part):
            self.reader.prefetch(refs.ahead)
            refs = refs.refs
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more of them would wait at full load for each next small operation, where others decode
        try:
            return [self[ref] for ref in refs]
        except VLAError as error:
            return error
        finally:
            torch.set_num_threads(threads)

    def _images(
        self, pictures: Sequence[Picture | None], where: tuple[str, int], position: int
    ) -> tuple[list[NDArray[np.uint8]], NDArray[np.bool_]]:
        """Images of one row, (3, H, W) uint8 per camera, and which cameras are present (N,)."""
        spec, augmentation = self.preprocessor.image, self.augmentation
        if pictures[0] is None:
            raise FaultError(missing_image().at(*where, schema.image_column(1)))
        rng = None
        if augmentation is not None:
            rng = np.random.default_rng(derive_seed(self.config.training.seed, "augmentation", position))
        images = []
        for pixels in _decoded(pictures, spec.decoded_side()):
            if pixels is None:
                images.append(spec.blank())
            elif augmentation is None or rng is None:
                images.append(spec.apply(pixels))
            elif spec.rounds:
                fitted = spec.apply(pixels, random_crop(augmentation.crop_scale, rng))
                images.append(jitter_colour(fitted, augmentation, rng))
            else:  # colours can be changed before they are normalised only
                box = random_crop(augmentation.crop_scale, rng)
                planes = jitter_colour(np.ascontiguousarray(pixels.transpose(2, 0, 1)), augmentation, rng)
                images.append(spec.apply(planes.transpose(1, 2, 0), box))
        return images, np.array([picture is not None for picture in pictures])


def _decoded(pictures: Sequence[Picture | None], side: int) -> list[Pixels | None]:
    """The pictures of one row, decoded as `Picture.decode` says; None where a camera is absent.

    A loader process has a core. The trainer's own, without loader processes, waits here with all of them: each camera is
    decoded in a thread.
    """
    decode = partial(_decode, side=side)
    if get_worker_info() is not None or len(pictures) < 2:
        return [decode(picture) for picture in pictures]
    return list(_threads().map(decode, pictures))


def _decode(picture: Picture | None, side: int) -> Pixels | None:
    return None if picture is None else picture.decode(side)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(os.cpu_count() or 1, OPEN_VIDEOS))


def read_chunk(reader: EpisodeReader, episode: int, step: int, horizon: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The recorded actions of the next `horizon` steps (K, A), and which of them are labels (K,).

    Past the episode's end its last action is repeated, and is none.
    """
    index = reader.index
    row, real = int(index.start[episode]) + step, min(horizon, int(index.length[episode]) - step)
    actions = reader.actions(int(index.file[episode]), row, row + real)
    steps = np.arange(horizon)
    labels = steps < real
    if index.unlabelled is not None:
        labels &= step + steps >= index.unlabelled[episode]
    return actions[np.minimum(steps, real - 1)], labels


def check_fit(index: EpisodeIndex, statistics: DatasetStatistics | None, config: VLAConfig) -> None:
    """Data against configuration and statistics (where there are any). Raises `DataError` with every mismatch at once."""
    layout = index.layout
    faults = layout_misfits(layout, config)
    columns = [(schema.STATE, layout.state_dim), (schema.ACTION, layout.action_dim)]
    for name, expected in columns if statistics is not None else []:
        got = len(getattr(statistics, name).min)
        if got != expected:
            faults.append(
                f"data.normalization_stats_path: statistics of {got} {name} dimensions, the data has {expected}; compute "
                f"them for this data"
            )
    if faults:
        raise DataError("\n  ".join([f"{index.paths[0]}: {MISFIT}", *faults]))


def check_actions(layout: Layout, statistics: DatasetStatistics | None, config: VLAConfig, remedy: str | None = None) -> None:
    """Raise `ConfigError` when `data.actions` cannot be what it says for this data, or the statistics are of other actions.

    remedy: where the statistics are a checkpoint's, what to do if other actions are wanted.
    """
    wanted = resolve_actions(config, layout.metadata, layout.state_dim, layout.action_dim)
    if statistics is None or wanted == statistics.actions:
        return
    expected, got = (actions.describe(layout.metadata) for actions in (wanted, statistics.actions))
    if remedy is not None:
        raise ConfigError(f"data.actions: got {expected}; the checkpoint predicts {got}: take it back, or {remedy}")
    path = config.data.normalization_stats_path
    raise ConfigError(f"data.normalization_stats_path: {path} is of actions as {got}, expected {expected}; {recompute(path)}")


def build_preprocessor(config: VLAConfig, model_name_or_path: str | None = None) -> Preprocessor:
    """The preprocessor of a configuration: the backbone's tokenizer and image settings, and the statistics file."""
    statistics = DatasetStatistics.load(config.data.normalization_stats_path)  # first: it costs nothing
    prompts, image = load_prompt_and_image_spec(config, model_name_or_path)
    return Preprocessor(prompts, image, statistics, config.data.normalization)


class Collator:
    """List of items to a batch of the same keys. Prompts are laid out for the cameras this batch has.

    Raises the `VLAError` that a worker returned instead of items.
    """

    def __init__(self, prompts: PromptEncoder) -> None:
        self.prompts, self.pickled = prompts, False

    def __call__(self, items: list[Item] | VLAError) -> Batch:
        return self.join([_stack(items)])

    def join(self, parts: Iterable[Batch | VLAError | None]) -> Batch:
        """The parts of a batch that workers stacked; a part without a slot is None."""
        stacked: list[Batch] = []
        for part in parts:
            if isinstance(part, VLAError):
                raise part
            if part is not None:
                stacked.append(part)
        if not self.pickled and any(isinstance(value, np.ndarray) for part in stacked for value in part.values()):
            self.pickled = True
            logger.warning(
                "data.num_workers: the batches that loader processes prepare do not fit into /dev/shm; they are copied through "
                "pipes, which is slower; give it more space (docker run --shm-size=8g, or --ipc=host)"
            )
        batch = {key: _join([part[key] for part in stacked]) for key in stacked[0]}
        ids, mask = self.prompts.encode(batch["raw_prompt_text"], batch["image_mask"].numpy())
        return {**batch, "input_ids": torch.from_numpy(ids), "vlm_attention_mask": torch.from_numpy(mask)}


def _join(values: list[Any]) -> Any:
    values = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]
    if len(values) == 1:
        return values[0]
    return torch.cat(values) if isinstance(values[0], Tensor) else list(chain.from_iterable(values))


def _stack(items: list[Item] | VLAError) -> Batch | VLAError | None:
    """A batch but for its tokens, which depend on the longest of its prompts; None without items."""
    if isinstance(items, VLAError):
        return items
    if not items:
        return None
    batch: Batch = {}
    for key, value in items[0].items():
        if isinstance(value, Tensor) and key not in ("input_ids", "vlm_attention_mask"):
            batch[key] = torch.stack([item[key] for item in items])  # type: ignore[literal-required]
    batch["raw_prompt_text"] = [item["raw_prompt_text"] for item in items]
    batch["position"] = torch.tensor([item["position"] for item in items])
    return batch if get_worker_info() is None else _share(batch)


def _share(batch: Batch) -> Batch:
    """A worker's batch in shared memory, or where that is full (in a container it may be 64 MB) as arrays, which are pickled.

    Torch would move it there in a thread, whose error nobody hears: the trainer would wait for ever.
    """
    try:
        for value in batch.values():
            if isinstance(value, Tensor):
                value.share_memory_()
    except RuntimeError:  # no space, or too many open files
        return {key: value.numpy() if isinstance(value, Tensor) else value for key, value in batch.items()}
    return batch


def load_batches(
    dataset: VLADataset, sampler: Iterable[list[SampleRef] | Part], config: VLAConfig, pin_memory: bool
) -> Iterator[Batch]:
    """Micro-batches of a sampler, in random order or streamed as the data set's reader is: whatever the number of workers,
    bit for bit what one process alone would make. Raises what a worker met.

    A worker makes a whole micro-batch of random order, and its part of every one that is streamed. Workers start through
    forkserver: forking a process that has run OpenMP, CUDA or gloo threads can hang.
    """
    blocks, workers, parts, work = dataset.reader.blocks, config.data.num_workers, 1, sampler
    if blocks is not None:
        assert isinstance(sampler, RunSampler)
        parts = max(1, workers)
        work = PartSampler(sampler, parts, blocks)
    if workers:
        start_forkserver()
    pin, collator = pin_memory and config.data.pin_memory, Collator(dataset.preprocessor.prompts)
    loader = DataLoader(
        dataset,
        batch_sampler=work,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_stack,
        pin_memory=pin and parts == 1,
        prefetch_factor=config.data.prefetch_factor if workers else None,
        multiprocessing_context=_Context() if workers else None,
        worker_init_fn=partial(_prepare_worker, os.getpid()),
        # Of its own, or starting a loader would draw from the global one and a resume could not restore it.
        generator=torch.Generator(),
    )
    try:
        stream = iter(loader)
    except OSError:
        sys.unraisablehook = lambda _: None  # the destructor of what torch has half made would print a traceback
        raise
    try:
        while pieces := list(islice(stream, parts)):
            batch = collator.join(pieces)
            yield {key: value.pin_memory() if pin and isinstance(value, Tensor) else value for key, value in batch.items()}
    finally:
        del stream  # which ends its workers: the traceback of an error would keep them
        if blocks is not None:
            dataset.reader.close()


class Part(NamedTuple):
    """Work for one worker of a streamed run: its slots of a micro-batch (none, perhaps, of a small last one), and the blocks to
    read ahead for those that follow, the soonest first."""

    refs: list[SampleRef]
    ahead: list[int]


class PartSampler:
    """The micro-batches of a `RunSampler`, each cut between the same slots into `parts` parts, in the order of its slots.

    Torch hands one piece of work after the other to its workers in turn. So each slot is read by the same worker from
    beginning to end, and each block is read by few of them.
    """

    def __init__(self, run: RunSampler, parts: int, blocks: Blocks) -> None:
        self.run, self.parts, self.blocks = run, parts, blocks

    def __iter__(self) -> Iterator[Part]:
        bounds = [0, *np.cumsum([len(slots) for slots in np.array_split(np.arange(self.run.width), self.parts)]).tolist()]
        cut = ([refs[first:stop] for first, stop in pairwise(bounds)] for refs in self.run)
        micros, later = tee(cut)
        count = AHEAD * self.run.accumulation + 1
        for micro in micros:
            following, count = list(islice(later, count)), 1
            for number, refs in enumerate(micro):
                yield Part(refs, [block for ahead in following for block in self._blocks(ahead[number])])

    def _blocks(self, refs: list[SampleRef]) -> list[int]:
        blocks: list[int] = np.unique(self.blocks.of_samples(np.array([ref.sample for ref in refs], np.int64))).tolist()
        return blocks


class _Worker(ForkServerProcess):
    """A process that ignores SIGTERM: what torch ends with it has to be killed. It has nothing to lose, and may hang."""

    def terminate(self) -> None:
        self.kill()

    def join(self, timeout: float | None = None) -> None:
        self.kill()
        super().join(timeout)


class _Context(ForkServerContext):
    Process = _Worker


def start_forkserver() -> None:
    """Start the process that workers are forked from; it ends with this one. It imports what they need, once for all of them,
    which takes seconds: a trainer calls this before it loads a model. Where it runs already, nothing happens.
    It ignores SIGTERM (and SIGINT anyway): workers whose parent is gone count as dead."""
    forkserver.set_forkserver_preload(["__main__", __name__])
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may change what a signal does; started from here, it is as torch leaves it
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a program that is started inherits
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_worker(error: Exception, batch: object) -> None:
    """A batch cannot be handed over: Python would drop it, and the trainer wait for it for ever."""
    with contextlib.suppress(OSError):
        os.write(2, f"a loader process ends: {first_line(error)}\n".encode(errors="backslashreplace"))
    os._exit(1)


def _prepare_worker(trainer: int, worker: int) -> None:
    torch.set_num_threads(1)
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    # A signal to the whole group reaches the workers too, but the trainer finishes its step and stops them itself.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(trainer)  # torch watches the parent of a worker, but that is only what workers are forked from
