"""Checkpoints: one self-describing file with the specification's keys and everything a resume or a robot needs (S9).

Written to a temporary name, synced, its sha256 put beside it, then renamed: a file under a final name is whole. `last` and
`best` are links to such files. A checkpoint in shards (`sharded.py`) is a folder with the same keys, read in the same way.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch

from paligemma_vla.errors import CheckpointError, UnreadableCheckpointError, first_line
from paligemma_vla.storage import atomic_file, atomic_write, fetch, is_url, sha256, sync_folder
from paligemma_vla.training import sharded
from paligemma_vla.training.distributed import Distributed

SPEC_KEYS = ("epoch", "state_dict", "optimizer", "best_metric", "lr_scheduler")
POLICY_KEYS = ("config", "preprocessor", "backbone", "metadata", "versions", "step", "ema")
RESUME_KEYS = (*POLICY_KEYS, "rng", "stale", "watch", "data")
SUFFIX = ".pth.tar"
LAST, BEST = f"last{SUFFIX}", f"model_best{SUFFIX}"
DIGEST = ".sha256"
logger = logging.getLogger(__name__)


def save_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write `payload` (tensors and plain data only) so that `path` is either the old file or the whole new one.

    Raises `CheckpointError` when it cannot be written; nothing that was there is lost then.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            line = f"{_save(payload, file)}  {path.name}\n"
            # Until the rename both digests are right: a kill in between leaves a file, old or new, that verifies.
            old = _digests(path) if path.exists() else ""
            atomic_write(_digest_path(path), old + line)
        atomic_write(_digest_path(path), line)
        sync_folder(path.parent)


def consolidate(folder: Path, path: Path) -> None:
    """Write a checkpoint in shards as the specification's one file. Raises `CheckpointError`."""
    save_checkpoint(path, sharded.read_whole(folder, sharded.IN_SHARDS))


def consolidate_link(folder: Path, name: str) -> None:
    """The one file of the checkpoint in shards that `name` (`LAST` or `BEST`) leads to, and a link to it."""
    link = folder / _in_shards(name)
    if link.exists():
        path = folder / f"{_stem(link.resolve())}{SUFFIX}"
        if not path.exists():
            consolidate(link.resolve(), path)
        link_checkpoint(path, name)


