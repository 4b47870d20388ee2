"""The architectures that Google published as PaliGemma, by name, and that of any checkpoint.

Sizes as in the models' `config.json` on the hub, and in Steiner et al. 2024 (PaliGemma 2). They make it possible to plan
memory, and to measure with random weights, where the gated files are not at hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, Gemma2Config, GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

from paligemma_vla.config import VLMConfig
from paligemma_vla.hub import backbone_errors, check_backbone

VOCABULARY, IMAGE_TOKEN, PATCH = 257_216, 257_152, 14
NAME = re.compile(r"(?:google/)?paligemma(2?)-(3b|10b|28b)-(?:[\w-]+-)?(224|448|896)(?:-\w+)*")
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    "query_pre_attn_scalar",  # of Gemma 2 alone
)
GEMMA = {"3b": (2048, 16384, 18, 8, 1, 256)}
GEMMA2 = {
    "3b": (2304, 9216, 26, 8, 4, 256, 256),
    "10b": (3584, 14336, 42, 16, 8, 256, 256),
    "28b": (4608, 36864, 46, 32, 16, 128, 144),
}
VISION: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def known_architecture(name: str) -> PaliGemmaConfig | None:
    """The architecture behind a name such as `google/paligemma2-3b-pt-224`; None for any other."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    family, published = (Gemma2Config, GEMMA2) if match[1] else (GemmaConfig, GEMMA)
    if match[2] not in published:
        return None
    sizes: dict[str, Any] = dict(zip(SIZES, published[match[2]], strict=False))
    text = family(**sizes, vocab_size=VOCABULARY)
    return paligemma_config(text, IMAGE_TOKEN, image_size=int(match[3]), patch_size=PATCH, **VISION)


def paligemma_config(text: GemmaConfig | Gemma2Config, image_token: int, **vision: Any) -> PaliGemmaConfig:
    """A PaliGemma of a text model and a SigLIP of the sizes `vision`."""
    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=text,
        image_token_index=image_token,
        vocab_size=text.vocab_size,
        projection_dim=text.hidden_size,
        hidden_size=text.hidden_size,
    )


def read_architecture(vlm: VLMConfig) -> dict[str, Any]:
    """`config.json` of the configured backbone as a dictionary. Raises `ModelError` when it cannot be read."""
    check_backbone(vlm.model_name_or_path, vlm.revision)
    with backbone_errors(vlm.model_name_or_path):
        return dict(AutoConfig.from_pretrained(vlm.model_name_or_path, revision=vlm.revision).to_dict())


def tower_sizes(architecture: Mapping[str, Any]) -> dict[str, int]:
    """Whole numbers of the two towers by dotted key: widths, layers, heads, vocabulary."""
    towers = {name: architecture.get(name, {}) for name in ("vision_config", "text_config")}
    return {f"{tower}.{key}": value for tower, keys in towers.items() for key, value in keys.items() if type(value) is int}


def architecture_to_plan(vlm: VLMConfig) -> tuple[dict[str, Any], bool]:
    """The configured backbone's architecture, and whether it is the published one because its files are not here."""
    published = known_architecture(vlm.model_name_or_path)
    if published is None or Path(vlm.model_name_or_path).is_dir():
        return read_architecture(vlm), False
    here = try_to_load_from_cache(vlm.model_name_or_path, "config.json", revision=vlm.revision)
    if isinstance(here, str):  # the network is not asked: the published sizes are known
        return dict(PaliGemmaConfig.from_json_file(here).to_dict()), False
    return dict(published.to_dict()), True
