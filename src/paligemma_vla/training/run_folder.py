"""The folder of a run: what is needed to know, and to repeat elsewhere, how it was made.

config.yaml                 resolved, complete; `train --config_path` with it repeats the run
normalization_stats.json    the statistics it uses
environment.json            per start: versions, machine, git state, data, command
code.patch                  what the code differs in from its commit, when it does
metrics.jsonl, logs/, checkpoints/, report.html
"""

from __future__ import annotations

import itertools
import json
import logging
import platform
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock

import paligemma_vla
from paligemma_vla.config import RUN_CONFIG, RUN_ENVIRONMENT, RUN_STATISTICS, VLAConfig
from paligemma_vla.errors import ConfigError, first_line
from paligemma_vla.storage import atomic_write, lock_file
from paligemma_vla.training.checkpoint import newest_first, remove_leftovers, set_aside_later
from paligemma_vla.training.distributed import Distributed, launched, launcher_id
from paligemma_vla.training.mirror import Mirror
from paligemma_vla.training.preflight import Data

logger = logging.getLogger(__name__)
SUCCESSION_SECONDS = 20.0
PATCH, METRICS = "code.patch", "metrics.jsonl"


def begin_run(
    config: VLAConfig,
    data: Data,
    distributed: Distributed,
    step: int,
    resumed: str | Path | None = None,
    mirror: Mirror | None = None,
) -> BaseFileLock:
    """Prepare `config.run_dir` for a run that starts at `step`, from the checkpoint `resumed` if there is one.

    A run goes on in its own folder; another run of the same name is moved aside, never overwritten. Returns the lock that keeps
    others out until it is closed. Raises `ConfigError` when the run is being trained already.
    """
    run_dir = config.run_dir
    lock = _lock(run_dir)
    checkpoints = run_dir / "checkpoints"
    goes_on = resumed is not None and Path(resumed).resolve().parent == checkpoints.resolve()
    if mirror is not None:
        mirror.begin(resuming=step > 0)
    elif not goes_on and (checkpoints.exists() or (run_dir / METRICS).exists()):
        _move_aside(run_dir)
    for name in ("logs", "checkpoints"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    remove_leftovers(checkpoints)
    if resumed is not None:
        set_aside_later(checkpoints, Path(resumed), step)
    statistics = run_dir / RUN_STATISTICS
    data.train.preprocessor.statistics.save(statistics)
    # Its own copy: the file it came from may be computed anew.
    own = config.data.model_copy(update={"normalization_stats_path": config.run_location(RUN_STATISTICS)})
    atomic_write(run_dir / RUN_CONFIG, config.model_copy(update={"data": own}).to_yaml())
    _record_start(run_dir, describe_start(data, distributed, step))
    handler = logging.FileHandler(run_dir / "logs" / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return lock


def _lock(run_dir: Path) -> BaseFileLock:
    """Beside the run's folder, which may be moved."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.with_name(f".{run_dir.name}.lock")
    # A launcher may have started this process before the one in whose place it comes is quite gone, on another machine even.
    lock = lock_file(path, SUCCESSION_SECONDS if launched() else 0.0)
    if lock is None:
        raise ConfigError(
            f"training.experiment_name: {run_dir} is being trained by another process; wait for it, or give another name"
        )
    return lock


def end_run(lock: BaseFileLock) -> None:
    """Let others train under this name."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _move_aside(run_dir: Path) -> None:
    stamp = f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    later = (f"{stamp}-{number}" for number in itertools.count(2))
    aside = next(run_dir.with_name(name) for name in itertools.chain([stamp], later) if not run_dir.with_name(name).exists())
    saved = bool(newest_first(run_dir / "checkpoints"))
    run_dir.rename(aside)
    hint = " (--resume_checkpoint auto goes on with a run)" if saved else ", which holds no checkpoint"
    logger.info("%s held an earlier run; it was moved to %s%s", run_dir, aside, hint)


def describe_start(data: Data, distributed: Distributed, step: int) -> dict[str, Any]:
    """What this start of a run depends on, as plain data."""
    device = distributed.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    index = data.train.index
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": gpu or str(device),
        "processes": distributed.world_size,
        "launcher": launcher_id(),
        "threads": torch.get_num_threads(),
        "packages": dict(sorted((found.name, found.version) for found in distributions())),
        "git": git_state(Path(paligemma_vla.__file__).parent),
        "data": {
            "fingerprint": data.fingerprint,
            "files": len(index.paths),
            "episodes": len(index),
            "excluded_episodes": index.excluded,
            "steps": index.steps,
        },
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the code in `folder`, and its uncommitted changes as a patch; None when it is not under git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        patch = _git(folder, "diff", "HEAD", "--binary", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(patch), "patch": patch}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=60).stdout


def _record_start(run_dir: Path, start: dict[str, Any]) -> None:
    """Append to environment.json; the patch lies beside it, readable."""
    git = start["git"]
    if git is not None:
        patch = git.pop("patch")
        if git["changed"]:
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
