"""FlowmatchingActionHead: a transformer over action tokens that predicts the velocity of a flow from noise to actions.

Each block: self-attention among the action tokens, cross-attention to context and state, an MLP, all modulated by flow time
and state (adaLN-zero, Peebles and Xie 2023); attention alone is slow to learn to read a few exact numbers out of many tokens.
The keys and values of context and state do not depend on the flow time, so they are projected once per observation and shared
by all Euler steps, and in training by all M (t, noise) draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma_vla import flow
from paligemma_vla.config import ActionHeadConfig
from paligemma_vla.model.attention import attention

KeyValue = tuple[Tensor, Tensor]


class FlowOutput(NamedTuple):
    """What training mode returns: velocity and target (B, M, K, A), and the parts of their masked mean squared error."""

    velocity: Tensor
    target: Tensor
    loss_sum: Tensor
    valid_count: Tensor


@dataclass(frozen=True)
class ProjectedContext:
    """What the velocity needs of an observation, at every flow time.

    keys_values: (B, heads, T + 1, D / heads) of every block. mask: (B, 1, 1, T + 1), what may be attended. state: (B, 1, D).
    """

    keys_values: list[KeyValue]
    mask: Tensor
    state: Tensor | None


class Modulation(NamedTuple):
    """Shift, scale (with its 1 added) and gate of every layer, for some flow times.

    blocks: of each (B or 1, M or 1, 1 or K, 9 D). final: (B or 1, M or 1, 1 or K, 2 D).
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


