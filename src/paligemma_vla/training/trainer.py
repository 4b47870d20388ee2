"""The one training loop, for one process or many.

A step: take this process's micro-batches, count the valid label elements of the whole global batch, and for each micro-batch
forward, sum of squared errors / that count, backward; then clip, AdamW step, scheduler step, moving average (S4.3, D7).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from paligemma_vla import versions
from paligemma_vla.config import DataSource, VLAConfig, config_from_dict, source_paths
from paligemma_vla.data.episodes import EpisodeIndex
from paligemma_vla.data.loader import Batch, VLADataset, batches, build_loader, build_preprocessor
from paligemma_vla.data.sampling import RunSampler, SampleOrder
from paligemma_vla.errors import CheckpointError, ConfigError, TrainingError, first_line
from paligemma_vla.model.action_head.flow_matching import FlowOutput
from paligemma_vla.model.vla_model import VLAModel, arguments_from_batch
from paligemma_vla.preprocess import Preprocessor
from paligemma_vla.training import checkpoint as ckpt
from paligemma_vla.training.distributed import COMMUNICATION_REMEDY, Distributed
from paligemma_vla.training.optim import ExponentialMovingAverage, build_optimizer, build_scheduler
from paligemma_vla.training.tracking import Tracker
from paligemma_vla.training.validation import to_device, validate

logger = logging.getLogger(__name__)
STALE_VALIDATIONS = 5


@dataclass
class Data:
    """Training and validation sets, and the order of the run."""

    train: VLADataset
    validation: VLADataset | None
    order: SampleOrder


def load_data(config: VLAConfig, preprocessor: Preprocessor) -> Data:
    """Index the files, split off validation episodes, and lay out the order. Raises `DataError`."""
    settings = config.data
    files = settings.train_parquet_files
    sources = [files] if isinstance(files, str) else list(files)
    indices = [EpisodeIndex.build(source_paths([source]), "data.train_parquet_files") for source in sources]
    held_out: list[EpisodeIndex] = []
    if settings.val_parquet_files is not None:
        held_out = [EpisodeIndex.build(source_paths(settings.val_parquet_files), "data.val_parquet_files")]
    elif settings.val_fraction > 0:
        pairs = [index.split(settings.val_fraction, config.training.seed) for index in indices]
        indices, held_out = [train for train, _ in pairs], [validation for _, validation in pairs]
    weights = [s.weight if isinstance(s, DataSource) else 1.0 for s in sources]
    weighted = any(isinstance(s, DataSource) for s in sources)
    order = SampleOrder(
        [index.steps for index in indices], weights if weighted else None, settings.batch_size, config.training.seed
    )
    train = VLADataset(EpisodeIndex.concatenate(indices), preprocessor, config, training=True)
    validation = VLADataset(EpisodeIndex.concatenate(held_out), preprocessor, config) if held_out else None
    return Data(train, validation, order)


class Trainer:
    """Train one configuration in this process's place among `distributed`.

    resume: a checkpoint to go on from, exactly (D3). Raises `VLAError`s for what the user must mend.
    """

    def __init__(self, config: VLAConfig, distributed: Distributed, resume: Path | None = None) -> None:
        self.config, self.distributed = config, distributed
        torch.manual_seed(config.training.seed)
        saved = ckpt.load_checkpoint(resume) if resume is not None else None
        self.preprocessor = Preprocessor.from_dict(saved["preprocessor"], str(resume)) if saved else build_preprocessor(config)
        self.data = load_data(config, self.preprocessor)
        self._check_division()
        self.model = VLAModel(config, self.preprocessor.prompts, self.preprocessor.image, saved["backbone"] if saved else None)
        self.model.to(distributed.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.total_steps = self._total_steps()
        self.stages = self._stages()
        vlm_start = next((first for first, train in self.stages if train == "all"), 0)
        self.scheduler = build_scheduler(
            self.optimizer, config.lr_scheduler, self.total_steps, self.data.order.steps_per_epoch, vlm_start
        )
        decay = config.training.ema_decay
        self.ema = ExponentialMovingAverage(self.model, decay) if decay else None
        self.step, self.best_metric, self.stale = 0, float("inf"), 0
        if saved is not None:
            self._restore(saved, str(resume))
        self.parallel: nn.Module = self.model
        self.learning: str | None = None
        self.tracker: Tracker | None = None

    def _check_division(self) -> None:
        parts = self.distributed.world_size * self.config.training.gradient_accumulation_steps
        if self.config.data.batch_size % parts:
            raise ConfigError(
                f"data.batch_size: got {self.config.data.batch_size}, expected a multiple of processes * "
                f"gradient_accumulation_steps = {parts}; it is the total over all of them"
            )

    def _total_steps(self) -> int:
        training = self.config.training
        total = training.epochs * self.data.order.steps_per_epoch
        return total if training.max_steps is None else min(total, training.max_steps)

    def _stages(self) -> list[tuple[int, str]]:
        """(first step, what learns) of each stage."""
        stages: list[tuple[int, str]] = []
        first = 0
        for stage in self.config.training.stages:
            stages.append((first, stage.train))
            first += stage.steps or 0
        if self.distributed.main and stages and stages[-1][0] >= self.total_steps:
            logger.warning(
                "training.stages: the last stage would begin after step %d, but the run ends with step %d; shorten the stages "
                "before it, or raise training.epochs or max_steps",
                stages[-1][0],
                self.total_steps,
            )
        return stages or [(0, "all")]

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.data.order.steps_per_epoch

    def run(self) -> dict[str, Any]:
        """Train to the end, or to where the configuration says to stop. Returns the last validation's metrics."""
        settings, order = self.config.training, self.data.order
        stop = min(
            self.total_steps,
            settings.stop_after_step or self.total_steps,
            (settings.stop_after_epoch or settings.epochs) * order.steps_per_epoch,
        )
        if self.distributed.main:
            self.tracker = Tracker(self.config, self.step)
        self._describe(stop)
        validation: dict[str, Any] = {}
        stream = self._stream(stop)
        bar = tqdm(total=stop, initial=self.step, unit="step", disable=not self.distributed.main, dynamic_ncols=True)
        meter = _Meter(self.config.data.batch_size)
        with bar, self._explained():
            while self.step < stop:
                self._enter_stage()
                rate = self.optimizer.param_groups[0]["lr"]
                loss, norm, wait = self._train_step(stream)
                self.step += 1
                meter.add(wait)
                epoch_ended = self.step % order.steps_per_epoch == 0
                due = self.step % settings.validate_every_n_steps == 0 if settings.validate_every_n_steps else epoch_ended
                saving = due or epoch_ended or self.step == stop
                if saving or self.step % settings.log_interval == 0:
                    self._refuse_divergence(loss, norm, saving)
                if self.step % settings.log_interval == 0 or self.step == self.total_steps:
                    self._log_step({"loss": loss, "norm": norm, "rate": rate}, meter, bar)
                bar.update()
                improved = False
                # An early stop is no occasion to validate: it must leave no trace that the whole run would not have.
                if due or self.step == self.total_steps:
                    validation = self.validate()
                    self._log_validation(validation)
                    improved = self._improved(validation)
                    meter.restart()
                numbered = epoch_ended and self.epoch % settings.save_every_n_epochs == 0
                if numbered or improved or self.step == stop:
                    self._save(improved)
                    meter.restart()
        if self.tracker is not None:
            self.tracker.close()
        return validation

    def _stream(self, stop: int) -> Iterator[Batch]:
        sampler = RunSampler(
            self.data.order,
            self.step,
            stop,
            self.distributed.rank,
            self.distributed.world_size,
            self.config.training.gradient_accumulation_steps,
        )
        loader = build_loader(self.data.train, sampler, self.config, self.distributed.device.type == "cuda")
        return batches(loader)

    def _enter_stage(self) -> None:
        """At the first step, and where a stage begins: say what learns, and tell DDP anew."""
        train = next(train for first, train in reversed(self.stages) if first <= self.step)
        if train == self.learning:
            return
        self.learning = train
        self.model.set_stage(train)
        if self.distributed.main and self.config.training.stages:
            logger.info("step %d: training %s", self.step, "the head alone" if train == "head" else "backbone and head")
        if self.distributed.world_size > 1:
            device = self.distributed.device
            ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=ids)

    def _train_step(self, stream: Iterator[Batch]) -> tuple[Tensor, Tensor, float]:
        """One optimiser step. Returns the loss over the global batch, the gradient norm, and seconds waited for data."""
        world, device = self.distributed.world_size, self.distributed.device
        began = time.perf_counter()
        micro = [next(stream) for _ in range(self.config.training.gradient_accumulation_steps)]
        wait = time.perf_counter() - began
        draws = self.config.model.action_head_config.num_flow_samples
        count = torch.stack([batch["action_mask"].sum() for batch in micro]).sum().to(device, torch.float32) * draws
        self.distributed.sum(count)
        self.parallel.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for number, batch in enumerate(micro):
            with self._no_sync() if number < len(micro) - 1 else contextlib.nullcontext():
                output: FlowOutput = self.parallel(**arguments_from_batch(to_device(batch, device)))
                # DDP averages gradients over processes; times world, their sum over the global count remains.
                (output.loss_sum * (world / count)).backward()
            total += output.loss_sum.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.grad_clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.model)
        return self.distributed.sum(total) / count, norm, wait

    def _refuse_divergence(self, loss: Tensor, norm: Tensor, saving: bool) -> None:
        """Raise `TrainingError` when the weights are lost, before anything is logged, called best, or saved.

        Once they are, every later loss says so: it is enough to ask where one is read anyway, and for the weights themselves
        where they may be saved, since the loss is that of the weights before the step.
        """
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if saving:
            finite &= torch.stack([torch.isfinite(parameter).all() for parameter in self.model.parameters()]).all()
        if not finite:
            raise TrainingError(
                f"step {self.step}: got NaN or infinity in the loss ({loss.item()}), the gradient (norm {norm.item()}) or the "
                f"weights, expected finite numbers; the run diverged and was not saved: lower optimizer.lr "
                f"({self.config.optimizer.lr:g}) and vlm_lr, or lengthen lr_scheduler.warmup_steps "
                f"({self.config.lr_scheduler.warmup_steps})"
            )

    def _no_sync(self) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def validate(self) -> dict[str, Any]:
        """Validation metrics, of the averaged weights where there are any; empty without a validation set."""
        if self.data.validation is None:
            return {}
        with self.ema.applied(self.model) if self.ema is not None else contextlib.nullcontext():
            return validate(self.model, self.data.validation, self.config, self.distributed)

    def _improved(self, validation: dict[str, Any]) -> bool:
        metric = validation.get(self.config.training.best_metric)
        if metric is None or not metric < self.best_metric:  # NaN is no improvement
            self.stale += 1
            if metric is not None and self.stale == STALE_VALIDATIONS:
                logger.warning(
                    "%s has not fallen in %d validations; validation runs the training objective on fixed noise, so this is "
                    "the model: lower optimizer.lr, add data or augmentation, or stop here (docs/troubleshooting.md)",
                    self.config.training.best_metric,
                    STALE_VALIDATIONS,
                )
            return False
        self.best_metric, self.stale = float(metric), 0
        return True

    def _save(self, improved: bool) -> None:
        """Write this step's checkpoint once; `last` and `best` point at it."""
        if self.distributed.main:
            at_epoch = self.step % self.data.order.steps_per_epoch == 0
            name = f"checkpoint_epoch_{self.epoch}" if at_epoch else f"checkpoint_step_{self.step}"
            path = self.config.run_dir / "checkpoints" / f"{name}.pth.tar"
            ckpt.save_checkpoint(path, self._payload())
            ckpt.link_checkpoint(path, ckpt.LAST)
            if improved or self.data.validation is None or not (path.parent / ckpt.BEST).exists():
                ckpt.link_checkpoint(path, ckpt.BEST)
            self._prune(path.parent)
        self.distributed.barrier()

    def _prune(self, folder: Path) -> None:
        """Mid-epoch checkpoints are kept only while `last` or `best` points at them."""
        kept = {(folder / name).resolve() for name in (ckpt.LAST, ckpt.BEST)}
        for path in folder.glob("checkpoint_step_*.pth.tar"):
            if path.resolve() not in kept:
                path.unlink()
                path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)

    def _payload(self) -> dict[str, Any]:
        layout = self.data.train.index.layout
        return {
            "epoch": self.epoch,
            "step": self.step,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_metric": float(self.best_metric),
            "lr_scheduler": self.scheduler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "rng": {"torch": torch.get_rng_state()},
            "stale": self.stale,
            "config": self.config.model_dump(mode="json"),
            "preprocessor": self.preprocessor.to_dict(),
            "backbone": _plain(self.model.paligemma_vlm.backbone_dict()),
            "metadata": layout.metadata.to_json(),
            "versions": versions(),
        }

    def _restore(self, saved: dict[str, Any], where: str) -> None:
        """Take over everything of a checkpoint; refuse one of another model."""
        before = config_from_dict(saved["config"], where=where)
        if before.model.action_head_config != self.config.model.action_head_config:
            raise CheckpointError(f"{where}: its model.action_head_config differs from this run's; resume with its own config")
        try:
            self.model.load_state_dict(saved["state_dict"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{where}: does not fit this model ({first_line(error)})") from error
        self.scheduler.load_state_dict(saved["lr_scheduler"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"])
        torch.set_rng_state(saved["rng"]["torch"].cpu())
        self.step, self.best_metric, self.stale = saved["step"], saved["best_metric"], saved["stale"]
        logger.info("resumed %s: step %d, %d epochs completed", where, self.step, self.epoch)

    def _describe(self, stop: int) -> None:
        if self.distributed.main:
            learning = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
            total = sum(p.numel() for p in self.model.parameters())
            validation = len(self.data.validation.index) if self.data.validation else 0
            logger.info(
                "%s: %.1f M parameters, %.1f M learn; %d training episodes (%d steps), %d validation episodes",
                self.config.training.experiment_name,
                total / 1e6,
                learning / 1e6,
                len(self.data.train.index),
                len(self.data.train),
                validation,
            )
            logger.info(
                "optimiser steps %d to %d of %d, %d per epoch, total batch %d on %d process(es), %s",
                self.step,
                stop,
                self.total_steps,
                self.data.order.steps_per_epoch,
                self.config.data.batch_size,
                self.distributed.world_size,
                self.distributed.device,
            )

    def _log_step(self, values: dict[str, Any], meter: _Meter, bar: Any) -> None:
        if self.tracker is None:
            return
        metrics = {
            "epoch": self.step / self.data.order.steps_per_epoch,
            "train/batch_loss": values["loss"].item(),
            "train/lr": values["rate"],
            "train/grad_norm": values["norm"].item(),
            **meter.read(),
        }
        self.tracker.log(self.step, metrics)
        bar.set_postfix(loss=f"{metrics['train/batch_loss']:.4f}", samples_s=f"{metrics['train/samples_per_s']:.0f}")

    def _log_validation(self, metrics: dict[str, Any]) -> None:
        if self.tracker is not None and metrics:
            self.tracker.log(self.step, {"epoch": self.step / self.data.order.steps_per_epoch, **metrics})
            shown = "  ".join(f"{name} {value:.5f}" for name, value in metrics.items() if isinstance(value, float))
            logger.info("step %d: %s", self.step, shown)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the failures that users know (S10.2) into messages with the remedy."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            reason = first_line(error)
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
                raise TrainingError(
                    f"out of memory at step {self.step} with data.batch_size {self.config.data.batch_size}: reduce it, or "
                    f"split it with training.gradient_accumulation_steps; model.vlm_config.dtype: bfloat16, "
                    f"activation_checkpointing: true and freezing the backbone save more (docs/troubleshooting.md)"
                ) from error
            if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
                raise TrainingError(
                    f"communication between processes failed at step {self.step} ({reason}): {COMMUNICATION_REMEDY}"
                ) from error
            raise


class _Meter:
    """Throughput and share of time spent waiting for data, since the last reading."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self.began, self.wait, self.steps = time.perf_counter(), 0.0, 0

    def add(self, wait: float) -> None:
        self.wait += wait
        self.steps += 1

    def read(self) -> dict[str, float]:
        elapsed = max(1e-9, time.perf_counter() - self.began)
        values = {"train/samples_per_s": self.steps * self.batch_size / elapsed, "train/data_wait": self.wait / elapsed}
        self.restart()
        return values


def _plain(value: Any) -> Any:
    """Configuration of a library as plain data, so that a checkpoint loads with weights_only."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
