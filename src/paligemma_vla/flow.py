"""The mathematics of flow matching, and nothing else.

Time runs from noise to action: t = 0 is noise, t = 1 is the action. On the straight path between them

    A_t = (1 - t) * noise + t * action        and        dA_t/dt = action - noise,

so the velocity a model learns is `action - noise`, everywhere (specification S4.2, D1; Lipman et al. 2023, Liu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

TIME_MIN, TIME_MAX = 0.02, 0.98
NUDGE, TINY = 0.02, 1e-20  # of a normalised action; what keeps 0 / 0 at 0
GUIDANCE_WEIGHT = 5.0  # largest weight of the guidance; above it few Euler steps overshoot (arXiv 2506.07339)

Velocity = Callable[[Tensor, float], Tensor]
Draws = Literal["uniform", "normal"]  # distribution of the noise, and with it that of the time


class Ongoing(NamedTuple):
    """What a robot goes on executing while its next chunk is sampled (real-time chunking).

    actions: (B, K, A) normalised, what is left of the last chunk, from the present step on; its last action repeated up to K.
    delay: (B,) how many of them are executed before the new chunk is used.   length: (B,) how many are real, >= delay.
    guided: pull a model towards them that was trained without prefixes; False: it was trained with them (`flow_prefix`).
    """

    actions: Tensor
    delay: Tensor
    length: Tensor
    guided: bool


def draw_time(shape: tuple[int, ...], generator: torch.Generator | None = None, draws: Draws = "uniform") -> Tensor:
    """Draw t ~ Beta(2, 2), clamped to [0.02, 0.98] (S4.2); with `normal` 1 - t ~ 0.999 Beta(1.5, 1) + 0.001, as pi0 does.

    The median of three uniforms is exactly Beta(2, 2), a power of one is Beta(1.5, 1), and unlike `torch.distributions` they
    take a generator.
    """
    if draws == "normal":
        return 0.999 - 0.999 * torch.rand(shape, generator=generator, device=_device(generator)) ** (1 / 1.5)
    uniforms = torch.rand((*shape, 3), generator=generator, device=_device(generator))
    return uniforms.median(dim=-1).values.clamp(TIME_MIN, TIME_MAX)


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | None = None, draws: Draws = "uniform") -> Tensor:
    """Draw noise ~ Uniform(-1, 1) (S4.2, S6.1), or as pi0 does from a standard normal distribution."""
    if draws == "normal":
        return torch.randn(shape, generator=generator, device=_device(generator))
    return torch.rand(shape, generator=generator, device=_device(generator)) * 2 - 1


def draw_prefix(shape: tuple[int, ...], longest: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw how many first actions are given, (..., M) int64: 0 in half of the M draws of a sample, else 1 to `longest` alike.

    A prefix tells much of what the pictures say. Where all draws had one, a backbone would hardly learn to look.
    """
    device = _device(generator)
    length = torch.randint(1, longest + 1, shape, generator=generator, device=device)
    # One uniform number a sample, moved on by 1 / M from draw to draw: half of them whatever it is, where M is even.
    uniform = torch.rand((*shape[:-1], 1), generator=generator, device=device)
    share = (uniform + torch.arange(shape[-1], device=device) / shape[-1]) % 1
    return torch.where(share < 0.5, length, 0)


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")


def interpolate(noise: Tensor, action: Tensor, time: Tensor) -> Tensor:
    """Point on the path at `time`; time (...,) broadcasts over the last two dimensions of noise and action (..., K, A)."""
    t = time[..., None, None]
    return (1 - t) * noise + t * action


def prefix_mask(length: Tensor, horizon: int) -> Tensor:
    """Which actions of a chunk are among its first `length` (...,): bool (..., K)."""
    return torch.arange(horizon, device=length.device) < length[..., None]


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


def soft_mask(delay: Tensor, length: Tensor, horizon: int) -> Tensor:
    """How firmly a new chunk keeps to each action of the last one: (B,) and (B,) to (B, K) in [0, 1].

    1 for those that are executed before the chunk is used, falling to 0 where the last chunk ends (arXiv 2506.07339, eq. 5).
    """
    step = torch.arange(horizon, device=delay.device)
    delay, length = delay[:, None], length[:, None]
    c = (length - step) / (length - delay + 1)
    weight = torch.where(step < delay, 1.0, c * torch.expm1(c) / (math.e - 1))
    return torch.where(step < length, weight, 0.0)


def guidance_weight(time: float) -> float:
    """Weight of the guidance at a flow time: (1 - t) / t * (t^2 + (1 - t)^2) / (1 - t)^2, at most `GUIDANCE_WEIGHT`."""
    if not 0 < time < 1:
        return GUIDANCE_WEIGHT
    return min(GUIDANCE_WEIGHT, (time**2 + (1 - time) ** 2) / (time * (1 - time)))


def guided(velocity: Velocity, target: Tensor, weights: Tensor) -> Velocity:
    """A velocity that also leads to where `target` (B, K, A) is, with `weights` (B, K, A): real-time chunking at inference.

    At each time the chunk that the velocity leads to is A + (1 - t) v; its weighted distance to the target comes back through
    the Jacobian of that estimate (arXiv 2506.07339, eq. 2 to 4). It is never longer than what brings the chunk as near to the
    target as this direction can, in the time that is left: the weight alone overshoots where the estimate is steep, as those of
    small models are. Needs gradients: not within `torch.inference_mode`.
    """

    def corrected(action: Tensor, time: float) -> Tensor:
        with torch.enable_grad():
            action = action.detach().requires_grad_()
            unguided = velocity(action, time)
            end = action + (1 - time) * unguided
        (correction,) = torch.autograd.grad(end, action, weights * (target - end.detach()))
        action, unguided = action.detach(), unguided.detach()
        largest = correction.abs().amax((1, 2), keepdim=True).clamp_min(TINY)
        nudge = NUDGE / largest * correction
        moved = nudge + (1 - time) * (velocity(action + nudge, time) - unguided)  # how the end moves with it
        slope, curvature = (part.sum((1, 2), keepdim=True) for part in (correction * nudge, weights * moved.square()))
        nearest = slope / curvature.clamp_min(TINY)  # in nudges
        weight = torch.clamp(nearest * NUDGE / largest / (1 - time), max=guidance_weight(time))
        return unguided + weight * correction

    return corrected


def euler_times(num_steps: int) -> list[float]:
    """Times at which `euler` asks for the velocity: i / num_steps."""
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")
    return [step / num_steps for step in range(num_steps)]


def euler(velocity: Velocity, noise: Tensor, num_steps: int) -> Tensor:
    """Integrate dA/dt = velocity(A, t) from t = 0 (noise) to t = 1 in `num_steps` equal Euler steps (S6.1).

    velocity receives (A, t_i) with t_i of `euler_times`. Exact when the velocity is constant.
    """
    action = noise
    for time in euler_times(num_steps):
        action = action + velocity(action, time) / num_steps
    return action
