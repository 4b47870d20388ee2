"""Seeded damage to episode files: bytes, columns, flags, images, metadata.

`mutate_parquet(seed, source)` gives the same damage for the same seed, with what it was.
"""

from __future__ import annotations

import datetime
import functools
import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from paligemma_vla import schema

Rng = np.random.Generator
NUMBERS = ("check", "stats", "train")  # commands that read state and action; they read flags and schema too
IMAGES = ("check", "train")  # commands that look at images and instructions
VECTORS = (schema.STATE, schema.ACTION)
IMAGE = "image_1_bytes"


@dataclass(frozen=True)
class Mutation:
    """Damaged bytes. refused: commands that must refuse them; sound: no command may refuse them."""

    seed: int
    name: str
    content: bytes
    refused: tuple[str, ...] = ()
    sound: bool = False

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.name}"


@dataclass(frozen=True)
class Damage:
    """One kind of damage, applied to a table: the function, and what must come of it."""

    apply: Callable[[Rng, pa.Table], Any]
    refused: tuple[str, ...]
    sound: bool


TABLES: list[Damage] = []


def damage(*refused: str, sound: bool = False) -> Callable[..., Any]:
    """Enter `apply(rng, table)` into `TABLES`. It returns the damaged table, or that and options for the writer."""

    def enter(apply: Callable[[Rng, pa.Table], Any]) -> Callable[[Rng, pa.Table], Any]:
        TABLES.append(Damage(apply, refused, sound))
        return apply

    return enter


def damage_column(names: tuple[str, ...], *refused: str, sound: bool = False) -> Callable[..., Any]:
    """The same of `change(rng, values, row)`, for a row of one of some columns. State and action become lists of any length,
    and their row is not the first."""

    def enter(change: Callable[[Rng, list[Any], int], None]) -> Any:
        @damage(*refused, sound=sound)
        @functools.wraps(change)
        def apply(rng: Rng, table: pa.Table) -> pa.Table:
            name = choose(rng, names)
            values, kind = table[name].to_pylist(), table.schema.field(name).type
            if name in VECTORS:
                kind = pa.list_(choose(rng, (pa.float32(), pa.float64())))
            change(rng, values, int(rng.integers(name in VECTORS, len(values))))
            return set_column(table, name, pa.array(values, kind))

        return apply

    return enter


