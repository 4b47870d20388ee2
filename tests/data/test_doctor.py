"""Every kind of fault, made on purpose, is found in its place; without what is listed, everything can be read."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episode_files import Columns, columns, put, write
from PIL import Image

from paligemma_vla.config import VLAConfig
from paligemma_vla.data.doctor import CheckOptions, Diagnosis, diagnose
from paligemma_vla.data.faults import Kind
from paligemma_vla.data.index import EpisodeIndex, ExclusionList, expand_paths, load_exclusions
from paligemma_vla.data.loader import VLADataset
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.errors import DataError
from paligemma_vla.schema import DatasetMetadata

ConfigFactory = Callable[..., VLAConfig]
Place = tuple[int | None, str | None, Kind]
GROUP_ROWS = 4


def diagnosed(folder: Path, options: CheckOptions | None = None) -> Diagnosis:
    return diagnose(expand_paths(str(folder), "x"), options or CheckOptions(), lambda size: None)


def located(diagnosis: Diagnosis) -> dict[str, list[Place]]:
    """(row, column, kind) of every fault, by file name."""
    return {
        Path(report.path).name: [(fault.row, fault.column, fault.kind) for fault in report.faults]
        for report in diagnosis.files
        if report.faults
    }


def found(folder: Path, options: CheckOptions | None = None) -> dict[str, list[Place]]:
    return located(diagnosed(folder, options))


def oversized() -> bytes:
    stream = io.BytesIO()
    Image.new("1", (6000, 6000)).save(stream, "PNG")
    return stream.getvalue()


def flip(path: Path, group: int, name: str) -> None:
    """Change one byte in the middle of a column's pages."""
    footer = pq.read_metadata(path).row_group(group)
    leaf = next(footer.column(n) for n in range(footer.num_columns) if footer.column(n).path_in_schema.startswith(name))
    content = bytearray(path.read_bytes())
    content[leaf.data_page_offset + leaf.total_compressed_size * 3 // 4] ^= 0x10
    path.write_bytes(content)


@dataclass
class Case:
    """How to break a good file of 3 + 1 + 4 rows in row groups of 4, and what must be found."""

    expected: list[Place]
    change: Callable[[Columns], Any] = lambda content: None
    types: dict[str, pa.DataType] | None = None
    metadata: bytes | None = None
    damage: Callable[[Path], Any] = lambda path: None

    def write(self, path: Path) -> None:
        content = columns()
        self.change(content)
        table = pa.table({name: pa.array(values, {**TYPES, **(self.types or {})}[name]) for name, values in content.items()})
        if self.metadata is not None:
            table = table.replace_schema_metadata({"paligemma_vla": self.metadata})
        pq.write_table(table, path, row_group_size=GROUP_ROWS, write_page_checksum=True, use_dictionary=["prompt"])
        self.damage(path)


TYPES = {
    "image_1_bytes": pa.binary(),
    "state": pa.list_(pa.float32()),
    "action": pa.list_(pa.float64()),
    "prompt": pa.string(),
    **dict.fromkeys(("is_first", "is_last", "is_terminal"), pa.bool_()),
}


def empty(content: Columns) -> None:
    for name in content:
        content[name] = []


def every(name: str, value: Any) -> Callable[[Columns], None]:
    return lambda content: content.update({name: [value] * 8})


def both(*changes: Callable[[Columns], Any]) -> Callable[[Columns], None]:
    return lambda content: [change(content) for change in changes] and None


CASES = {
    "not_parquet": Case([(None, None, Kind.FILE)], damage=lambda path: path.write_bytes(b"episodes " * 50)),
    "nothing": Case([(None, None, Kind.FILE)], damage=lambda path: path.write_bytes(b"")),
    "cut_short": Case([(None, None, Kind.FILE)], damage=lambda path: path.write_bytes(path.read_bytes()[:-40])),
    "no_rows": Case([(None, None, Kind.EMPTY)], empty),
    "no_prompt": Case([(None, "prompt", Kind.COLUMN)], lambda content: content.pop("prompt")),
    "no_image_and_bad_state": Case(
        [(None, "image_1_bytes", Kind.COLUMN), (6, "state", Kind.LENGTH)],
        both(lambda content: content.pop("image_1_bytes"), put("state", 6, None)),
    ),
    "camera_gap": Case(
        [(None, "image_2_bytes", Kind.COLUMN)],
        lambda content: content.update(image_3_bytes=content["image_1_bytes"]),
        {"image_3_bytes": pa.binary()},
    ),
    "flag_as_number": Case([(None, "is_last", Kind.TYPE)], every("is_last", 1), {"is_last": pa.int8()}),
    "prompt_as_number": Case([(None, "prompt", Kind.TYPE)], every("prompt", 1), {"prompt": pa.int8()}),
    "other_state": Case([(None, "state", Kind.ROBOT)], every("state", [0.0] * 5)),
    "other_rate": Case([(None, None, Kind.ROBOT)], metadata=b'{"control_hz": 5.0}'),
    "bad_metadata": Case([(None, None, Kind.METADATA)], metadata=b'{"control_hz": "fast"}'),
    "bad_encoding": Case([(None, None, Kind.METADATA)], metadata=b"\xff\xfe"),
    "null_state": Case([(0, "state", Kind.LENGTH)], put("state", 0, None)),
    "short_state": Case([(5, "state", Kind.LENGTH)], put("state", 5, [1.0])),
    "long_first_action": Case([(0, "action", Kind.LENGTH)], put("action", 0, [1.0, 2.0, 3.0])),
    "null_in_state": Case([(2, "state", Kind.NUMBER)], put("state", 2, [1.0, None, 2.0])),
    "nan_action": Case([(3, "action", Kind.NUMBER)], put("action", 3, [float("nan"), 1.0])),
    "inf_action": Case([(4, "action", Kind.NUMBER)], put("action", 4, [1.0, float("-inf")])),
    "action_too_large": Case([(7, "action", Kind.NUMBER)], put("action", 7, [1e300, 1.0])),
    "two_in_one_row": Case(
        [(5, "action", Kind.NUMBER), (5, "state", Kind.LENGTH)],
        both(put("state", 5, []), put("action", 5, [float("inf"), 0.0])),
    ),
    "no_picture": Case([(6, "image_1_bytes", Kind.NO_IMAGE)], put("image_1_bytes", 6, None)),
    "not_a_picture": Case([(1, "image_1_bytes", Kind.IMAGE)], put("image_1_bytes", 1, b"GIF89a")),
    "half_a_picture": Case(
        [(1, "image_1_bytes", Kind.IMAGE)],
        lambda content: content["image_1_bytes"].__setitem__(1, content["image_1_bytes"][1][:200]),
    ),
    "large_picture": Case([(3, "image_1_bytes", Kind.IMAGE_SIZE)], put("image_1_bytes", 3, oversized())),
    "null_prompt": Case([(7, "prompt", Kind.PROMPT)], put("prompt", 7, None)),
    "empty_prompt": Case([(3, "prompt", Kind.PROMPT)], put("prompt", 3, " \n ")),
    "other_prompt": Case(
        [(6, "prompt", Kind.PROMPT_CHANGE)], lambda content: content["prompt"].__setitem__(slice(6, 8), ["x"] * 2)
    ),
    "no_beginning": Case([(0, "is_first", Kind.FLAGS)], put("is_first", 0, False)),
    "orphans": Case([(4, "is_first", Kind.FLAGS)], put("is_first", 4, False)),
    "no_end": Case([(7, "is_last", Kind.FLAGS)], put("is_last", 7, False)),
    "no_end_in_the_middle": Case([(2, "is_last", Kind.FLAGS)], put("is_last", 2, False)),
    "end_in_the_middle": Case([(6, "is_first", Kind.FLAGS)], put("is_last", 5, True)),
    "no_flags": Case(
        [(0, "is_first", Kind.FLAGS), (7, "is_last", Kind.FLAGS)], both(every("is_first", False), every("is_last", False))
    ),
    "null_flag": Case([(4, "is_first", Kind.FLAGS)], put("is_first", 4, None)),
    "terminal_in_the_middle": Case([(1, "is_terminal", Kind.FLAGS)], put("is_terminal", 1, True)),
    "flipped_picture": Case([(4, "image_1_bytes", Kind.GROUP)], damage=lambda path: flip(path, 1, "image_1_bytes")),
    "flipped_state": Case([(0, "state", Kind.GROUP)], damage=lambda path: flip(path, 0, "state")),
    "flipped_flags": Case([(None, None, Kind.GROUP)], damage=lambda path: flip(path, 1, "is_last")),
}
FIRST = Case([], metadata=DatasetMetadata(control_hz=10.0).to_json().encode())


def list_of(diagnosis: Diagnosis, path: Path) -> ExclusionList:
    """The exclusion list of a diagnosis, written and read again."""
    ExclusionList(str(path), diagnosis.excluded).save()
    loaded = load_exclusions(str(path))
    assert loaded is not None
    return loaded


def read_everything(folder: Path, exclude: ExclusionList, dataset: VLADataset, config: VLAConfig) -> EpisodeIndex:
    """Index, statistics and every sample of what is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        index = EpisodeIndex.build(str(folder), "x", exclude)
        statistics = compute_statistics(str(folder), "x", exclude=exclude)
    assert statistics.state.count == index.steps
    data = VLADataset(index, dataset.preprocessor, config)
    for number in range(len(data)):
        item = data[number]
        assert item["state"].isfinite().all()
        assert item["action"].isfinite().all()
    return index


def test_diagnose_finds_every_fault_of_a_folder_in_one_pass(
    tmp_path: Path, dataset: VLADataset, tiny_config: ConfigFactory
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    FIRST.write(data / "a_first.parquet")
    for name, case in CASES.items():
        case.write(data / f"{name}.parquet")
    diagnosis = diagnosed(data)
    assert located(diagnosis) == {f"{name}.parquet": case.expected for name, case in sorted(CASES.items())}
    assert all("\n" not in str(fault) for fault in diagnosis.faults)
    index = read_everything(data, list_of(diagnosis, tmp_path / "list.json"), dataset, tiny_config())
    # A file that is unusable is left out as a whole; otherwise the episodes that hold a fault, and no other.
    assert index.excluded == len(diagnosis.excluded)
    bad = {"flipped_state": 2}  # a row group holds the end of one and the beginning of another
    for report in diagnosis.files[1:]:
        assert len(report.excluded()) == bad.get(Path(report.path).stem, 1), report.path
    assert len(index) == sum(report.episodes - report.bad_episodes for report in diagnosis.files)


def test_diagnose_names_every_episode_a_row_group_touches(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write(path, columns((3, 3, 3, 3)), row_group_size=5, write_page_checksum=True)
    flip(path, 1, "action")
    assert [(entry.first_row, entry.rows, entry.episode) for entry in diagnosed(tmp_path).excluded] == [
        (3, 3, 1),
        (6, 3, 2),
        (9, 3, 3),
    ]


def test_diagnose_goes_through_a_row_group_larger_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paligemma_vla.data.doctor.BATCH_ROWS", 3)
    content = columns((5, 5, 5))
    content["state"][13] = None
    content["prompt"][7:10] = ["x"] * 3
    content["image_1_bytes"][11] = b""
    write(tmp_path / "x.parquet", content)
    assert found(tmp_path) == {
        "x.parquet": [(7, "prompt", Kind.PROMPT_CHANGE), (11, "image_1_bytes", Kind.IMAGE), (13, "state", Kind.LENGTH)]
    }
    assert len(found(tmp_path, CheckOptions(allow_prompt_changes=True))["x.parquet"]) == 2


def test_diagnose_interrupted_stops_the_other_threads(episode_dir: Path) -> None:
    calls = 0

    def interrupt(size: int) -> None:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(expand_paths(str(episode_dir), "x"), CheckOptions(), interrupt)
    assert calls <= 3


def test_diagnose_against_a_configuration(
    tmp_path: Path, dataset: VLADataset, tiny_config: ConfigFactory, episode_dir: Path
) -> None:
    content = columns()
    content["prompt"][4:8] = ["word " * 60] * 4
    write(tmp_path / "x.parquet", content)
    config = tiny_config({"data.state_dim": 9, "model.action_head_config.per_action_dim": 1, "model.vlm_config.num_cameras": 2})
    diagnosis = diagnosed(tmp_path, CheckOptions(dataset.preprocessor.prompts, config))
    assert [str(fault).split(": ")[1] for fault in diagnosis.misfits] == [
        "data.state_dim",
        "model.action_head_config.per_action_dim",
        "model.vlm_config",
    ]
    assert [(f.row, f.kind) for f in diagnosis.files[0].faults] == [(row, Kind.PROMPT_LENGTH) for row in range(4, 8)]
    assert [entry.first_row for entry in diagnosis.excluded] == [4]  # what fits nothing cannot be left out
    assert not diagnosed(episode_dir, CheckOptions(dataset.preprocessor.prompts, tiny_config())).faults


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_damaged_the_rest_can_be_read(
    tmp_path: Path, seed: int, dataset: VLADataset, tiny_config: ConfigFactory
) -> None:
    """Several values changed and several bytes flipped anywhere in the files, footers included."""
    rng = np.random.default_rng(seed)
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        lengths = tuple(rng.integers(1, 7, 5).tolist())
        content = columns(lengths)
        for _ in range(rng.integers(0, 4)):
            name = str(rng.choice(list(content)))
            values = {"image_1_bytes": [None, b"x"], "prompt": [None, ""], "state": [None, [1.0], [np.nan] * 3]}
            values["action"] = [None, [1.0], [np.inf] * 2]
            choices = values.get(name, [None, True, False])
            content[name][int(rng.integers(sum(lengths)))] = choices[rng.integers(len(choices))]
        path = data / f"{number}.parquet"
        write(path, content, row_group_size=6, write_page_checksum=True)
        damaged = bytearray(path.read_bytes())
        for _ in range(rng.integers(0, 3)):
            damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
    diagnosis = diagnosed(data)
    good = diagnosis.episodes - diagnosis.bad_episodes
    exclude = list_of(diagnosis, tmp_path / "list.json")
    if good:
        assert len(read_everything(data, exclude, dataset, tiny_config())) == good
    else:
        with pytest.raises(DataError, match="every episode is left out"):
            EpisodeIndex.build(str(data), "x", exclude)
