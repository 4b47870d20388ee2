"""What an answer and a training step of PaliGemma 3B cost in operations and bytes, stage by stage; nothing is run.

The model is built on torch's meta device, where tensors have shapes and no storage, and every product of its forward pass is
counted. A stage takes at least as long as its operations at the peak rate, or its weights (bfloat16) through the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from paligemma_vla.config import load_config
from paligemma_vla.model.architectures import known_architecture
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.preprocess import ImageSpec

MODEL, CONFIG, PROMPT, EULER_STEPS = "paligemma-3b-pt-224", "configs/vla_config.yaml", 21, 50
# Dense bfloat16 operations and bytes a second, from the makers' data sheets.
CHIPS = {"H100 SXM": (989e12, 3.35e12), "RTX 4090": (165e12, 1.01e12)}


class Stage(NamedTuple):
    """operations: multiplications and additions of one pass. weights: numbers read. passes: of one answer."""

    name: str
    operations: float
    weights: int
    passes: int

    def seconds(self, chip: str) -> float:
        """Of all passes, at least."""
        rate, bandwidth = CHIPS[chip]
        return self.passes * max(self.operations / rate, 2 * self.weights / bandwidth)


def stages(cameras: int) -> list[Stage]:
    """The stages of one answer to one observation."""
    config = load_config(CONFIG, {"model.vlm_config.num_cameras": cameras, "model.vlm_config.model_name_or_path": MODEL})
    architecture = known_architecture(MODEL)
    assert architecture is not None
    side, patch = architecture.vision_config.image_size, architecture.vision_config.patch_size
    with torch.device("meta"):
        model = VLAModel(config, NotImplemented, ImageSpec(side, (0.5,) * 3, (0.5,) * 3), architecture.to_dict()).eval()
        pixels = torch.empty(cameras, 3, side, side)
        tokens = cameras * (side // patch) ** 2 + PROMPT
        embedded = torch.empty(1, tokens, architecture.text_config.hidden_size)
        state, horizon = torch.empty(1, config.data.state_dim), config.model.action_head_config.horizon
        action = torch.empty(1, 1, horizon, config.model.action_head_config.per_action_dim)
    backbone, head = model.paligemma_vlm.backbone, model.action_head
    with torch.inference_mode():
        context = head.project_context(embedded, None, state)
        modulation = head._modulation(torch.empty(1, 1, device="meta"), context)
        ways: list[tuple[str, Callable[[], object], list[nn.Module | Tensor], int]] = [
            (
                "vision tower and projector",
                lambda: backbone.get_image_features(pixels),
                [backbone.vision_tower, backbone.multi_modal_projector],
                1,
            ),
            (
                "language model",
                lambda: backbone.language_model(inputs_embeds=embedded),
                [*backbone.language_model.layers],
                1,
            ),
            (
                "head: keys and values of the context, modulations of all times",
                lambda: (
                    head.project_context(embedded, None, state),
                    head._modulation(torch.empty(1, EULER_STEPS, device="meta"), context),
                ),
                [head.context_proj, *(block.key_value for block in head.blocks), *(block.modulation for block in head.blocks)],
                1,
            ),
            (
                "head: an Euler step",
                lambda: head._velocity(action, modulation, context),
                [
                    part
                    for block in head.blocks
                    for part in (block.qkv, block.self_out, block.query, block.cross_out, block.mlp)
                ],
                EULER_STEPS,
            ),
        ]
        counted = []
        for name, run, read, passes in ways:
            with FlopCounterMode(display=False) as counter:
                run()
            weights = sum(p.numel() for module in read if isinstance(module, nn.Module) for p in module.parameters())
            counted.append(Stage(name, float(counter.get_total_flops()), weights, passes))
    return counted


def table() -> str:
    """Markdown: a line per stage and number of cameras."""
    chips = " | ".join(f"{chip}, ms at least" for chip in CHIPS)
    lines = [
        f"| stage | cameras | GFLOP a pass | weights, MB | passes | {chips} |",
        "|---|---|---|---|---|" + "---|" * len(CHIPS),
    ]
    for cameras in (1, 2):
        answer = stages(cameras)
        for stage in answer:
            times = " | ".join(f"{stage.seconds(chip) * 1e3:.2f}" for chip in CHIPS)
            numbers = f"{stage.operations / 1e9:,.1f} | {2 * stage.weights / 1e6:,.0f} | {stage.passes}"
            lines.append(f"| {stage.name} | {cameras} | {numbers} | {times} |")
        total = " | ".join(f"**{sum(stage.seconds(chip) for stage in answer) * 1e3:.2f}**" for chip in CHIPS)
        operations = sum(stage.operations * stage.passes for stage in answer) / 1e9
        lines.append(f"| **an answer** | {cameras} | {operations:,.0f} in all | | | {total} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