class TimeEmbedding(nn.Module):
    """Flow time in [0, 1] to (..., D): sines and cosines with periods from 0.004 to 4, then a small MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = width // 2
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        exponents = torch.linspace(math.log(4e-3), math.log(4.0), self.frequencies, device=time.device)
        angle = 2 * math.pi * time.float()[..., None] / exponents.exp()
        embedded: Tensor = self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))
        return embedded


class AdaptiveNorms(nn.Linear):
    """What modulates `norms` layer norms: shift, scale and gate of each, in turn, from the conditioning vector (..., D).

    It begins at zero. The scale that it gives is 1 more than the layer's own.
    """

    one: Tensor

    def __init__(self, width: int, norms: int, gates: bool) -> None:
        kinds = 3 if gates else 2
        super().__init__(width, norms * kinds * width)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        one = torch.zeros(norms, kinds, width)
        one[:, 1] = 1
        self.register_buffer("one", one.flatten(), persistent=False)

    def forward(self, condition: Tensor) -> Tensor:
        """condition (..., D) to (..., norms * 2 or 3 * D)."""
        return F.linear(condition, self.weight, self.bias + self.one)


class Block(nn.Module):
    """Self-attention, cross-attention, MLP; shift, scale and gate of each come from the conditioning vector."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        hidden = int(mlp_ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = AdaptiveNorms(width, 3, gates=True)

    def project_context(self, context: Tensor) -> KeyValue:
        """Context (B, T, D) to keys and values (B, heads, T, D / heads)."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(self, x: Tensor, modulation: Tensor, context: KeyValue, mask: Tensor) -> Tensor:
        """x (B, M, K, D) to (B, M, K, D). modulation: (B or 1, M or 1, 1 or K, 9 D)."""
        batch, draws, steps, width = x.shape
        parts = modulation.chunk(9, dim=-1)
        shift, scale, gate = parts[0::3], parts[1::3], parts[2::3]

        modulated = torch.addcmul(shift[0], self.norm(x), scale[0])
        query, key, value = self.qkv(modulated).flatten(0, 1).chunk(3, dim=-1)  # (B M, K, D)
        mixed = attention(self._split(query), self._split(key), self._split(value))
        x = torch.addcmul(x, gate[0], self.self_out(self._join(mixed)).view(x.shape))

        # All M draws of a sample look at one context, so they stand side by side as queries: nothing is copied.
        query = self.query(torch.addcmul(shift[1], self.norm(x), scale[1])).view(batch, draws * steps, width)
        mixed = attention(self._split(query), *context, mask)
        x = torch.addcmul(x, gate[1], self.cross_out(self._join(mixed)).view(x.shape))

        return torch.addcmul(x, gate[2], self.mlp(torch.addcmul(shift[2], self.norm(x), scale[2])))

    def _split(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        return x.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)  # (B, heads, T, D / heads)

    def _join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # (B, T, D)


class FlowmatchingActionHead(nn.Module):
    """Flow-matching action head (S4, S5, S6).

    config: `model.action_head_config`. context_dim: width E of the backbone's context. state_dim: numbers in the state (P).
    Actions are normalised throughout: (B, K, A), or flat (B, K * A) as a batch carries them.
    """

    def __init__(self, config: ActionHeadConfig, context_dim: int, state_dim: int) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.action_encoder = nn.Linear(config.per_action_dim, width)
        self.position = nn.Parameter(torch.randn(config.horizon, width) * 0.02)
        self.time_embedding = TimeEmbedding(width)
        self.context_norm = nn.LayerNorm(context_dim)
        self.context_proj = nn.Linear(context_dim, width)
        if config.use_state_input:
            self.state_encoder = nn.Sequential(nn.Linear(state_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, config.num_heads, config.mlp_ratio) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_modulation = AdaptiveNorms(width, 1, gates=False)
        self.velocity = nn.Linear(width, config.per_action_dim)
        nn.init.zeros_(self.velocity.weight)
        nn.init.zeros_(self.velocity.bias)

    def project_context(
        self, fused_tokens: Tensor, context_mask: Tensor | None = None, state: Tensor | None = None
    ) -> ProjectedContext:
        """Everything that does not depend on the flow time, once per observation.

        fused_tokens (B, T, E); context_mask (B, T), True where there is a token (None: everywhere); state (B, P).
        """
        context = self.context_proj(self.context_norm(fused_tokens))
        if context_mask is None:
            context_mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        mask, encoded = context_mask.bool(), None
        if self.config.use_state_input:
            if state is None:
                raise ValueError("state: got None, expected (B, P); use_state_input is true")
            encoded = self.state_encoder(state)[:, None]  # (B, 1, D)
            context, mask = torch.cat([context, encoded.to(context.dtype)], dim=1), F.pad(mask, (0, 1), value=True)
        keys_values = [block.project_context(context) for block in cast("list[Block]", self.blocks)]
        return ProjectedContext(keys_values, mask[:, None, None, :], encoded)

    def predict_velocity(
        self,
        action: Tensor,
        time: Tensor | float,
        context: ProjectedContext | Tensor,
        context_mask: Tensor | None = None,
        state: Tensor | None = None,
        clean: Tensor | None = None,
    ) -> Tensor:
        """Velocity at a point of the flow (S4.2): same shape as `action`, (B, K, A) or (B, M, K, A), float32.

        time: a number, (B,) or (B, M), in [0, 1]. context: what `project_context` gave, or fused tokens (B, T, E) with mask
        and state. clean: (B, K) or (B, M, K), actions that are given: their own time is 1 (arXiv 2512.05964).
        """
        if isinstance(context, Tensor):
            context = self.project_context(context, context_mask, state)
        draws = action if action.dim() == 4 else action[:, None]  # (B, M, K, A)
        time = torch.as_tensor(time, dtype=torch.float32, device=action.device)
        modulation = self._modulation(time.reshape(1, 1) if time.dim() == 0 else time.view(len(action), -1), context)
        if clean is not None:
            at_end = self._modulation(torch.ones(1, 1, device=action.device), context)
            modulation = modulation.where(clean if clean.dim() == 3 else clean[:, None], at_end)
        return self._velocity(draws, modulation, context).view(action.shape)

    def _modulation(self, time: Tensor, context: ProjectedContext) -> Modulation:
        """What flow times (B or 1, M) and the state make of every layer."""
        embedded = self.time_embedding(time)  # (B or 1, M, D)
        condition = F.silu(embedded if context.state is None else embedded + context.state)[:, :, None]
        blocks = [block.modulation(condition) for block in cast("list[Block]", self.blocks)]
        return Modulation(blocks, self.final_modulation(condition))

    def _velocity(self, draws: Tensor, modulation: Modulation, context: ProjectedContext) -> Tensor:
        """draws (B, M, K, A) to their velocity, float32."""
        x = self.action_encoder(draws) + self.position
        for block, modulated, key_value in zip(self.blocks, modulation.blocks, context.keys_values, strict=True):
            x = block(x, modulated, key_value, context.mask)
        shift, scale = modulation.final.chunk(2, dim=-1)
        velocity: Tensor = self.velocity(torch.addcmul(shift, self.final_norm(x), scale))
        return velocity.float()

    def loss(
        self,
        fused_tokens: Tensor,
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
            flow_time = flow.draw_time((len(action), self.config.num_flow_samples)).to(action.device)
        if flow_noise is None:
            flow_noise = flow.draw_noise((*flow_time.shape, *chunk)).to(action.device)
        if action_mask is None:
            action_mask = torch.ones_like(action[:, 0], dtype=torch.bool)
        context = self.project_context(fused_tokens, context_mask, state)
        point, mask, clean = flow.interpolate(flow_noise, action, flow_time), action_mask[:, None], None
        if flow_prefix is not None:
            clean = flow.prefix_mask(flow_prefix, self.config.horizon)  # (B, M, K)
            point, mask = torch.where(clean[..., None], action, point), mask & ~clean[..., None]
        velocity = self.predict_velocity(point, flow_time, context, clean=clean)
        target = flow.velocity_target(flow_noise, action)
        return FlowOutput(velocity, target, *flow.masked_squared_error(velocity, target, mask))

    def sample(
        self,
        context: Tensor,
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
        known = self._modulation(torch.arange(num_steps, device=noise.device)[None] / num_steps, projected)

        def velocity(action: Tensor, time: float) -> Tensor:
            return self._velocity(action[:, None], known.at(times.index(time)), projected)[:, 0]

        if ongoing is None:
            return flow.euler(velocity, noise, num_steps)
        given, horizon = ongoing.actions, self.config.horizon
        if ongoing.guided:
            weights = flow.soft_mask(ongoing.delay, ongoing.length, horizon)[..., None].expand_as(noise)
            return flow.euler(flow.guided(velocity, given, weights), noise, num_steps)
        clean = flow.prefix_mask(ongoing.delay, horizon)  # (B, K)
        at_end = self._modulation(torch.ones(1, 1, device=noise.device), projected)

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
        fused_tokens: Tensor,
        state: Tensor | None = None,
        context_mask: Tensor | None = None,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        ongoing: flow.Ongoing | None = None,
    ) -> Tensor:
        """Sample actions (B, K, A), normalised (S6.1). noise: None draws Uniform(-1, 1) from torch's global generator.
        ongoing: what they have to continue."""
        if noise is None:
            shape = (len(fused_tokens), self.config.horizon, self.config.per_action_dim)
            noise = flow.draw_noise(shape).to(fused_tokens.device)
        if num_steps is None:
            num_steps = self.config.num_inference_timesteps
        return self.sample(fused_tokens, context_mask, state, noise, num_steps, ongoing)

    def forward(
        self, fused_tokens: Tensor, state: Tensor | None = None, actions_gt: Tensor | None = None
    ) -> FlowOutput | Tensor:
        """Training mode with `actions_gt`, sampling without (S4.1)."""
        if actions_gt is None:
            return self.get_action(fused_tokens, state)
        return self.loss(fused_tokens, actions_gt, state)
