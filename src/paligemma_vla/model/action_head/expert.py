"""The action experts of pi0 (arXiv 2410.24164) and pi0.5 (arXiv 2504.16054): a narrow Gemma beside the language model's layers.

Its action tokens attend, in layer i, to each other and to the keys and values of the language model's layer i, which do not
depend on them: they are computed once per observation. So are those of pi0's state token, which sees no action. Tensors have
the published names, and what is float32 there in a model of bfloat16 is so here. Flow time runs the other way there, from 1
(noise) to 0: `_theirs` is the one place that knows.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma_vla.config import ActionHeadConfig
from paligemma_vla.errors import ModelError
from paligemma_vla.model.action_head.base import Float32Linear, FlowActionHead, KeyValue, Modulation, TextSizes
from paligemma_vla.model.attention import attention

SHORTEST, LONGEST = 0.004, 4.0  # periods of the time's sines


@dataclass(frozen=True)
class ExpertContext:
    """What the velocity needs of an observation, at every flow time.

    keys_values: (B, groups, T, D) of every layer, and behind them those of pi0's state token. mask: (B, T), what may be
    attended. turns: cosines and sines (B, 1, K, D) of the positions of the actions.
    """

    keys_values: list[KeyValue]
    mask: Tensor
    turns: tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Gemma's, in float32: its weight is 1 less than what it multiplies with."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (..., D), normalised; what its residual branch is multiplied with: nothing."""
        return _normalised(x, self.eps) * (1 + self.weight), None


class AdaptiveRMSNorm(nn.Module):
    """pi0.5's: scale, shift and gate come from the flow time."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.dense = Float32Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)
        self.eps = eps

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (..., D), normalised and modulated (..., 3 D); the gate of its residual branch."""
        assert modulation is not None
        scale, shift, gate = modulation.chunk(3, dim=-1)
        return torch.addcmul(shift, _normalised(x, self.eps), 1 + scale), gate


def _normalised(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class SelfAttention(nn.Module):
    """The projections of a layer's attention."""

    def __init__(self, width: int, text: TextSizes) -> None:
        super().__init__()
        self.head_dim = text.head_dim
        self.q_proj = nn.Linear(width, text.heads * text.head_dim, bias=False)
        self.k_proj = nn.Linear(width, text.groups * text.head_dim, bias=False)
        self.v_proj = nn.Linear(width, text.groups * text.head_dim, bias=False)
        self.o_proj = nn.Linear(text.heads * text.head_dim, width, bias=False)

    def split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)  # (B, heads, S, D)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return result


