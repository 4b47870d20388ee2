"""EpisodeWriter: the only way this project writes episodes.

A folder holds shards `<prefix>-00000.parquet, ...`. The shard being filled lives in a hidden journal (an Arrow stream, one
record batch per episode), so a kill loses at most the episode being written; opening the folder again recovers the rest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from paligemma_vla import schema
from paligemma_vla.data.formats.parquet import ROWS_PER_GROUP, ParquetEpisodes
from paligemma_vla.errors import DataError
from paligemma_vla.schema import DatasetMetadata, Episode
from paligemma_vla.storage import atomic_file, lock_file

IMAGE_MAGIC = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}


def arrow_schema(
    cameras: int, state_dim: int, action_dim: int, metadata: DatasetMetadata, extra: Mapping[str, pa.DataType] | None = None
) -> pa.Schema:
    """Schema of an episode file (S1.1): `cameras` image columns, state (P,), action (A,), prompt, three flags, extra."""
    columns = [pa.field(schema.image_column(n + 1), pa.binary()) for n in range(cameras)]
    columns += [
        pa.field(schema.STATE, pa.list_(pa.float32(), state_dim), nullable=False),
        pa.field(schema.ACTION, pa.list_(pa.float32(), action_dim), nullable=False),
        pa.field(schema.PROMPT, pa.string(), nullable=False),
        *(pa.field(flag, pa.bool_(), nullable=False) for flag in schema.FLAGS),
        *(pa.field(name, kind) for name, kind in (extra or {}).items()),
    ]
    return pa.schema(columns, metadata={schema.METADATA_KEY: metadata.to_json().encode()})


class EpisodeWriter:
    """Write episodes into a folder, shard by shard.

    output_dir: created when missing. metadata: stored in every file. prefix: of the file names; a folder may hold several.
    episodes_per_file: when a shard is closed. The first episode fixes the number of cameras and the dimensions.
    extra: types of further columns, which every `Episode.extra` has; training does not read them.

    `episodes_written` counts what the folder already holds under this prefix, so a killed collection can go on from there.
    Raises `DataError` for an episode that does not fit; nothing of it is written then.
    """

    def __init__(
        self,
        output_dir: str | Path,
        metadata: DatasetMetadata,
        prefix: str = "episodes",
        episodes_per_file: int = 64,
        extra: Mapping[str, pa.DataType] | None = None,
    ) -> None:
        self.output_dir, self.metadata, self.prefix = Path(output_dir), metadata, prefix
        self.episodes_per_file, self.extra = episodes_per_file, dict(extra or {})
        self.output_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_file(self.output_dir / f".{prefix}.lock")
        if lock is None:
            being = f"'{prefix}' is being written by another writer"
            raise DataError(f"{self.output_dir}: {being}; wait for it, or write into another folder")
        self._lock = lock
        self._journal: pa.OSFile | None = None
        self._stream: pa.RecordBatchStreamWriter | None = None
        self._schema: pa.Schema | None = None
        self._in_shard = 0
        self._shard = self.episodes_written = 0
        try:
            self._take_over()
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def write(self, episode: Episode) -> None:
        """Append one episode; on return it survives a kill of the process."""
        batch = self._batch(episode)
        if self._stream is None:
            self._journal = pa.OSFile(os.fsencode(self._journal_path), "wb")
            self._stream = pa.ipc.new_stream(self._journal, batch.schema)
        self._stream.write_batch(batch)
        self.episodes_written += 1
        self._in_shard += 1
        if self._in_shard >= self.episodes_per_file:
            self._close_shard()

    def expect(self, cameras: int, state_dim: int, action_dim: int) -> pa.Schema:
        """The schema of episodes of this form; raises `DataError` where the episodes already written have another."""
        wanted = arrow_schema(cameras, state_dim, action_dim, self.metadata, self.extra)
        if self._schema is None:
            self._schema = wanted
        if not self._schema.equals(wanted):
            where = f"{self.output_dir}: episode {self.episodes_written} of '{self.prefix}'"
            got, expected = (", ".join(f"{one.name}: {one.type}" for one in fields) for fields in (wanted, self._schema))
            text = f"columns differ from the episodes already written: got {got}, expected {expected}"
            raise DataError(f"{where}: {text}; write it into another folder or under another prefix")
        return wanted

    def close(self) -> None:
        """Turn what the journal holds into a Parquet file, and let others write here."""
        try:
            if self._stream is not None:
                self._close_shard()
        finally:
            self._unlock()

    @property
    def _journal_path(self) -> Path:
        return self.output_dir / f".{self.prefix}-{self._shard:05d}.arrows"

    @property
    def _shard_path(self) -> Path:
        return self.output_dir / f"{self.prefix}-{self._shard:05d}.parquet"

    def _batch(self, episode: Episode) -> pa.RecordBatch:
        where = f"{self.output_dir}: episode {self.episodes_written} of '{self.prefix}'"
        check_episode(episode, where)
        length = episode.length
        wanted = self.expect(len(episode.images), episode.state.shape[1], episode.action.shape[1])
        if misfits := self.metadata.misfits(episode.state.shape[1], episode.action.shape[1]):
            raise DataError("\n  ".join([f"{where} cannot be written", *misfits]))
        flags = np.zeros((3, length), bool)
        flags[0, 0] = flags[1, -1] = True
        flags[2, -1] = episode.is_terminal
        arrays = [pa.array(images, pa.binary()) for images in episode.images]
        for values in (episode.state, episode.action):
            flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
        arrays.append(pa.array([episode.prompt] * length, pa.string()))
        arrays += [pa.array(flag) for flag in flags]
        arrays += [pa.array(episode.extra[name], kind) for name, kind in self.extra.items()]
        return pa.RecordBatch.from_arrays(arrays, schema=wanted)

    def _close_shard(self) -> None:
        assert self._stream is not None and self._journal is not None
        self._stream.close()
        self._journal.close()
        self._stream = self._journal = None
        if batches := _read_journal(self._journal_path):  # none where the disk was full at once
            self._publish(batches)
        self._in_shard = 0

    def _publish(self, batches: list[pa.RecordBatch]) -> None:
        """Write a shard to a temporary name, then rename it, then drop the journal: a kill in between loses nothing."""
        facts = {schema.EPISODES_KEY: str(len(batches)).encode(), schema.CONTENT_KEY: content_digest(batches).encode()}
        shard_schema = batches[0].schema.with_metadata({**batches[0].schema.metadata, **facts})
        images = [name for name in shard_schema.names if name.startswith("image_")]
        with atomic_file(self._shard_path) as file, parquet_writer(file, shard_schema, images, "ZSTD", schema.PROMPT) as writer:
            for batch in batches:
                writer.write_table(pa.Table.from_batches([batch]), row_group_size=ROWS_PER_GROUP)
        self._journal_path.unlink(missing_ok=True)
        self._shard += 1

    def _take_over(self) -> None:
        """Turn the journals of killed runs into shards, but drop one whose shard was published; count what the folder holds."""
        for leftover in self.output_dir.glob(f".{self.prefix}-?????.parquet.*.tmp"):
            leftover.unlink()
        for journal in sorted(self.output_dir.glob(f".{self.prefix}-?????.arrows")):
            self._shard = int(journal.stem[-5:])
            if not self._shard_path.exists() and (batches := _read_journal(journal)):
                self._publish(batches)
            journal.unlink(missing_ok=True)
        shards = sorted(self.output_dir.glob(f"{self.prefix}-?????.parquet"))
        # Not their count: a shard may have been taken out, and none is ever overwritten.
        self._shard = max((int(path.stem[-5:]) + 1 for path in shards), default=0)
        self.episodes_written = sum(_episodes_in(path) for path in shards)
        if shards:
            self._schema = stored_schema(shards[0])

    def _unlock(self) -> None:
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()


def check_episode(episode: Episode, where: str) -> None:
    """Raise `DataError` unless the episode's columns agree in length, are finite, and hold JPEG or PNG images."""
    length = episode.length
    faults = []
    if length == 0:
        faults.append("got 0 steps, expected at least 1")
    if not episode.images:
        faults.append("images: got no camera, expected at least 1")
    for name, values in ((schema.STATE, episode.state), (schema.ACTION, episode.action)):
        if values.ndim != 2 or len(values) != length:
            faults.append(f"{name}: got shape {values.shape}, expected ({length}, dimensions)")
        elif not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            faults.append(f"{name}: step {row}, dimension {column} is {values[row, column]}, expected a finite number")
    for name, column_values in episode.extra.items():
        if len(column_values) != length:
            faults.append(f"{name}: got {len(column_values)} values, expected {length}")
    for number, images in enumerate(episode.images):
        column = schema.image_column(number + 1)
        if len(images) != length:
            faults.append(f"{column}: got {len(images)} images, expected {length}")
        for step, image in enumerate(images):
            if image is not None and not image.startswith(tuple(IMAGE_MAGIC.values())):
                faults.append(f"{column}: step {step} is neither JPEG nor PNG")
                break
    if not episode.prompt.strip():
        faults.append("prompt: got an empty instruction")
    if faults:
        raise DataError("\n  ".join([f"{where} cannot be written", *faults]))


