"""A tiny random PaliGemma with its own tokenizer, in Hugging Face format.

It is loaded through the very path that `google/paligemma-3b-pt-224` takes, so the demonstration and the tests exercise that
path without a download.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GemmaTokenizer,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from paligemma_vla.model.architectures import paligemma_config

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
CORPUS = """
open close push pull slide turn rotate twist shut move press lift pick place put grasp reach insert stack wipe pour take
drop grab release raise lower drag
the a an robot arm gripper hand please should now to from into onto in on off up down left right and with until it is
fully all way
faucet tap window drawer door handle button lever box cube block cup bowl plate mug bottle spoon towel table shelf lid peg hole
red green blue yellow white black small big top bottom front back side first second
open the drawer close the drawer slide the window open push the window shut turn the faucet on turn the tap off
pick up the red cube and place it in the bowl put the cup on the table
"""


@dataclass(frozen=True)
class TinySpec:
    """Sizes of a tiny PaliGemma. The defaults are the demonstration's: 16 image tokens, 1 M parameters.

    second: of the second generation, whose text model is Gemma 2. instructions: what its tokenizer learns besides `CORPUS`.
    """

    image_size: int = 64
    patch_size: int = 16
    vision_layers: int = 3
    text_layers: int = 2
    width: int = 128
    heads: int = 4
    vocabulary: int = 512
    seed: int = 0
    second: bool = False
    instructions: tuple[str, ...] = ()


def train_tokenizer(vocabulary: int, size: int = 0, instructions: Sequence[str] = ()) -> GemmaTokenizer:
    """Train a byte-fallback BPE with Gemma's special tokens on a small corpus of instructions.

    size: of the table; what is not learned is filled with tokens that occur in no text, as Gemma's own is. instructions: to
    learn besides.
    """
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    learner.pre_tokenizer = pre_tokenizers.Split(pattern="▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "\n"],
        initial_alphabet=["▁"],
        show_progress=False,
    )
    lines = [line.replace(" ", "▁") for line in (*CORPUS.strip().splitlines(), *instructions)]
    learner.train_from_iterator(lines * 4, trainer)
    model = json.loads(learner.to_str())["model"]
    model["vocab"].update((f"<unused{number}>", number) for number in range(len(model["vocab"]), size))
    return GemmaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])  # type: ignore[misc]


def write_tiny_paligemma(output_dir: str | Path, spec: TinySpec | None = None) -> Path:
    """Write config, random weights and processor into `output_dir`; returns it. The same spec gives the same weights."""
    spec = spec or TinySpec()
    processor = make_processor(spec.image_size, spec.patch_size, train_tokenizer(spec.vocabulary, 0, spec.instructions))
    shared = {"hidden_size": spec.width, "intermediate_size": 4 * spec.width, "num_attention_heads": spec.heads}
    text: dict[str, Any] = {
        **shared,
        "num_hidden_layers": spec.text_layers,
        "num_key_value_heads": 1,
        "head_dim": spec.width // spec.heads,
        # The processor has just added <image> and some 1,150 loc/seg tokens: only now is the vocabulary's size known.
        "vocab_size": len(processor.tokenizer),
    }
    architecture = paligemma_config(
        Gemma2Config(**text, query_pre_attn_scalar=spec.width) if spec.second else GemmaConfig(**text),
        processor.image_token_id,
        num_hidden_layers=spec.vision_layers,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        **shared,
    )
    return write_paligemma(output_dir, architecture, processor, spec.seed)


def make_processor(image_size: int, patch_size: int, tokenizer: GemmaTokenizer) -> PaliGemmaProcessor:
    """The processor of a PaliGemma that looks at square images of `image_size` px in patches of `patch_size`."""
    images: Any = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    images.image_seq_length = (image_size // patch_size) ** 2
    return PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)


def write_paligemma(
    output_dir: str | Path,
    architecture: PaliGemmaConfig,
    processor: PaliGemmaProcessor,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write config, random weights and processor in Hugging Face format into `output_dir`; returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        architecture.dtype = dtype
        model = PaliGemmaForConditionalGeneration._from_config(architecture, dtype=dtype)
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    return Path(output_dir)
