"""Batches of a streamed run: the same bits whoever reads them, and each block once for each process that needs it."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paligemma_vla.config import VLAConfig
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.loader import AHEAD, PartSampler, VLADataset, load_batches
from paligemma_vla.data.order import RunSampler, SampleRef, StreamedOrder
from paligemma_vla.data.reader import FOOTER_BYTES, Blocks, EpisodeReader, cut_blocks, streaming_cache_bytes
from paligemma_vla.errors import DataError
from paligemma_vla.preprocess import Preprocessor
from support import identical, write_episodes

ConfigFactory = Callable[..., VLAConfig]
LENGTHS = (20, 33, 5, 40, 12, 28, 61, 7, 19, 30, 2, 44, 16)
SMALL = 1.5e4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream")
    write_episodes(path, LENGTHS, cameras=2, per_file=5)
    return path


def order_of(blocks: Blocks, batch: int = 16) -> StreamedOrder:
    return StreamedOrder([blocks.sizes], None, batch, 0, 3)


def dataset_of(folder: Path, preprocessor: Preprocessor, config: VLAConfig, pool: int = 2**30) -> tuple[VLADataset, Blocks]:
    index = EpisodeIndex.build(str(folder))
    blocks = cut_blocks(index, SMALL)
    return VLADataset(index, preprocessor, config, True, EpisodeReader(index, 2, pool, blocks)), blocks


def test_batches_are_the_same_bits_for_any_number_of_workers_and_those_of_the_other_reader(
    folder: Path, preprocessor: Preprocessor, tiny_config: ConfigFactory
) -> None:
    config = tiny_config({"data.num_workers": 0}, cameras=2)
    index = EpisodeIndex.build(str(folder))
    order = order_of(cut_blocks(index, SMALL))
    assert order.epoch_size % 16 == 13  # the last batch of an epoch is smaller
    start, stop = order.steps_per_epoch - 3, order.steps_per_epoch + 4
    plain = VLADataset(index, preprocessor, config, training=True)
    expected = list(load_batches(plain, RunSampler(order, start, stop, 0, 1, 2), config, pin_memory=False))
    assert len(expected) == 14
    assert sorted({len(batch["position"]) for batch in expected}) == [5, 8]
    for loading in ({"num_workers": 0}, {"num_workers": 1, "prefetch_factor": 1}, {"num_workers": 3}):
        config = tiny_config({f"data.{key}": value for key, value in loading.items()}, cameras=2)
        data, _ = dataset_of(folder, preprocessor, config)
        got = list(load_batches(data, RunSampler(order, start, stop, 0, 1, 2), config, pin_memory=False))
        assert [list(batch) for batch in got] == [list(batch) for batch in expected]
        assert identical(got, expected), loading
    data, _ = dataset_of(folder, preprocessor, config, pool=1)
    config = tiny_config({"data.num_workers": 0}, cameras=2)
    assert identical(list(load_batches(data, RunSampler(order, stop - 1, stop, 0, 1, 2), config, False)), expected[-2:])


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (4, 9)])
def test_parts_are_the_micro_batches_between_the_same_slots(folder: Path, world: int, parts: int) -> None:
    blocks = cut_blocks(EpisodeIndex.build(str(folder)), SMALL)
    order = order_of(blocks, 14)
    homes: dict[int, set[tuple[int, int]]] = {}
    for rank in range(world):
        run = RunSampler(order, 3, 70, rank, world, 1)
        stream = list(PartSampler(run, parts, blocks))
        assert len(stream) == len(run) * parts
        for number, micro in enumerate(run):
            pieces = stream[number * parts : (number + 1) * parts]
            assert [ref for piece in pieces for ref in piece.refs] == micro
            for place, piece in enumerate(pieces):
                for ref in piece.refs:
                    if ref.valid:
                        homes.setdefault(ref.position % 14, set()).add((rank, place))
    assert sorted(homes) == list(range(14))
    assert all(len(readers) == 1 for readers in homes.values())


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reads ahead")]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each block is read; none may be read when it is needed and not before."""
    count: Counter[int] = Counter()
    read = EpisodeReader._read

    def noted(reader: EpisodeReader, block: int) -> Any:
        assert threading.current_thread() in reading_threads()
        count[block] += 1
        return read(reader, block)

    monkeypatch.setattr(EpisodeReader, "_read", noted)
    return count


