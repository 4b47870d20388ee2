"""Optimiser, learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from paligemma_vla.config import OptimizerConfig, SchedulerConfig
from paligemma_vla.errors import needs_extra
from paligemma_vla.model.vla_model import VLAModel, layer_matrices
from paligemma_vla.training.parallel import copy_local, to_local


def build_optimizer(model: VLAModel, config: OptimizerConfig) -> Optimizer:
    """AdamW (S8.2) over everything that learns in some stage: groups for backbone and head, each with and without decay.

    Weight decay is for matrices: norms, biases, embeddings and positions go without. With `muon`, groups of matrices in the
    layers are apart, which are what it is for.
    """
    layers = layer_matrices(model) if config.type == "muon" else set()
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    model.set_stage("all")
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "vlm" if name.startswith("paligemma_vlm.") else "head"
            decays = parameter.ndim > 1 and parameter not in embeddings and not name.endswith("action_head.position")
            orthogonal = decays and parameter in layers
            groups.setdefault((part, decays, orthogonal), []).append(parameter)
    rates = {"head": config.lr, "vlm": config.vlm_lr if config.vlm_lr is not None else config.lr}
    settings: list[dict[str, Any]] = [
        {"params": params, "lr": rates[part], "weight_decay": config.weight_decay if decays else 0.0, "part": part}
        for (part, decays, _), params in sorted(groups.items())
    ]
    if config.type == "muon":
        from paligemma_vla.training.optim_muon import Muon

        flags = [{"orthogonal": orthogonal} for _, _, orthogonal in sorted(groups)]
        return Muon([group | flag for group, flag in zip(settings, flags, strict=True)], betas=config.betas, eps=config.eps)
    if config.type == "adamw_8bit":
        with needs_extra("optimizer.type: adamw_8bit needs torchao", "quantization"):
            from paligemma_vla.training.optim_8bit import AdamW8bit

        return cast(Optimizer, AdamW8bit(settings, betas=config.betas, eps=config.eps))
    return AdamW(settings, betas=config.betas, eps=config.eps, fused=True)


def build_scheduler(
    optimizer: Optimizer, config: SchedulerConfig, total_steps: int, steps_per_epoch: int, vlm_start: int
) -> LambdaLR:
    """Linear warm-up, then cosine to `min_lr_ratio` or constant, per optimiser step (D2).

    vlm_start: the step at which the backbone begins to learn; its groups warm up again from there.
    """
    length = total_steps if config.T_max is None else max(1, round(config.T_max * steps_per_epoch))

    def factor(step: int, start: int) -> float:
        warm = min(1.0, (step - start + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.type == "constant":
            return max(0.0, warm)
        done = min(1.0, max(0, step - config.warmup_steps) / max(1, length - config.warmup_steps))
        cosine = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
        return max(0.0, warm) * cosine

    def schedule(start: int) -> Callable[[int], float]:
        return lambda step: factor(step, start)

    return LambdaLR(optimizer, [schedule(vlm_start if group["part"] == "vlm" else 0) for group in optimizer.param_groups])


class ExponentialMovingAverage:
    """Moving average over the parameters that learn in some stage, by name: ema = decay * ema + (1 - decay) * weight.

    The decay is warmed up as (1 + n) / (10 + n), so that a short run is not held back by its random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(model.named_parameters())
        pairs = [(to_local(average), to_local(current[name].detach())) for name, average in self.average.items()]
        torch._foreach_lerp_([average for average, _ in pairs], [weight for _, weight in pairs], 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model carries the averaged weights."""
        current = dict(model.named_parameters())
        saved = {name: current[name].detach().clone() for name in self.average}
        self._copy(current, self.average)
        try:
            yield
        finally:
            self._copy(current, saved)

    @staticmethod
    def _copy(parameters: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
        for name, value in source.items():
            copy_local(parameters[name], value)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._copy(self.average, state["average"])
        self.updates = state["updates"]
