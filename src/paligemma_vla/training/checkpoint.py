"""Checkpoints: self-describing, with the specification's keys and everything that a resume or a robot needs (S9).

There are two kinds. A file, `.pth.tar`, has its sha256 beside it. A folder of shards, `.dcp`, is written by all processes
(`sharded.py`): tensors as safetensors, everything else, and the sha256 of each shard, in `record.pt`. Both are written under
a temporary name first: under its own name a checkpoint is complete. `last` and `best` are links to checkpoints.

The newest checkpoint is that of the highest step. Dates say nothing: a copied folder or bucket has others.

Policies import this module: it knows no processes. Where several read one checkpoint, they are handed in as `together`.
"""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from paligemma_vla.errors import CheckpointError, UnreadableCheckpointError, VLAError, first_line
from paligemma_vla.storage import atomic_file, atomic_write, fetch, is_url, open_source, read_failure, sha256, sync_folder

if TYPE_CHECKING:
    from paligemma_vla.training.distributed import Distributed

SPEC_KEYS = ("epoch", "state_dict", "optimizer", "best_metric", "lr_scheduler")
POLICY_KEYS = ("config", "preprocessor", "backbone", "metadata", "versions", "step", "ema")
RESUME_KEYS = (*POLICY_KEYS, "rng", "stale", "watch", "data")
SUFFIX, SHARDS_SUFFIX = ".pth.tar", ".dcp"
LAST, BEST = f"last{SUFFIX}", f"model_best{SUFFIX}"
DIGEST = ".sha256"
RECORD, DIGESTS = "record.pt", "shards"
# Parts whose tensors lie in shards; in the record each tensor has a placeholder with these keys.
IN_SHARDS = ("state_dict", "optimizer", "ema")
PLACEHOLDER = {"tensor", "shape", "dtype"}
# Errors of this machine, which say nothing about the file.
TRANSIENT = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
logger = logging.getLogger(__name__)


def save_checkpoint(path: Path, payload: Mapping[str, Any]) -> None:
    """Write `payload` (tensors and plain data only) so that `path` is either the old file or the new one.

    Raises `CheckpointError` when it cannot be written; nothing that was there is lost then.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            try:
                torch.save(payload, file)
            except RuntimeError as error:  # torch's own, where a full disk raised an `OSError`
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            file.flush()
            with ThreadPoolExecutor(1) as pool:  # the disk writes while the file is hashed, from memory
                synced = pool.submit(os.fsync, file.fileno())
                line = f"{sha256(file.name)}  {path.name}\n"
                synced.result()
            # Until the rename both digests are right: after a kill in between the file, old or new, verifies.
            old = _digests(path) if path.exists() else ""
            atomic_write(_digest_path(path), old + line)
        atomic_write(_digest_path(path), line)
        sync_folder(path.parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what a full or missing disk raises into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or first_line(error)}); the checkpoints before it are intact; free "
            f"some space, or keep fewer (training.keep_last)"
        ) from error


def load_checkpoint(location: str | Path, keys: Sequence[str] = POLICY_KEYS) -> dict[str, Any]:
    """Read and verify a checkpoint at a path or URL; of one in shards the optimiser's tensors are left out.

    keys: what must be there besides the specification's. Raises `CheckpointError` for one that is missing or damaged, or lacks
    a key.
    """
    with _on_this_machine(location) as path:
        verify_checkpoint(path)
        return _with_keys(read_checkpoint(path, ("state_dict", "ema")), path, keys)


def open_to_resume(location: str | Path, together: Distributed, verified: bool) -> dict[str, Any]:
    """A checkpoint to go on from, opened by all processes. In place of tensors in shards it has placeholders.

    verified: it has just been. Raises `CheckpointError`, about a damaged one on every process.
    """
    with _on_this_machine(location) as path:
        if not verified:
            _verify_to_resume(path, together)
        return _with_keys(read_checkpoint(path), path, RESUME_KEYS)


@contextmanager
def _on_this_machine(location: str | Path) -> Iterator[Path]:
    """The path of a checkpoint, without links; what lies behind a URL is fetched."""
    if not is_url(str(location)):
        path = Path(location)
        yield path.resolve() if path.exists() else path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield fetch(str(location), Path(folder) / Path(location).name)


def _with_keys(payload: Any, path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What was read from `path`, if the specification's keys and `keys` are in it. Raises `CheckpointError`."""
    missing = [key for key in (*SPEC_KEYS, *keys) if not isinstance(payload, dict) or key not in payload]
    if missing:
        raise CheckpointError(f"{path}: missing {', '.join(missing)}; it was not written by this program")
    if not isinstance(payload["step"], int):
        raise CheckpointError(f"{path}: step: got {payload['step']!r}, expected an integer; use an older checkpoint")
    return dict(payload)


