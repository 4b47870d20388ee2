"""Train a policy: the command behind main_train.py, main_train_ddp.py and `paligemma-vla train`."""

from __future__ import annotations

import argparse
import logging
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import BaseFileLock

from paligemma_vla.cli.arguments import add_config_arguments, configured, natural, positive
from paligemma_vla.config import VLAConfig, own_statistics
from paligemma_vla.errors import CheckpointError, VLAError
from paligemma_vla.storage import is_url

if TYPE_CHECKING:
    from paligemma_vla.training.distributed import Distributed
    from paligemma_vla.training.run import RemoteRun

logger = logging.getLogger(__name__)


# flag, config key, type, help
CONFIG_FLAGS = (
    ("--epochs", "training.epochs", int, None),
    ("--batch_size", "data.batch_size", int, "total, over all processes and accumulation"),
    ("--lr", "optimizer.lr", float, None),
    ("--experiment_name", "training.experiment_name", str, None),
    ("--train_data_override", "data.train_parquet_files", str, "file, folder, glob or URL of training episodes"),
    ("--val_data_override", "data.val_parquet_files", str, "file, folder, glob or URL of validation episodes"),
    ("--model_path_override", "model.vlm_config.model_name_or_path", str, "backbone: hub id or folder"),
    (
        "--init_from",
        "training.init_from",
        str,
        "new run from a policy's weights: checkpoint, exported folder, org/name on the hub",
    ),
    ("--wandb_project_name", "wandb.project", str, None),
    ("--wandb_entity", "wandb.entity", str, None),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    for flag, key, kind, text in CONFIG_FLAGS:
        parser.add_argument(flag, dest=key, type=kind, help=text, metavar=flag[2:].upper())
    parser.add_argument("--resume_checkpoint", help="path or URL of a checkpoint, or auto: the run's newest that verifies")
    force = "resume although data or settings differ from the checkpoint's; its optimiser stays (without it: --init_from)"
    parser.add_argument("--force", action="store_true", help=force)
    parser.add_argument("--use_wandb", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--nproc", type=positive, help="processes on this machine (default: 1; main_train_ddp.py: one per GPU)")
    parser.add_argument(
        "--max_restarts", type=natural, default=0, help="start all processes again when one has failed, so often"
    )


def resolve_config(args: argparse.Namespace) -> VLAConfig:
    """The configuration file with the flags applied; --set wins."""
    overrides = {key: value for _, key, _, _ in CONFIG_FLAGS if (value := getattr(args, key)) is not None}
    checkpoint = args.resume_checkpoint
    if checkpoint not in (None, "auto") and "training.experiment_name" not in overrides:
        location = checkpoint if is_url(checkpoint) else str(Path(checkpoint).absolute())
        runs, name, folder, _ = ["", "", "", *location.rsplit("/", 3)][-4:]
        if folder == "checkpoints":  # a run that is named by its checkpoint goes on in its own folder
            overrides |= {"training.experiment_name": name, "training.checkpoint_dir": runs}
    if args.use_wandb:
        overrides["wandb.enabled"] = True
    return configured(args, {"data.normalization_stats_path": own_statistics(args.config_path), **overrides})


def main(args: argparse.Namespace) -> int:
    """Start here, or in `--nproc` processes, or join the group torchrun started."""
    config = resolve_config(args)
    if "LOCAL_RANK" in os.environ or ((args.nproc or 1) == 1 and not args.max_restarts):
        return train(config, args.device, args.resume_checkpoint, args.force, Path(args.config_path))
    from paligemma_vla.training.distributed import launch

    launch(run_rank, partial(main, args), args.nproc or 1, args.max_restarts)
    return 0


def main_ddp(args: argparse.Namespace) -> int:
    """As `main`, one process per GPU unless --nproc says otherwise."""
    if args.nproc is None and "LOCAL_RANK" not in os.environ:
        import torch

        on_gpu = args.device in (None, "cuda")
        args.nproc = max(1, torch.cuda.device_count()) if on_gpu else 1
    return main(args)


def run_rank(job: Callable[[], int]) -> int:
    """What one process of a launch does. The launcher reports the error of the first rank that fails."""
    from paligemma_vla.cli.main import log_to_stderr

    log_to_stderr()
    try:
        return job()
    except VLAError as error:
        raise VLAError(str(error)) from error  # one class for every message that says what to do


def train(
    config: VLAConfig,
    device: str | None = None,
    resume_checkpoint: str | None = None,
    force: bool = False,
    config_path: Path | None = None,
) -> int:
    """Train in this process, alone or as one of a group: join, find the checkpoint, prepare, train, report.

    device: None takes the best there is. resume_checkpoint: a path or URL, or `auto`. force: resume in spite of differences.
    config_path: where the configuration was read, to warn if it repeats a run on other data.
    """
    from paligemma_vla.training.distributed import explain_communication, join

    distributed = join(device)  # what is wrong with it is told before the slow imports

    from paligemma_vla.evaluation.report import Report, write_report
    from paligemma_vla.training.checkpoint import consolidate_links
    from paligemma_vla.training.run import RemoteRun, begin_run, end_run, warn_of_other_data
    from paligemma_vla.training.trainer import Trainer

    if not distributed.main:
        logging.getLogger().setLevel(logging.WARNING)
    with explain_communication():
        remote = RemoteRun(config.run_dir, config.run_url) if config.run_url is not None else None
        checkpoint, verified = find_checkpoint(config, resume_checkpoint, remote, distributed)
        trainer = Trainer(config, distributed, checkpoint, force, verified, remote)

        def begin() -> BaseFileLock:  # not earlier: a run that cannot begin leaves no trace
            if config_path is not None:
                warn_of_other_data(config_path, trainer.data)
            return begin_run(trainer.config, trainer.data, distributed, trainer.step, checkpoint, remote)

        lock = distributed.on_main(begin)
        trainer.run()
        distributed.close()  # the rest is done by one process, and takes its time
    if lock is not None:
        if config.training.saves_shards:
            try:
                consolidate_links(config.run_dir / "checkpoints")  # the specification's files
            except CheckpointError as error:  # what was learned is safe in the shards
                logger.error("%s; `paligemma-vla consolidate` writes it later", error)
        title = f"Training: {config.training.experiment_name}"
        page = Report(title=title, run_dir=config.run_dir, dataset=trainer.data.train.index)
        report = write_report(config.run_dir / "report.html", page)
        if remote is not None:
            remote.publish(config.training.keep_last)
        locations = config.run_location("checkpoints"), config.run_location(report.name)
        logger.info("finished; checkpoints in %s, report: %s", *locations)
        end_run(lock)
    return 0


def find_checkpoint(
    config: VLAConfig, wanted: str | None, remote: RemoteRun | None, distributed: Distributed
) -> tuple[str | Path | None, bool]:
    """The checkpoint to go on from, the same on all processes, and whether it is verified; None starts afresh.

    wanted: None, a path or URL, or `auto`: the newest checkpoint of the run, if there is one. After a restart by the launcher
    that began the run it is always the newest.
    """
    from paligemma_vla.training.checkpoint import newest_checkpoint

    if wanted == "auto" or distributed.broadcast(partial(was_begun_by_this_launcher, config)):
        folder = config.run_dir / "checkpoints"
        found = distributed.broadcast(remote.newest_checkpoint) if remote else newest_checkpoint(folder, distributed)
        if found is not None:
            with distributed.one_at_a_time():
                if remote is not None and not found.exists():  # rank 0 has fetched it, on its machine
                    remote.fetch_checkpoint(found.name)
            if not found.exists():
                raise CheckpointError(
                    f"{found}: not there on {socket.gethostname()}; training.checkpoint_dir has to be a folder that all "
                    f"machines share, or a URL"
                )
            return found, True
        if wanted == "auto":
            if distributed.main:
                logger.info("no checkpoint to go on from in %s: the run starts afresh", config.run_location("checkpoints"))
            return None, True
    return wanted, False


def was_begun_by_this_launcher(config: VLAConfig) -> bool:
    """True if the launcher of this process began the run: then it has restarted its processes after a failure."""
    from paligemma_vla.training.distributed import launcher_id
    from paligemma_vla.training.run import read_starts

    launcher = launcher_id()
    return launcher is not None and [start.get("launcher") for start in read_starts(config.run_dir)][-1:] == [launcher]
