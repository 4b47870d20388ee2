"""A streamed run from an object store: one request for a block, and no sample lost or repeated however the store behaves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paligemma_vla import storage
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.loader import VLADataset, batches, build_loader, run_batches
from paligemma_vla.data.order import RunSampler, StreamedOrder
from paligemma_vla.data.reader import EpisodeReader, cut_blocks
from paligemma_vla.errors import DataError
from paligemma_vla.preprocess import Preprocessor
from store import Faults, Store
from support import identical, write_episodes

ConfigFactory = Callable[..., VLAConfig]
LENGTHS = (20, 33, 5, 40, 12, 28, 21, 7, 19)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with Store("episodes") as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored")
    write_episodes(path, LENGTHS, cameras=2, per_file=4)
    return path


def streamed(place: str, preprocessor: Preprocessor, config: VLAConfig) -> tuple[VLADataset, StreamedOrder]:
    index = EpisodeIndex.build(place)
    blocks = cut_blocks(index, 2e4)
    data = VLADataset(index, preprocessor, config, True, EpisodeReader(index, 2, 2**30, blocks))
    return data, StreamedOrder([blocks.sizes], None, 8, 0, 2)


def test_a_bad_store_changes_no_sample(
    store: Store,
    folder: Path,
    preprocessor: Preprocessor,
    tiny_config: ConfigFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)
    config = tiny_config({"data.num_workers": 0}, cameras=2)
    plain = VLADataset(str(folder), preprocessor, config, training=True)
    data, order = streamed(store.upload(folder, "bad"), preprocessor, config)
    assert data.index.fingerprint == plain.index.fingerprint
    steps = order.steps_per_epoch
    expected = list(batches(build_loader(plain, RunSampler(order, 0, steps, 0, 1, 1), config, pin_memory=False)))
    faults = Faults(latency=0.002, unavailable=0.2, cut=0.1, short=0.1)
    with store.failing(faults), caplog.at_level(logging.WARNING):
        got = list(run_batches(data, RunSampler(order, 0, steps, 0, 1, 1), config, pin_memory=False))
    assert identical(got, expected)
    assert sum(len(batch["position"]) for batch in got) == sum(LENGTHS)
    assert "again in" in caplog.text


def test_a_block_is_one_request_and_a_file_two_more(
    store: Store, folder: Path, preprocessor: Preprocessor, tiny_config: ConfigFactory
) -> None:
    config = tiny_config({"data.num_workers": 0}, cameras=2)
    data, order = streamed(store.upload(folder, "good"), preprocessor, config)
    reader, steps = data.reader, order.steps_per_epoch
    assert isinstance(reader, EpisodeReader)
    store.reset()
    assert len(list(run_batches(data, RunSampler(order, 0, steps, 0, 1, 1), config, pin_memory=False))) == steps
    assert store.requests["GET"] == len(reader.blocks) + len(data.index.paths)
    assert store.requests["HEAD"] == len(data.index.paths)
    size = int(data.index.stamps[:, 0].sum())
    assert store.sent["GET"] <= 2 * size  # the ends of the files, which of small ones is all, and nothing else twice


def test_an_object_that_was_replaced_is_refused(
    store: Store, folder: Path, preprocessor: Preprocessor, tiny_config: ConfigFactory
) -> None:
    config = tiny_config({"data.num_workers": 0}, cameras=2)
    data, order = streamed(store.upload(folder, "replaced"), preprocessor, config)
    name = data.index.paths[1].rsplit("/", 1)[1]
    content = bytearray((folder / name).read_bytes())
    content[2000] ^= 1
    store.put(f"replaced/{name}", bytes(content))
    with pytest.raises(DataError, match=rf"{name}: changed since it was indexed: got .*version"):
        list(run_batches(data, RunSampler(order, 0, order.steps_per_epoch, 0, 1, 1), config, pin_memory=False))
