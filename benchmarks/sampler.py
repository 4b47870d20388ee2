"""The sampler at the size of the 3-billion model's head: 50 Euler steps, batch 1, contexts of one and two cameras.

The naive loop is the specification's, in float32: it hands the context to `predict_velocity` at each step, which projects it,
and what the flow time makes of every layer, each time. Where the processor has instructions for bfloat16, ours is also measured
with weights held so, under autocast, as a policy computes there. The limit is memory: a step reads all weights of the blocks.
"""

from __future__ import annotations

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Row, interleaved, read_bytes_per_second
from paligemma_vla.config import ActionHeadConfig
from paligemma_vla.model.action_head.flow_matching import FlowmatchingActionHead

STEPS, CAMERAS = 50, {277: "one camera", 533: "two cameras"}
REPEATS = 5


@torch.inference_mode()
def measure() -> list[Row]:
    torch.manual_seed(0)
    config = ActionHeadConfig(embed_dim=1024, num_layers=8, num_heads=8)
    head = FlowmatchingActionHead(config, context_dim=2048, state_dim=7).eval()
    for parameter in head.parameters():  # the zero-initialised layers would make the comparison empty
        parameter.normal_(0, 0.02)
    state, noise = torch.randn(1, 7), torch.rand(1, 8, 7) * 2 - 1
    half = copy.deepcopy(head)
    for module in half.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
    bandwidth = read_bytes_per_second()
    rows = []
    for tokens, cameras in CAMERAS.items():
        context = torch.randn(1, tokens, 2048)

        def naive(context: torch.Tensor = context) -> torch.Tensor:
            action = noise
            for step in range(STEPS):
                action = action + head.predict_velocity(action, step / STEPS, context, None, state) / STEPS
            return action

        def fast(context: torch.Tensor = context) -> torch.Tensor:
            return head.sample(context, None, state, noise, STEPS)

        runs = {"naive": naive, "float32": fast}
        difference = (naive() - fast()).abs().max().item()
        assert difference <= 1e-5, difference
        if torch.cpu._is_avx512_bf16_supported():

            def in_bfloat16(context: torch.Tensor = context) -> torch.Tensor:
                with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                    return half.sample(context, None, state, noise, STEPS)

            runs["bfloat16"] = in_bfloat16
        taken = interleaved(runs, REPEATS)
        # The layers that shift and scale are read once, not at each step.
        read = sum(p.numel() for name, p in head.named_parameters() if name.startswith("blocks.") and "modulation" not in name)
        read += 8 * 2 * tokens * config.embed_dim  # keys and values
        rows.append(Row(f"sampler, {cameras}: naive loop, float32", *taken["naive"].in_ms))
        for kind, size in (("float32", 4), ("bfloat16", 2)):
            if kind in taken:
                one = taken[kind]
                floor = STEPS * read * size / bandwidth
                rows.append(
                    Row(
                        f"sampler, {cameras}: {kind}",
                        *one.in_ms,
                        ratio=taken["naive"].median / one.median,
                        against="naive loop, float32",
                        share=floor / one.median,
                        limit=f"{bandwidth / 1e9:.1f} GB/s read",
                    )
                )
        rows.append(
            Row(f"sampler, {cameras}: largest difference from the naive loop", difference, "normalised action", "lower")
        )
    return rows
