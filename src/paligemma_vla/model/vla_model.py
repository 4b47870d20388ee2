"""VLAModel: backbone and action head; one `forward` for training and sampling."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import ModelError, first_line
from paligemma_vla.flow import Ongoing
from paligemma_vla.model.action_head.base import Float32Linear, FlowOutput, KeyValue
from paligemma_vla.model.lora import add_adapters, merge_adapters
from paligemma_vla.model.quantize import Weights, quantize
from paligemma_vla.preprocess import ImageSpec, PromptEncoder, load_prompt_and_image_spec

SMALL = 20e6  # parameters: with fewer, a CPU answers sooner in float32, without the casts (docs/performance.md)
LARGE_TABLE = 2**20  # numbers; a smaller table is not worth a message of its own
AUTOCAST = (nn.Linear, nn.Conv2d)  # modules whose weights autocast turns into the type that is computed in


def resolve_class(path: str, key: str, promised: str) -> Any:
    """The module class behind `package.module:Class`, which has the method `promised`; raises `ModelError` with the key."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # of any kind: importing runs whatever the module holds
        raise ModelError(f"{key}: cannot find '{path}' ({first_line(error)}); expected package.module:Class") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, promised)):
        raise ModelError(f"{key}: got '{path}', expected a torch.nn.Module with {promised}(); docs/architecture.md says more")
    return found


