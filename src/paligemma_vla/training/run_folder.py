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
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

import paligemma_vla
from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import first_line
from paligemma_vla.training.checkpoint import remove_leftovers
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.mirror import Mirror
from paligemma_vla.training.preflight import Data

logger = logging.getLogger(__name__)
CONFIG, STATISTICS, ENVIRONMENT, PATCH = "config.yaml", "normalization_stats.json", "environment.json", "code.patch"


def begin_run(config: VLAConfig, data: Data, distributed: Distributed, step: int, mirror: Mirror | None = None) -> None:
    """Prepare `config.run_dir` for a run that starts at `step`; above 0 it goes on with what is there.

    An earlier run of the same name is moved aside, never overwritten.
    """
    run_dir = config.run_dir
    if mirror is not None:
        mirror.begin(resuming=step > 0)
    if step == 0 and (run_dir / "checkpoints").exists():
        _move_aside(run_dir)
    for name in ("logs", "checkpoints"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir / "checkpoints")
    statistics = run_dir / STATISTICS
    data.train.preprocessor.statistics.save(statistics)
    # Its own copy: the file it came from may be computed anew.
    own = config.data.model_copy(update={"normalization_stats_path": config.run_place(STATISTICS)})
    _write(run_dir / CONFIG, config.model_copy(update={"data": own}).to_yaml())
    _record_start(run_dir, describe_start(data, distributed, step))
    handler = logging.FileHandler(run_dir / "logs" / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)


def _move_aside(run_dir: Path) -> None:
    stamp = f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    later = (f"{stamp}-{number}" for number in itertools.count(2))
    aside = next(run_dir.with_name(name) for name in itertools.chain([stamp], later) if not run_dir.with_name(name).exists())
    saved = any((run_dir / "checkpoints").glob("checkpoint_*.pth.tar"))
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
            _write(run_dir / PATCH, patch)
    starts = read_starts(run_dir) if start["step"] else []
    _write(run_dir / ENVIRONMENT, json.dumps({"starts": [*starts, start]}, indent=2) + "\n")


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where the record is missing or cannot be read."""
    try:
        return list(json.loads((run_dir / ENVIRONMENT).read_text(encoding="utf-8"))["starts"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: cannot be read (%s); it begins anew", run_dir / ENVIRONMENT, first_line(error))
        return []


def warn_of_other_data(config_path: Path, data: Data) -> None:
    """When the configuration is that of a run folder: say so if the data are not those of that run."""
    starts = read_starts(config_path.parent) if config_path.name == CONFIG else []
    if starts and starts[0]["data"]["fingerprint"] != data.fingerprint:
        logger.warning("%s is of a run on other episodes than there are now: this run will not repeat it", config_path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
