"""A run's folder: what it records so that it can be repeated elsewhere, who may go on with it, and its copy behind a URL.

config.yaml                 resolved, complete; `train --config_path` with it repeats the run
normalization_stats.json    the statistics it uses
environment.json            per start: versions, machine, git state, data, command
code.patch                  what the code differs in from its commit, when it does
metrics.jsonl, logs/, checkpoints/, report.html
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock

import paligemma_vla
from paligemma_vla.config import RUN_CONFIG, RUN_ENVIRONMENT, RUN_STATISTICS, VLAConfig, VLMConfig, config_from_dict
from paligemma_vla.errors import CheckpointError, ConfigError, DataError, ModelError, first_line
from paligemma_vla.normalization import DatasetStatistics
from paligemma_vla.storage import atomic_write, fetch, file_system, list_files, lock_file, retry
from paligemma_vla.training import checkpoint as ckpt
from paligemma_vla.training.distributed import Distributed, launcher_id
from paligemma_vla.training.preflight import Data

logger = logging.getLogger(__name__)
PATCH, METRICS, CHECKPOINTS = "code.patch", "metrics.jsonl", "checkpoints"
# A launcher may start a process before the one that it replaces is gone.
REPLACED_SECONDS = 20.0

# Keys that a resume may change: how long, how fast and where; not what is learned from which samples, nor what `best` means.
FREE = {
    "data": "num_workers prefetch_factor pin_memory cache_mb allow_other_statistics",
    "model.vlm_config": "activation_checkpointing attn_implementation",
    "training": (
        "epochs max_steps stop_after_epoch stop_after_step gradient_accumulation_steps parallel shard_processes cpu_offload "
        "log_interval tensorboard validate_every_n_steps save_every_n_epochs save_every_n_steps keep_last checkpoint_format "
        "stop_when_save_fails max_skipped_steps checkpoint_dir experiment_name"
    ),
    "wandb": "enabled project entity mode",
    "control": "action_low action_high action_rate",
}
# Files may have moved: their content is compared instead, or comes out of the checkpoint.
MOVABLE = {
    "data": "train_parquet_files val_parquet_files exclude_episodes normalization_stats_path",
    "model.vlm_config": "model_name_or_path revision",
}
NOT_COMPARED = {f"{section}.{key}" for table in (FREE, MOVABLE) for section, keys in table.items() for key in keys.split()}


def begin_run(
    config: VLAConfig,
    data: Data,
    distributed: Distributed,
    step: int,
    resumed: str | Path | None = None,
    remote: RemoteRun | None = None,
) -> BaseFileLock:
    """Prepare `config.run_dir` for a run that starts at `step`, from the checkpoint `resumed` if there is one.

    A run goes on in its own folder; another run of the same name is moved aside, never overwritten. Returns the lock that keeps
    others out until it is closed. Raises `ConfigError` when the run is being trained already.
    """
    run_dir = config.run_dir
    lock = _lock(run_dir)
    checkpoints = run_dir / CHECKPOINTS
    found = Path(resumed or "").resolve()
    folders = found.parent, str(resumed).rpartition("/")[0]
    goes_on = resumed is not None and (folders[0] == checkpoints.resolve() or folders[1] == config.run_location(CHECKPOINTS))
    if remote is not None:
        remote.take_over(found.name, step) if goes_on else remote.move_aside()
    elif not goes_on and (checkpoints.exists() or (run_dir / METRICS).exists()):
        run_dir.rename(aside := run_dir.with_name(f"{run_dir.name}.{ckpt.time_stamp()}"))
        logger.info("%s held an earlier run; it was moved to %s (--resume_checkpoint auto goes on with a run)", run_dir, aside)
    for folder in (run_dir / "logs", checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    ckpt.remove_leftovers(checkpoints)
    if goes_on and found.exists():
        ckpt.set_aside_later(found, step)
    data.train.preprocessor.statistics.save(run_dir / RUN_STATISTICS)
    # Its own copy: the file it came from may be computed anew.
    own = config.data.model_copy(update={"normalization_stats_path": config.run_location(RUN_STATISTICS)})
    atomic_write(run_dir / RUN_CONFIG, config.model_copy(update={"data": own}).to_yaml())
    _record_start(run_dir, describe_start(data, distributed, step))
    handler = logging.FileHandler(run_dir / "logs" / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return lock


def _lock(run_dir: Path) -> BaseFileLock:
    """Beside the run's folder, which may be moved."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.with_name(f".{run_dir.name}.lock")
    lock = lock_file(path, REPLACED_SECONDS if launcher_id() is not None else 0.0)
    if lock is None:
        raise ConfigError(
            f"training.experiment_name: {run_dir} is being trained by another process; wait for it, or give another name"
        )
    return lock


