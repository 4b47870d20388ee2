"""Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for everything else, as one optimiser.

Its steps are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982), so one rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

MOMENTUM = 0.95


class Muon(Optimizer):
    """groups: as every optimiser takes them; where `orthogonal` is true, of matrices that Muon is for."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], betas: tuple[float, float], eps: float) -> None:
        of_muon, others = ([dict(group) for group in groups if group["orthogonal"] is chosen] for chosen in (True, False))
        self._parts: tuple[Any, Any] = (
            torch.optim.Muon(of_muon, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, betas=betas, eps=eps, fused=True),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss

    def _share(self) -> None:
        """The two work on the groups and the state of this one, which is what schedules set and checkpoints hold."""
        for part, chosen in zip(self._parts, (True, False), strict=True):
            part.param_groups = [group for group in self.param_groups if group["orthogonal"] is chosen]
            part.state = self.state