def verify_checkpoint(path: Path, part: int = 0, parts: int = 1) -> None:
    """Compare a checkpoint with its checksums; of `parts` processes that share the work this is number `part`.

    Raises `CheckpointError` for a damaged one, `UnreadableCheckpointError` for one that this machine cannot read now.
    """
    if part == 0 and not path.exists():
        others = sorted(p.name for p in path.parent.glob(f"*{SUFFIX}"))
        raise CheckpointError(f"{path}: no such checkpoint" + (f"; there are: {', '.join(others)}" if others else ""))
    with _reading(path):
        if path.is_dir():
            _verify_shards(path, part, parts)
        elif part == 0:
            _verify_file(path)


def read_checkpoint(path: Path, tensors: Sequence[str] = ()) -> dict[str, Any]:
    """The payload, unverified. tensors: parts that must have their tensors, not placeholders. Raises as `verify_checkpoint`."""
    with _reading(path):
        # Mapped: what is not asked for (the optimiser, for a policy) is never read, and nothing is in memory twice.
        return _read_shards(path, tensors) if path.is_dir() else _load(path, mmap=True)


def _load(path: Path, mmap: bool = False) -> dict[str, Any]:
    return cast(dict[str, Any], torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever reading fails with into a `CheckpointError` of `path`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of any kind: a damaged file can hold anything
        text = f"{path}: cannot be read ({read_failure(path, error)})"
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in TRANSIENT):
            remedy = "it may be intact: make it readable, or move it away and use an older one"
            raise UnreadableCheckpointError(f"{text}; {remedy}") from error
        raise CheckpointError(f"{text}; is it a complete checkpoint?") from error


def _verify_file(path: Path) -> None:
    """Without its sha256 (copied alone, or under another name) a file is verified by the checksums inside it."""
    digests = _digests(path)
    if not digests:
        _check_archive(path)
    elif sha256(path) not in digests.split():
        raise CheckpointError(f"{path}: damaged: its sha256 differs from {path.name}{DIGEST}; use an older checkpoint")


def _verify_shards(folder: Path, part: int, parts: int) -> None:
    """Rank 0 verifies the record, each process its part of the shards."""
    if part == 0:
        _check_archive(folder / RECORD)
    digests = _load(folder / RECORD)[DIGESTS]
    present = {shard.name for shard in folder.glob("*.safetensors")}
    if different := sorted(digests.keys() ^ present):  # all that are present would be read
        what = "is not one of the shards that were written" if different[0] in present else "is missing"
        raise CheckpointError(f"{folder}: {different[0]} {what}; copy it again, or use an older checkpoint")
    for name, digest in sorted(digests.items())[part::parts]:
        if sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: damaged: its sha256 differs from {RECORD}; use an older checkpoint")


def _read_shards(folder: Path, tensors: Sequence[str]) -> dict[str, Any]:
    record = _load(folder / RECORD)
    del record[DIGESTS]
    wanted = {
        value["tensor"]: torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]))
        for value in placeholders({part: record.get(part) for part in tensors})
    }
    read_tensors(folder, wanted)
    return fill(record, wanted)


def is_in_shards(path: Path) -> bool:
    """Whether a path is a checkpoint in shards."""
    return (path / RECORD).is_file()


def _check_archive(path: Path) -> None:
    """Compare the entries of a file of torch's with their checksums: torch does not."""
    with zipfile.ZipFile(path) as archive:
        if (entry := archive.testzip()) is not None:
            raise CheckpointError(f"{path}: damaged: the checksum of '{entry}' is wrong; copy it again, or use an older one")