def end_run(lock: BaseFileLock) -> None:
    """Let others train under this name."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def describe_start(data: Data, distributed: Distributed, step: int) -> dict[str, Any]:
    """What this start of a run depends on, as plain data."""
    device, index = distributed.device, data.train.index
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": distributed.world_size,
        "launcher": launcher_id(),
        "threads": torch.get_num_threads(),
        "packages": installed_packages(),
        "git": git_state(Path(paligemma_vla.__file__).parent),
        "data": {
            "fingerprint": data.fingerprint,
            "files": len(index.paths),
            "episodes": len(index),
            "excluded_episodes": index.excluded,
            "steps": index.steps,
        },
    }


@cache
def installed_packages() -> dict[str, str]:
    """Versions by name, read once: a third of the time that a tiny run takes."""
    return dict(sorted((found.name, found.version) for found in distributions()))


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the code in `folder`, and its uncommitted changes as a patch; None when it is not under git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=60).stdout

    try:
        patch = git("diff", "HEAD", "--binary", "--", ".")
        return {"commit": git("rev-parse", "HEAD").strip(), "changed": bool(patch), "patch": patch}
    except (OSError, subprocess.SubprocessError):
        return None


def _record_start(run_dir: Path, start: dict[str, Any]) -> None:
    """Append to environment.json; the patch lies beside it, readable."""
    if start["git"] is not None and (patch := start["git"].pop("patch")):
        atomic_write(run_dir / PATCH, patch.encode(errors="replace"))
    starts = read_starts(run_dir) if start["step"] else []
    atomic_write(run_dir / RUN_ENVIRONMENT, json.dumps({"starts": [*starts, start]}, indent=2) + "\n")


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where the record is missing or cannot be read."""
    try:
        starts = json.loads((run_dir / RUN_ENVIRONMENT).read_bytes())["starts"]
        return [start for start in starts if start["data"]["fingerprint"]]
    except FileNotFoundError:
        return []
    except Exception as error:  # of any kind: it is a record beside the run, and can hold anything
        logger.warning("%s: cannot be read (%s); it begins anew", run_dir / RUN_ENVIRONMENT, first_line(error))
        return []


def warn_of_other_data(config_path: Path, data: Data) -> None:
    """When the configuration is that of a run folder: say so if the data are not those of that run."""
    starts = read_starts(config_path.parent) if config_path.name == RUN_CONFIG else []
    if starts and starts[0]["data"]["fingerprint"] != data.fingerprint:
        logger.warning("%s is of a run on other episodes than there are now: this run will not repeat it", config_path)


def keep_start(config: VLAConfig, saved: Mapping[str, Any], where: str) -> VLAConfig:
    """The configuration of a resume, with `init_from` as in the checkpoint, which has the weights of the run itself."""
    if config.training.init_from is not None:
        logger.info("%s has the weights of this run: training.init_from (%s) is not read", where, config.training.init_from)
    recorded = saved["config"]["training"]  # older checkpoints do not know the keys
    own = {"init_from": recorded.get("init_from"), "init_statistics": recorded.get("init_statistics", "kept")}
    return config.model_copy(update={"training": config.training.model_copy(update=own)})


