"""Validation: the training objective on fixed draws, and the error of sampled actions in real units (S4.4, S6.2, D8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paligemma_vla.config import VLAConfig
from paligemma_vla.data.loader import Batch, VLADataset, load_batches
from paligemma_vla.data.order import ValidationSampler
from paligemma_vla.model.action_head.base import FlowOutput
from paligemma_vla.model.vla_model import arguments_from_batch
from paligemma_vla.preprocess import Preprocessor
from paligemma_vla.training.distributed import Distributed


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


@torch.no_grad()
def validate(model: nn.Module, data: VLADataset, config: VLAConfig, distributed: Distributed) -> dict[str, Any]:
    """Metrics over the same samples with the same (t, noise) every time, divided among the processes.

    `val/epoch_loss`: masked mean of the training objective. `val/action_mae`: mean absolute error of sampled actions in real
    units, also per dimension and per step of the horizon (null for a step that no label reaches).
    """
    settings, device = config.training, distributed.device
    head = config.model.action_head_config
    sums = torch.zeros(2, device=device)
    errors = torch.zeros(2, head.horizon, head.per_action_dim, device=device)
    model.eval()
    for batch in _batches(data, settings.val_max_samples, config, distributed):
        output: FlowOutput = model(**arguments_from_batch(batch))
        sums += torch.stack([output.loss_sum, output.valid_count])
    if settings.val_action_samples:
        for batch in _batches(data, settings.val_action_samples, config, distributed):
            errors += _action_errors(model, batch, data.preprocessor)
    sums, errors = distributed.all_reduce(sums), distributed.all_reduce(errors)
    metrics: dict[str, Any] = {"val/epoch_loss": (sums[0] / sums[1]).item()}
    if settings.val_action_samples:
        total, count = errors.double().cpu().numpy()
        metrics["val/action_mae"] = float(total.sum() / count.sum())
        metrics["val/action_mae_per_dim"] = _means(total.sum(0), count.sum(0))
        metrics["val/action_mae_per_step"] = _means(total.sum(1), count.sum(1))
    return metrics


def _batches(data: VLADataset, samples: int, config: VLAConfig, distributed: Distributed) -> Iterator[Batch]:
    """This process's batches, on its device, of `samples` samples spread evenly over the set."""
    size = max(1, config.data.batch_size // distributed.world_size)
    sampler = ValidationSampler(len(data), samples, size, distributed.rank, distributed.world_size)
    # Validation sets are small and read often: starting workers each time would take longer than they save.
    no_workers = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    for batch in load_batches(data, sampler, no_workers, pin_memory=False):
        yield to_device(batch, distributed.device)


def _action_errors(model: nn.Module, batch: Batch, preprocessor: Preprocessor) -> Tensor:
    """Absolute errors of sampled actions in real units, and how many, each (K, A)."""
    sampled: Tensor = model(**arguments_from_batch(batch, sample=True))  # (B, K, A)
    dimension = preprocessor.action.dimension
    state = preprocessor.state.denormalize(batch["state"].cpu().numpy())
    predicted, recorded = (
        preprocessor.decode_actions(actions.view_as(sampled)[..., :dimension].cpu().numpy(), state)
        for actions in (sampled, batch["action"])
    )
    difference = torch.zeros(sampled.shape)
    difference[..., :dimension] = torch.from_numpy(np.abs(predicted - recorded))
    mask = batch["action_mask"]
    return torch.stack([(difference.to(mask.device) * mask).sum(0), mask.sum(0).float()])


def _means(total: np.ndarray[Any, Any], count: np.ndarray[Any, Any]) -> list[float | None]:
    return [float(t / n) if n else None for t, n in zip(total, count, strict=True)]