def content_digest(batches: Iterable[pa.RecordBatch]) -> str:
    """Of every value of some episodes, in order, 16 characters. Images leave no other trace in a file's footer."""
    digest = hashlib.blake2b(digest_size=8)
    for batch in batches:
        digest.update(batch.num_rows.to_bytes(8, "little"))
        for column in batch.columns:
            for buffer in column.buffers():
                digest.update((0 if buffer is None else buffer.size).to_bytes(8, "little"))
                digest.update(buffer or b"")
    return digest.hexdigest()


def _read_journal(path: Path) -> list[pa.RecordBatch]:
    """Whole record batches of a journal; a torn tail (killed while writing) is left out."""
    batches = []
    with pa.memory_map(os.fsencode(path)) as source:
        try:
            for batch in pa.ipc.open_stream(source):
                batches.append(batch)
        except (pa.ArrowInvalid, OSError):
            pass
    return batches


def stored_schema(path: Path) -> pa.Schema:
    """Schema of a file of episodes; raises `DataError` when it cannot be read."""
    with ParquetEpisodes(str(path), str(path)) as file:
        return file.arrow


def _episodes_in(path: Path) -> int:
    metadata = stored_schema(path).metadata or {}
    if schema.EPISODES_KEY not in metadata:
        raise DataError(f"{path}: was not written by EpisodeWriter; write into another folder or under another prefix")
    return int(metadata[schema.EPISODES_KEY])


def parquet_writer(file: IO[bytes], arrow: pa.Schema, images: list[str], codec: str, repetitive: str) -> pq.ParquetWriter:
    """A writer of rows with images. images: columns of encoded images, which are compressed already; statistics over them
    would only swell the footer. repetitive: the column whose values repeat."""
    inner = {field.name: ".list.element" for field in arrow if pa.types.is_fixed_size_list(field.type)}
    inner |= {field.name: ".bytes" for field in arrow if pa.types.is_struct(field.type)}
    leaves = {f"{name}{inner.get(name, '')}": name in images for name in arrow.names}  # Parquet's own column paths
    return pq.ParquetWriter(
        file,
        arrow,
        compression={leaf: "NONE" if is_image else codec for leaf, is_image in leaves.items()},
        use_dictionary=[repetitive],
        write_statistics=[leaf for leaf, is_image in leaves.items() if not is_image],
        write_page_checksum=True,
    )