def check_same_run(saved: Mapping[str, Any], config: VLAConfig, fingerprint: Mapping[str, str | None], where: str) -> None:
    """Raise `CheckpointError` with every difference that would make a resume silently another run."""
    old = config_from_dict(saved["config"], where=f"{where}: config")
    before, now = _settings(old, saved["data"]), _settings(config, fingerprint)
    if _is_other_backbone(saved, old.model.vlm_config, config.model.vlm_config):
        names = (each.model.vlm_config.model_name_or_path for each in (old, config))
        before["model.vlm_config.model_name_or_path"], now["model.vlm_config.model_name_or_path"] = names
    kept = old.training.init_from is not None and old.training.init_statistics == "kept"  # no file was read
    if not kept and _are_other_statistics(saved, config):
        before["data.normalization_stats_path"] = "the statistics"
        now["data.normalization_stats_path"] = f"other statistics ({config.data.normalization_stats_path})"
    differences = [
        f"{key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differences:
        remedy = (
            f"{where}: this would be another run; take back what differs (the checkpoint's own configuration is config.yaml of "
            f"its run), start a run of its own (--init_from begins it with these weights), or go on all the same with --force"
        )
        raise CheckpointError("\n  ".join([remedy, *differences]))


def _settings(config: VLAConfig, fingerprint: Mapping[str, str | None]) -> dict[str, Any]:
    """What a resume may not change: dotted keys, with the way of reading that null stands for, and the data itself."""
    settings = _flatten(config.model_dump(mode="json"))
    settings["data.reading"] = "streamed" if config.data.streamed else "random"
    if not config.data.streamed:
        del settings["data.stream_block_mb"], settings["data.stream_window"]
    episodes = {f"data.{name}_parquet_files": fingerprint[key] for name, key in (("train", "training"), ("val", "validation"))}
    order = {"data.train_parquet_files (the order in which weighted sources are streamed)": fingerprint.get("order")}
    return {key: value for key, value in settings.items() if key not in NOT_COMPARED} | episodes | order


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as {dotted key: value}. A list (of stages, of weighted sources) is one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_other_backbone(saved: Mapping[str, Any], before: VLMConfig, now: VLMConfig) -> bool:
    """Whether another backbone is named. Its weights come out of the checkpoint, so one that has only moved is the same."""
    if now.model_name_or_path == before.model_name_or_path:
        return False
    from paligemma_vla.model.architectures import read_architecture, tower_sizes  # heavy, and needed for this alone

    try:
        return tower_sizes(read_architecture(now)) != tower_sizes(saved["backbone"])
    except ModelError:
        return True


def _are_other_statistics(saved: Mapping[str, Any], config: VLAConfig) -> bool:
    """The checkpoint's own are used in any case: a file that is gone, or cannot be read, contradicts nothing."""
    try:
        now = DatasetStatistics.load(config.data.normalization_stats_path).to_dict()
    except DataError:
        return False
    return any(now[name] != saved["preprocessor"]["statistics"][name] for name in ("state", "action"))


class RemoteRun:
    """A run behind a URL: training writes the folder `local`, the working copy, which is published there after each save.

    What lies behind the URL is what counts: a start takes over from there. Of the checkpoints only those that are linked stay
    on this machine. Every method raises `StorageError` when the URL cannot be reached.
    """

    def __init__(self, local: Path, url: str) -> None:
        self.local, self.url = local, url.rstrip("/")
        self.system, self.root = retry(self.url, lambda: file_system(self.url))
        self._published: dict[str, tuple[int, int]] = {}
        self._steps: dict[str, float] = {}

    def newest_checkpoint(self) -> Path | None:
        """Fetch the newest checkpoint that verifies; what is passed over is logged."""
        names = ckpt.newest_first(self._numbered(self._names()), self._read_step)
        return ckpt.first_valid(map(self.fetch_checkpoint, names))

    def fetch_checkpoint(self, name: str) -> Path:
        """Copy a checkpoint, and its digest where it has one, to this machine."""
        digest = f"{CHECKPOINTS}/{name}{ckpt.DIGEST}"
        if digest in self._names():
            self._fetch(digest)
        return self._fetch(f"{CHECKPOINTS}/{name}")

    def take_over(self, resumed: str, step: int) -> None:
        """Go on with the run from the checkpoint `resumed`: fetch its records, and the best; move later checkpoints aside."""
        for path in (self.local / CHECKPOINTS).glob("*"):
            if not path.name.startswith(resumed):
                ckpt.remove(path)
        names, best = self._names(), f"{CHECKPOINTS}/{ckpt.BEST}"
        checkpoints = [*self._numbered(names), *([ckpt.BEST] if best in names else [])]
        later = {f"{CHECKPOINTS}/{name}" for name in checkpoints if step < self._read_step(name) < float("inf")}
        aside = f"{CHECKPOINTS}/after_step_{step}.{ckpt.time_stamp()}"
        for name in names:
            if name.removesuffix(ckpt.DIGEST) in later:
                self._write(self.system.mv, f"{self.root}/{name}", f"{self.root}/{aside}/{Path(name).name}")
            elif name == best or not name.startswith(f"{CHECKPOINTS}/"):
                self._fetch(name)
        if later:
            logger.info("the run goes on from step %d: its later checkpoints were moved to %s/%s", step, self.url, aside)

    def move_aside(self) -> None:
        """Make room for a run that starts."""
        shutil.rmtree(self.local, ignore_errors=True)
        aside = f"{self.root}.{ckpt.time_stamp()}"
        if names := self._names():
            for name in names:
                self._write(self.system.mv, f"{self.root}/{name}", f"{aside}/{name}")
            logger.info("%s held an earlier run; it was moved to %s", self.url, aside)

    def publish(self, keep_last: int | None) -> None:
        """Copy what has changed, then remove the checkpoints that are not to be kept: the new ones are there by then."""
        files = [path for path in self.local.rglob("*") if path.is_file() and not path.name.startswith(".")]
        # Links last: what they point at is there first.
        for path in sorted(files, key=lambda path: (path.is_symlink(), path)):
            name = path.relative_to(self.local).as_posix()
            if self._published.get(name) != _stamp(path):
                self._copy(path, name)
                self._published[name] = _stamp(path)
                self._steps.pop(path.name, None)
        names = self._names()
        linked = ckpt.linked_checkpoints(self.local / CHECKPOINTS)
        for name in ckpt.superfluous(self._numbered(names), self._read_step, linked, keep_last):
            for file in (f"{CHECKPOINTS}/{name}", f"{CHECKPOINTS}/{name}{ckpt.DIGEST}"):
                if file in names:
                    retry(self.url, partial(self.system.rm_file, f"{self.root}/{file}"))

    def _copy(self, path: Path, name: str) -> None:
        if path.is_symlink():  # a store has no links: a copy there, not a second transfer
            self._write(self.system.cp_file, f"{self.root}/{CHECKPOINTS}/{path.resolve().name}", f"{self.root}/{name}")
        else:
            self._write(self.system.put_file, str(path), f"{self.root}/{name}")

    def _write(self, action: Callable[[str, str], Any], source: str, target: str) -> None:
        """Copy or move a file; on disks, unlike in stores, the folder of `target` has to be there."""
        retry(self.url, lambda: self.system.makedirs(target.rpartition("/")[0], exist_ok=True), target)
        retry(self.url, lambda: action(source, target), target)

    def _names(self) -> list[str]:
        """Names of all files there, relative to the run's folder."""
        self.system.invalidate_cache()
        return list_files(self.url)

    def _numbered(self, names: list[str]) -> list[str]:
        """The checkpoints among the files there, by their names alone."""
        return ckpt.numbered(name.removeprefix(f"{CHECKPOINTS}/") for name in names)

    def _read_step(self, name: str) -> float:
        if name not in self._steps:
            self._steps[name] = ckpt.read_step(f"{self.url}/{CHECKPOINTS}/{name}")
        return self._steps[name]

    def _fetch(self, name: str) -> Path:
        path = fetch(f"{self.url}/{name}", self.local / name)
        self._published[name] = _stamp(path)
        return path


def _stamp(path: Path) -> tuple[int, int]:
    """Changes with a file's content. That of a link changes with its target."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