class _HashedFile:
    """What `torch.save` writes to: takes the digest on the way, and keeps the error that torch would turn into another."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(payload: dict[str, Any], file: IO[bytes]) -> str:
    """Serialise into an open file; returns the sha256 of what was written. Raises `OSError` on a full disk."""
    hashed = _HashedFile(file)
    try:
        torch.save(payload, cast(IO[bytes], hashed))  # all that is asked of it is there
    except RuntimeError:
        if hashed.error is not None:
            raise hashed.error from None
        raise
    return hashed.digest.hexdigest()


def link_checkpoint(target: Path, name: str) -> None:
    """Point `name` (`LAST` or `BEST`, in shards with their suffix) beside `target` at it, at once."""
    other, link = (target.with_name(link) for link in (name, _in_shards(name)))
    if target.suffix != sharded.SUFFIX:
        other, link = link, other
    temporary = _temporary(link)
    with _writing(link):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.replace(link)
        if _stem(other.resolve()) != _stem(target):
            other.unlink(missing_ok=True)  # of a time when checkpoints were of the other kind


def _in_shards(name: str) -> str:
    return f"{name.removesuffix(SUFFIX)}{sharded.SUFFIX}"


def _stem(path: Path) -> str:
    return path.name.removesuffix(SUFFIX).removesuffix(sharded.SUFFIX)


def linked_checkpoints(folder: Path, names: Sequence[str] = (LAST, BEST)) -> set[Path]:
    """What the links of a run point at."""
    links = [folder / link for name in names for link in (name, _in_shards(name))]
    return {link.resolve() for link in links if link.exists()}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tell of a disk that is full or gone."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or first_line(error)}); the checkpoints before it are whole; free "
            f"some space, or keep fewer (training.keep_last)"
        ) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed save left; only while nothing else saves into `folder`."""
    for path in folder.glob(".*.tmp"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def prune_checkpoints(folder: Path, keep_last: int | None) -> None:
    """Remove what is neither linked nor to be kept; see `superfluous`."""
    linked = {path.name for path in linked_checkpoints(folder)}
    if keep_last:  # what cannot be read is not one of the newest, and not ours to remove
        numbered = [path.name for path in newest_first(folder) if _step_of(path) < float("inf")]
    else:
        numbered = [path.name for path in _numbered(folder)]
    for name in superfluous(numbered, linked, keep_last):
        _remove(folder / name)
        _digest_path(folder / name).unlink(missing_ok=True)


def superfluous(names: Sequence[str], linked: Set[str], keep_last: int | None) -> list[str]:
    """Numbered checkpoints (newest first) that go: not linked, nor of the newest `keep_last`; None keeps those of epochs."""
    kept = names[:keep_last] if keep_last else [name for name in names if name.startswith("checkpoint_epoch_")]
    return [name for name in names if name not in kept and name not in linked]


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu", keys: Sequence[str] = POLICY_KEYS, verify: bool = True
) -> dict[str, Any]:
    """Read and verify a checkpoint. Raises `CheckpointError` naming what is wrong: missing, damaged, or a key absent.

    keys: what must be there besides the specification's. A file without its sha256 (copied alone, or under another name) is
    verified by the checksums inside it. One behind a URL is fetched first. Of one in shards the optimiser's tensors are left
    out. verify: another process does it where False.
    """
    if is_url(str(path)):
        with tempfile.TemporaryDirectory() as folder:
            return load_checkpoint(fetch(str(path), Path(folder) / Path(path).name), device, keys, verify)
    path = Path(path)
    if path.is_dir():
        return with_keys(sharded.read_whole(path.resolve(), ("state_dict", "ema"), verify), path, keys)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.pth.tar")) if path.parent.is_dir() else []
        raise CheckpointError(f"{path}: no such checkpoint" + (f"; there are: {', '.join(beside)}" if beside else ""))
    real = path.resolve()
    try:
        if verify:
            _verify(real)
        # Mapped: what is not asked for (the optimiser, for a policy) is never read, and nothing is in memory twice.
        payload = torch.load(real, map_location=device, weights_only=True, mmap=True)
    except (
        OSError,
        MemoryError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
    ) as error:
        raise sharded.unreadable(real, error) from error
    return with_keys(payload, real, keys)


def open_to_resume(path: str | Path, distributed: Distributed, verified: bool) -> dict[str, Any]:
    """A checkpoint to go on from, for all processes; of one in shards the tensors are still notes (`sharded`), and `in_shards`
    is True.

    verified: it has just been. Raises `CheckpointError`, about a damaged one on every process.
    """
    if Path(path).is_dir():
        folder = Path(path).resolve()
        if not verified:
            sharded.verify_together(folder, distributed)
        return {**with_keys(sharded.read_record(folder, verify=False), folder, RESUME_KEYS), "in_shards": True}
    read = partial(load_checkpoint, path, keys=RESUME_KEYS)
    payload = distributed.on_main(partial(read, verify=not verified))
    return {**(payload or read(verify=False)), "in_shards": False}


def with_keys(payload: Any, path: Path, keys: Sequence[str] = POLICY_KEYS) -> dict[str, Any]:
    """What was read from `path`, when the specification's keys and `keys` are in it. Raises `CheckpointError`."""
    missing = [key for key in (*SPEC_KEYS, *keys) if not isinstance(payload, dict) or key not in payload]
    if missing:
        raise CheckpointError(f"{path}: missing {', '.join(missing)}; it was not written by this program")
    if not isinstance(payload["step"], int):
        raise CheckpointError(f"{path}: step: got {payload['step']!r}, expected a whole number; use an older checkpoint")
    return dict(payload)