def mutate_parquet(seed: int, source: Path) -> Mutation:
    """Damage an episode file: two seeds in five its bytes, the others its table, which is then written anew."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.4:
        data = bytearray(source.read_bytes())
        apply = choose(rng, (flip_bytes, rearrange))
        return Mutation(seed, apply.__name__, bytes(apply(rng, data)))
    kind = choose(rng, TABLES)
    table = pq.read_table(source)
    # Keep only the metadata that says what the numbers mean: a checksum would refuse the file before anything is looked at.
    table = table.replace_schema_metadata({schema.METADATA_KEY: table.schema.metadata[schema.METADATA_KEY]})
    changed = kind.apply(rng, table)
    table, options = changed if isinstance(changed, tuple) else (changed, {})
    stream = io.BytesIO()
    pq.write_table(table, stream, **{"row_group_size": int(rng.choice([1, 5, 32, 10_000])), **options})
    return Mutation(seed, kind.apply.__name__, stream.getvalue(), kind.refused, kind.sound)


def choose(rng: Rng, choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def flip(rng: Rng, data: bytearray, first: int, last: int) -> bytearray:
    """Change up to three bytes of a region, or up to 64."""
    for position in rng.integers(first, max(first + 1, last), rng.integers(1, choose(rng, (4, 65)))):
        data[min(position, len(data) - 1)] ^= rng.integers(1, 256)
    return data


def flip_bytes(rng: Rng, data: bytearray) -> bytearray:
    """Anywhere, or in one of the places that a reader trusts: footer, its length, the header of a page, a page."""
    metadata = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata
    chunk = metadata.row_group(int(rng.integers(metadata.num_row_groups))).column(int(rng.integers(metadata.num_columns)))
    page = chunk.dictionary_page_offset or chunk.data_page_offset
    end = len(data)
    footer = end - 8 - int.from_bytes(data[-8:-4], "little")
    regions = [
        (0, end),
        (footer, end - 8),
        (0, 8),
        (end - 8, end),
        (page, page + 24),
        (page, page + chunk.total_compressed_size),
    ]
    return flip(rng, data, *choose(rng, regions))


def rearrange(rng: Rng, data: bytearray) -> bytes:
    """Lose, repeat, move or blank a piece, append garbage, or leave next to nothing."""
    first, last = sorted(rng.integers(len(data), size=2))
    head, piece, tail = data[:first], data[first:last], data[last:]
    pieces = (head, head + tail, data[:last] + data[first:], head + tail + piece, head + bytes(len(piece)) + tail)
    tiny = (b"", b"PAR1", b"PAR1PAR1", b"PAR1\0\0\0\0PAR1", b"PAR1\xff\xff\xff\x7fPAR1", b"\0", rng.bytes(100))
    return bytes(choose(rng, (*pieces, data + rng.bytes(1000), choose(rng, tiny))))


def set_column(table: pa.Table, name: str, values: pa.Array | list[Any]) -> pa.Table:
    if not isinstance(values, pa.Array):
        values = pa.array(values, table.schema.field(name).type)
    return table.set_column(table.schema.get_field_index(name), pa.field(name, values.type), values)


@damage(*NUMBERS)
def drop_columns(rng: Rng, table: pa.Table) -> pa.Table:
    kept = rng.integers(table.num_columns) if rng.random() < 0.5 else table.num_columns - 1
    return table.select(sorted(rng.choice(table.column_names, kept, replace=False).tolist()))


@damage(*NUMBERS)
def rename_column(rng: Rng, table: pa.Table) -> pa.Table:
    names = list(table.column_names)
    names[rng.integers(len(names))] = choose(rng, ("", "State", "image_1", "x" * 5000, "état", "a.b", "\n", "list.element"))
    return table.rename_columns(names)


@damage(*NUMBERS)
def retype_column(rng: Rng, table: pa.Table) -> pa.Table:
    rows = range(table.num_rows)
    wrong = (
        pa.array(rows, pa.int64()),
        pa.array([{"a": n} for n in rows]),
        pa.array([[[float(n)]] for n in rows], pa.list_(pa.list_(pa.float32()))),
        pa.array([datetime.date(2024, 1, 1) for _ in rows]),
        pa.nulls(table.num_rows),
        pa.array([[n] for n in rows], pa.list_(pa.int32())),
        pa.array([[str(n)] for n in rows], pa.list_(pa.string())),
        pa.array([[(str(n), n)] for n in rows], pa.map_(pa.string(), pa.int32())),
    )
    return set_column(table, choose(rng, table.column_names), choose(rng, wrong))


@damage()
def duplicate_column(rng: Rng, table: pa.Table) -> pa.Table:
    name = choose(rng, table.column_names)
    return table.append_column(table.schema.field(name), table[name])


@damage(sound=True)
def reorder_columns(rng: Rng, table: pa.Table) -> pa.Table:
    return table.select(rng.permutation(table.column_names).tolist())


@damage(sound=True)
def add_columns(rng: Rng, table: pa.Table) -> pa.Table:
    table = table.append_column("reward", pa.array([{"value": [0.5]}] * table.num_rows))
    return table.append_column("image_bytes", pa.array(["not looked at"] * table.num_rows))


@damage(sound=True)
def encode_otherwise(rng: Rng, table: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    options = (
        {"use_dictionary": True, "row_group_size": 10_000},
        {"compression": "gzip", "data_page_version": "2.0"},
        {"compression": "none", "use_dictionary": False, "data_page_size": 64, "write_page_checksum": True},
        {"compression": "brotli", "store_schema": False},
    )
    return table, choose(rng, options)


@damage(sound=True)
def use_other_sound_types(rng: Rng, table: pa.Table) -> pa.Table:
    name = choose(rng, (*VECTORS, schema.PROMPT, IMAGE))
    column = table[name].combine_chunks()
    if name == schema.PROMPT:
        return set_column(table, name, column.cast(pa.large_string()).dictionary_encode())
    if name == IMAGE:
        return set_column(table, name, column.cast(pa.large_binary()))
    kinds = (pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float64()))
    return set_column(table, name, pa.array(column.to_pylist(), choose(rng, kinds)))


@damage_column(VECTORS, *NUMBERS)
def change_one_length(rng: Rng, values: list[Any], row: int) -> None:
    values[row] = choose(rng, ([], [1.0], [0.5] * 300))


@damage_column(VECTORS, *NUMBERS)
def change_dimension_halfway(rng: Rng, values: list[Any], row: int) -> None:
    values[row:] = [[*value, 0.0] for value in values[row:]]


@damage_column(VECTORS, *NUMBERS)
def move_a_number_to_the_row_before(rng: Rng, values: list[Any], row: int) -> None:
    """As many numbers as there should be, but cut up otherwise: a reshape alone would not notice."""
    values[row - 1], values[row] = values[row - 1] + values[row][:1], values[row][1:]


@damage_column(VECTORS, *NUMBERS)
def make_a_number_infinite(rng: Rng, values: list[Any], row: int) -> None:
    values[row][-1] = choose(rng, (float("nan"), float("inf"), -float("inf"), 1e300, -1e39))


@damage_column(VECTORS)
def make_a_number_huge(rng: Rng, values: list[Any], row: int) -> None:
    values[row][0] = choose(rng, (3e38, -3.4e38, 1e30, 1e-45, 1e20))


@damage_column(VECTORS, *NUMBERS)
def lose_numbers(rng: Rng, values: list[Any], row: int) -> None:
    """One number, one vector, or all of them."""
    kind = rng.integers(3)
    if kind == 2:
        values[:] = [[]] * len(values)
    else:
        values[row] = [None, *values[row][1:]] if kind else None


@damage_column((schema.IS_FIRST, schema.IS_LAST), *NUMBERS)
def change_a_flag(rng: Rng, values: list[Any], row: int) -> None:
    values[row] = choose(rng, (None, not values[row]))


@damage()
def draw_flags(rng: Rng, table: pa.Table) -> pa.Table:
    for name in rng.choice(schema.FLAGS, rng.integers(1, 4), replace=False).tolist():
        table = set_column(table, name, (rng.random(table.num_rows) < rng.random()).tolist())
    return table


@damage(*NUMBERS)
def reverse_or_lose_rows(rng: Rng, table: pa.Table) -> pa.Table:
    return table.slice(0, 0) if rng.random() < 0.5 else table.take(pa.array(range(table.num_rows - 1, -1, -1)))


@damage()
def slice_rows(rng: Rng, table: pa.Table) -> pa.Table:
    return table.slice(int(rng.integers(1, table.num_rows)), int(rng.integers(1, table.num_rows)))


@damage_column((schema.PROMPT,), *IMAGES)
def make_prompt_unusable(rng: Rng, values: list[Any], row: int) -> None:
    long = ("open the drawer " * 6400, "x" * 100_000, "\n" * 50_000 + "a" * 50_000, "🤖" * 30_000)
    values[row] = choose(rng, (None, "", "  \n\t ", *long))


@damage_column((schema.PROMPT,))
def make_prompt_odd(rng: Rng, values: list[Any], row: int) -> None:
    values[row] = choose(rng, ("<image>", "<image>" * 20 + " a", "<bos><eos><pad>", "a\0b", "\x1b[31mred", "%s {}"))


@damage(*IMAGES)
def make_prompt_other_than_utf8(rng: Rng, table: pa.Table) -> pa.Table:
    values = [value.encode() for value in table[schema.PROMPT].to_pylist()]
    values[rng.integers(len(values))] = choose(rng, (b"\xff\xfe\x80", b"open \xc3", b"\xed\xa0\x80"))
    invalid = pa.array(values, pa.binary())
    return set_column(table, schema.PROMPT, pa.Array.from_buffers(pa.string(), len(values), invalid.buffers()))


def encoded(mode: str, size: tuple[int, int], kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind)
    return stream.getvalue()


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG by hand, so that its header may say what no encoder would write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


@damage_column((IMAGE,), *IMAGES)
def make_image_unusable(rng: Rng, values: list[Any], row: int) -> None:
    huge_jpeg = b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xd9"
    broken = (None, b"", rng.bytes(500), huge_jpeg, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", png(0, 0), png(2**31 - 1, 2**31 - 1))
    foreign = [encoded(mode, (8, 8), kind) for mode, kind in (("RGB", "GIF"), ("RGB", "BMP"), ("I;16", "PNG"))]
    values[row] = choose(rng, (*broken, *foreign, png(40_000, 40_000, bytes(40_000)), values[row][: len(values[row]) // 3]))


@damage_column((IMAGE,))
def flip_image(rng: Rng, values: list[Any], row: int) -> None:
    """As JPEG, or as PNG: its headers, or all of it."""
    data, region = bytearray(values[row]), (0, len(values[row]))
    if rng.random() < 0.5:
        stream = io.BytesIO()
        Image.open(io.BytesIO(data)).save(stream, "PNG")
        data = bytearray(stream.getvalue())
        region = (8, choose(rng, (34, len(data))))
    values[row] = bytes(flip(rng, data, *region))


@damage_column((IMAGE,), sound=True)
def use_other_sound_images(rng: Rng, values: list[Any], row: int) -> None:
    kinds = [(mode, (30, 20), "PNG") for mode in ("RGBA", "P", "1", "LA")]
    kinds += [("CMYK", (30, 20), "JPEG"), ("L", (30, 20), "JPEG"), ("RGB", (1, 1), "PNG"), ("RGB", (3000, 1), "PNG")]
    values[row] = encoded(*choose(rng, kinds))


@damage(*NUMBERS)
def make_metadata_unusable(rng: Rng, table: pa.Table) -> pa.Table:
    broken = (b"{", b"\xff\xfe", b"[1, 2]", b"null", b"3", b'"text"', b"[" * 100_000, b"NaN", b"[" * 3000 + b"]" * 3000)
    return table.replace_schema_metadata({schema.METADATA_KEY: choose(rng, broken)})


@damage()
def make_metadata_odd(rng: Rng, table: pa.Table) -> pa.Table:
    raw = json.loads(table.schema.metadata[schema.METADATA_KEY])
    values = (None, 7, -1, 1e308, float("nan"), "x", "x" * 10**6, [], [1], [None, ["a"]], {}, {"a": {"b": []}}, True, "\ud800")
    for name in rng.choice(sorted(raw), rng.integers(1, 4), replace=False).tolist():
        raw[name] = choose(rng, values)
    return table.replace_schema_metadata({schema.METADATA_KEY: json.dumps(raw).encode()})


@damage()
def add_metadata(rng: Rng, table: pa.Table) -> pa.Table:
    further = (
        (b"episodes", b"minus one"),
        (b"\xff\xff", b"\xff"),
        (b"", b""),
        (b"huge", b"x" * 10**6),
        (b"ARROW:schema", b"AAAA"),
    )
    return table.replace_schema_metadata({**table.schema.metadata, **dict([choose(rng, further)])})
