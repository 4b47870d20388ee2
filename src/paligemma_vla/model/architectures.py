"""The architectures that Google published as PaliGemma, by name, and that of any checkpoint.

Sizes as in the models' `config.json` on the hub, and in Steiner et al. 2024 (PaliGemma 2). They make it possible to plan
memory, and to measure with random weights, where the gated files are not at hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, Gemma2Config, GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

from paligemma_vla.config import VLMConfig
from paligemma_vla.hub import backbone_errors, check_backbone

VOCABULARY, IMAGE_TOKEN, PATCH = 257_216, 257_152, 14
NAME = re.compile(r"(?:google/)?paligemma(2?)-(3b|10b|28b)-(?:[\w-]+-)?(224|448|896)(?:-\w+)*")
# (hidden_size, intermediate_size, layers, heads, key-value heads, head_dim, query_pre_attn_scalar)
GEMMA2 = {
    "3b": (2304, 9216, 26, 8, 4, 256, 256),
    "10b": (3584, 14336, 42, 16, 8, 256, 256),
    "28b": (4608, 36864, 46, 32, 16, 128, 144),
}


def known_architecture(name: str) -> PaliGemmaConfig | None:
    """The architecture behind a name such as `google/paligemma2-3b-pt-224`; None for any other."""
    match = NAME.fullmatch(name)
    if match is None or (not match[1] and match[2] != "3b"):
        return None
    text = _gemma2(match[2]) if match[1] else _gemma()
    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=int(match[3]),
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vocab_size=VOCABULARY,
        projection_dim=text.hidden_size,
        hidden_size=text.hidden_size,
    )


def _gemma() -> GemmaConfig:
    return GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    )


def _gemma2(size: str) -> Gemma2Config:
    hidden, intermediate, layers, heads, key_value_heads, head_dim, scalar = GEMMA2[size]
    return Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
    )


def read_architecture(vlm: VLMConfig) -> dict[str, Any]:
    """`config.json` of the configured backbone as a dictionary. Raises `ModelError` when it cannot be read."""
    check_backbone(vlm.model_name_or_path, vlm.revision)
    with backbone_errors(vlm.model_name_or_path):
        return dict(AutoConfig.from_pretrained(vlm.model_name_or_path, revision=vlm.revision).to_dict())


def architecture_to_plan(vlm: VLMConfig) -> tuple[dict[str, Any], bool]:
    """The configured backbone's architecture, and whether it is the published one because its files are not here."""
    published = known_architecture(vlm.model_name_or_path)
    if published is None or Path(vlm.model_name_or_path).is_dir():
        return read_architecture(vlm), False
    here = try_to_load_from_cache(vlm.model_name_or_path, "config.json", revision=vlm.revision)
    if isinstance(here, str):  # the network is not asked: the published sizes are known
        return dict(PaliGemmaConfig.from_json_file(here).to_dict()), False
    return dict(published.to_dict()), True
