"""The one training loop, for one process or many.

A step: take this process's micro-batches, count the valid label elements of the global batch, and for each micro-batch
forward, sum of squared errors / that count, backward; then clip, AdamW step, scheduler step, moving average (S4.3, D7).
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import operator
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paligemma_vla import keep_freed_memory, versions
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.loader import Batch, load_batches, start_forkserver
from paligemma_vla.data.order import RunSampler
from paligemma_vla.errors import OPEN_FILES_REMEDY, CheckpointError, StorageError, TrainingError, first_line
from paligemma_vla.model.action_head.base import FlowOutput
from paligemma_vla.model.memory_plan import with_remedies
from paligemma_vla.model.vla_model import VLAModel, arguments_from_batch
from paligemma_vla.preprocess import Preprocessor
from paligemma_vla.progress import progress_bar
from paligemma_vla.schema import chunk_coverage
from paligemma_vla.training import checkpoint as ckpt
from paligemma_vla.training.distributed import Distributed, with_new_group
from paligemma_vla.training.interrupt import StopRequest
from paligemma_vla.training.metrics import LossMonitor, Meter, Step, Tracker
from paligemma_vla.training.optim import ExponentialMovingAverage, build_optimizer, build_scheduler
from paligemma_vla.training.parallel import build_mesh, full_tensor, parallelize
from paligemma_vla.training.preflight import prepare
from paligemma_vla.training.run import RemoteRun, check_same_run, keep_start
from paligemma_vla.training.sharded import ShardedWriter, gather_tensors, read_shards, restore_model, restore_optimizer
from paligemma_vla.training.validation import to_device, validate

logger = logging.getLogger(__name__)
STALE_VALIDATIONS = 5


class Trainer:
    """Train one configuration as one process of `distributed`.

    resume: a checkpoint to go on from, exactly (D3). verified: its digest has been checked already. force: also resume a run
    with other data, batch size, rates, ... remote: where the run's folder is published after each save.
    Raises `VLAError`s for what the user must change, before any weight of the backbone is loaded.
    """

    def __init__(
        self,
        config: VLAConfig,
        distributed: Distributed,
        resume: str | Path | None = None,
        force: bool = False,
        verified: bool = False,
        remote: RemoteRun | None = None,
    ) -> None:
        self.config, self.distributed, self.remote = config, distributed, remote
        if distributed.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.training.seed)
        saved = None if resume is None else ckpt.open_to_resume(resume, distributed, verified)
        preprocessor = Preprocessor.from_dict(saved["preprocessor"], str(resume)) if saved else None
        backbone, source = saved["backbone"] if saved else None, None
        if saved is not None:
            self.config = config = keep_start(config, saved, str(resume))
        elif config.training.init_from is not None:
            from paligemma_vla.training.init_from import SourcePolicy  # with the modules of a policy

            source = distributed.on_all(partial(SourcePolicy, config, config.training.init_from))
            backbone = source.trained.backbone if source else None
        if config.data.num_workers:  # what workers need is imported while this process indexes data and loads the model
            start_forkserver()
        self.preprocessor, self.data, self.plan = prepare(config, distributed, preprocessor, backbone, source)
        if distributed.main and self.plan.fits:
            logger.info("%s", self.plan.table())
        elif distributed.main:
            logger.warning("%s", with_remedies(self.plan).table())
        if saved is not None and not force:
            check_same_run(saved, config, self.data.fingerprint, str(resume))

        mesh = build_mesh(config.training, distributed)
        one_at_a_time = distributed.any(self.plan.one_at_a_time)

        self.begins_with: str | None = None

        def build() -> None:
            with distributed.one_at_a_time() if one_at_a_time else contextlib.nullcontext():
                self.model = VLAModel(config, self.preprocessor.prompts, self.preprocessor.image, backbone)
                if source is not None:
                    layout = self.data.train.index.layout
                    changed = source.load_into(self.model, distributed.device, layout)
                    self.begins_with = source.describe(changed, self.preprocessor, layout)
                with self._explained():
                    self.parallel = parallelize(self.model, distributed, config.training, mesh)

        distributed.on_all(build)
        self.step, steps_per_epoch = 0, self.data.order.steps_per_epoch
        self.total_steps = min(config.training.epochs * steps_per_epoch, config.training.max_steps or sys.maxsize)
        self.stages = self._stages()
        vlm_start = next((first for first, train in self.stages if train == "all"), 0)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scheduler = build_scheduler(self.optimizer, config.lr_scheduler, self.total_steps, steps_per_epoch, vlm_start)
        decay = config.training.ema_decay
        self.ema = ExponentialMovingAverage(self.model, decay) if decay else None
        self.monitor = LossMonitor(config, self.data, distributed)
        self.best_metric, self.stale = float("inf"), 0
        self.writers = with_new_group(distributed)
        self.sharded = ShardedWriter(self.writers) if config.training.saves_shards else None
        self.saved_step: int | None = None
        if saved is not None:
            self._restore(saved, str(resume))
        self.learning: str | None = None
        self.tracker: Tracker | None = None

    def _stages(self) -> list[tuple[int, str]]:
        """(first step, what learns) of each stage."""
        stages: list[tuple[int, str]] = []
        first = 0
        for stage in self.config.training.stages:
            stages.append((first, stage.train))
            first += stage.steps or 0
        if self.distributed.main and stages and stages[-1][0] >= self.total_steps:
            logger.warning(
                f"training.stages: the last stage would begin after step {stages[-1][0]}, but the run ends with step "
                f"{self.total_steps}; shorten the stages before it, or raise training.epochs or max_steps"
            )
        return stages or [(0, "all")]

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.data.order.steps_per_epoch

    def run(self) -> None:
        """Train to the end, or to where the configuration says to stop.

        After Ctrl-C or SIGTERM the step is finished and saved, the command to go on is logged, and the signal delivered. A
        step that has not begun, since its samples are not there yet, is not waited for.
        """
        settings, order = self.config.training, self.data.order
        stop = min(
            self.total_steps,
            settings.stop_after_step or self.total_steps,
            (settings.stop_after_epoch or settings.epochs) * order.steps_per_epoch,
        )
        if self.distributed.main:
            self.tracker = Tracker(self.config, self.step)
            self._describe(stop)
        stream = self._stream(stop)
        bar = progress_bar(stop, "training", "step", initial=self.step, hidden=not self.distributed.main)
        meter = Meter(self.config.data.batch_size)
        with StopRequest(self.distributed) as request, bar, self._explained():
            while self.step < stop:
                began = time.perf_counter()
                micro = request.interruptible(lambda: list(islice(stream, settings.gradient_accumulation_steps)))
                meter.add(time.perf_counter() - began)
                if request.anywhere() or micro is None:
                    break
                self._enter_stage()
                taken = self._train_step(micro)
                self.step += 1
                self.monitor.update(self.step, taken)
                epoch_ended = self.step % order.steps_per_epoch == 0
                due = self.step % settings.validate_every_n_steps == 0 if settings.validate_every_n_steps else epoch_ended
                if self.step % settings.log_interval == 0 or self.step == self.total_steps:
                    self._log_step(taken, meter, bar)
                bar.update()
                improved = False
                # No validation at an early stop: it must leave no trace that the uninterrupted run would not have.
                if due or self.step == self.total_steps:
                    validation = self.validate()
                    self._log_validation(validation)
                    improved = self._improved(validation)
                    meter.restart()
                numbered = epoch_ended and self.epoch % settings.save_every_n_epochs == 0
                periodic = settings.save_every_n_steps and self.step % settings.save_every_n_steps == 0
                if numbered or periodic or improved or self.step == stop:
                    self._save(improved, last=self.step == stop)
                    meter.restart()
            if 0 < self.step < stop and self.saved_step != self.step:
                self._save(improved=False, last=True)
            self._finish_saving(last=True)
        if self.tracker is not None:
            self.tracker.close()
        # A DDP module that destroys the process group deadlocks: it holds Python's lock, which the group's thread needs.
        self.parallel.release()
        gc.collect()
        if self.step < stop:
            self._log_how_to_go_on(request.name)
            request.deliver()

    def _log_how_to_go_on(self, reason: str) -> None:
        if not self.distributed.main:
            return
        saved, config = (self.config.run_location(name) for name in (f"checkpoints/{self._checkpoint_name()}", "config.yaml"))
        command, how = "paligemma-vla train", ""
        if self.distributed.world_size > 1:
            command, how = "python main_train_ddp.py", " (and the same processes)"
        logger.warning(
            f"stopped by {reason} after step {self.step} of {self.total_steps}; saved as {saved}; go on with\n"
            f"  {command} --config_path {shlex.quote(config)} --resume_checkpoint auto{how}"
            if self.step
            else f"stopped by {reason} before the first step; nothing was saved"
        )

    def _stream(self, stop: int) -> Iterator[Batch]:
        """This process's micro-batches from the current step on."""
        rank, world_size = self.distributed.rank, self.distributed.world_size
        accumulation = self.config.training.gradient_accumulation_steps
        sampler = RunSampler(self.data.order, self.step, stop, rank, world_size, accumulation)
        return load_batches(self.data.train, sampler, self.config, self.distributed.device.type == "cuda")

    def _enter_stage(self) -> None:
        """At the first step, and at the first of each stage, choose what learns."""
        train = next(train for first, train in reversed(self.stages) if first <= self.step)
        if train == self.learning:
            return
        self.learning = train
        self.parallel.enter_stage(train)
        if self.distributed.main and self.config.training.stages:
            logger.info("step %d: training %s", self.step, "the head alone" if train == "head" else "backbone and head")

    def _train_step(self, micro: list[Batch]) -> Step:
        """One optimiser step; weights and moving average stay as they are where loss or gradient is not finite."""
        world, device = self.distributed.world_size, self.distributed.device
        rate = self.optimizer.param_groups[0]["lr"]
        draws = self.config.model.action_head_config.num_flow_samples
        count = torch.stack([batch["action_mask"].sum() for batch in micro]).sum().to(device, torch.float32) * draws
        self.distributed.all_reduce(count)
        self.parallel.module.train()
        self.parallel.warm_up(lambda: self._forward(micro[0]).loss_sum)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        parts = []
        for number, batch in enumerate(micro):
            with self.parallel.accumulating() if number < len(micro) - 1 else contextlib.nullcontext():
                output = self._forward(batch)
                # Gradients are averaged over processes: times world, they are summed, over the global count.
                (output.loss_sum * (world / count)).backward()
            total += output.loss_sum.detach()
            parts.append((batch, output))
        norm = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.grad_clip_norm))
        loss = self.distributed.all_reduce(total) / count
        taken = Step(loss.item(), norm.item(), rate, parts)
        if taken.finite:
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.model)
        with warnings.catch_warnings():
            # The schedule follows the position in the run, also after a skipped step of the optimiser.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        return taken

    def _forward(self, batch: Batch) -> FlowOutput:
        output: FlowOutput = self.parallel.module(**arguments_from_batch(to_device(batch, self.distributed.device)))
        return output

    def validate(self) -> dict[str, Any]:
        """Validation metrics, of the averaged weights where there are any; empty without a validation set."""
        if self.data.validation is None:
            return {}
        with self.ema.applied(self.model) if self.ema is not None else contextlib.nullcontext():
            metrics = validate(self.model, self.data.validation, self.config, self.distributed)
            self.parallel.reshard()
        return metrics

    def _improved(self, validation: dict[str, Any]) -> bool:
        metric = validation.get(self.config.training.best_metric)
        if metric is None or not metric < self.best_metric:  # NaN is no improvement
            self.stale += 1
            if metric is not None and self.stale == STALE_VALIDATIONS:
                logger.warning(
                    f"{self.config.training.best_metric} has not fallen in {self.stale} validations; validation runs the "
                    f"training objective on fixed noise, so this is the model: lower optimizer.lr, add data or augmentation, "
                    f"or stop here (docs/troubleshooting.md)"
                )
            return False
        self.best_metric, self.stale = float(metric), 0
        return True

    def _save(self, improved: bool, last: bool) -> None:
        """Write this step's checkpoint, once; the links `last` and, if `improved`, `model_best` point at it.

        last: no later save will follow. See `_tolerate_failure` for one that fails.
        """
        if self.monitor.in_a_row > 1 and not improved:
            # The weights may be useless: older checkpoints must not be pruned for them.
            if last:
                raise self.monitor.diverged(self.step)
            return
        self.monitor.check_weights(self.step, self.model)
        path = self.config.run_dir / "checkpoints" / self._checkpoint_name()
        complete = partial(self._complete, path, improved)
        self._finish_saving(last=False)
        with self._tolerate_failure(last):
            if self.sharded is not None:
                self.sharded.save(path, self._payload(), complete)
            else:
                payload = gather_tensors(self._payload(), keep=self.distributed.main)
                self.distributed.on_main(partial(ckpt.save_checkpoint, path, payload))
                self.distributed.on_main(complete)
        self.saved_step = self.step

    def _finish_saving(self, last: bool) -> None:
        """Wait for the sharded checkpoint that is being written."""
        if self.sharded is not None:
            with self._tolerate_failure(last):
                self.sharded.wait()

    @contextlib.contextmanager
    def _tolerate_failure(self, last: bool) -> Iterator[None]:
        """A checkpoint that cannot be written ends the run only if it is the last, or the configuration says so."""
        try:
            yield
        except (CheckpointError, StorageError) as error:
            if last or self.config.training.stop_when_save_fails:
                raise
            if self.distributed.main:
                logger.error("%s; training goes on (training.stop_when_save_fails)", error)

    def _checkpoint_name(self) -> str:
        at_epoch = self.step % self.data.order.steps_per_epoch == 0
        name = f"checkpoint_epoch_{self.epoch}" if at_epoch else f"checkpoint_step_{self.step}"
        return name + (ckpt.SUFFIX if self.sharded is None else ckpt.SHARDS_SUFFIX)

    def _complete(self, path: Path, improved: bool) -> None:
        """On rank 0, when a checkpoint is complete: set the links, publish, prune."""
        ckpt.link_checkpoint(path, ckpt.LAST)
        if improved or self.data.validation is None or not ckpt.linked_checkpoints(path.parent, [ckpt.BEST]):
            ckpt.link_checkpoint(path, ckpt.BEST)
        keep_last = self.config.training.keep_last
        if self.remote is not None:
            self.remote.publish(keep_last)
            keep_last = 1
        ckpt.prune_checkpoints(path.parent, keep_last)

    def _payload(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_metric": float(self.best_metric),
            "lr_scheduler": self.scheduler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "rng": {"torch": torch.get_rng_state()},
            "threads": torch.get_num_threads(),
            "stale": self.stale,
            "watch": self.monitor.state_dict(),
            "data": self.data.fingerprint,
            "config": self.config.model_dump(mode="json"),
            "preprocessor": self.preprocessor.to_dict(),
            "backbone": json.loads(json.dumps(self.model.paligemma_vlm.backbone_dict(), default=str)),
            "metadata": self.data.train.index.layout.metadata.to_json(),
            "versions": versions(),
        }

    def _restore(self, saved: dict[str, Any], where: str) -> None:
        """Restore everything from a checkpoint; raise `CheckpointError` for one of another model."""
        settings = [dict(group) for group in self.optimizer.param_groups]
        saved = read_shards(Path(where), saved, self.model, self.optimizer, self.writers.group)
        try:
            restore_model(self.model, saved["state_dict"])
            restore_optimizer(self.optimizer, saved["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{where}: does not fit this model ({first_line(error)})") from error
        # The configuration of now counts: a longer run has another schedule, a forced resume other rates.
        self.scheduler.load_state_dict({**saved["lr_scheduler"], "base_lrs": self.scheduler.base_lrs})
        for group, own, factor in zip(self.optimizer.param_groups, settings, self.scheduler.lr_lambdas, strict=True):
            group.update(own, lr=own["initial_lr"] * factor(self.scheduler.last_epoch))
        if self.ema is not None:
            # A forced resume may begin to average: then from the restored weights.
            self.ema = ExponentialMovingAverage(self.model, self.ema.decay)
            if saved["ema"] is not None:
                self.ema.load_state_dict(saved["ema"])
        torch.set_rng_state(saved["rng"]["torch"].cpu())
        self.monitor.load_state_dict(saved["watch"])
        self.step, self.stale = operator.index(saved["step"]), operator.index(saved["stale"])
        self.best_metric = float(saved["best_metric"])
        self.saved_step = self.step
        logger.info("resumed %s: step %d, %d epochs completed", where, self.step, self.epoch)
        threads = torch.get_num_threads()
        if saved.get("threads", threads) != threads:
            logger.warning(
                f"{where} was written by a process of {saved['threads']} threads, this one has {threads}: sums are rounded "
                f"differently, so the run goes on but not bit for bit; OMP_NUM_THREADS={saved['threads']} keeps the number"
            )

    def _describe(self, stop: int) -> None:
        """Log what is trained on what, and for how long."""
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        learning = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"]) / 1e6
        train, order = self.data.train.index, self.data.order
        validation = 0 if self.data.validation is None else len(self.data.validation.index)
        logger.info(
            f"{self.config.training.experiment_name}: {parameters:.1f} M parameters, {learning:.1f} M learn; {len(train)} "
            f"training episodes ({train.steps} steps), {validation} validation episodes"
        )
        horizon = self.config.model.action_head_config.horizon
        if coverage := chunk_coverage(horizon, self.data.train.index.layout.metadata.control_hz):
            logger.info("%s", coverage)
        if self.begins_with is not None:
            logger.info("it begins with %s", self.begins_with)
        logger.info(
            f"optimiser steps {self.step} to {stop} of {self.total_steps}, {order.steps_per_epoch} per epoch, total batch "
            f"{order.batch_size} on {self.distributed.world_size} process(es), {self.distributed.device}"
            + ("; nothing is left to train: raise training.epochs or max_steps to go on" if self.step >= stop else "")
        )

    def _log_step(self, taken: Step, meter: Meter, bar: Any) -> None:
        if self.tracker is None:
            return
        metrics = {
            "epoch": self.step / self.data.order.steps_per_epoch,
            "train/lr": taken.rate,
            "train/skipped_steps": self.monitor.skipped,
            **meter.read(),
        }
        if taken.finite:
            metrics |= {"train/batch_loss": taken.loss, "train/grad_norm": taken.norm}
        self.tracker.log(self.step, metrics)
        bar.set_postfix(loss=f"{taken.loss:.4f}", samples_s=f"{metrics['train/samples_per_s']:.0f}", refresh=False)

    def _log_validation(self, metrics: dict[str, Any]) -> None:
        if self.tracker is not None and metrics:
            self.tracker.log(self.step, {"epoch": self.step / self.data.order.steps_per_epoch, **metrics})
            shown = "  ".join(f"{name} {value:.5f}" for name, value in metrics.items() if isinstance(value, float))
            logger.info("step %d: %s", self.step, shown)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise failures that users meet (S10.2) with their remedy."""
        try:
            yield
        except (MemoryError, RuntimeError, ConnectionError, EOFError) as error:
            reason = first_line(error)
            if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker" in reason:
                raise TrainingError(
                    f"a loader process ended at step {self.step} ({reason}), as one does that the system stops for lack of "
                    f"memory: lower data.num_workers or data.cache_mb; --resume_checkpoint auto goes on"
                ) from error
            if "Too many open files" in reason:
                raise TrainingError(f"too many open files at step {self.step}; {OPEN_FILES_REMEDY}") from error
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
                raise TrainingError(
                    f"out of memory at step {self.step} with data.batch_size {self.config.data.batch_size}; reduce it, or take "
                    f"one of the changes below (docs/troubleshooting.md); what was planned:\n{with_remedies(self.plan).table()}"
                ) from error
            raise
