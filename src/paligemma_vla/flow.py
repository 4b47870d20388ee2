"""The mathematics of flow matching, and nothing else.

Time runs from noise to action: t = 0 is noise, t = 1 is the action. On the straight path between them

    A_t = (1 - t) * noise + t * action        and        dA_t/dt = action - noise,

so the velocity a model learns is `action - noise`, everywhere (specification S4.2, D1; Lipman et al. 2023, Liu et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TIME_MIN, TIME_MAX = 0.02, 0.98


def draw_time(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Draw t ~ Beta(2, 2), clamped to [0.02, 0.98] (S4.2).

    The median of three uniforms is exactly Beta(2, 2), and unlike `torch.distributions` it takes a generator.
    """
    uniforms = torch.rand((*shape, 3), generator=generator, device=_device(generator))
    return uniforms.median(dim=-1).values.clamp(TIME_MIN, TIME_MAX)


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Draw noise ~ Uniform(-1, 1) (S4.2, S6.1)."""
    return torch.rand(shape, generator=generator, device=_device(generator)) * 2 - 1


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")


def interpolate(noise: Tensor, action: Tensor, time: Tensor) -> Tensor:
    """Point on the path at `time`; time (...,) broadcasts over the last two dimensions of noise and action (..., K, A)."""
    t = time[..., None, None]
    return (1 - t) * noise + t * action


def velocity_target(noise: Tensor, action: Tensor) -> Tensor:
    """What the model is to predict anywhere on the path: `action - noise`."""
    return action - noise


def masked_squared_error(velocity: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squared errors over valid elements, and their number, both 0-d float32 (D7).

    velocity, target: (..., K, A); mask: bool, broadcast to them. Sum and count stay apart so that the mean can be taken over
    the global batch, whatever the number of processes and accumulation steps.
    """
    mask = mask.expand_as(target)
    squared = (velocity.float() - target.float()).square()
    return torch.where(mask, squared, 0.0).sum(), mask.sum().float()


def euler(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, num_steps: int) -> Tensor:
    """Integrate dA/dt = velocity(A, t) from t = 0 (noise) to t = 1 in `num_steps` equal Euler steps (S6.1).

    velocity receives (A, t_i) with t_i = i / num_steps. Exact when the velocity is constant.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")
    action = noise
    for step in range(num_steps):
        action = action + velocity(action, step / num_steps) / num_steps
    return action
