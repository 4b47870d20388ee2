"""Episodes behind URLs: the same data as on a disk, bit for bit, whatever the store does that passes."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from episode_files import columns, write

from paligemma_vla import storage
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.doctor import CheckOptions, diagnose
from paligemma_vla.data.index import EpisodeIndex, expand_paths
from paligemma_vla.data.loader import VLADataset, load_batches
from paligemma_vla.data.order import RunSampler, SampleOrder, StreamedOrder
from paligemma_vla.data.reader import EpisodeReader, cut_blocks, episode_prompts
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.errors import DataError, UnreachableError
from paligemma_vla.preprocess import Preprocessor
from ranks import train_on
from store import Faults, Store
from support import call, identical, read_metrics, write_episodes
from zygote import Zygote

ConfigFactory = Callable[..., VLAConfig]
FLAKY = Faults(unavailable=0.1, cut=0.05, short=0.05)
ARRAYS = ("file", "start", "length", "groups", "group_offsets", "digests")


@pytest.fixture(scope="module")
def store(two_camera_dir: Path, episode_dir: Path) -> Iterator[Store]:
    with Store("robot-data") as started:
        started.upload(two_camera_dir, "two")
        started.upload(episode_dir, "one")
        yield started


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of hundredths of seconds."""
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)


@pytest.fixture(autouse=True)
def _no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def names(index: EpisodeIndex) -> list[str]:
    return [path.rpartition("/")[2] for path in index.paths]