def _verify(path: Path) -> None:
    """Raise `CheckpointError` for a file that is not what was written."""
    digests = _digests(path)
    if not digests and (entry := sharded.damaged_entry(path)) is not None:
        raise CheckpointError(f"{path}: damaged: the checksum of '{entry}' in it is wrong; copy it again, or use an older one")
    if digests and sha256(path) not in digests.split():
        raise CheckpointError(f"{path}: damaged: its sha256 differs from {_digest_path(path).name}; use an older checkpoint")


def _digests(path: Path) -> str:
    """What the file beside a checkpoint says; nothing when it is not there."""
    try:
        return _digest_path(path).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise CheckpointError(f"{_digest_path(path)}: cannot be read ({error.strerror}); take it away") from error


def newest_checkpoint(folder: Path, distributed: Distributed) -> Path | None:
    """The checkpoint of a run that is furthest and verifies; what is passed over is logged. Every process has to ask.

    Raises `UnreadableCheckpointError` for one that may be whole: to pass over it would be to throw it away.
    """
    for path, in_shards in distributed.broadcast(partial(_candidates, folder)):
        try:
            distributed.on_main(partial(_check_keys, path))
            if in_shards:
                sharded.verify_together(path, distributed)
        except UnreadableCheckpointError:
            raise
        except CheckpointError as error:
            if distributed.main:
                logger.warning("passed over: %s", error)
        else:
            return Path(path)
    return None


def _candidates(folder: Path) -> list[tuple[Path, bool]]:
    """Numbered checkpoints, the furthest first, and whether each is in shards."""
    try:
        next(os.scandir(folder), None)  # glob finds nothing where it may not look
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableCheckpointError(f"{folder}: cannot be read ({error.strerror}); see to that") from error
    return [(path, path.is_dir()) for path in newest_first(folder)]


def _check_keys(path: Path) -> None:
    """Raise `CheckpointError` for a checkpoint that a run cannot go on from, or a file that is damaged."""
    if path.is_dir():
        with_keys(sharded.read_record(path, verify=False), path, RESUME_KEYS)
    else:
        load_checkpoint(path, keys=RESUME_KEYS)


def newest_first(folder: Path) -> list[Path]:
    """Numbered checkpoints, the furthest first. Not by date: a copy of the folder has other dates.

    Those that do not even tell their step come first, so that `newest_checkpoint` names them.
    """
    return sorted(_numbered(folder), key=lambda path: (_step_of(path), path.stat().st_mtime_ns), reverse=True)


def _numbered(folder: Path) -> list[Path]:
    files = [path for path in folder.glob(f"checkpoint_*{SUFFIX}") if path.is_file()]
    return files + [path for path in folder.glob(f"checkpoint_*{sharded.SUFFIX}") if path.is_dir()]


def _step_of(path: Path) -> float:
    try:
        # mmap: the small entries are read, not the weights.
        small = path / sharded.RECORD if path.is_dir() else path
        return float(torch.load(small, map_location="cpu", mmap=True, weights_only=True)["step"])
    except Exception:  # of any kind: a damaged file can hold anything, and is judged by whoever loads it
        return float("inf")


def set_aside_later(folder: Path, resumed: Path, step: int) -> None:
    """Move checkpoints of steps after `step` into a folder of their own: a run that goes on from an older one repeats them."""
    later = [path for path in newest_first(folder) if step < _step_of(path) < float("inf")]
    if not later:
        return
    aside = folder / f"after_step_{step}.{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir()
    for path in later:
        for name in (path.name, _digest_path(path).name):
            if (folder / name).exists():
                (folder / name).rename(aside / name)
    for name in (LAST, BEST):
        if not linked_checkpoints(folder, [name]) and resumed.parent.resolve() == folder.resolve():
            link_checkpoint(folder / resumed.name, name)
    logger.info("the run goes on from step %d: its later checkpoints were moved to %s", step, aside)


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{DIGEST}")


def plain(value: Any) -> Any:
    """Configuration of a library as plain data, so that a checkpoint loads with weights_only."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
