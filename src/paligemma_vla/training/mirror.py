"""A run on a URL: it writes a folder on this machine, the working copy, which is published there after each save.

What lies behind the URL is what counts: a start takes over from there, and a fresh run begins with an empty working copy.
Only the checkpoints that are linked stay on this machine.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from functools import partial
from pathlib import Path

from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import CheckpointError, UnreadableCheckpointError
from paligemma_vla.storage import fetch, file_system, list_files, retry
from paligemma_vla.training.checkpoint import BEST, DIGEST, LAST, RESUME_KEYS, load_checkpoint, superfluous

logger = logging.getLogger(__name__)


class Mirror:
    """Keeps what lies at `url` equal to the folder `local`. Every method raises `StorageError` when it cannot be reached."""

    def __init__(self, local: Path, url: str) -> None:
        self.local, self.url = local, url.rstrip("/")
        self.system, self.root = retry(self.url, lambda: file_system(self.url))
        self._published: dict[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, config: VLAConfig) -> Mirror | None:
        """That of a run whose checkpoint_dir is a URL."""
        return cls(config.run_dir, config.run_url) if config.run_url is not None else None

    def newest_checkpoint(self) -> Path | None:
        """Fetch the newest checkpoint that verifies; what is passed over is logged."""
        for name in self._checkpoints():
            path = self.fetch_checkpoint(name)
            try:
                load_checkpoint(path, keys=RESUME_KEYS)
            except UnreadableCheckpointError:
                raise
            except CheckpointError as error:
                logger.warning("passed over: %s", error)
                path.unlink()
            else:
                return path
        return None

    def fetch_checkpoint(self, name: str) -> Path:
        """Copy a checkpoint, and its digest where it has one, to this machine."""
        digest = f"checkpoints/{name}{DIGEST}"
        if self._has(digest):
            self._fetch(digest)
        return self._fetch(f"checkpoints/{name}")

    def begin(self, resuming: bool) -> None:
        """Take over records of the run that goes on, or make room for one that starts."""
        if resuming:
            for name in self._names():
                if not name.startswith("checkpoints/"):
                    self._fetch(name)
            return
        shutil.rmtree(self.local, ignore_errors=True)
        names = self._names()
        if names:
            aside = f"{self.root}.{time.strftime('%Y%m%d-%H%M%S')}"
            for name in names:
                self._make_folder(f"{aside}/{name}")
                retry(self.url, partial(self.system.mv, f"{self.root}/{name}", f"{aside}/{name}"))
            logger.info("%s held an earlier run; it was moved to %s", self.url, aside)

    def publish(self, keep_last: int | None) -> None:
        """Copy what has changed, then remove the checkpoints that are not to be kept: the new ones are there by then."""
        files = sorted(path for path in self.local.rglob("*") if path.is_file() and not path.name.startswith("."))
        # Links last: what they point at is there first.
        for path in sorted(files, key=Path.is_symlink):
            name, status = path.relative_to(self.local).as_posix(), path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if self._published.get(name) != stamp:
                self._copy(path, name)
                self._published[name] = stamp
        linked = {(self.local / "checkpoints" / name).resolve().name for name in (LAST, BEST)}
        for name in superfluous(self._checkpoints(), linked, keep_last):
            for suffix in ("", DIGEST):
                if self._has(f"checkpoints/{name}{suffix}"):
                    retry(self.url, partial(self.system.rm_file, f"{self.root}/checkpoints/{name}{suffix}"))

    def _copy(self, path: Path, name: str) -> None:
        if path.is_symlink():  # a store has no links: a copy there, not a second transfer
            copy = partial(self.system.cp_file, f"{self.root}/checkpoints/{path.resolve().name}")
        else:
            self._make_folder(f"{self.root}/{name}")
            copy = partial(self.system.put_file, str(path))
        retry(f"{self.url}/{name}", lambda: copy(f"{self.root}/{name}"))

    def _make_folder(self, file: str) -> None:
        """The folder that `file` is to lie in; stores have none, disks do."""
        retry(self.url, lambda: self.system.makedirs(file.rpartition("/")[0], exist_ok=True))

    def _checkpoints(self) -> list[str]:
        """Names of the numbered checkpoints there, newest first."""
        names = [name.removeprefix("checkpoints/") for name in self._names()]
        numbered = [name for name in names if name.startswith("checkpoint_") and name.endswith(".pth.tar")]
        ages = {name: retry(self.url, partial(self.system.modified, f"{self.root}/checkpoints/{name}")) for name in numbered}
        # Stores know seconds, in which a small run saves twice: then the number in the name decides.
        return sorted(numbered, key=lambda name: (ages[name], int(re.sub(r"\D", "", name))), reverse=True)

    def _names(self) -> list[str]:
        """Names of all files there, relative to the run's folder."""
        self.system.invalidate_cache()
        return list(list_files(self.url))

    def _has(self, name: str) -> bool:
        return bool(retry(self.url, lambda: self.system.exists(f"{self.root}/{name}")))

    def _fetch(self, name: str) -> Path:
        return fetch(f"{self.url}/{name}", self.local / name)
