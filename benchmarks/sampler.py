"""The sampler at the size of the 3-billion model's head: 50 Euler steps, 256 image tokens and a prompt, batch 1.

The naive loop is the specification's: it hands the context to `predict_velocity` at each step, which projects it each time.
"""

from __future__ import annotations

import torch

from benchmarks.common import Row, best_seconds
from paligemma_vla.config import ActionHeadConfig
from paligemma_vla.model.action_head.flow_matching import FlowmatchingActionHead

STEPS = 50


@torch.inference_mode()
def measure() -> list[Row]:
    torch.manual_seed(0)
    config = ActionHeadConfig(embed_dim=1024, num_layers=8, num_heads=8)
    head = FlowmatchingActionHead(config, context_dim=2048, state_dim=7).eval()
    for parameter in head.parameters():  # the zero-initialised layers would make the comparison empty
        parameter.normal_(0, 0.02)
    context, state, noise = torch.randn(1, 280, 2048), torch.randn(1, 7), torch.rand(1, 8, 7) * 2 - 1

    def naive() -> torch.Tensor:
        action = noise
        for step in range(STEPS):
            action = action + head.predict_velocity(action, step / STEPS, context, None, state) / STEPS
        return action

    def fast() -> torch.Tensor:
        return head.sample(context, None, state, noise, STEPS)

    difference = (naive() - fast()).abs().max().item()
    assert difference <= 1e-5, difference
    seconds, reference = best_seconds(fast, 3), best_seconds(naive, 3)
    return [
        Row("sampler, 50 steps, head 1024 x 8", seconds * 1000, "ms", "lower"),
        Row("naive loop / sampler", reference / seconds, "times as long", "higher"),
        Row("naive loop - sampler, largest difference", difference, "normalised action", "lower"),
    ]
