"""Every kind of fault, made on purpose, is found in its place; without what is listed, everything can be read."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
    faults = [(Path(report.path).name, fault) for report in diagnosis.files for fault in report.faults]
    return {name: [(one.row, one.column, one.kind) for other, one in faults if other == name] for name, _ in faults}


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
        types = {name: kind for name, kind in {**TYPES, **(self.types or {})}.items() if name in content}
        write(
            path, content, types, self.metadata, row_group_size=GROUP_ROWS, write_page_checksum=True, use_dictionary=["prompt"]
        )
        self.damage(path)


TYPES = {"prompt": pa.string(), **dict.fromkeys(("is_first", "is_last", "is_terminal"), pa.bool_())}


def every(name: str, value: Any) -> Callable[[Columns], None]:
    return lambda content: content.update({name: [value] * 8})


def both(*changes: Callable[[Columns], Any]) -> Callable[[Columns], None]:
    return lambda content: [change(content) for change in changes] and None


def cell(name: str, row: int, value: Any, kind: Kind) -> Case:
    """A value put into a row, and the kind of fault that it is there."""
    return Case([(row, name, kind)], put(name, row, value))


CASES = {
    "not_parquet": Case([(None, None, Kind.FILE)], damage=lambda path: path.write_bytes(b"episodes " * 50)),
    "cut_short": Case([(None, None, Kind.FILE)], damage=lambda path: path.write_bytes(path.read_bytes()[:-40])),
    "no_rows": Case([(None, None, Kind.EMPTY)], lambda content: [values.clear() for values in content.values()]),
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
    "other_state": Case([(None, "state", Kind.ROBOT)], every("state", [0.0] * 5)),
    "other_rate": Case([(None, None, Kind.ROBOT)], metadata=b'{"control_hz": 5.0}'),
    "bad_metadata": Case([(None, None, Kind.METADATA)], metadata=b'{"control_hz": "fast"}'),
    "null_state": cell("state", 0, None, Kind.LENGTH),
    "short_state": cell("state", 5, [1.0], Kind.LENGTH),
    "null_in_state": cell("state", 2, [1.0, None, 2.0], Kind.NUMBER),
    "nan_action": cell("action", 3, [float("nan"), 1.0], Kind.NUMBER),
    "action_too_large": cell("action", 7, [1e300, 1.0], Kind.NUMBER),
    "two_in_one_row": Case(
        [(5, "action", Kind.NUMBER), (5, "state", Kind.LENGTH)],
        both(put("state", 5, []), put("action", 5, [float("inf"), 0.0])),
    ),
    "no_picture": cell("image_1_bytes", 6, None, Kind.NO_IMAGE),
    "not_a_picture": cell("image_1_bytes", 1, b"GIF89a", Kind.IMAGE),
    "half_a_picture": cell("image_1_bytes", 1, columns()["image_1_bytes"][1][:200], Kind.IMAGE),
    "large_picture": cell("image_1_bytes", 3, oversized(), Kind.IMAGE_SIZE),
    "null_prompt": cell("prompt", 7, None, Kind.PROMPT),
    "empty_prompt": cell("prompt", 3, " \n ", Kind.PROMPT),
    "other_prompt": Case([(6, "prompt", Kind.PROMPT_CHANGE)], both(put("prompt", 6, "x"), put("prompt", 7, "x"))),
    "no_beginning": cell("is_first", 0, False, Kind.FLAGS),
    "orphans": cell("is_first", 4, False, Kind.FLAGS),
    "no_end": cell("is_last", 7, False, Kind.FLAGS),
    "no_end_in_the_middle": cell("is_last", 2, False, Kind.FLAGS),
    "end_in_the_middle": Case([(6, "is_first", Kind.FLAGS)], put("is_last", 5, True)),
    "no_flags": Case(
        [(0, "is_first", Kind.FLAGS), (7, "is_last", Kind.FLAGS)], both(every("is_first", False), every("is_last", False))
    ),
    "null_flag": cell("is_first", 4, None, Kind.FLAGS),
    "terminal_in_the_middle": cell("is_terminal", 1, True, Kind.FLAGS),
    "flipped_picture": Case([(4, "image_1_bytes", Kind.GROUP)], damage=lambda path: flip(path, 1, "image_1_bytes")),
    "flipped_state": Case([(0, "state", Kind.GROUP)], damage=lambda path: flip(path, 0, "state")),
    "flipped_flags": Case([(None, None, Kind.GROUP)], damage=lambda path: flip(path, 1, "is_last")),
}
FIRST = Case([], metadata=DatasetMetadata(control_hz=10.0).to_json().encode())


def list_of(diagnosis: Diagnosis, path: Path) -> ExclusionList:
    """The exclusion list of a diagnosis, written and read again."""
    ExclusionList(str(path), diagnosis.excluded).save()
    return cast(ExclusionList, load_exclusions(str(path)))


def read_everything(folder: Path, exclude: ExclusionList, dataset: VLADataset, config: VLAConfig) -> EpisodeIndex:
    """Index, statistics and every sample of what is left."""
    index = EpisodeIndex.build(str(folder), "x", exclude)
    assert compute_statistics(str(folder), "x", exclude=exclude).state.count == index.steps
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
    excluded = [(entry.first_row, entry.rows, entry.episode) for entry in diagnosed(tmp_path).excluded]
    assert excluded == [(3, 3, 1), (6, 3, 2), (9, 3, 3)]


def test_diagnose_goes_through_a_row_group_larger_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paligemma_vla.data.doctor.BATCH_ROWS", 3)
    content = columns((5, 5, 5))
    content["state"][13] = None
    content["prompt"][7:10] = ["x"] * 3
    content["image_1_bytes"][11] = b""
    write(tmp_path / "x.parquet", content)
    faults = [(7, "prompt", Kind.PROMPT_CHANGE), (11, "image_1_bytes", Kind.IMAGE), (13, "state", Kind.LENGTH)]
    assert located(diagnosed(tmp_path)) == {"x.parquet": faults}


def test_diagnose_interrupted_stops_the_other_threads(episode_dir: Path) -> None:
    calls: list[int] = []

    def interrupt(size: int) -> None:
        calls.append(size)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(expand_paths(str(episode_dir), "x"), CheckOptions(), interrupt)
    assert len(calls) <= 3


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
