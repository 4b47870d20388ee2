"""Files that change under a run, damaged pages, digests and fingerprints, and what an index costs."""

from __future__ import annotations

import gc
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from episode_files import columns, write

from paligemma_vla.data import index as index_module
from paligemma_vla.data.index import EpisodeIndex, FileFacts, read_facts
from paligemma_vla.data.reader import EpisodeReader, iterate_numbers
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.errors import DataError
from support import write_episodes


@pytest.mark.parametrize("name", ["image_1_bytes", "state", "action", "prompt"])
def test_flipped_byte_in_a_page_of_the_writers_files_is_an_error(tmp_path: Path, name: str) -> None:
    """No flip gives other data silently. (A few bytes of a page's header say what nobody reads.)"""
    write_episodes(tmp_path, lengths=(30,))
    (path,) = tmp_path.glob("*.parquet")
    whole = path.read_bytes()

    def content() -> list[Any]:
        group = EpisodeReader(EpisodeIndex.build(str(path)), 1, 2**20).group_of(0, 0)[0]
        return [
            group.state.tolist(),
            group.action.tolist(),
            group.prompt.to_pylist(),
            [i and [i.encoded(place) for place in range(len(group.prompt))] for i in group.images],
        ]

    expected = content()
    footer = pq.read_metadata(path).row_group(0)
    leaf = next(footer.column(n) for n in range(footer.num_columns) if footer.column(n).path_in_schema.startswith(name))
    start = leaf.dictionary_page_offset or leaf.data_page_offset
    refused = 0
    for place in np.linspace(start, start + leaf.total_compressed_size - 1, 25).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert content() == expected
        except DataError as error:
            assert "row 0: row group 0 (rows 0 to 29)" in str(error)
            refused += 1
    assert refused >= 12
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    index = EpisodeIndex.build(str(path))
    if name in ("state", "action"):
        with pytest.raises(DataError, match="columns state, action: cannot be read"):
            list(iterate_numbers(index, 0))


def test_fingerprint_is_of_the_data_and_not_of_its_place(tmp_path: Path) -> None:
    write_episodes(tmp_path / "a", per_file=4)
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")  # other dates as well
    first, second = (EpisodeIndex.build(str(tmp_path / name)) for name in ("a", "elsewhere"))
    assert first.fingerprint == second.fingerprint
    assert first.digests.tolist() == second.digests.tolist()
    assert compute_statistics(str(tmp_path / "a"), "x").digests == tuple(f"{d:016x}" for d in first.digests.tolist())

    write_episodes(tmp_path / "other", per_file=4, seed=1)
    train, validation = first.split(0.3, 0)
    different = [
        first,
        EpisodeIndex.build(list(reversed(first.paths))),
        EpisodeIndex.build(list(first.paths[:2])),
        EpisodeIndex.build(str(tmp_path / "other")),
        EpisodeIndex.concatenate([first, second]),
        train,
        validation,
    ]
    assert len({index.fingerprint for index in different}) == len(different)


@pytest.mark.parametrize("lengths", [(3, 4), (300, 400)])
def test_fingerprint_of_other_writers_files_tells_pictures_in_another_order(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    content = columns(lengths)
    options: dict[str, Any] = {"compression": "none", "write_statistics": False}
    first = EpisodeIndex.build(write(tmp_path / "a.parquet", content, **options)).fingerprint
    assert EpisodeIndex.build(write(tmp_path / "b.parquet", content, **options)).fingerprint == first
    content["image_1_bytes"].reverse()
    assert EpisodeIndex.build(write(tmp_path / "c.parquet", content, **options)).fingerprint != first


def test_statistics_are_not_of_a_file_that_was_exchanged_after_it_was_indexed(tmp_path: Path) -> None:
    """They would go under the digest of the other one."""
    write_episodes(tmp_path / "a", lengths=(9, 9), per_file=1)
    write_episodes(tmp_path / "b", lengths=(9, 9), per_file=1, seed=3)
    index = EpisodeIndex.build(str(tmp_path / "a"))
    shutil.copy(tmp_path / "b" / "episodes-00001.parquet", tmp_path / "a" / "episodes-00001.parquet")
    list(iterate_numbers(index, 0))
    with pytest.raises(DataError, match=r"episodes-00001\.parquet: changed since it was indexed"):
        list(iterate_numbers(index, 1))


def test_index_of_many_files_takes_64_bytes_an_episode_and_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured, so that an object per file or episode would show; paths are counted as the strings they are."""
    path = write(tmp_path / "x.parquet", columns(), row_group_size=3)
    facts: FileFacts = read_facts(path)
    files = [f"{tmp_path}/folder/episodes-{number:06d}.parquet" for number in range(1000)]
    monkeypatch.setattr(index_module, "expand_paths", lambda paths, where: files)
    monkeypatch.setattr(index_module, "_gather", lambda arguments, files, kept: dict.fromkeys(kept, facts))
    tracemalloc.start()
    index = EpisodeIndex.build(str(tmp_path))
    gc.collect()
    measured = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    strings = sum(path.__sizeof__() for path in files)
    limit = 64 * len(index) + 64 * 3 * len(files)
    assert (len(index), len(index.groups)) == (3000, 4000)
    assert index.nbytes - strings <= limit
    assert measured <= limit + 20_000
