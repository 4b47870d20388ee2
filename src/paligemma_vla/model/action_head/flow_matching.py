"""FlowmatchingActionHead: a transformer over action tokens that predicts the velocity of a flow from noise to actions.

Each block: self-attention among the action tokens, cross-attention to context and state, an MLP, all modulated by flow time
and state (adaLN-zero, Peebles and Xie 2023); attention alone is slow to learn to read a few exact numbers out of many tokens.
The keys and values of context and state do not depend on the flow time, so they are projected once per observation and shared
by all Euler steps, and in training by all M (t, noise) draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma_vla.config import ActionHeadConfig
from paligemma_vla.model.action_head.base import FlowActionHead, KeyValue, Modulation
from paligemma_vla.model.attention import attention


@dataclass(frozen=True)
class ProjectedContext:
    """What the velocity needs of an observation, at every flow time.

    keys_values: (B, heads, T + 1, D / heads) of every block. mask: (B, 1, 1, T + 1), what may be attended. state: (B, 1, D).
    """

    keys_values: list[KeyValue]
    mask: Tensor
    state: Tensor | None


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


class FlowmatchingActionHead(FlowActionHead):
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