def test_each_block_is_read_once_in_a_pass_and_again_where_two_slots_share_it(
    tmp_path: Path, preprocessor: Preprocessor, tiny_config: ConfigFactory, fetched: Counter[int]
) -> None:
    """Four processes one after the other, each with the pool that the configuration gives it."""
    write_episodes(tmp_path, (3, 4, 2, 3) * 40, cameras=2, per_file=40)
    index = EpisodeIndex.build(str(tmp_path))
    blocks = cut_blocks(index, 4e3)
    assert len(blocks) > 60
    order = StreamedOrder([blocks.sizes], None, 8, 0, 2)
    config = tiny_config({"data.num_workers": 0}, cameras=2)
    room = streaming_cache_bytes(blocks, 2, 2, AHEAD) - FOOTER_BYTES + 2**16
    assert room < 0.4 * blocks.nbytes.sum()
    steps = range(order.steps_per_epoch)
    for rank in range(4):
        slots = [order.batch(step)[1][2 * rank : 2 * rank + 2] for step in steps]
        needed = {block for samples in slots for block in blocks.of_samples(samples).tolist()}
        before = Counter(fetched)
        data = VLADataset(index, preprocessor, config, True, EpisodeReader(index, 2, room, blocks))
        for _ in load_batches(data, RunSampler(order, 0, len(steps), rank, 4, 1), config, pin_memory=False):
            assert len(reading_threads()) == 4
        deadline = time.monotonic() + 5
        while reading_threads() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not reading_threads()
        assert set(fetched - before) == needed
        # A lane ends in the block where the next begins: read when the one ends and when the other begins.
        assert (fetched - before).total() <= len(needed) + 1
        assert len(needed) < len(blocks) / 3
    assert set(fetched) == set(range(len(blocks)))
    assert fetched.total() <= len(blocks) + 7


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_ahead_arrives_at_its_step(
    tmp_path: Path, preprocessor: Preprocessor, tiny_config: ConfigFactory, workers: int
) -> None:
    write_episodes(tmp_path, LENGTHS, cameras=2, per_file=5)
    config = tiny_config({"data.num_workers": workers}, cameras=2)
    data, blocks = dataset_of(tmp_path, preprocessor, config)
    order = order_of(blocks)
    path = Path(data.index.paths[2])
    content = bytearray(path.read_bytes())
    content[300:400] = bytes(100)
    path.write_bytes(content)
    bad = set(np.flatnonzero(data.index.file[blocks.episodes[:-1]] == 2).tolist())
    steps = [set(blocks.of_samples(order.batch(step)[1]).tolist()) for step in range(order.steps_per_epoch)]
    sound = next(number for number, used in enumerate(steps) if used & bad)
    got: list[Tensor] = []

    def read() -> Iterator[None]:
        for batch in load_batches(data, RunSampler(order, 0, 30, 0, 1, 1), config, pin_memory=False):
            got.append(batch["position"])
            yield

    with pytest.raises(DataError, match=r"episodes-00002\.parquet: changed since it was indexed") as caught:
        list(read())
    assert len(got) == sound
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()  # although `caught` keeps the frames


def test_a_filler_and_empty_parts_change_nothing(folder: Path, preprocessor: Preprocessor, tiny_config: ConfigFactory) -> None:
    """Ranks of a small last batch: one without a slot of its own, one with fewer slots than workers."""
    config = tiny_config({"data.num_workers": 0}, cameras=2)
    data, blocks = dataset_of(folder, preprocessor, config)
    order = StreamedOrder([blocks.sizes], None, 12, 0, 3)
    last = order.steps_per_epoch - 1
    positions, samples = order.batch(last)
    assert len(positions) == 5
    (filler,) = load_batches(data, RunSampler(order, last, last + 1, 5, 6, 1), config, pin_memory=False)
    assert not filler["action_mask"].any()
    assert len(filler["position"]) == 1
    run = RunSampler(order, last, last + 1, 2, 6, 1)
    assert [len(part.refs) for part in PartSampler(run, 2, blocks)] == [1, 0]
    (batch,) = load_batches(data, run, tiny_config({"data.num_workers": 2}, cameras=2), pin_memory=False)
    assert batch["position"].tolist() == [positions[4]]
    plain = VLADataset(data.index, preprocessor, config, training=True)
    assert torch.equal(batch["image_1"][0], plain[SampleRef(int(positions[4]), int(samples[4]))]["image_1"])