def _digests(path: Path) -> str:
    """The text of the file beside a checkpoint; empty when there is none."""
    digest = _digest_path(path)
    return digest.read_text(encoding="ascii", errors="replace") if digest.exists() else ""


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{DIGEST}")


def placeholders(tree: Any) -> list[dict[str, Any]]:
    """Every placeholder of a tensor in a tree."""
    return [leaf for leaf in tree_leaves(tree, is_leaf=_is_placeholder) if _is_placeholder(leaf)]


def fill(record: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A record with tensors in place of their placeholders; those whose tensor is not given stay."""

    def replace(value: Any) -> Any:
        return tensors.get(value["tensor"], value) if _is_placeholder(value) else value

    return cast(dict[str, Any], tree_map(replace, record, is_leaf=_is_placeholder))


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() == PLACEHOLDER


def read_tensors(folder: Path, wanted: dict[str, Tensor], group: Any = None) -> None:
    """Read tensors, by key, from shards into `wanted`; of a `DTensor` this process's part. Raises `CheckpointError`.

    group: the process group of all that read, None for one process alone.
    """
    if not wanted:
        return
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.distributed is disabled")
            load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group, no_dist=group is None)
    except (CheckpointException, Exception) as error:  # what DCP and safetensors raise has no common base
        raise CheckpointError(f"{folder}: does not fit ({reason_of(error)})") from error


def reason_of(error: BaseException) -> str:
    """What an error says; DCP wraps those of the ranks."""
    failures = getattr(error, "failures", {})
    return "; ".join(f"rank {rank}: {first_line(cause)}" for rank, (cause, _) in failures.items()) or first_line(error)


def consolidate(folder: Path, path: Path) -> None:
    """Write a checkpoint in shards as the specification's one file. Raises `CheckpointError`."""
    verify_checkpoint(folder)
    save_checkpoint(path, read_checkpoint(folder, IN_SHARDS))


def consolidate_links(folder: Path) -> None:
    """Write the files of the checkpoints in shards that `LAST` and `BEST` lead to, and link them too."""
    for name in (LAST, BEST):
        link = folder / _with_suffix(name, SHARDS_SUFFIX)
        if link.exists():
            path = folder / _with_suffix(link.resolve().name, SUFFIX)
            if not path.exists():
                consolidate(link.resolve(), path)
            link_checkpoint(path, name)


def link_checkpoint(target: Path, name: str) -> None:
    """Point `name` (`LAST` or `BEST`) beside `target` at it, atomically. One of the other kind to another checkpoint goes."""
    here, other = (SUFFIX, SHARDS_SUFFIX) if target.suffix != SHARDS_SUFFIX else (SHARDS_SUFFIX, SUFFIX)
    link, old = target.with_name(_with_suffix(name, here)), target.with_name(_with_suffix(name, other))
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    with _writing(link):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.replace(link)
        if old.resolve().name != _with_suffix(target.name, other):
            old.unlink(missing_ok=True)


def linked_checkpoints(folder: Path, names: Sequence[str] = (LAST, BEST)) -> set[str]:
    """Names of what the links of a run point at."""
    links = [folder / _with_suffix(name, suffix) for name in names for suffix in (SUFFIX, SHARDS_SUFFIX)]
    return {link.resolve().name for link in links if link.exists()}


def _with_suffix(name: str, suffix: str) -> str:
    return name.removesuffix(SUFFIX).removesuffix(SHARDS_SUFFIX) + suffix


def numbered(names: Iterable[str]) -> list[str]:
    """Those of `names` that are checkpoints: not links, digests or anything else."""
    return [name for name in names if name.startswith("checkpoint_") and name.endswith((SUFFIX, SHARDS_SUFFIX))]


def read_step(location: str | Path) -> float:
    """The step of a checkpoint, infinite for one that cannot be read. Its weights are not read, nor fetched from a URL.

    Raises `StorageError` for a URL that cannot be reached.
    """
    try:
        if is_url(str(location)):
            with open_source(location) as source:
                saved = torch.load(io.BufferedReader(source, 2**16), map_location="meta", weights_only=True)
        else:
            record = Path(location, RECORD) if Path(location).is_dir() else location
            saved = torch.load(record, map_location="meta", weights_only=True, mmap=True)
        return float(saved["step"])
    except VLAError:
        raise
    except Exception:  # of any kind: a damaged file can hold anything, and whoever loads it says so
        return math.inf


def newest_first(names: Iterable[str], step_of: Callable[[str], float]) -> list[str]:
    """Checkpoints by their step, the highest first. Unreadable ones come first, so that `first_valid` reports them."""
    return sorted(names, key=lambda name: (step_of(name), name), reverse=True)


def newest_checkpoint(folder: Path, together: Distributed | None = None) -> Path | None:
    """The newest checkpoint of a run that verifies, the same on every process; what is passed over is logged."""

    def sort() -> list[str]:
        with _reading(folder):
            names = os.listdir(folder) if folder.exists() else []
        return newest_first(numbered(names), lambda name: read_step(folder / name))

    names = together.broadcast(sort) if together else sort()
    return first_valid((folder / name for name in names), together)


def first_valid(candidates: Iterable[Path], together: Distributed | None = None) -> Path | None:
    """The first checkpoint that a run can go on from; what is passed over is logged.

    Raises `UnreadableCheckpointError` for one that may be intact: to pass over it would be to throw it away.
    """
    for path in candidates:
        try:
            _verify_to_resume(path, together)
            return path
        except UnreadableCheckpointError:
            raise
        except CheckpointError as error:
            if together is None or together.main:
                logger.warning("passed over: %s", error)
    return None


def _verify_to_resume(path: Path, together: Distributed | None) -> None:
    """Raise `CheckpointError` for a checkpoint that a run cannot go on from: on all processes, each of which verifies a part.

    A process that does not see the checkpoint (on another machine) verifies nothing.
    """
    rank, processes = (together.rank, together.world_size) if together else (0, 1)

    def verify() -> None:
        verify_checkpoint(path, rank, processes)
        if rank == 0:
            _with_keys(read_checkpoint(path), path, RESUME_KEYS)

    if together is None:
        verify()
    else:
        together.on_all(verify)


def prune_checkpoints(folder: Path, keep_last: int | None) -> None:
    """Remove what is neither linked nor to be kept; see `superfluous`."""
    names = numbered(os.listdir(folder))
    for name in superfluous(names, lambda name: read_step(folder / name), linked_checkpoints(folder), keep_last):
        remove(folder / name)


def superfluous(names: list[str], step_of: Callable[[str], float], linked: Set[str], keep_last: int | None) -> list[str]:
    """Which checkpoints go: neither linked nor of the newest `keep_last`; None keeps those of epochs.

    What cannot be read is not one of the newest, and not ours to remove.
    """
    if keep_last is None:
        unkept = [name for name in names if not name.startswith("checkpoint_epoch_")]
    else:
        steps = {name: step for name in names if (step := step_of(name)) < math.inf}
        unkept = newest_first(steps, steps.__getitem__)[keep_last:]
    return [name for name in unkept if name not in linked]


def set_aside_later(resumed: Path, step: int) -> None:
    """Move the checkpoints after `step` into a folder of their own: a run that goes on from an older one repeats them.

    resumed: that older one. Links that lose their target point at it.
    """
    folder = resumed.parent
    if later := [name for name in numbered(os.listdir(folder)) if step < read_step(folder / name) < math.inf]:
        aside = folder / f"after_step_{step}.{time_stamp()}"
        aside.mkdir()
        for name in later:
            for part in (folder / name, _digest_path(folder / name)):
                if part.exists():
                    part.rename(aside / part.name)
        logger.info("the run goes on from step %d: its later checkpoints were moved to %s", step, aside)
    for name in (LAST, BEST):
        if not linked_checkpoints(folder, [name]):
            link_checkpoint(resumed.resolve(), name)


def time_stamp() -> str:
    """Part of the name of something that is moved aside."""
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed save left; only while nothing else saves into `folder`."""
    for path in folder.glob(".*.tmp"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint of either kind, and the digest beside it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
        _digest_path(path).unlink(missing_ok=True)
