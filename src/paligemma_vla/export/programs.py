"""`torch.export` programs of a policy's model: graphs that need torch to run, and nothing of this package.

Both compute in float32, whatever the configuration's compute type, and hold their number of Euler steps: the loop is unrolled.
They take and give normalised numbers; tokens, pixels and units stay with `Preprocessor`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from paligemma_vla import flow
from paligemma_vla.config import ActionHeadConfig
from paligemma_vla.errors import ModelError, first_line
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.preprocess import Preprocessor

STEPS = "num_steps"  # extra file of a program: its Euler steps


class SamplerProgram(nn.Module):
    """context (B, T, E), mask (B, T) bool, state (B, P), noise (B, K, A) -> actions (B, K, A), normalised, float32."""

    def __init__(self, model: VLAModel, num_steps: int) -> None:
        super().__init__()
        self.action_head, self.num_steps = model.action_head, num_steps

    def forward(self, context: Tensor, context_mask: Tensor, state: Tensor | None, noise: Tensor) -> Tensor:
        actions: Tensor = self.action_head.get_action(context, state, context_mask, noise, self.num_steps)
        return actions


class ModelProgram(nn.Module):
    """Backbone and sampler: images (I, 3, H, W) uint8, input_ids (B, T), mask (B, T) bool, state (B, P), noise (B, K, A) ->
    actions (B, K, A), normalised, float32.

    images: those that are present, sample by sample in camera order; input_ids and mask as `PromptEncoder.encode` makes them.
    """

    def __init__(self, model: VLAModel, num_steps: int) -> None:
        super().__init__()
        self.model, self.num_steps = model, num_steps

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, state: Tensor | None, noise: Tensor) -> Tensor:
        context = self.model.paligemma_vlm.fuse(images, input_ids, attention_mask)
        actions: Tensor = self.model.action_head.get_action(context, state, attention_mask, noise, self.num_steps)
        return actions


def export_program(kind: str, model: VLAModel, preprocessor: Preprocessor, head: ActionHeadConfig) -> ExportedProgram:
    """The whole `sampler`, for any B and T, or the `model` with its backbone, for any B, T and number of images.

    model: on the CPU, where the program will compute. head: `model.action_head_config`, whose Euler steps are unrolled.
    Raises `ModelError` for a model that cannot be traced.
    """
    state = torch.rand(2, preprocessor.state.dimension) if head.use_state_input else None
    noise = flow.draw_noise((2, head.horizon, head.per_action_dim))
    program: nn.Module
    inputs: tuple[Tensor | None, ...]
    if kind == "sampler" and model.paligemma_vlm.gives != "hidden_states":
        raise ModelError("torch.export: this head reads more than one tensor of a context; take --torch_export model")
    if kind == "sampler":
        program = SamplerProgram(model, head.num_inference_timesteps)
        context = torch.rand(2, 5, model.paligemma_vlm.hidden_size)
        inputs = context, torch.ones(2, 5, dtype=torch.bool), state, noise
    else:
        program = ModelProgram(model, head.num_inference_timesteps)
        # Three images in two rows of different length: sizes that happened to agree would be taken for one.
        present = np.array([[True, True], [True, False]])
        ids, mask = preprocessor.prompts.encode(["open the drawer slowly", "push"], present)
        images = torch.from_numpy(np.stack([preprocessor.image.blank()] * 3))
        inputs = images, torch.from_numpy(ids), torch.from_numpy(mask), state, noise
    # Sizes that differ between inputs stay open; those that a model fixes are found to be fixed.
    sizes = tuple(None if value is None else dict.fromkeys(range(2), Dim.AUTO) for value in inputs)
    try:
        return torch.export.export(program.eval(), inputs, dynamic_shapes=sizes, strict=False)
    except Exception as error:  # of any kind: what cannot be traced fails in many ways
        raise ModelError(f"torch.export: {type(program).__name__} cannot be traced ({first_line(error)})") from error


def save_program(folder: Path, kind: str, model: VLAModel, preprocessor: Preprocessor, head: ActionHeadConfig) -> None:
    """Write `sampler.pt2` or `model.pt2` into `folder`."""
    program = export_program(kind, model, preprocessor, head)
    torch.export.save(program, folder / f"{kind}.pt2", extra_files={STEPS: str(head.num_inference_timesteps)})