class ExpertLayer(nn.Module):
    """Attention and MLP of one layer of the expert."""

    def __init__(self, width: int, hidden: int, text: TextSizes, norm: type[RMSNorm | AdaptiveRMSNorm]) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, text)
        self.mlp = MLP(width, hidden)
        self.input_layernorm = norm(width, text.eps)
        self.post_attention_layernorm = norm(width, text.eps)

    def keys_values(self, normed: Tensor, turns: tuple[Tensor, Tensor]) -> KeyValue:
        """Of tokens (B, S, D) that are normalised already."""
        attn = self.self_attn
        return _turned(attn.split(attn.k_proj(normed)), turns), attn.split(attn.v_proj(normed))

    def forward(
        self,
        x: Tensor,
        past: KeyValue,
        mask: Tensor,
        turns: tuple[Tensor, Tensor],
        modulation: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        """x (B, M, S, D), of M draws, to the same. past (B, groups, T, D), mask (B, T); turns of the S positions."""
        batch, draws = x.shape[:2]
        attn = self.self_attn
        normed, gate = self.input_layernorm(x, modulation[0])
        normed = normed.flatten(0, 1)  # (B M, S, D)
        turns = tuple(_per_draw(part, draws) for part in turns)  # type: ignore[assignment]
        own = self.keys_values(normed, turns)
        key, value = (torch.cat([_per_draw(old, draws).to(new.dtype), new], 2) for old, new in zip(past, own, strict=True))
        seen = F.pad(_per_draw(mask, draws), (0, x.shape[2]), value=True)[:, None, None]
        query = _turned(attn.split(attn.q_proj(normed)), turns)
        mixed = attention(query, key, value, seen).transpose(1, 2).flatten(2)  # (B M, S, heads D)
        x = _gated(x, gate, attn.o_proj(mixed).view(batch, draws, -1, x.shape[-1]))
        normed, gate = self.post_attention_layernorm(x, modulation[1])
        return _gated(x, gate, self.mlp(normed))


def _gated(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    return x + branch if gate is None else torch.addcmul(x, gate, branch.to(gate.dtype))


def _per_draw(x: Tensor, draws: int) -> Tensor:
    """(B, ...) to (B M, ...): each sample's as often as it has draws."""
    return x if draws == 1 else x.repeat_interleave(draws, 0)


def _turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions, half against half, in float32."""
    cosine, sine = turns
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)
    return turned.to(x.dtype)


class ExpertActionHead(FlowActionHead):
    """An action expert.

    config: `model.action_head_config`, whose sizes are those of the expert: embed_dim is its width, per_action_dim the width
    that actions and states are padded to. text: of the language model beside it. state_dim: numbers in the state (P).
    """

    context = "keys_values"
    norm: type[RMSNorm | AdaptiveRMSNorm] = RMSNorm

    def __init__(self, config: ActionHeadConfig, text: TextSizes, state_dim: int) -> None:
        super().__init__()
        self.config, self.text = config, text
        width, numbers = config.embed_dim, config.per_action_dim
        known = (config.num_layers, config.num_heads)
        if known != (text.layers, text.heads):
            raise ModelError(
                f"model.action_head_config: got num_layers and num_heads {known}, expected those of the backbone's language "
                f"model, {text.layers, text.heads}: an expert has a layer beside each of its layers"
            )
        if state_dim > numbers:
            raise ModelError(
                f"data.state_dim: got {state_dim}, expected at most per_action_dim, {numbers}: states are padded to it"
            )
        hidden = int(config.mlp_ratio * width)
        self.layers = nn.ModuleList(ExpertLayer(width, hidden, text, self.norm) for _ in range(text.layers))
        self.norm_out = self.norm(width, text.eps)
        self.action_in_proj = Float32Linear(numbers, width)
        self.action_out_proj = Float32Linear(width, numbers)

    def project_context(
        self, fused_tokens: list[KeyValue], context_mask: Tensor | None = None, state: Tensor | None = None
    ) -> ExpertContext:
        first = fused_tokens[0][0]
        if context_mask is None:
            context_mask = torch.ones(first.shape[0], first.shape[2], dtype=torch.bool, device=first.device)
        count = context_mask.sum(1)
        return ExpertContext(fused_tokens, context_mask.bool(), self._turns(count, self.config.horizon))

    def _turns(self, begin: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, 1, S, D / 2) of the positions from `begin` (B,) on."""
        half = torch.arange(0, self.text.head_dim, 2, dtype=torch.int64, device=begin.device).float() / self.text.head_dim
        position = (begin[:, None] + torch.arange(steps, device=begin.device)).float()  # (B, S)
        angle = position[:, None, :, None] / self.text.rope_theta**half
        return angle.cos(), angle.sin()

    def _velocity(self, draws: Tensor, modulation: Modulation, context: ExpertContext) -> Tensor:
        x = self._tokens(draws, modulation)
        for number, (layer, past) in enumerate(zip(self.layers, context.keys_values, strict=True)):
            x = layer(x, past, context.mask, context.turns, self._of_layer(modulation, number))
        x, _ = self.norm_out(x, self._of_end(modulation))
        velocity: Tensor = self.action_out_proj(x)
        return -velocity  # theirs leads to the noise

    @abstractmethod
    def _tokens(self, draws: Tensor, modulation: Modulation) -> Tensor:
        """Actions (B, M, K, A) as tokens (B, M, K, D)."""

    def _of_layer(self, modulation: Modulation, number: int) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    def _of_end(self, modulation: Modulation) -> Tensor | None:
        return None

    def _time_embedding(self, time: Tensor) -> Tensor:
        """Flow time, float64, to sines and cosines (..., D), float32: of periods from 0.004 to 4 the shortest turns a hundredth
        of a step by a sixth of a circle, so the angle is computed in float64."""
        share = torch.linspace(0, 1, self.config.embed_dim // 2, dtype=torch.float64, device=time.device)
        period = SHORTEST * (LONGEST / SHORTEST) ** share
        angle = 2 * math.pi * _theirs(time.double())[..., None] / period
        return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def _theirs(time: Tensor) -> Tensor:
    return 1 - time


class Pi0ActionHead(ExpertActionHead):
    """pi0: a state token, and the flow time mixed into the actions by an MLP."""

    without_adapters = ("action_time_mlp_in",)  # its weight is used in two parts

    def __init__(self, config: ActionHeadConfig, text: TextSizes, state_dim: int) -> None:
        super().__init__(config, text, state_dim)
        width = config.embed_dim
        if config.use_state_input:
            self.state_proj = Float32Linear(config.per_action_dim, width)
        self.action_time_mlp_in = Float32Linear(2 * width, width)
        self.action_time_mlp_out = Float32Linear(width, width)

    def project_context(
        self, fused_tokens: list[KeyValue], context_mask: Tensor | None = None, state: Tensor | None = None
    ) -> ExpertContext:
        context = super().project_context(fused_tokens, context_mask, state)
        if not self.config.use_state_input:
            return context
        if state is None:
            raise ValueError("state: got None, expected (B, P); use_state_input is true")
        x = self.state_proj(F.pad(state, (0, self.config.per_action_dim - state.shape[1])))[:, None, None]  # (B, M = 1, 1, D)
        turns, joined = self._turns(context.mask.sum(1), 1), []
        layers = cast("list[ExpertLayer]", list(self.layers))
        for layer, past in zip(layers, context.keys_values, strict=True):
            own = layer.keys_values(layer.input_layernorm(x)[0].flatten(0, 1), turns)
            joined.append(tuple(torch.cat([old, new.to(old.dtype)], 2) for old, new in zip(past, own, strict=True)))
            if layer is not layers[-1]:
                x = layer(x, past, context.mask, turns, (None, None))
        turns = self._turns(context.mask.sum(1) + 1, self.config.horizon)
        return ExpertContext(cast("list[KeyValue]", joined), F.pad(context.mask, (0, 1), value=True), turns)

    def _modulation(self, time: Tensor, context: ExpertContext) -> Modulation:
        """The time's part of the first layer of the MLP (B or 1, M, 1, D), which needs no action."""
        weight = self.action_time_mlp_in.weight[:, self.config.embed_dim :]
        mixed = Float32Linear.part(self._time_embedding(time), weight, self.action_time_mlp_in.bias)
        return Modulation([], mixed[:, :, None])

    def _tokens(self, draws: Tensor, modulation: Modulation) -> Tensor:
        weight = self.action_time_mlp_in.weight[:, : self.config.embed_dim]
        tokens: Tensor = self.action_time_mlp_out(
            F.silu(Float32Linear.part(self.action_in_proj(draws), weight) + modulation.final)
        )
        return tokens


class Pi05ActionHead(ExpertActionHead):
    """pi0.5: the flow time modulates every norm; the state, if any, is in the prompt."""

    norm = AdaptiveRMSNorm

    def __init__(self, config: ActionHeadConfig, text: TextSizes, state_dim: int) -> None:
        super().__init__(config, text, state_dim)
        self.time_mlp_in = Float32Linear(config.embed_dim, config.embed_dim)
        self.time_mlp_out = Float32Linear(config.embed_dim, config.embed_dim)

    def _modulation(self, time: Tensor, context: ExpertContext) -> Modulation:
        """Scale, shift and gate of both norms of every layer (B or 1, M, 1, 6 D), and of the last norm."""
        condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(self._time_embedding(time)))))[:, :, None]
        layers: list[Any] = list(self.layers)
        modules = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in layers]
        blocks = [torch.cat([norm.dense(condition) for norm in norms], -1) for norms in modules]
        return Modulation(blocks, cast("Any", self.norm_out).dense(condition))

    def _tokens(self, draws: Tensor, modulation: Modulation) -> Tensor:
        tokens: Tensor = self.action_in_proj(draws)
        return tokens

    def _of_layer(self, modulation: Modulation, number: int) -> tuple[Tensor | None, Tensor | None]:
        attention_part, mlp_part = modulation.blocks[number].chunk(2, dim=-1)
        return attention_part, mlp_part

    def _of_end(self, modulation: Modulation) -> Tensor | None:
        return modulation.final
