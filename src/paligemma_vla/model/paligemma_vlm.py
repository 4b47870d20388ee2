"""PaliGemmaVLM: cameras and instruction to the fused context, through PaliGemma without its language-model head.

With `model.vlm_config.lora` its weights stay as they are, and low-rank adapters beside its linear layers learn (peft).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PaliGemmaConfig, PaliGemmaModel
from transformers.initialization import no_init_weights
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaDecoderLayer, GemmaMLP, apply_rotary_pos_emb
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipVisionEmbeddings

from paligemma_vla.config import VLMConfig
from paligemma_vla.errors import ModelError
from paligemma_vla.hub import backbone_errors
from paligemma_vla.model.action_head.base import Context, KeyValue, TextSizes
from paligemma_vla.model.attention import CHOSEN
from paligemma_vla.model.lora import adapted, add_adapters, merge_adapters
from paligemma_vla.preprocess import ImageSpec, PromptEncoder

# What selective recomputation keeps: half of a layer's activations (11.9 of 24.3 GB in the plan of vla_config_ddp.yaml for 16
# samples; 2.4 where everything is recomputed), and nearly all that is slow to compute.
MATRIX_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]


class PaliGemmaVLM(nn.Module):
    """SigLIP and Gemma as one encoder: images + prompts -> (B, T, E).

    config: `model.vlm_config`. prompts, image: how the checkpoint wants its inputs. backbone_config: build this architecture
    without weights (a checkpoint's follow) instead of loading `model_name_or_path`. gives: what the action head reads.
    Raises `ModelError` when the model cannot be loaded.
    """

    pixel_mean: Tensor  # (3, 1, 1), of pixels in [0, 255]
    pixel_std: Tensor

    def __init__(
        self,
        config: VLMConfig,
        prompts: PromptEncoder,
        image: ImageSpec,
        backbone_config: dict[str, Any] | None = None,
        gives: Context = "hidden_states",
    ) -> None:
        super().__init__()
        self.config, self.prompts, self.gives = config, prompts, gives
        self.backbone = _load(config) if backbone_config is None else _build(config, backbone_config)
        _save_operations(self.backbone, config)
        if gives == "keys_values":
            _give_keys_values(self.backbone)
        if config.lora is not None:
            left_out = ("vision_tower", "multi_modal_projector") * config.freeze_vision_tower
            self.backbone.requires_grad_(False)
            frozen = (*left_out, *("language_model",) * config.freeze_language_model)
            unused = _unused_names(self.backbone) if gives == "keys_values" else ()
            add_adapters(self.backbone, config.lora, "model.vlm_config.lora", (*frozen, *unused))
        self.register_buffer("pixel_mean", torch.tensor(image.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(image.std).view(3, 1, 1) * 255, persistent=False)
        self.vision_modules = [self.backbone.vision_tower, self.backbone.multi_modal_projector]
        if config.activation_checkpointing:
            options: dict[str, Any] = {"use_reentrant": False}
            if config.activation_checkpointing == "selective":
                options["context_fn"] = partial(create_selective_checkpoint_contexts, MATRIX_PRODUCTS)
            with warnings.catch_warnings():  # 5.23 prefers a new name, which 5.17 does not know yet
                warnings.simplefilter("ignore", FutureWarning)
                self.backbone.gradient_checkpointing_enable(options)

    @property
    def hidden_size(self) -> int:
        """Width E of the context."""
        return int(self.backbone.config.get_text_config().hidden_size)

    @property
    def text_sizes(self) -> TextSizes:
        """What an expert shares with the language model."""
        text = self.backbone.config.get_text_config()
        heads, groups = text.num_attention_heads, text.num_key_value_heads
        theta = float(text.rope_parameters["rope_theta"])
        return TextSizes(text.num_hidden_layers, heads, groups, text.head_dim, theta, text.rms_norm_eps)

    def backbone_dict(self) -> dict[str, Any]:
        """The architecture, as plain data for the checkpoint."""
        return dict(self.backbone.config.to_dict())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that `freeze_vision_tower` and `freeze_language_model` leave free; with `lora` those of the adapters."""
        if self.config.lora is not None:
            adapters = [adapter for _, layer in adapted(self.backbone) for adapter in (layer.lora_A, layer.lora_B)]
            return [p for adapter in adapters for p in adapter.parameters()]
        frozen: set[nn.Parameter] = set()
        if self.gives == "keys_values":
            unused = _unused_names(self.backbone)
            frozen.update(p for name, p in self.backbone.named_parameters() if name.startswith(unused))
        if self.config.freeze_vision_tower:
            frozen.update(p for module in self.vision_modules for p in module.parameters())
        if self.config.freeze_language_model:
            frozen.update(self.backbone.language_model.parameters())
        return [p for p in self.backbone.parameters() if p not in frozen]

    def merge_adapters(self, dtype: torch.dtype = torch.float32) -> None:
        """Add the adapters to the weights beside them: a plain backbone remains."""
        merge_adapters(self.backbone, dtype)
        self.config = self.config.model_copy(update={"lora": None})

    def forward(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> tuple[Tensor | list[KeyValue], Tensor]:
        """Return the context (B, T, E), or keys and values of each layer (B, heads, T, D), and the mask (B, T) of its tokens.

        images: per camera (B, 3, H, W), uint8 as in a batch, or float already normalised. prompts: B instructions, encoded
        here unless input_ids (B, T) and attention_mask (B, T) are given. image_mask (B, N): which cameras are present; None:
        all of them.
        """
        device = self.pixel_mean.device
        if input_ids is None:
            present = torch.ones(len(images[0]), len(images), dtype=torch.bool) if image_mask is None else image_mask
            ids, mask = self.prompts.encode(prompts, present.cpu().numpy())
            input_ids, attention_mask = torch.from_numpy(ids), torch.from_numpy(mask)
        if attention_mask is None:
            raise ValueError("vlm_attention_mask: got None with input_ids, expected (B, T)")
        input_ids, attention_mask = input_ids.to(device), attention_mask.to(device).bool()
        return self.fuse(self._present(images, image_mask), input_ids, attention_mask), attention_mask

    def fuse(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor | list[KeyValue]:
        """The context of pixels (I, 3, H, W), uint8 or normalised, and tokens (B, T), all on the model's device.

        pixels: the I images that are present, sample by sample in camera order.
        """
        if pixels.dtype == torch.uint8:
            pixels = (pixels.float() - self.pixel_mean).div_(self.pixel_std)
        # The backbone would count the image tokens, and so wait for a GPU, and copy the pictures' into their slots one by one.
        pictures = self.backbone.get_image_features(pixels).pooler_output.flatten(0, 1)  # (I * image tokens, E)
        slots = input_ids == self.backbone.config.image_token_id
        number = slots.flatten().cumsum(0).sub_(1).clamp_(min=0).view(slots.shape)
        text = self.backbone.get_input_embeddings()(input_ids.masked_fill(slots, 0))
        tokens = torch.where(slots[..., None], F.embedding(number, pictures.to(text.dtype)), text)
        if self.gives == "keys_values":
            return self._keys_values(tokens, attention_mask)
        output = self.backbone(
            inputs_embeds=tokens,
            attention_mask=attention_mask.long(),
            # Counted over real tokens only, so an absent camera or padding shifts nothing; from 1, as in pretraining.
            position_ids=attention_mask.long().cumsum(dim=1).clamp(min=1),
            # All prefix: without it transformers masks causally or not depending on kernel and padding.
            token_type_ids=torch.zeros_like(input_ids),
            use_cache=False,
        )
        context: Tensor = output.last_hidden_state
        return context

    def _keys_values(self, tokens: Tensor, attention_mask: Tensor) -> list[KeyValue]:
        """Keys, turned by their positions, and values (B, heads, T, D) of every layer, from tokens (B, T, E)."""
        text: Any = self.backbone.language_model
        mask = attention_mask[:, None, None].expand(-1, 1, tokens.shape[1], -1)  # every token sees all that are real
        if text.config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(~mask, torch.finfo(tokens.dtype).min)
        turns = text.rotary_emb(tokens, position_ids=(attention_mask.long().cumsum(1) - 1).clamp(min=0))
        collected = []
        for layer in text.layers:
            tokens, *key_value = layer(tokens, attention_mask=mask, position_embeddings=turns)
            collected.append((key_value[0], key_value[1]))
        return collected

    def _present(self, images: Sequence[Tensor], image_mask: Tensor | None) -> Tensor:
        """Present images, sample by sample in camera order: (number of images, 3, H, W)."""
        device = self.pixel_mean.device
        stacked = torch.stack([image.to(device, non_blocking=True) for image in images], dim=1)  # (B, N, 3, H, W)
        pixels = stacked.flatten(0, 1)
        return pixels if image_mask is None or bool(image_mask.all()) else pixels[image_mask.flatten().to(device)]


class PatchEmbedding(nn.Conv2d):
    """A convolution of patches that do not overlap, as the matrix product that it is: on CPUs several times as fast."""

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (I, C, H, W) to (I, D, H / patch, W / patch)."""
        high, wide = self.kernel_size
        patches = pixels.unflatten(3, (-1, wide)).unflatten(2, (-1, high)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PrefixLayer(GemmaDecoderLayer):
    """A layer that also gives its keys and values. The last one computes nothing else: nothing else of it is read."""

    last = False

    def forward(self, tokens: Tensor, attention_mask: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """tokens (B, T, E) to the same, keys and values (B, heads, T, D)."""
        if self.last:
            attn, normed = self.self_attn, self.input_layernorm(tokens)
            key, value = (
                part(normed).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in (attn.k_proj, attn.v_proj)
            )
            return tokens, apply_rotary_pos_emb(key, key, *position_embeddings)[1], value
        seen = _Seen()
        tokens = super().forward(
            tokens, attention_mask=attention_mask, position_embeddings=position_embeddings, past_key_values=cast("Any", seen)
        )
        return tokens, *seen.key_value


class _Seen:
    """In place of transformers' cache: keeps what a layer's attention computes."""

    def update(self, key: Tensor, value: Tensor, layer: int, *more: Any) -> KeyValue:
        self.key_value = key, value
        return self.key_value


def _give_keys_values(backbone: PaliGemmaModel) -> None:
    layers: Any = backbone.language_model.layers
    if not all(type(layer) is GemmaDecoderLayer for layer in layers):
        raise ModelError(
            "model.action_head_config.head: an expert reads keys and values of a Gemma of the first generation (PaliGemma 3B); "
            f"got a backbone of {type(layers[0]).__name__}"
        )
    for layer in layers:
        layer.__class__ = PrefixLayer
    layers[-1].last = True


def _unused_names(backbone: PaliGemmaModel) -> tuple[str, ...]:
    """How names begin of what keys and values do not depend on."""
    layers: Any = backbone.language_model.layers
    parts = ("self_attn.q_proj.", "self_attn.o_proj.", "mlp.", "post_attention_layernorm.")
    return "language_model.norm.", *(f"language_model.layers.{len(layers) - 1}.{part}" for part in parts)


def _save_operations(backbone: PaliGemmaModel, config: VLMConfig) -> None:
    """Let transformers' modules compute what they do in fewer operations."""
    for module in backbone.modules():
        if isinstance(module, nn.Embedding):  # a table in bfloat16 would make the layers' sums bfloat16 too
            module.register_forward_hook(_in_float32)
        elif isinstance(module, SiglipVisionEmbeddings):
            module.patch_embedding.__class__ = PatchEmbedding
        elif isinstance(module, GemmaAttention | SiglipAttention | GemmaMLP):
            module.register_forward_pre_hook(_cast_once, with_kwargs=True)
    if config.attn_implementation is None:
        for tower in (backbone.vision_tower, backbone.language_model):
            if tower.config._attn_implementation == "sdpa":
                tower.config._attn_implementation = CHOSEN


def _in_float32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def _cast_once(module: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What several linear layers are given, in the type that autocast would turn it into for each of them."""

    def cast(value: Any, name: str = "hidden_states") -> Any:
        if name != "hidden_states" or value.is_meta or not torch.is_autocast_enabled(value.device.type):
            return value
        return value.to(torch.get_autocast_dtype(value.device.type))

    return tuple(map(cast, inputs)), {name: cast(value, name) for name, value in more.items()}


def _weights_dtype(config: VLMConfig) -> torch.dtype:
    """Type to load weights in: float32 for masters that the optimiser updates, the compute type when none of them learns."""
    return getattr(torch, config.dtype) if config.frozen or config.lora is not None else torch.float32


def _load(config: VLMConfig) -> PaliGemmaModel:
    with backbone_errors(config.model_name_or_path):
        loaded: Any = PaliGemmaModel.from_pretrained(
            config.model_name_or_path,
            revision=config.revision or "main",
            dtype=_weights_dtype(config),
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model: PaliGemmaModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    # The language model's head is its table of tokens again, and nothing here reads it.
    faults = {
        "missing": report["missing_keys"],
        "of another shape": report["mismatched_keys"],
        "unexpected": [name for name in report["unexpected_keys"] if not name.endswith("lm_head.weight")],
    }
    listed = [f"{kind}: {', '.join(sorted(map(str, names))[:5])}" for kind, names in faults.items() if names]
    if listed:
        raise ModelError(f"{config.model_name_or_path}: weights {'; '.join(listed)}; is it a PaliGemma, and complete?")
    return model


def _build(config: VLMConfig, backbone_config: dict[str, Any]) -> PaliGemmaModel:
    """The architecture with weights of no meaning: a checkpoint's follow."""
    architecture = PaliGemmaConfig.from_dict(backbone_config)
    if config.attn_implementation is not None:
        architecture._attn_implementation = config.attn_implementation
    with no_init_weights():
        model = PaliGemmaModel(architecture)
    for parameter in model.parameters():  # not the buffers: rotary frequencies need float32
        parameter.data = parameter.data.to(_weights_dtype(config))
    return model