def same_index(first: EpisodeIndex, second: EpisodeIndex) -> None:
    assert (names(first), first.layout, first.fingerprint) == (names(second), second.layout, second.fingerprint)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def foreign_files(folder: Path) -> None:
    """As other writers make them: plain tables, one of them too long for a digest of all its bytes."""
    folder.mkdir()
    write(folder / "a.parquet", columns((3, 4)), row_group_size=2)
    write(folder / "b.parquet", columns((400, 300)), row_group_size=100, compression="none")


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_index_and_statistics_are_those_of_the_same_files_on_disk(
    store: Store, quick: None, two_camera_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    folder, url = two_camera_dir, store.url("two")
    if kind == "foreign":
        folder = tmp_path / "foreign"
        foreign_files(folder)
        url = store.upload(folder, "foreign")
    local = EpisodeIndex.build(str(folder))
    with store.failing(FLAKY), caplog.at_level(logging.WARNING):
        for _ in range(5):
            os.environ["XDG_CACHE_HOME"] += "x"
            remote = EpisodeIndex.build(url)
            same_index(remote, local)
        expected, got = compute_statistics(local, "x"), compute_statistics(remote, "x")
        for file in range(len(local.paths)):
            assert episode_prompts(remote, file) == episode_prompts(local, file)
    assert got.digests == expected.digests
    for part in ("state", "action"):
        first, second = vars(getattr(got, part)), vars(getattr(expected, part))
        assert all(np.array_equal(first[name], second[name]) for name in second)
    assert "again in" in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
def test_a_bad_store_changes_no_sample(
    store: Store,
    quick: None,
    two_camera_dir: Path,
    preprocessor: Preprocessor,
    session_config: ConfigFactory,
    caplog: pytest.LogCaptureFixture,
    streamed: bool,
) -> None:
    config = session_config(cameras=2)
    index, local = EpisodeIndex.build(store.url("two")), EpisodeIndex.build(str(two_camera_dir))
    blocks = cut_blocks(index, 2e4) if streamed else None
    order = StreamedOrder([blocks.sizes], None, 8, 0, 2) if blocks else SampleOrder([index.steps], None, 8, 0)
    remote = VLADataset(index, preprocessor, config, True, EpisodeReader(index, 2, 2**30 if streamed else 1, blocks))
    sampler = RunSampler(order, 0, order.steps_per_epoch, 0, 1, 1)
    with store.failing(Faults(latency=0.002, unavailable=0.2, cut=0.1, short=0.1)), caplog.at_level(logging.WARNING):
        got = list(load_batches(remote, sampler, config, pin_memory=False))
    plain = VLADataset(local, preprocessor, config, training=True)
    assert identical(got, list(load_batches(plain, sampler, config, pin_memory=False)))
    assert sum(len(batch["position"]) for batch in got) == local.steps
    assert "again in" in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
def test_a_row_group_or_block_is_one_request_and_a_file_two_more(store: Store, streamed: bool) -> None:
    index = EpisodeIndex.build(store.url("two"))
    blocks = cut_blocks(index, 2e4) if streamed else None
    reader = EpisodeReader(index, 2, 2**30, blocks)
    units = len(blocks) if blocks else len(index.groups) - len(index.paths)
    store.reset()
    for file in range(len(index.paths)):
        for row in range(int(index.row_groups(file)[-1])):
            reader.group_of(file, row)
    assert store.requests == {"GET": units + len(index.paths), "HEAD": len(index.paths)}
    assert store.sent["GET"] <= 2 * index.stamps[:, 0].sum()  # the ends of the files, and nothing else twice


@pytest.mark.parametrize("protocol", ["s3", "memory", "file"])
def test_files_folders_globs_and_lists_are_found_as_on_a_disk(store: Store, tmp_path: Path, protocol: str) -> None:
    contents = ["a/x.parquet", "a/y [1].parquet", "a/deep/er/z.parquet", "b/x.parquet", "b/.hidden.parquet", "b/notes.txt"]
    contents += [".cache/a/x.parquet", "a/__MACOSX/x.parquet", "a/.old/x.parquet", "b/$RECYCLE.BIN/1/x.parquet"]
    root = tmp_path / "tree"
    for name in contents:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_tiny(root / name)
        store.put(f"tree/{name}", (root / name).read_bytes())
        fsspec.filesystem("memory").pipe(f"/tree/{name}", (root / name).read_bytes())
    url = {"s3": store.url("tree"), "memory": "memory://tree", "file": f"file://{root}"}[protocol]
    found = {"": 4, "/": 4, "/a": 3, "/a/x.parquet": 1, "/*/x.parquet": 2, "/**/x.parquet": 2, "/**": 5, "/[ab]": 4, "/a/*": 3}
    found |= {"/b/*": 2, "/*/*/er/*": 1, "/**/er/*": 1, "/a/*/*.parquet": 0}
    # Strangers are data where they are named.
    found |= {"/.cache": 1, "/.c*/*/*": 1, "/*/.old/*": 1, "/**/.old/*": 1, "/a/__MACOSX": 1, "/b/$RECYCLE.BIN/**": 1}
    for pattern, count in found.items():
        if not count:
            with pytest.raises(DataError, match="no Parquet file there"):
                expand_paths([f"{root}{pattern}", f"{url}{pattern}"], "x")
            continue
        local = expand_paths(f"{root}{pattern}", "x")
        remote = expand_paths(f"{url}{pattern}", "x")
        assert len(remote) == len(local) == count, pattern
        for path, place in zip(local, remote, strict=True):
            assert place.startswith(url), pattern
            if path.endswith(".parquet"):
                assert EpisodeIndex.build(place).fingerprint == EpisodeIndex.build(path).fingerprint
    assert expand_paths([f"{url}/b", f"{url}/a/x.parquet", f"{url}/b"], "x") == [
        *expand_paths(f"{url}/b", "x"),
        f"{url}/a/x.parquet",
    ]
    for pattern in ["/none", "/none/*.parquet", "/a/none.parquet"]:
        with pytest.raises(DataError, match="none"):
            EpisodeIndex.build(f"{url}{pattern}", "data.train_parquet_files")


def write_tiny(path: Path) -> None:
    write(path, columns((2 + len(str(path)) % 3,)))


@pytest.mark.parametrize("pattern", ["", "/*", "/**"])
def test_key_with_an_empty_part_is_refused_by_name(store: Store, episode_dir: Path, pattern: str) -> None:
    """A disk has no such path; left out in silence it would be missed."""
    content = next(episode_dir.glob("*.parquet")).read_bytes()
    store.put("odd/x.parquet", content)
    store.put("odd//a/c.parquet", content)
    with pytest.raises(DataError, match=r"odd//a/c\.parquet: has a part without a name in its path; rename it"):
        expand_paths(store.url(f"odd{pattern}"), "x")
    store.client.delete_object(Bucket="robot-data", Key="odd//a/c.parquet")
    assert len(expand_paths(store.url(f"odd{pattern}"), "x")) == 1


def test_second_index_asks_once_for_each_file(store: Store) -> None:
    """A listing has no version, which alone tells some changes."""
    first = EpisodeIndex.build(store.url("two"))
    for _ in range(2):
        store.reset()
        same_index(EpisodeIndex.build(store.url("two")), first)
        assert store.requests == {"GET": 1, "HEAD": len(first.paths)}


def test_file_that_is_replaced_within_a_second_is_found(store: Store, tmp_path: Path) -> None:
    """A store's date has whole seconds, and the size may well be the same: what it calls the version tells."""
    write_episodes(tmp_path / "a", lengths=(9,), seed=1)
    url = store.upload(tmp_path / "a", "twice")
    first = EpisodeIndex.build(url)
    content = bytearray((tmp_path / "a" / "episodes-00000.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    store.put("twice/episodes-00000.parquet", bytes(content))
    assert EpisodeIndex.build(url).stamps.tolist() != first.stamps.tolist()


def test_first_index_of_our_files_takes_two_requests_each(store: Store, tmp_path: Path) -> None:
    """However many row groups and episodes there are, and whatever the images weigh."""
    write_episodes(tmp_path / "many", lengths=(70,) * 12, per_file=6)
    url = store.upload(tmp_path / "many", "many")
    store.reset()
    index = EpisodeIndex.build(url)
    assert (len(index.paths), len(index.groups)) == (2, 2 * (6 * 3 + 1))
    listing = 1
    assert store.requests == {"GET": listing + 2, "HEAD": 2}


def test_one_process_asks_the_store_about_every_file(
    store: Store, zygote: Zygote, tiny_config: ConfigFactory, tmp_path: Path
) -> None:
    write_episodes(tmp_path / "files", lengths=(5,) * 12, per_file=1)
    place = store.upload(tmp_path / "files", "files").removeprefix("s3://robot-data/")
    changes = {
        "data.train_parquet_files": store.complete_url(place),
        "data.val_fraction": 0.0,
        "data.allow_other_statistics": True,
        "data.batch_size": 2,
        "training.max_steps": 1,
    }
    asked = []
    for world_size in (1, 2):
        store.reset()
        config = tiny_config({**changes, "training.experiment_name": f"asks_{world_size}"})
        train_on(zygote, config, world_size, tmp_path)
        asked.append(store.requests["HEAD"])
    assert asked[0] >= 12
    assert asked[1] - asked[0] <= 2, "files that the second process has opened for its samples"


def test_store_that_stays_away_ends_in_one_error_within_the_patience(
    store: Store, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = EpisodeIndex.build(store.url("two"))
    reader = EpisodeReader(index, 2, 2**20)
    reader.group_of(0, 0)
    with store.failing(Faults(unavailable=1.0)):
        for attempt in (
            lambda: reader.group_of(0, int(index.row_groups(0)[1])),
            lambda: EpisodeIndex.build(store.url("two")),
            lambda: list(diagnose([index.paths[0]], CheckOptions(), lambda size: None).faults),
        ):
            with pytest.raises(UnreachableError, match=r"s3://robot-data/two.*\(10 attempts in \d s"):
                attempt()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://no-such-bucket/x", "NO_SUCH_BUCKET"),
        ("s3://robot-data/none/x.parquet", "cannot be read .*not exist"),
        ("s3://robot-data/none/*.parquet", "no Parquet file there"),
        ("lerobot:s3://robot-data/set", "data of another format is read from a disk only; copy it"),
        ("nosuch://robot-data/set", "Protocol not known: nosuch"),
    ],
)
def test_what_is_not_there_is_one_message(store: Store, capfd: Any, place: str, message: str) -> None:
    status, out, error = call(capfd, "data", "info", place)
    assert (status, out) == (2, "")
    assert place.removeprefix("lerobot:") in error
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert "again in" not in error


def test_credentials_that_a_store_refuses_are_one_message(store: Store, capfd: Any) -> None:
    with store.failing(Faults(denied=1.0)):
        status, out, error = call(capfd, "data", "info", store.url("two"))
    assert (status, out) == (2, "")
    assert re.match(r"error: s3://robot-data/two: .*INVALID_ACCESS_KEY_ID.*; check", error)
    assert "again in" not in error


def test_evaluation_takes_a_url(
    store: Store, checkpoint: Path, tmp_path: Path, two_camera_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = []
    for name, location in (("local", str(two_camera_dir)), ("remote", store.url("two"))):
        arguments = ["--checkpoint_path", checkpoint, "--eval_data_path", location, "--output_dir", tmp_path / name]
        status, _, error = call(capfd, "evaluate", *arguments, "--max_samples", 5, "--device", "cpu")
        assert status == 0, error
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        written.append((metrics["mae"], metrics["velocity_loss"]))
    assert written[0] == written[1]


def test_lerobot_set_behind_a_url_is_refused(store: Store) -> None:
    store.put("lerobot/meta/info.json", b"{}")
    store.put("lerobot/data/chunk-000/file-000.parquet", b"PAR1")
    for place in ("lerobot", "lerob*"):
        with pytest.raises(DataError, match="s3://robot-data/lerobot: this is lerobot data, which is read from a disk only"):
            expand_paths(store.url(place), "x")


@pytest.mark.parametrize("reading", ["random", "streamed"])
def test_weighted_sources_behind_urls_train_as_from_the_disk(
    store: Store, zygote: Zygote, tiny_config: ConfigFactory, tmp_path: Path, episode_dir: Path, reading: str
) -> None:
    """By loader processes, to which this process's client of the store must not go."""
    paths = sorted(map(str, episode_dir.glob("*.parquet")))
    runs = {}
    for name, places in (("local", paths), ("remote", [store.complete_url(f"one/{Path(path).name}") for path in paths])):
        *training, validation = places
        data = {
            "data.train_parquet_files": [{"path": place, "weight": n + 0.5} for n, place in enumerate(training)],
            "data.val_parquet_files": validation,
            "data.reading": reading,
            "data.num_workers": 2 * (name == "remote"),
        }
        config = tiny_config({**data, "training.experiment_name": name})
        (tmp_path / f"{name}.yaml").write_text(config.to_yaml())
        with store.failing(Faults(unavailable=0.05, latency=0.001)):
            result = zygote.run(["train", "--config_path", f"{name}.yaml", "--device", "cpu"], tmp_path)
        assert result.status == 0, result.stderr
        runs[name] = read_metrics(config.run_dir)
    assert runs["remote"] == runs["local"]


@pytest.mark.parametrize("url", ["s3://", "memory://", "file://", "gs://"])
def test_url_that_names_no_place_is_refused(url: str) -> None:
    with pytest.raises(DataError, match=f"x: got '{url}', which names no place"):
        expand_paths(url, "x")
