"""EpisodeWriter: what is in its files, and that a kill loses nothing that was finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paligemma_vla import schema
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.writer import ROWS_PER_GROUP, EpisodeWriter
from paligemma_vla.errors import DataError
from paligemma_vla.schema import DatasetMetadata, Episode
from support import ACTION_DIM, METADATA, STATE_DIM, make_episode, read_rows, write_episodes


@pytest.fixture
def episode() -> Episode:
    return make_episode(np.random.default_rng(0), 5)


def test_writer_file_layout_is_the_specifications(tmp_path: Path) -> None:
    write_episodes(tmp_path, lengths=(70, 3), cameras=2)
    file = pq.ParquetFile(tmp_path / "episodes-00000.parquet")
    expected = ["image_1_bytes", "image_2_bytes", "state", "action", "prompt", "is_first", "is_last", "is_terminal"]
    assert file.schema_arrow.names == expected
    assert file.schema_arrow.field("state").type == pa.list_(pa.float32(), STATE_DIM)
    assert file.schema_arrow.field("action").type == pa.list_(pa.float32(), ACTION_DIM)
    assert DatasetMetadata.from_json(file.schema_arrow.metadata[schema.METADATA_KEY]) == METADATA
    for group in range(file.metadata.num_row_groups):
        assert file.metadata.row_group(group).num_rows <= ROWS_PER_GROUP
        for leaf in range(file.metadata.num_columns):
            column = file.metadata.row_group(group).column(leaf)
            if column.path_in_schema.startswith("image_"):
                assert column.compression == "UNCOMPRESSED"
                assert not column.has_dictionary_page
                assert not column.is_stats_set


def test_writer_killed_in_mid_collection_loses_no_finished_episode(tmp_path: Path) -> None:
    """SIGKILL while the sixth episode is being written; the journal's tail is torn as well."""
    code = f"""
import os, signal, sys
import numpy as np
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from support import METADATA, make_episode
from paligemma_vla.data.writer import EpisodeWriter
rng = np.random.default_rng(0)
writer = EpisodeWriter({str(tmp_path)!r}, METADATA, episodes_per_file=3)
for number in range(5):
    writer.write(make_episode(rng, 4 + number, 1, number))
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (journal,) = tmp_path.glob(".*.arrows")
    with open(journal, "ab") as file:
        file.write(journal.read_bytes()[-500:-100])  # half a record batch

    rng = np.random.default_rng(0)
    expected = [make_episode(rng, 4 + number, 1, number) for number in range(5)]
    expected.append(make_episode(np.random.default_rng(9), 3))
    with EpisodeWriter(tmp_path, METADATA, episodes_per_file=3) as writer:
        assert writer.episodes_written == 5
        writer.write(expected[-1])
        assert writer.episodes_written == 6
    rows = read_rows(tmp_path)
    assert [row["state"] for row in rows] == [state.tolist() for e in expected for state in e.state]
    assert [row["image_1_bytes"] for row in rows] == [image for e in expected for image in e.images[0]]
    assert EpisodeIndex.build(str(tmp_path)).length.tolist() == [e.length for e in expected]
    assert not list(tmp_path.glob(".*"))


def test_writer_recovers_whatever_journal_a_kill_left(tmp_path: Path, episode: Episode) -> None:
    """Of shard 0 no byte, of shard 1 what is published already; shard 2 has nothing but its journal."""
    writer = EpisodeWriter(tmp_path, METADATA)
    writer.write(episode)
    journal = (tmp_path / ".episodes-00000.arrows").read_bytes()
    writer.close()
    (tmp_path / "episodes-00000.parquet").rename(tmp_path / "episodes-00001.parquet")
    for shard, content in enumerate([b"", journal, journal]):
        (tmp_path / f".episodes-0000{shard}.arrows").write_bytes(content)
    with EpisodeWriter(tmp_path, METADATA) as again:
        assert again.episodes_written == 2
        again.write(episode)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"episodes-0000{shard}.parquet" for shard in (1, 2, 3)]
    assert len(EpisodeIndex.build(str(tmp_path))) == 3


def test_two_writers_of_one_prefix_are_refused(tmp_path: Path, episode: Episode) -> None:
    with EpisodeWriter(tmp_path, METADATA) as writer:
        writer.write(episode)
        with pytest.raises(DataError, match="'episodes' is being written by another writer"):
            EpisodeWriter(tmp_path, METADATA)
        with EpisodeWriter(tmp_path, METADATA, prefix="further") as further:
            further.write(episode)
    with EpisodeWriter(tmp_path, METADATA) as again:
        assert again.episodes_written == 1
    assert len(EpisodeIndex.build(str(tmp_path))) == 2
    assert not list(tmp_path.glob(".*"))


def test_writer_names_a_shard_that_is_not_its_own_or_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "episodes-00000.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(DataError, match=f"{path.name}: was not written by EpisodeWriter"):
        EpisodeWriter(tmp_path, METADATA)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{path.name}: cannot be read as Parquet"):
        EpisodeWriter(tmp_path, METADATA)
    assert not list(tmp_path.glob(".*"))


def test_writer_never_overwrites_a_shard_when_an_earlier_one_was_deleted(tmp_path: Path) -> None:
    episodes = write_episodes(tmp_path, lengths=(2, 3, 4), per_file=1)
    (tmp_path / "episodes-00000.parquet").unlink()
    write_episodes(tmp_path, lengths=(7,), seed=5)
    lengths = EpisodeIndex.build(str(tmp_path)).length.tolist()
    assert sorted(lengths) == sorted([*(e.length for e in episodes[1:]), 7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: replace(e, action=e.action[:0]), "0 steps"),
        (lambda e: replace(e, images=[]), "no camera"),
        (lambda e: replace(e, state=e.state[:-1]), r"state: got shape \(4, 3\), expected \(5, dimensions\)"),
        (lambda e: replace(e, action=e.action * [[1], [1], [1], [np.nan], [1]]), "action: step 3, dimension 0 is nan"),
        (lambda e: replace(e, images=[e.images[0][:-2]]), "image_1_bytes: got 3 images, expected 5"),
        (lambda e: replace(e, images=[[b"GIF89a"] * 5]), "image_1_bytes: step 0 is neither JPEG nor PNG"),
        (lambda e: replace(e, prompt="  ", state=e.state[1:]), r"(?s)state:.*prompt: got an empty instruction"),
        (lambda e: replace(e, state=e.state[:, :2]), "columns differ"),
        (lambda e: replace(e, images=e.images * 2), "columns differ"),
    ],
)
def test_writer_refuses_what_does_not_fit_and_writes_nothing_of_it(tmp_path: Path, episode: Episode, change, message) -> None:
    with EpisodeWriter(tmp_path, METADATA) as writer:
        writer.write(episode)
        with pytest.raises(DataError, match=message) as caught:
            writer.write(change(episode))
        assert str(tmp_path) in str(caught.value)
        assert "episode 1 of 'episodes'" in str(caught.value)
        assert writer.episodes_written == 1
        writer.write(episode)
    assert EpisodeIndex.build(str(tmp_path)).length.tolist() == [5, 5]


def test_further_columns_are_written_and_left_out_of_training(tmp_path: Path, episode: Episode) -> None:
    extra = {"actor": pa.string(), "success": pa.bool_()}
    with EpisodeWriter(tmp_path, METADATA, extra=extra) as writer:
        writer.write(replace(episode, extra={"actor": list("abcde"), "success": [None] * 5}))
        writer.write(replace(episode, extra={"actor": list("fghij"), "success": [True] * 5}))
        with pytest.raises(DataError, match="actor: got 4 values, expected 5"):
            writer.write(replace(episode, extra={"actor": list("abcd"), "success": [True] * 5}))
    rows = read_rows(tmp_path)
    assert "".join(row["actor"] for row in rows) == "abcdefghij"
    assert [row["success"] for row in rows] == [None] * 5 + [True] * 5
    assert len(EpisodeIndex.build(str(tmp_path))) == 2
    with EpisodeWriter(tmp_path, METADATA) as writer, pytest.raises(DataError, match="columns differ"):
        writer.write(episode)