class VLAModel(nn.Module):
    """`paligemma_vlm` + `action_head` (S3).

    config: the whole configuration. prompts, image: the backbone's input settings; None reads them from the backbone.
    backbone_config: build this architecture without loading pretrained weights (they come from a checkpoint of ours).
    """

    def __init__(
        self,
        config: VLAConfig,
        prompts: PromptEncoder | None = None,
        image: ImageSpec | None = None,
        backbone_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        vlm, head = config.model.vlm_config, config.model.action_head_config
        if prompts is None or image is None:
            prompts, image = load_prompt_and_image_spec(config)
        backbone = resolve_class(vlm.backbone, "model.vlm_config.backbone", "trainable_parameters")
        action_head = resolve_class(head.head, "model.action_head_config.head", "get_action")
        # What a head reads: the last hidden states, if it does not say.
        if getattr(action_head, "context", "hidden_states") == "keys_values":
            self.paligemma_vlm = backbone(vlm, prompts, image, backbone_config, "keys_values")
            self.action_head = action_head(head, self.paligemma_vlm.text_sizes, config.data.state_dim)
        else:
            self.paligemma_vlm = backbone(vlm, prompts, image, backbone_config)
            self.action_head = action_head(head, self.paligemma_vlm.hidden_size, config.data.state_dim)
        if head.lora is not None:
            left_out = getattr(action_head, "without_adapters", ())
            add_adapters(self.action_head, head.lora, "model.action_head_config.lora", left_out)
        self.head_has_adapters = head.lora is not None
        self.detach_context = head.detach_context
        self.configured_dtype = getattr(torch, vlm.dtype)
        self.set_stage("all")
        self.dtype = self.dtype_on("cpu")

    def dtype_on(self, device_type: str) -> torch.dtype:
        """Type of matrix products: as configured, but float32 where a CPU is faster so: without instructions for bfloat16, and
        for a small model that only answers."""
        if device_type == "cpu":
            small = sum(p.numel() for p in self.parameters()) < SMALL and not any(p.requires_grad for p in self.parameters())
            if small or not torch.cpu._is_avx512_bf16_supported():
                return torch.float32
        dtype: torch.dtype = self.configured_dtype
        return dtype

    def to_device(self, device: torch.device, weights: Weights | None = None) -> VLAModel:
        """Move to `device`, frozen matrices in the type that it computes in: half the memory, the same products.

        Choose what learns before (`set_stage`, `requires_grad_`). weights: quantise the backbone, which must have no adapters
        and no longer learns; raises `ModelError` where that is impossible.
        """
        self.cast_for(device)
        if weights is not None:
            quantize(self.paligemma_vlm, weights, device)
        return self.to(device)

    def cast_for(self, device: torch.device) -> None:
        """Cast matrices that do not learn to the type that `device` computes in, everything else to float32."""
        self.dtype = self.dtype_on(device.type)
        for module in self.modules():
            matrices = isinstance(module, (*AUTOCAST, nn.Embedding)) and not isinstance(module, Float32Linear)
            for parameter in module.parameters(recurse=False):
                frozen_matrix = matrices and not parameter.requires_grad
                parameter.data = parameter.data.to(self.dtype if frozen_matrix else torch.float32)

    def set_stage(self, train: str) -> None:
        """Choose what learns: `head` alone, or `all` that the configuration does not freeze."""
        free: set[nn.Parameter] = set()
        # A detached context gives the backbone no gradient. DDP needs a gradient for each parameter that learns (D9).
        if train == "all" and not self.detach_context:
            free = set(self.paligemma_vlm.trainable_parameters())
        for parameter in self.paligemma_vlm.parameters():
            parameter.requires_grad_(parameter in free)
        self.backbone_learns = bool(free)

    def merge_adapters(self, dtype: torch.dtype) -> None:
        """Add adapters to the weights beside them, and keep the sums in `dtype`."""
        if self.paligemma_vlm.config.lora is not None:
            self.paligemma_vlm.merge_adapters(dtype)
        if self.head_has_adapters:
            merge_adapters(self.action_head, dtype)

    def _autocast(self, device_type: str) -> torch.autocast:
        return torch.autocast(device_type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    def get_vl_embeddings(
        self,
        image_1_batch: Tensor,
        raw_prompt_texts_batch: Sequence[str],
        vlm_attention_mask_batch: Tensor | None = None,
        image_2_batch: Tensor | None = None,
        **more: Any,
    ) -> Tensor | list[KeyValue]:
        """The fused context (B, T, E), or what else the head reads; arguments as in `forward`."""
        with self._autocast(image_1_batch.device.type):
            return self._context(image_1_batch, raw_prompt_texts_batch, vlm_attention_mask_batch, image_2_batch, **more)[0]

    def _context(
        self,
        image_1_batch: Tensor,
        prompts: Sequence[str],
        attention_mask: Tensor | None,
        image_2_batch: Tensor | None,
        further_images: Sequence[Tensor] = (),
        input_ids: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> tuple[Tensor | list[KeyValue], Tensor]:
        images = [image_1_batch, *([] if image_2_batch is None else [image_2_batch]), *further_images]
        # (B, S, C, H, W): the last frame is what the model uses (S3.2).
        images = [image[:, -1] if image.dim() == 5 else image for image in images]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.backbone_learns):
            context, mask = self.paligemma_vlm(images, prompts, input_ids, attention_mask, image_mask)
        return context, mask

    def forward(  # noqa: PLR0913 - the specification's arguments
        self,
        image_1_batch: Tensor,
        raw_prompt_texts_batch: Sequence[str],
        vlm_attention_mask_batch: Tensor | None = None,
        state_batch: Tensor | None = None,
        image_2_batch: Tensor | None = None,
        actions_gt_seq: Tensor | None = None,
        *,
        further_images: Sequence[Tensor] = (),
        input_ids: Tensor | None = None,
        image_mask: Tensor | None = None,
        action_mask: Tensor | None = None,
        flow_time: Tensor | None = None,
        flow_noise: Tensor | None = None,
        flow_prefix: Tensor | None = None,
        num_steps: int | None = None,
        ongoing: Ongoing | None = None,
    ) -> FlowOutput | Tensor:
        """Training objective with `actions_gt_seq`, sampled actions without (S3.2, S4.1).

        image_n_batch: (B, 3, H, W) uint8, float when already normalised, or (B, S, 3, H, W), of which the last frame is used.
        raw_prompt_texts_batch: B instructions, encoded here unless input_ids and vlm_attention_mask_batch (B, T) are given.
        state_batch (B, P) normalised. actions_gt_seq (B, K * A) or (B, K, A) normalised, with action_mask (B, K, A).
        further_images: cameras 3 .. N. image_mask (B, N): which cameras are present. flow_time (B, M), flow_noise
        (B, M, K, A): drawn here when missing; in sampling flow_noise is the start, (B, 1, K, A). flow_prefix (B, M): so many
        first actions are given. num_steps: Euler steps. ongoing: what sampled actions have to continue.

        Returns `FlowOutput`, or actions (B, K, A), normalised, float32.
        """
        with self._autocast(image_1_batch.device.type):
            inputs = (image_1_batch, raw_prompt_texts_batch, vlm_attention_mask_batch, image_2_batch)
            context, mask = self._context(*inputs, further_images, input_ids, image_mask)
            if actions_gt_seq is None:
                noise = None if flow_noise is None else flow_noise[:, 0]
                more = {} if ongoing is None else {"ongoing": ongoing}  # not every head knows it
                actions: Tensor = self.action_head.get_action(context, state_batch, mask, noise, num_steps, **more)
                return actions
            prefix = {} if flow_prefix is None else {"flow_prefix": flow_prefix}
            output: FlowOutput = self.action_head.loss(
                context, actions_gt_seq, state_batch, mask, action_mask, flow_time, flow_noise, **prefix
            )
            return output


def backbone_layers(model: VLAModel) -> list[nn.Module]:
    """Layers of the backbone, which a sharded model gathers one by one.

    The action head stays gathered through the step: sampling passes through it once per Euler step.
    """
    return [layer for module in model.paligemma_vlm.modules() if isinstance(module, nn.ModuleList) for layer in module]


def layer_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Matrices of the layers, of backbone and head: what the optimiser Muon is for."""
    layers = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return {parameter for module in layers for parameter in module.parameters() if parameter.ndim == 2}


def large_tables(model: VLAModel) -> list[nn.Module]:
    """Token tables, which a sharded model gathers by themselves: they are used once per step."""
    tables = [module for module in model.paligemma_vlm.modules() if isinstance(module, nn.Embedding)]
    return [table for table in tables if table.weight.numel() >= LARGE_TABLE]


def arguments_from_batch(batch: dict[str, Any], sample: bool = False, num_steps: int | None = None) -> dict[str, Any]:
    """Keyword arguments for `VLAModel.forward` from a batch of the loader; with `sample` those that sample actions."""
    arguments = {
        "image_1_batch": batch["image_1"],
        "raw_prompt_texts_batch": batch["raw_prompt_text"],
        "vlm_attention_mask_batch": batch["vlm_attention_mask"],
        "state_batch": batch["state"],
        "image_2_batch": batch.get("image_2"),
        "further_images": [batch[f"image_{n}"] for n in range(3, batch["image_mask"].shape[1] + 1)],
        "input_ids": batch["input_ids"],
        "image_mask": batch["image_mask"],
        "flow_noise": batch["flow_noise"],
    }
    if sample:
        return {**arguments, "num_steps": num_steps}
    return {
        **arguments,
        "actions_gt_seq": batch["action"],
        "action_mask": batch["action_mask"],
        "flow_time": batch["flow_time"],
        "flow_prefix": batch.get("flow_prefix"),
    }
