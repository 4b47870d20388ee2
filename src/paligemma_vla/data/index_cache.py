"""What indexing learns from files, kept on disk: a file that has not changed since is not opened again.

A cache that is damaged, of another version or not writable is as good as none. Nothing but time depends on it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.data.episode_file import read_layout
from paligemma_vla.data.files import Layout, Rows
from paligemma_vla.data.flags import FlagRows, find_flags
from paligemma_vla.data.sources import absolute_name, open_file
from paligemma_vla.schema import DatasetMetadata
from paligemma_vla.storage import cache_folder, replace_file

VERSION = 6
ROWS = ("groups", "outside", *(field.name for field in fields(FlagRows)))
# S3 refuses requests of clocks that differ by more (RequestTimeTooSkewed); and a second, which is as exact as mtimes are.
SETTLED_SECONDS = 15 * 60 + 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileFacts:
    """What indexing learns from one file, exclusions aside.

    identity: see `ByteSource.identity`. settled: whether it was asked for so long after the file's mtime that another file
    has another mtime. digest: see `EpisodeFile.digest`. groups: see `group_bounds`. outside: row ranges [first, stop) that
    were not asked for, one after the other (2 X,).
    """

    identity: tuple[int, int, int]
    settled: bool
    layout: Layout
    digest: int
    groups: Rows
    outside: Rows
    flags: FlagRows


def read_facts(path: str) -> FileFacts:
    """Read footer and flags of one file. Raises `FaultError` naming file and column."""
    asked = time.time()
    with open_file(path) as file:
        identity = file.identity()  # before it is read: a change in between is found later
        layout, digest = read_layout(file), file.digest()
        facts = layout, digest, file.bounds, file.outside.ravel(), find_flags(file)
        return FileFacts(identity, is_settled(identity, asked), *facts)


def is_settled(identity: tuple[int, int, int], asked: float) -> bool:
    """Whether a file that is written after `asked` (seconds; the identity was not known yet) has another mtime, whatever the
    clock of the store says."""
    return asked - identity[1] / 1e9 > SETTLED_SECONDS


def cache_path(arguments: Sequence[str]) -> Path:
    """Where the facts about the files behind some arguments (files, folders, globs) are kept."""
    absolute = "\n".join(absolute_name(argument) for argument in arguments)
    key = hashlib.blake2b(os.fsencode(absolute), digest_size=16).hexdigest()
    return cache_folder("index") / f"{key}.npz"


def load_facts(path: Path) -> dict[str, FileFacts]:
    """Facts by absolute path of the file; none when there is no cache that can be used."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return _unpack({name: arrays[name] for name in arrays.files})
    except Exception as error:  # of any kind: bytes on a disk can be anything, and the files themselves are there
        logger.debug("%s: no index is taken from there (%s)", path, error)
        return {}


def save_facts(path: Path, facts: Mapping[str, FileFacts]) -> None:
    """Replace the cache by these facts; does nothing where it cannot be written."""
    stream = io.BytesIO()
    np.savez(stream, **_pack(facts))  # type: ignore[arg-type]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, stream.getbuffer())
    except OSError as error:
        logger.debug("%s: the index is not kept (%s)", path, error)


def _pack(facts: Mapping[str, FileFacts]) -> dict[str, NDArray[Any]]:
    layouts = [_layout_text(entry.layout) for entry in facts.values()]
    distinct = sorted(set(layouts))
    number = {text: place for place, text in enumerate(distinct)}
    header = json.dumps({"version": VERSION, "paths": list(facts), "layouts": distinct})
    rows = {name: [_rows(entry, name) for entry in facts.values()] for name in ROWS}
    return {
        "header": np.frombuffer(header.encode(), np.uint8),
        "identity": np.array([entry.identity for entry in facts.values()], np.int64),
        "settled": np.array([entry.settled for entry in facts.values()], bool),
        "digest": np.array([entry.digest for entry in facts.values()], np.uint64),
        "layout": np.array([number[text] for text in layouts], np.int64),
        **{name: np.concatenate([np.empty(0, np.int64), *parts]) for name, parts in rows.items()},
        **{f"{name}_count": np.array([len(part) for part in parts], np.int64) for name, parts in rows.items()},
    }


def _unpack(arrays: Mapping[str, NDArray[Any]]) -> dict[str, FileFacts]:
    header = json.loads(arrays["header"].tobytes())
    if header["version"] != VERSION:
        raise ValueError(f"version {header['version']}")
    layouts = [_layout(text) for text in header["layouts"]]
    rows = {name: np.split(arrays[name], np.cumsum(arrays[f"{name}_count"])[:-1]) for name in ROWS}
    return {
        path: FileFacts(
            identity=tuple(arrays["identity"][place].tolist()),
            settled=bool(arrays["settled"][place]),
            layout=layouts[arrays["layout"][place]],
            digest=int(arrays["digest"][place]),
            groups=rows["groups"][place],
            outside=rows["outside"][place],
            flags=FlagRows(*(rows[field.name][place] for field in fields(FlagRows))),
        )
        for place, path in enumerate(header["paths"])
    }


def _rows(entry: FileFacts, name: str) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = getattr(entry if name in ("groups", "outside") else entry.flags, name)
    return rows


def _layout_text(layout: Layout) -> str:
    return json.dumps([layout.cameras, layout.state_dim, layout.action_dim, layout.metadata.to_json()])


def _layout(text: str) -> Layout:
    cameras, state_dim, action_dim, metadata = json.loads(text)
    return Layout(cameras, state_dim, action_dim, DatasetMetadata.from_json(metadata))
