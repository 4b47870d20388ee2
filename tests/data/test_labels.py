"""Interventions as the only labels: what is sampled, and what is masked, against the column read naively."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from paligemma_vla.config import VLAConfig
from paligemma_vla.data.doctor import CheckOptions, diagnose
from paligemma_vla.data.faults import Kind
from paligemma_vla.data.index import EpisodeIndex, ExclusionList
from paligemma_vla.data.labels import build_index, keep_interventions
from paligemma_vla.data.loader import VLADataset
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import DataError
from paligemma_vla.preprocess import Preprocessor
from paligemma_vla.training.preflight import build_order, index_sources
from support import HORIZON, METADATA, make_episode, read_rows, train_here

ConfigFactory = Callable[..., VLAConfig]
# P: policy, I: intervention. Taken over once; from the beginning; never; twice, long and shortly after each other.
ACTED = ("PPPPPPIIII", "IIIII", "PPPPPP", "PIIPPPPPPPIIPPPPP", "PPPPPIIPIPP")
NAMES = {"P": "policy", "I": "intervention", "?": "somebody", "-": None}


def record(folder: Path, acted: tuple[str, ...]) -> str:
    rng = np.random.default_rng(3)
    with EpisodeWriter(folder, METADATA, episodes_per_file=3, extra={"actor": pa.string()}) as writer:
        for number, text in enumerate(acted):
            episode = make_episode(rng, len(text), number=number)
            writer.write(replace(episode, extra={"actor": [NAMES[letter] for letter in text]}))
    return str(folder)


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    return record(tmp_path / "recorded", ACTED)


def test_samples_and_masks_are_those_of_the_column_read_naively(
    recorded: str, preprocessor: Preprocessor, tiny_config: ConfigFactory
) -> None:
    rows = read_rows(Path(recorded))
    dataset = VLADataset(keep_interventions(EpisodeIndex.build(recorded), HORIZON), preprocessor, tiny_config())
    expected = {}
    for first, row in enumerate(rows):
        chunk = rows[first : first + HORIZON]
        labels = [later["episode"] == row["episode"] and later["actor"] == "intervention" for later in chunk]
        # The labels of a chunk are those of one run: of what follows where that ends, nothing is learnt from here.
        for step in range(1, len(labels)):
            labels[step] &= labels[step - 1] or not any(labels[:step])
        if any(labels):
            expected[row["file"], row["row"]] = labels + [False] * (HORIZON - len(labels))
    found = {}
    for sample in range(len(dataset)):
        file, _, row = dataset.where(sample).partition(": row ")
        item = dataset[sample]
        assert item["action_mask"].any(1).equal(item["action_mask"].all(1))
        found[file, int(row)] = item["action_mask"][:, 0].tolist()
    assert found == expected
    assert sum(map(sum, found.values())) > 30 and len(found) == len(dataset)


def test_data_that_does_not_say_who_acted_keeps_all_its_steps(recorded: str, episode_dir: Path) -> None:
    plain, cut = EpisodeIndex.build(str(episode_dir)), keep_interventions(EpisodeIndex.build(recorded), HORIZON)
    kept = build_index([str(episode_dir)], "data", None, "interventions", HORIZON)
    assert np.array_equal(kept.start, plain.start) and np.array_equal(kept.length, plain.length)
    both = EpisodeIndex.concatenate([plain, cut])
    assert both.unlabelled is not None and both.unlabelled.tolist() == [0] * len(plain) + cut.unlabelled.tolist()
    assert cut.unlabelled.tolist() == [3, 0, 1, 3, 3, 1]
    some = both.select(np.array([0, len(plain), len(plain) + 2]))
    assert some.unlabelled.tolist() == [0, 3, 1]
    assert cut.fingerprint != replace(cut, unlabelled=np.zeros_like(cut.unlabelled)).fingerprint


def test_mixture_learns_demonstrations_and_corrections_by_their_weights(
    recorded: str, episode_dir: Path, tiny_config: ConfigFactory
) -> None:
    """Also a run over them, in either order of reading, and its statistics."""
    mixture = [{"path": str(episode_dir), "weight": 1}, {"path": recorded, "weight": 1}]
    changes = {"data.train_parquet_files": mixture, "data.labels": "interventions", "data.allow_other_statistics": True}
    config = tiny_config(changes | {"data.val_fraction": 0, "training.max_steps": 2})
    sources, _ = index_sources(config)
    assert [source.steps for source in sources] == [EpisodeIndex.build(str(episode_dir)).steps, 27]
    samples = np.concatenate([build_order(sources, config).batch(step)[1] for step in range(7)])
    assert np.mean(samples >= sources[0].steps) == pytest.approx(0.5, abs=0.05), "as the weights say"
    rows = compute_statistics(sources[1], "test").state.count
    assert rows == 27, "where the policy was alone is no data"
    for reading in ("random", "streamed"):
        trainer = train_here(
            tiny_config(changes | {"training.max_steps": 2, "data.reading": reading, "data.val_fraction": 0.1})
        )
        assert trainer.step == 2


def test_check_with_such_a_configuration_lists_episodes_of_unknown_actors(tmp_path: Path, tiny_config: ConfigFactory) -> None:
    location = record(tmp_path / "recorded", ("PPII", "PI?P-", "PPI"))
    (path,) = (str(path) for path in Path(location).glob("*.parquet"))
    for labels, rows in (("all", []), ("interventions", [6, 8])):
        options = CheckOptions(config=tiny_config({"data.labels": labels}))
        found = diagnose([path], options, lambda size: None)
        assert [(fault.row, fault.kind) for fault in found.faults] == [(row, Kind.ACTOR) for row in rows]
        assert [(entry.first_row, entry.rows) for entry in found.excluded] == [(4, 5)] * bool(rows)
    without = ExclusionList(str(tmp_path / "list.json"), found.excluded)
    assert build_index([location], "data", without, "interventions", HORIZON).unlabelled.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("acted", "message"),
    [
        (("PPP", "PI?P"), "row 5, column actor: got 'somebody', expected policy or intervention"),
        (("PII-",), "row 3, column actor: got None, expected policy or intervention"),
        (("PPP", "PPPP"), "data: data.labels: interventions: none in 2 episodes of .*; record some, give other data"),
    ],
)
def test_column_without_use_is_refused(tmp_path: Path, acted: tuple[str, ...], message: str) -> None:
    location = record(tmp_path / "recorded", acted)
    with pytest.raises(DataError, match=message):
        build_index([location], "data", None, "interventions", HORIZON)
    assert build_index([location], "data", None, "all", HORIZON).unlabelled is None
