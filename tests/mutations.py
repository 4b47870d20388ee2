"""Seeded damage to episode files: bytes, columns, flags, images, metadata.

`mutate_parquet(seed, source)` gives the same damage for the same seed, with what it was.
"""

from __future__ import annotations

import datetime
import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from paligemma_vla import schema

Rng = np.random.Generator
NUMBERS = ("check", "stats", "train")  # commands that read state and action; both read the flags and the schema
IMAGES = ("check", "train")  # commands that look at images and instructions


@dataclass(frozen=True)
class Mutation:
    """Damaged bytes. refused: commands that certainly must refuse them; sound: nothing may refuse them."""

    seed: int
    name: str
    content: bytes
    refused: frozenset[str] = frozenset()
    sound: bool = False

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.name}"


@dataclass(frozen=True)
class Damage:
    """One kind of damage: what does it, and what must come of it."""

    apply: Callable[..., Any]
    refused: frozenset[str]
    sound: bool


@dataclass
class Catalogue:
    """Kinds of damage by name; `@catalogue.add(...)` enters one."""

    kinds: dict[str, Damage] = field(default_factory=dict)

    def add(self, *refused: str, sound: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def enter(apply: Callable[..., Any]) -> Callable[..., Any]:
            self.kinds[apply.__name__.strip("_")] = Damage(apply, frozenset(refused), sound)
            return apply

        return enter

    def pick(self, rng: Rng) -> tuple[str, Damage]:
        name = sorted(self.kinds)[rng.integers(len(self.kinds))]
        return name, self.kinds[name]


RAW, TABLES = Catalogue(), Catalogue()


def mutate_parquet(seed: int, source: Path) -> Mutation:
    """Damage an episode file: two seeds in five its bytes, the others its table, which is then written anew."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.4:
        name, damage = RAW.pick(rng)
        return Mutation(seed, name, bytes(damage.apply(rng, bytearray(source.read_bytes()))))
    name, damage = TABLES.pick(rng)
    table = pq.read_table(source)
    # Only the metadata that says what the numbers mean: a checksum would refuse all of this before it is looked at.
    table = table.replace_schema_metadata({schema.METADATA_KEY: table.schema.metadata[schema.METADATA_KEY]})
    changed = damage.apply(rng, table)
    table, options = changed if isinstance(changed, tuple) else (changed, {})
    stream = io.BytesIO()
    pq.write_table(table, stream, **{"row_group_size": int(rng.choice([1, 5, 32, 10_000])), **options})
    return Mutation(seed, name, stream.getvalue(), damage.refused, damage.sound)


# ---- bytes of a Parquet file


def _flip(rng: Rng, data: bytearray, first: int, last: int) -> bytearray:
    for place in rng.integers(first, max(first + 1, last), rng.integers(1, 65)):
        data[min(place, len(data) - 1)] ^= rng.integers(1, 256)
    return data


def _footer(data: bytearray) -> int:
    """Where the footer begins."""
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


@RAW.add()
def _flip_anywhere(rng: Rng, data: bytearray) -> bytearray:
    return _flip(rng, data, 0, len(data))


@RAW.add()
def _flip_one_byte(rng: Rng, data: bytearray) -> bytearray:
    data[rng.integers(len(data))] ^= rng.integers(1, 256)
    return data


@RAW.add()
def _flip_footer(rng: Rng, data: bytearray) -> bytearray:
    return _flip(rng, data, _footer(data), len(data) - 8)


@RAW.add()
def _flip_few_in_footer(rng: Rng, data: bytearray) -> bytearray:
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(_footer(data), len(data) - 8)] ^= 1 << rng.integers(8)
    return data


@RAW.add()
def _flip_header_or_length(rng: Rng, data: bytearray) -> bytearray:
    return _flip(rng, data, 0, 8) if rng.random() < 0.5 else _flip(rng, data, len(data) - 8, len(data))


@RAW.add()
def _flip_page_header(rng: Rng, data: bytearray) -> bytearray:
    """A column chunk begins with its first page's header, some twenty bytes of Thrift."""
    footer = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata
    chunk = footer.row_group(int(rng.integers(footer.num_row_groups))).column(int(rng.integers(footer.num_columns)))
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    for _ in range(rng.integers(1, 5)):
        data[first + rng.integers(24)] ^= rng.integers(1, 256)
    return data


@RAW.add()
def _flip_data_page(rng: Rng, data: bytearray) -> bytearray:
    footer = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata
    chunk = footer.row_group(int(rng.integers(footer.num_row_groups))).column(int(rng.integers(footer.num_columns)))
    return _flip(rng, data, chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size)


@RAW.add()
def _truncate(rng: Rng, data: bytearray) -> bytearray:
    return data[: rng.integers(len(data))]


@RAW.add()
def _append_garbage(rng: Rng, data: bytearray) -> bytearray:
    return data + rng.bytes(int(rng.integers(1, 2000)))


@RAW.add()
def _cut_middle(rng: Rng, data: bytearray) -> bytearray:
    first, last = sorted(rng.integers(len(data), size=2))
    return data[:first] + data[last:]


@RAW.add()
def _repeat_middle(rng: Rng, data: bytearray) -> bytearray:
    first, last = sorted(rng.integers(len(data), size=2))
    return data[:last] + data[first:]


@RAW.add()
def _zero_block(rng: Rng, data: bytearray) -> bytearray:
    first = rng.integers(len(data))
    last = min(len(data), first + rng.integers(1, 4096))
    data[first:last] = bytes(last - first)
    return data


@RAW.add()
def _swap_blocks(rng: Rng, data: bytearray) -> bytearray:
    size = int(rng.integers(1, len(data) // 4))
    first, second = rng.integers(len(data) - size, size=2)
    data[first : first + size], data[second : second + size] = data[second : second + size], data[first : first + size]
    return data


@RAW.add()
def _empty_or_tiny(rng: Rng, data: bytearray) -> bytes:
    choices = (b"", b"PAR1", b"PAR1PAR1", b"PAR1\0\0\0\0PAR1", b"PAR1\xff\xff\xff\x7fPAR1", b"\0", rng.bytes(100))
    return choices[rng.integers(len(choices))]


# ---- tables


def _replaced(table: pa.Table, name: str, values: pa.Array | list[Any]) -> pa.Table:
    if not isinstance(values, pa.Array):
        values = pa.array(values, table.schema.field(name).type)
    return table.set_column(table.schema.get_field_index(name), pa.field(name, values.type), values)


def _any(rng: Rng, names: list[str] | tuple[str, ...]) -> str:
    return str(names[rng.integers(len(names))])


def _some_row(rng: Rng, table: pa.Table) -> int:
    return int(rng.integers(table.num_rows))


@TABLES.add(*NUMBERS)
def _drop_column(rng: Rng, table: pa.Table) -> pa.Table:
    return table.drop_columns([_any(rng, table.column_names)])


@TABLES.add(*NUMBERS)
def _drop_columns(rng: Rng, table: pa.Table) -> pa.Table:
    return table.select(sorted(rng.choice(table.column_names, rng.integers(table.num_columns), replace=False).tolist()))


@TABLES.add(*NUMBERS)
def _rename_column(rng: Rng, table: pa.Table) -> pa.Table:
    names = list(table.column_names)
    names[rng.integers(len(names))] = _any(rng, ("", "State", "image_1", "x" * 5000, "état", "a.b", "\n", "list.element"))
    return table.rename_columns(names)


@TABLES.add(*NUMBERS)
def _retype_column(rng: Rng, table: pa.Table) -> pa.Table:
    name = _any(rng, table.column_names)
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
    return _replaced(table, name, wrong[rng.integers(len(wrong))])


@TABLES.add()
def _duplicate_column(rng: Rng, table: pa.Table) -> pa.Table:
    name = _any(rng, table.column_names)
    return table.append_column(table.schema.field(name), table[name])


@TABLES.add(sound=True)
def _reorder_columns(rng: Rng, table: pa.Table) -> pa.Table:
    return table.select(rng.permutation(table.column_names).tolist())


@TABLES.add(sound=True)
def _further_columns(rng: Rng, table: pa.Table) -> pa.Table:
    return table.append_column("reward", pa.array([{"value": [0.5]}] * table.num_rows)).append_column(
        "image_bytes", pa.array(["not looked at"] * table.num_rows)
    )


@TABLES.add(sound=True)
def _other_encoding(rng: Rng, table: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    choices: list[dict[str, Any]] = [
        {"use_dictionary": True, "row_group_size": 10_000},
        {"compression": "gzip", "data_page_version": "2.0"},
        {"compression": "none", "use_dictionary": False, "data_page_size": 64, "write_page_checksum": True},
        {"compression": "brotli", "store_schema": False},
    ]
    return table, choices[rng.integers(len(choices))]


@TABLES.add(sound=True)
def _other_sound_types(rng: Rng, table: pa.Table) -> pa.Table:
    name = _any(rng, (schema.STATE, schema.ACTION, schema.PROMPT, "image_1_bytes"))
    if name == schema.PROMPT:
        return _replaced(table, name, table[name].combine_chunks().cast(pa.large_string()).dictionary_encode())
    if name == "image_1_bytes":
        return _replaced(table, name, table[name].combine_chunks().cast(pa.large_binary()))
    kinds = (pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float64()))
    return _replaced(table, name, pa.array(table[name].to_pylist(), kinds[rng.integers(len(kinds))]))


def _with_number(rng: Rng, table: pa.Table, change: Callable[[list[Any]], Any]) -> pa.Table:
    """State or action as lists of any length, one row of it changed."""
    name = _any(rng, (schema.STATE, schema.ACTION))
    values = table[name].to_pylist()
    row = _some_row(rng, table)
    values[row] = change(list(values[row]))
    kind = (pa.list_(pa.float32()), pa.list_(pa.float64()))[rng.integers(2)]
    return _replaced(table, name, pa.array(values, kind))


@TABLES.add(*NUMBERS)
def _one_row_of_another_length(rng: Rng, table: pa.Table) -> pa.Table:
    other = ([], [1.0], [0.5] * 300)[rng.integers(3)]
    return _with_number(rng, table, lambda old: other)


@TABLES.add(*NUMBERS)
def _another_dimension_halfway(rng: Rng, table: pa.Table) -> pa.Table:
    name = _any(rng, (schema.STATE, schema.ACTION))
    values = table[name].to_pylist()
    half = int(rng.integers(1, len(values)))
    values[half:] = [[*value, 0.0] for value in values[half:]]
    return _replaced(table, name, pa.array(values, pa.list_(pa.float32())))


@TABLES.add(*NUMBERS)
def _two_lengths_that_even_out(rng: Rng, table: pa.Table) -> pa.Table:
    """As many numbers as there should be, but cut up otherwise: a reshape alone would not notice."""
    name = _any(rng, (schema.STATE, schema.ACTION))
    values = table[name].to_pylist()
    row = int(rng.integers(1, len(values)))
    values[row - 1], values[row] = values[row - 1] + values[row][:1], values[row][1:]
    return _replaced(table, name, pa.array(values, pa.list_(pa.float32())))


@TABLES.add(*NUMBERS)
def _number_not_finite(rng: Rng, table: pa.Table) -> pa.Table:
    bad = float(_any(rng, ("nan", "inf", "-inf", "1e300", "-1e39")))
    name = _any(rng, (schema.STATE, schema.ACTION))
    values = table[name].to_pylist()
    values[_some_row(rng, table)][-1] = bad
    return _replaced(table, name, pa.array(values, pa.list_(pa.float64())))


@TABLES.add()
def _number_huge(rng: Rng, table: pa.Table) -> pa.Table:
    huge = float(_any(rng, ("3e38", "-3.4e38", "1e30", "1e-45", "1e20")))
    return _with_number(rng, table, lambda old: [huge, *old[1:]])


@TABLES.add(*NUMBERS)
def _number_null(rng: Rng, table: pa.Table) -> pa.Table:
    return _with_number(rng, table, lambda old: None if rng.random() < 0.5 else [None, *old[1:]])


@TABLES.add(*NUMBERS)
def _no_numbers(rng: Rng, table: pa.Table) -> pa.Table:
    name = _any(rng, (schema.STATE, schema.ACTION))
    return _replaced(table, name, pa.array([[]] * table.num_rows, pa.list_(pa.float32())))


@TABLES.add(*NUMBERS)
def _flag_null(rng: Rng, table: pa.Table) -> pa.Table:
    name = _any(rng, (schema.IS_FIRST, schema.IS_LAST))
    values = table[name].to_pylist()
    values[_some_row(rng, table)] = None
    return _replaced(table, name, values)


@TABLES.add(*NUMBERS)
def _flag_turned(rng: Rng, table: pa.Table) -> pa.Table:
    name = _any(rng, (schema.IS_FIRST, schema.IS_LAST))
    values = table[name].to_pylist()
    row = _some_row(rng, table)
    values[row] = not values[row]
    return _replaced(table, name, values)


@TABLES.add()
def _flags_random(rng: Rng, table: pa.Table) -> pa.Table:
    for name in rng.choice(schema.FLAGS, rng.integers(1, 4), replace=False).tolist():
        table = _replaced(table, name, (rng.random(table.num_rows) < rng.random()).tolist())
    return table


@TABLES.add(*NUMBERS)
def _rows_reversed(rng: Rng, table: pa.Table) -> pa.Table:
    return table.take(pa.array(range(table.num_rows - 1, -1, -1)))


@TABLES.add()
def _rows_sliced(rng: Rng, table: pa.Table) -> pa.Table:
    return table.slice(int(rng.integers(1, table.num_rows)), int(rng.integers(1, table.num_rows)))


@TABLES.add(*NUMBERS)
def _no_rows(rng: Rng, table: pa.Table) -> pa.Table:
    return table.slice(0, 0)


def _with_prompt(rng: Rng, table: pa.Table, prompt: str | None) -> pa.Table:
    values = table[schema.PROMPT].to_pylist()
    values[_some_row(rng, table)] = prompt
    return _replaced(table, schema.PROMPT, values)


@TABLES.add(*IMAGES)
def _prompt_unusable(rng: Rng, table: pa.Table) -> pa.Table:
    long = ("open the drawer " * 6400, "x" * 100_000, "\n" * 50_000 + "a" * 50_000, "🤖" * 30_000)
    return _with_prompt(rng, table, (None, "", "  \n\t ", *long)[rng.integers(7)])


@TABLES.add()
def _prompt_odd(rng: Rng, table: pa.Table) -> pa.Table:
    return _with_prompt(
        rng, table, _any(rng, ("<image>", "<image>" * 20 + " a", "<bos><eos><pad>", "a\0b", "\x1b[31mred", "%s {}"))
    )


@TABLES.add(*IMAGES)
def _prompt_not_utf8(rng: Rng, table: pa.Table) -> pa.Table:
    values = [value.encode() for value in table[schema.PROMPT].to_pylist()]
    values[_some_row(rng, table)] = (b"\xff\xfe\x80", b"open \xc3", b"\xed\xa0\x80")[rng.integers(3)]
    invalid = pa.array(values, pa.binary())
    return _replaced(table, schema.PROMPT, pa.Array.from_buffers(pa.string(), len(values), invalid.buffers()))


def _with_image(rng: Rng, table: pa.Table, change: Callable[[bytes], bytes | None]) -> pa.Table:
    values = table["image_1_bytes"].to_pylist()
    row = _some_row(rng, table)
    values[row] = change(values[row])
    return _replaced(table, "image_1_bytes", values)


def _encoded(mode: str, size: tuple[int, int], kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind)
    return stream.getvalue()


def _png(width: int, height: int, rows: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG by hand, so that its header may say what no encoder would write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


@TABLES.add(*IMAGES)
def _image_unusable(rng: Rng, table: pa.Table) -> pa.Table:
    jpeg_size = b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xd9"
    choices: list[Callable[[bytes], bytes | None]] = [
        lambda old: None,
        lambda old: b"",
        lambda old: old[: len(old) // 3],
        lambda old: rng.bytes(500),
        lambda old: _encoded("RGB", (8, 8), "GIF"),
        lambda old: _encoded("RGB", (8, 8), "BMP"),
        lambda old: _png(40_000, 40_000, bytes(40_000)),
        lambda old: _png(2**31 - 1, 2**31 - 1),
        lambda old: _png(0, 0),
        lambda old: jpeg_size,
        lambda old: b"\x89PNG\r\n\x1a\n",
        lambda old: b"\xff\xd8\xff",
    ]
    return _with_image(rng, table, choices[rng.integers(len(choices))])


@TABLES.add()
def _image_flipped(rng: Rng, table: pa.Table) -> pa.Table:
    return _with_image(rng, table, lambda old: bytes(_flip(rng, bytearray(old), 0, len(old))))


@TABLES.add()
def _png_flipped(rng: Rng, table: pa.Table) -> pa.Table:
    def change(old: bytes) -> bytes:
        stream = io.BytesIO()
        Image.open(io.BytesIO(old)).save(stream, "PNG")
        data = bytearray(stream.getvalue())
        return bytes(_flip(rng, data, 8, int(rng.choice([34, len(data)]))))

    return _with_image(rng, table, change)


@TABLES.add(sound=True)
def _image_of_another_kind(rng: Rng, table: pa.Table) -> pa.Table:
    kinds = [
        ("RGB", (1, 1), "PNG"),
        ("CMYK", (30, 20), "JPEG"),
        ("L", (30, 20), "JPEG"),
        ("I;16", (30, 20), "PNG"),
        ("RGBA", (30, 20), "PNG"),
        ("P", (30, 20), "PNG"),
        ("1", (30, 20), "PNG"),
        ("LA", (30, 20), "PNG"),
        ("RGB", (3000, 1), "PNG"),
    ]
    return _with_image(rng, table, lambda old: _encoded(*kinds[rng.integers(len(kinds))]))


@TABLES.add(*NUMBERS)
def _metadata_unusable(rng: Rng, table: pa.Table) -> pa.Table:
    choices = (b"{", b"\xff\xfe", b"[1, 2]", b"null", b"3", b'"text"', b"[" * 100_000, b"NaN", b"[" * 3000 + b"]" * 3000)
    return table.replace_schema_metadata({schema.METADATA_KEY: choices[rng.integers(len(choices))]})


@TABLES.add()
def _metadata_odd(rng: Rng, table: pa.Table) -> pa.Table:
    raw = json.loads(table.schema.metadata[schema.METADATA_KEY])
    values = (None, 7, -1, 1e308, float("nan"), "x", "x" * 10**6, [], [1], [None, ["a"]], {}, {"a": {"b": []}}, True, "\ud800")
    for name in rng.choice(sorted(raw), rng.integers(1, 4), replace=False).tolist():
        raw[name] = values[rng.integers(len(values))]
    return table.replace_schema_metadata({schema.METADATA_KEY: json.dumps(raw).encode()})


@TABLES.add()
def _metadata_further(rng: Rng, table: pa.Table) -> pa.Table:
    further = {b"episodes": b"minus one", b"\xff\xff": b"\xff", b"": b"", b"huge": b"x" * 10**6, b"ARROW:schema": b"AAAA"}
    key = list(further)[rng.integers(len(further))]
    return table.replace_schema_metadata({**table.schema.metadata, key: further[key]})
