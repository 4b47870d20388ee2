"""Images that are read one by one, against pyarrow's reading of the whole row group."""

from __future__ import annotations

import gc
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episode_files import columns, write
from PIL import Image

from lerobot_sets import write_set
from paligemma_vla.data.formats import READ_ERRORS, open_file, pages
from paligemma_vla.data.formats.pages import LocatedPictures, find_chunk, locate_pictures
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import EpisodeReader
from paligemma_vla.errors import DataError

ROWS = 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SMALLEST_CHUNK", 0)


def images(null: bool = False, repeated: bool = False, flat: bool = False) -> list[bytes | None]:
    """Of 0 to 150,000 bytes. flat: parts of them can be packed."""
    rng = np.random.default_rng(0)
    made: list[bytes | None] = []
    for number in range(ROWS):
        size = 0 if number == 3 else int(rng.integers(1, 150_000))
        middle = b"abcdefgh" * 600 if flat else b""
        made.append(rng.bytes(size // 2) + middle + rng.bytes(size - size // 2))
    if repeated:
        made = [made[n // 3] for n in range(ROWS)]
    return [None if null and number % 5 == 2 else image for number, image in enumerate(made)]


def write_images(path: Path, values: list[bytes | None], struct: bool = False, **options: Any) -> str:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else options.pop("kind", pa.binary())
    column = [{"bytes": value, "path": f"{n}.png"} for n, value in enumerate(values)] if struct else values
    field = pa.field("images", kind, nullable=options.pop("nullable", True))
    table = pa.table(
        {"images": pa.array(column, kind), "number": np.arange(ROWS)}, pa.schema([field, pa.field("number", pa.int64())])
    )
    pq.write_table(table, path, **{"compression": "none", "use_dictionary": False, **options})
    return str(path)


def locate(path: str, group: int = 0) -> LocatedPictures | None:
    chunk = find_chunk(pq.read_metadata(path), pq.read_schema(path).field("images"), group)
    return None if chunk is None else locate_pictures(path, chunk, lambda: None)


def read_one_by_one(located: LocatedPictures) -> list[bytes | None]:
    rows = range(len(located.places.length))
    return [located.encoded(row) if located.present(row) else None for row in rows]


def read_by_pyarrow(path: str, group: int = 0) -> list[bytes | None]:
    values = (
        pq.ParquetFile(path, page_checksum_verification=True).read_row_group(group, columns=["images"])["images"].to_pylist()
    )
    return [value["bytes"] if isinstance(value, dict) else value for value in values]


SMALL_PAGES = {"data_page_size": 1, "write_batch_size": 7}


@pytest.mark.parametrize("codec", ["none", "snappy"])
@pytest.mark.parametrize("struct", [False, True], ids=["binary", "struct"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        SMALL_PAGES,
        {"write_page_checksum": True},
        {"use_dictionary": True},
        {"use_dictionary": True, **SMALL_PAGES},
        {"use_dictionary": True, "dictionary_pagesize_limit": 500_000, "write_batch_size": 4},  # pages of both encodings
        {"row_group_size": 15},
        {"kind": pa.large_binary()},
        {"nullable": False},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("content", [{}, {"repeated": True}, {"flat": True}, {"null": True}], ids=" ".join)
def test_each_image_is_what_pyarrow_reads(
    tmp_path: Path, codec: str, struct: bool, options: dict[str, Any], content: dict[str, bool]
) -> None:
    if struct and "kind" in options:
        options = {}
    if content.get("null"):
        options = {**options, "nullable": True}
    path = write_images(tmp_path / "x.parquet", images(**content), struct, compression=codec, **options)
    for group in range(pq.read_metadata(path).num_row_groups):
        located = locate(path, group)
        if struct and content.get("null"):  # they may be files beside it
            assert located is None
        else:
            assert located is not None
            assert read_one_by_one(located) == read_by_pyarrow(path, group)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"data_page_version": "2.0"},
        {"column_encoding": {"images": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"kind": pa.list_(pa.binary())},
    ],
    ids=str,
)
def test_what_is_of_another_kind_is_left_to_pyarrow(tmp_path: Path, options: dict[str, Any]) -> None:
    values: list[Any] = images()
    if "kind" in options:
        values = [[value] for value in values]
    assert locate(write_images(tmp_path / "x.parquet", values, **options)) is None


RANDOM = np.random.default_rng(0).bytes(70_000)


def literal(content: bytes) -> bytes:
    return bytes([62 << 2]) + (len(content) - 1).to_bytes(3, "little") + content


def copy(distance: int) -> bytes:
    """Of 64 bytes."""
    return bytes([63 << 2 | 2]) + distance.to_bytes(2, "little")


@pytest.mark.parametrize(
    ("parts", "size"),
    [
        ([literal(RANDOM)], 70_000),
        ([literal(RANDOM[: 2**16]), literal(RANDOM[:100]), copy(200)], 2**16 + 164),
        ([literal(RANDOM[:40_000]), *[copy(2)] * 400], 40_000 + 64 * 400),
    ],
    ids=["a literal across blocks", "a copy from the block before", "many copies"],
)
def test_snappy_that_other_encoders_may_write_is_left_to_pyarrow(parts: list[bytes], size: int) -> None:
    page = pages._to_varint(size) + b"".join(parts)
    assert len(pa.Codec("snappy").decompress(page, size, asbytes=True)) == size
    with pytest.raises(ValueError, match=r"another block|another size|not gone through"):
        pages._snappy_blocks(page, size)


def test_numbers_of_more_bits_than_parquet_has_are_refused() -> None:
    """As of a damaged page: they would wrap around, and be those of other images."""
    assert pages._hybrid(bytes([2 << 1, 7, 1 << 1 | 1, 0b11100100, 0]), 0, 2, 6).tolist() == [7, 7, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="64 bits"):
        pages._hybrid(bytes([1 << 1 | 1, *[255] * 64]), 0, 64, 8)


def test_small_chunks_and_small_images_are_left_to_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_images(tmp_path / "x.parquet", images())
    assert locate(path) is not None
    monkeypatch.setattr(pages, "SMALLEST_CHUNK", 10**8)
    assert locate(path) is None
    monkeypatch.setattr(pages, "SMALLEST_CHUNK", 0)
    monkeypatch.setattr(pages, "SMALLEST_IMAGE", 10**5)
    assert locate(path) is None


def test_damage_that_a_checksum_shows_is_left_to_pyarrow(tmp_path: Path) -> None:
    path = write_images(tmp_path / "x.parquet", images(), write_page_checksum=True)
    content = bytearray(Path(path).read_bytes())
    content[500_000] ^= 1
    Path(path).write_bytes(content)
    assert locate(path) is None


@pytest.mark.parametrize("options", [{}, {"compression": "snappy", "use_dictionary": True}], ids=["plain", "LeRobot's"])
def test_damaged_pages_give_what_pyarrow_reads_or_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_images(tmp_path / "x.parquet", [image[:2000] for image in images() if image is not None], **options)
    clean, rng = Path(path).read_bytes(), np.random.default_rng(0)
    end = 4 + pq.read_metadata(path).row_group(0).column(0).total_compressed_size
    places = [*range(4, 80), *range(end - 120, end), *rng.integers(4, end, 150).tolist()]
    compared = 0
    for place in places:
        content = bytearray(clean)
        content[place] ^= 1 << int(rng.integers(8))
        Path(path).write_bytes(content)
        located = locate(path)
        if located is None:
            continue
        try:
            expected = read_by_pyarrow(path)
        except READ_ERRORS:
            continue
        assert read_one_by_one(located) == expected, place
        compared += 1
    assert compared > 50


@pytest.fixture
def long_episode(tmp_path: Path) -> str:
    """One row group of an episode of large pictures."""
    content = columns((60,))
    rng = np.random.default_rng(0)
    content["image_1_bytes"] = [png(rng) for _ in range(60)]
    return write(tmp_path / "long.parquet", content, compression="snappy")


def png(rng: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def open_reader(name: str, cameras: int = 1) -> EpisodeReader:
    return EpisodeReader(EpisodeIndex.build(name), cameras, 2**28)


def test_reader_keeps_places_and_no_images(long_episode: str) -> None:
    reader = open_reader(long_episode)
    expected = pq.read_table(long_episode)["image_1_bytes"].to_pylist()
    for row in (7, 59, 0, 30):
        group, number = reader.group_of(0, row)
        (picture,) = group.pictures(number)
        assert picture is not None
        assert picture.encoded() == expected[row]
    assert len(reader._cache) == 1
    assert reader._cached_bytes < 10_000 < len(expected[0])


def test_files_that_were_closed_leave_no_garbage(long_episode: str) -> None:
    """A footer takes megabytes; waiting for the collector, those of many files took more than the cache may."""
    gc.collect()
    gc.disable()
    try:
        with open_file(long_episode) as file:
            assert file.locate("image_1_bytes", 0, lambda: None) is not None
            list(file.read_groups(["state", "prompt"], [0]))
        del file
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_image_of_a_file_that_changed_is_refused(long_episode: str) -> None:
    reader = open_reader(long_episode)
    group, number = reader.group_of(0, 5)
    (picture,) = group.pictures(number)
    assert picture is not None
    first = picture.encoded()
    os.utime(long_episode, ns=(1, os.stat(long_episode).st_mtime_ns))
    assert picture.encoded() == first  # another time of access is no change
    Path(long_episode).write_bytes(Path(long_episode).read_bytes()[:-1])
    with pytest.raises(DataError, match=r"long.parquet: changed since it was indexed: got .* expected .*; put it back"):
        picture.encoded()
    os.unlink(long_episode)
    with pytest.raises(DataError, match=r"long.parquet: gone since it was indexed"):
        picture.encoded()


def test_both_ways_read_the_same_lerobot_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = write_set(tmp_path / "set", video=False)
    monkeypatch.setattr(pages, "SMALLEST_IMAGE", 0)

    def read() -> list[bytes | None]:
        reader = open_reader(truth.name, 2)
        found = []
        for file in range(len(reader.index.paths)):
            for row in range(int(reader.index.row_groups(file)[-1])):
                group, number = reader.group_of(file, row)
                found += [None if one is None else one.encoded() for one in group.pictures(number)]
        return found

    with open_file(EpisodeIndex.build(truth.name).paths[0]) as file:
        assert file.locate("image_1_bytes", 0, lambda: None) is not None
    one_by_one = read()
    monkeypatch.setattr(pages, "SMALLEST_CHUNK", 2**30)
    assert one_by_one == read()
    assert len(one_by_one) == 2 * 20
