"""Attention, by torch's fused kernels or, where their backward pass is slow, by two products and a softmax.

The fused kernels of CPUs take up to ten times as long to go back in bfloat16 as the same in three operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CHOSEN = "paligemma_vla"  # its name in transformers


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """query (B, H, Q, D), key and value (B, H, K, D), or of fewer heads, mask bool, broadcast to (B, 1, Q, K): True where a key
    may be attended. Returns (B, H, Q, D).
    """
    if _learns_slowly(value):
        return _in_three_operations(query, key, value, mask, query.shape[-1] ** -0.5)
    if key.shape[1] != query.shape[1] and (mask is None or mask.shape[2] == 1):
        # Heads that share their keys stand side by side as queries, so that nothing is repeated.
        grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask).view(query.shape)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _learns_slowly(value: Tensor) -> bool:
    return torch.is_grad_enabled() and value.device.type == "cpu" and value.dtype is torch.bfloat16


def _in_three_operations(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `attention`; key and value may be of fewer heads, which each serve as many of the query's; the softmax in float32."""
    batch, heads, queries, size = query.shape
    groups = key.shape[1]
    # Heads that share their keys stand side by side as queries, so that nothing is repeated.
    query = query.to(value.dtype).reshape(batch, groups, -1, size)
    scores = (query @ key.to(value.dtype).transpose(-1, -2)).float()  # (B, G, H / G Q, K)
    if mask is None:
        scores = scores * scale
    else:
        away = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
        if mask.shape[2] > 1:  # it differs from query to query
            scores = scores.unflatten(2, (heads // groups, queries))
            away = away[:, :, None]
        scores = torch.add(away, scores, alpha=scale).view(batch, groups, -1, key.shape[2])
    mixed = scores.softmax(dim=-1).to(value.dtype) @ value
    return mixed.view(batch, heads, queries, size)


def _for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What a layer of transformers calls; its mask is (B, 1, Q, K). Returns (B, Q, H, D)."""
    causal = more.get("is_causal") if more.get("is_causal") is not None else getattr(module, "is_causal", True)
    plain = attention_mask.dtype is torch.bool if attention_mask is not None else not causal
    if plain and not dropout and scaling is not None and _learns_slowly(value):
        return _in_three_operations(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)


AttentionInterface.register(CHOSEN, _for_transformers)
AttentionMaskInterface.register(CHOSEN, sdpa_mask)
