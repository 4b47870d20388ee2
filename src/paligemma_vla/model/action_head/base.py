"""What flow-matching heads share: the training objective, and sampling, over a velocity that each computes in its own way."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma_vla import flow
from paligemma_vla.config import ActionHeadConfig

KeyValue = tuple[Tensor, Tensor]
# What a head reads of the backbone: its last hidden states (B, T, E), or the keys and values of each layer.
Context = Literal["hidden_states", "keys_values"]


class TextSizes(NamedTuple):
    """What an expert shares with the language model beside it."""

    layers: int
    heads: int
    groups: int
    head_dim: int
    rope_theta: float
    eps: float


class Float32Linear(nn.Linear):
    """A small layer that computes in float32 whatever the others compute in."""

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, self.weight, self.bias)

    @staticmethod
    def part(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product with some columns of the weight."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight, bias)


class FlowOutput(NamedTuple):
    """What training mode returns: velocity and target (B, M, K, A), and the parts of their masked mean squared error."""

    velocity: Tensor
    target: Tensor
    loss_sum: Tensor
    valid_count: Tensor


class Modulation(NamedTuple):
    """What some flow times make of every layer, and of what follows the last.

    blocks: of each (B or 1, M or 1, 1 or K, n D). final: (B or 1, M or 1, 1 or K, n D). How many n of what, a head decides.
    """

    blocks: list[Tensor]
    final: Tensor

    def at(self, draw: int) -> Modulation:
        """That of one of the M times: (B or 1, 1, 1 or K, n D)."""
        return Modulation([block[:, draw, None] for block in self.blocks], self.final[:, draw, None])

    def where(self, chosen: Tensor, other: Modulation) -> Modulation:
        """That of `other` for the actions that are chosen (B, M, K)."""
        chosen = chosen[..., None]
        blocks = [torch.where(chosen, theirs, own) for own, theirs in zip(self.blocks, other.blocks, strict=True)]
        return Modulation(blocks, torch.where(chosen, other.final, self.final))


class FlowActionHead(nn.Module):
    """A head that predicts the velocity of a flow from noise to actions (S4, S6).

    context: what it reads of an observation. Actions are normalised throughout: (B, K, A), or flat (B, K * A) as a batch
    carries them.
    """

    context: Context = "hidden_states"
    config: ActionHeadConfig

    @abstractmethod
    def project_context(self, fused_tokens: Any, context_mask: Tensor | None = None, state: Tensor | None = None) -> Any:
        """Everything that does not depend on the flow time, once per observation.

        fused_tokens (B, T, E), or keys and values of each layer (B, heads, T, D); context_mask (B, T), True where there is a
        token (None: everywhere); state (B, P).
        """

    @abstractmethod
    def _modulation(self, time: Tensor, context: Any) -> Modulation:
        """What flow times (B or 1, M), float64, make of every layer."""

    @abstractmethod
    def _velocity(self, draws: Tensor, modulation: Modulation, context: Any) -> Tensor:
        """draws (B, M, K, A) to their velocity, float32."""

    def predict_velocity(
        self,
        action: Tensor,
        time: Tensor | float,
        context: Any,
        context_mask: Tensor | None = None,
        state: Tensor | None = None,
        clean: Tensor | None = None,
    ) -> Tensor:
        """Velocity at a point of the flow (S4.2): same shape as `action`, (B, K, A) or (B, M, K, A), float32.

        time: a number, (B,) or (B, M), in [0, 1]. context: what `project_context` gave, or fused tokens (B, T, E) with mask
        and state. clean: (B, K) or (B, M, K), actions that are given: their own time is 1 (arXiv 2512.05964).
        """
        if isinstance(context, Tensor | list):
            context = self.project_context(context, context_mask, state)
        draws = action if action.dim() == 4 else action[:, None]  # (B, M, K, A)
        time = torch.as_tensor(time, dtype=torch.float64, device=action.device)
        modulation = self._modulation(time.reshape(1, 1) if time.dim() == 0 else time.view(len(action), -1), context)
        if clean is not None:
            at_end = self._modulation(_ones(action.device), context)
            modulation = modulation.where(clean if clean.dim() == 3 else clean[:, None], at_end)
        return self._velocity(draws, modulation, context).view(action.shape)

    def loss(
        self,
        fused_tokens: Any,
        actions_gt: Tensor,
        state: Tensor | None = None,
        context_mask: Tensor | None = None,
        action_mask: Tensor | None = None,
        flow_time: Tensor | None = None,
        flow_noise: Tensor | None = None,
        flow_prefix: Tensor | None = None,
    ) -> FlowOutput:
        """The training objective (S4.2): at M random points of each sample's path, squared error of the velocity.

        actions_gt (B, K * A) or (B, K, A); action_mask (B, K, A), None: all valid; flow_time (B, M) and flow_noise
        (B, M, K, A), None: drawn here from torch's global generator. flow_prefix (B, M): so many first actions are given, as
        they are when a robot executes them already; they are left out of the loss (arXiv 2512.05964).
        """
        chunk = (self.config.horizon, self.config.per_action_dim)
        action = actions_gt.view(-1, 1, *chunk).float()  # (B, 1, K, A)
        if flow_time is None:
            flow_time = flow.draw_time((len(action), self.config.num_flow_samples), draws=self.config.noise).to(action.device)
        if flow_noise is None:
            flow_noise = flow.draw_noise((*flow_time.shape, *chunk), draws=self.config.noise).to(action.device)
        if action_mask is None:
            action_mask = torch.ones_like(action[:, 0], dtype=torch.bool)
        context = self.project_context(fused_tokens, context_mask, state)
        point, mask, clean = flow.interpolate(flow_noise, action, flow_time).float(), action_mask[:, None], None
        if flow_prefix is not None:
            clean = flow.prefix_mask(flow_prefix, self.config.horizon)  # (B, M, K)
            point, mask = torch.where(clean[..., None], action, point), mask & ~clean[..., None]
        velocity = self.predict_velocity(point, flow_time, context, clean=clean)
        target = flow.velocity_target(flow_noise, action)
        return FlowOutput(velocity, target, *flow.masked_squared_error(velocity, target, mask))

    def sample(
        self,
        context: Any,
        context_mask: Tensor | None,
        state: Tensor | None,
        noise: Tensor,
        num_steps: int,
        ongoing: flow.Ongoing | None = None,
    ) -> Tensor:
        """Integrate from noise (B, K, A) to actions (B, K, A) in `num_steps` Euler steps; deterministic given the noise.

        ongoing: what the actions have to continue; None: nothing.
        """
        projected = self.project_context(context, context_mask, state)
        # The times are known, so what they make of every layer is one product for all of them: at batch 1 the weights of these
        # layers, 2/5 of a block's, are read once, not at each step.
        times = flow.euler_times(num_steps)
        # Made on the device: a copy from the machine's memory cannot be part of a CUDA graph.
        steps = torch.arange(num_steps, dtype=torch.float64, device=noise.device)
        known = self._modulation(steps[None] / num_steps, projected)

        def velocity(action: Tensor, time: float) -> Tensor:
            return self._velocity(action[:, None], known.at(times.index(time)), projected)[:, 0]

        if ongoing is None:
            return flow.euler(velocity, noise, num_steps)
        given, horizon = ongoing.actions, self.config.horizon
        if ongoing.guided:
            weights = flow.soft_mask(ongoing.delay, ongoing.length, horizon)[..., None].expand_as(noise)
            return flow.euler(flow.guided(velocity, given, weights), noise, num_steps)
        clean = flow.prefix_mask(ongoing.delay, horizon)  # (B, K)
        at_end = self._modulation(_ones(noise.device), projected)

        def continued(action: Tensor, time: float) -> Tensor:
            action = torch.where(clean[..., None], given, action)
            modulation = known.at(times.index(time)).where(clean[:, None], at_end)
            return self._velocity(action[:, None], modulation, projected)[:, 0]

        return torch.where(clean[..., None], given, flow.euler(continued, noise, num_steps))

    def compile_step(self) -> None:
        """Compile the work of an Euler step into fewer kernels (`torch.compile`), in place."""
        self._velocity = torch.compile(self._velocity)  # type: ignore[method-assign]

    def get_action(
        self,
        fused_tokens: Any,
        state: Tensor | None = None,
        context_mask: Tensor | None = None,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        ongoing: flow.Ongoing | None = None,
    ) -> Tensor:
        """Sample actions (B, K, A), normalised (S6.1). noise: None draws it from torch's global generator.
        ongoing: what they have to continue."""
        if noise is None:
            some = fused_tokens if isinstance(fused_tokens, Tensor) else fused_tokens[0][0]
            shape = (len(some), self.config.horizon, self.config.per_action_dim)
            noise = flow.draw_noise(shape, draws=self.config.noise).to(some.device)
        if num_steps is None:
            num_steps = self.config.num_inference_timesteps
        return self.sample(fused_tokens, context_mask, state, noise, num_steps, ongoing)

    def forward(self, fused_tokens: Any, state: Tensor | None = None, actions_gt: Tensor | None = None) -> FlowOutput | Tensor:
        """Training mode with `actions_gt`, sampling without (S4.1)."""
        if actions_gt is None:
            return self.get_action(fused_tokens, state)
        return self.loss(fused_tokens, actions_gt, state)


def _ones(device: torch.device) -> Tensor:
    """The flow time of an action that is given, (1, 1)."""
    return torch.ones(1, 1, dtype=torch.float64, device=device)
