"""Attention: every way of computing it gives the same, and the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from paligemma_vla.model import attention as module
from paligemma_vla.model.attention import attention

BATCH, HEADS, QUERIES, KEYS, SIZE = 3, 4, 5, 7, 16
BFLOAT16 = 2e-2  # it has 8 bits


def random(heads: int, tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    made = torch.randn(BATCH, tokens, heads, SIZE, generator=torch.Generator().manual_seed(seed))
    return made.transpose(1, 2).to(dtype).requires_grad_()


def mask_of(queries: int) -> Tensor:
    """Keys that may be attended, (B, 1, queries, K): at least one for every query."""
    mask = torch.rand(BATCH, 1, queries, KEYS, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[..., 0] = True
    return mask


def with_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return [output.detach().float(), *(g.float() for g in torch.autograd.grad((output.float() * weights).sum(), inputs))]


@pytest.mark.parametrize("masked", [0, 1, QUERIES], ids=["no mask", "one for all queries", "one for each query"])
def test_three_operations_give_what_the_kernel_gives(masked: int) -> None:
    inputs = [random(HEADS, QUERIES, 0), random(HEADS, KEYS, 1), random(HEADS, KEYS, 2)]
    mask = mask_of(masked) if masked else None
    assert module._learns_slowly(inputs[2])
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = with_gradients(F.scaled_dot_product_attention(*exact, attn_mask=mask), exact)
    for got, wanted in zip(with_gradients(attention(*inputs, mask), inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=BFLOAT16, rtol=BFLOAT16)


class Layer(nn.Module):
    """What a layer of transformers says of itself."""

    num_key_value_groups, is_causal = HEADS // 2, True


@pytest.mark.parametrize("masked", [1, QUERIES])
def test_layers_whose_heads_share_keys(masked: int) -> None:
    """As transformers' own function, which repeats them."""
    inputs = [random(HEADS, QUERIES, 0), random(2, KEYS, 1), random(2, KEYS, 2)]
    mask = mask_of(masked).expand(-1, -1, QUERIES, -1)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = with_gradients(sdpa_attention_forward(Layer(), *exact, mask, scaling=0.3)[0], exact)
    output, _ = module._for_transformers(Layer(), *inputs, mask, scaling=0.3)
    for got, wanted in zip(with_gradients(output, inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=BFLOAT16, rtol=BFLOAT16)


def test_a_causal_layer_without_a_mask_stays_causal() -> None:
    inputs = [random(HEADS, QUERIES, 0), random(HEADS, QUERIES, 1), random(HEADS, QUERIES, 2)]
    layer = Layer()
    layer.num_key_value_groups = 1
    output, _ = module._for_transformers(layer, *inputs, None, scaling=0.25)
    (gradient,) = torch.autograd.grad(output[:, 0].float().sum(), inputs[2])
    assert gradient[:, :, 0].abs().max() > 0 and not gradient[:, :, 1:].any()


def test_without_gradients_and_in_float32_the_kernel_computes() -> None:
    value = random(HEADS, KEYS, 2)
    with torch.no_grad():
        assert not module._learns_slowly(value)
    assert not module._learns_slowly(random(HEADS, KEYS, 2, torch.float32))
