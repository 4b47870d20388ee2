"""One observation's answer by models of several sizes, in float32 and in bfloat16: below which size the casts cost more than
they save (`vla_model.SMALL`). The first is the demonstration's. 10 Euler steps, batch 1."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.common import Row, interleaved
from paligemma_vla.config import config_from_dict
from paligemma_vla.model import vla_model
from paligemma_vla.model.memory_plan import full_batch
from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.preprocess import load_prompt_and_image_spec

PROMPT, REPEATS = 10, 9
TRAINING = ("actions_gt_seq", "action_mask", "flow_time", "flow_prefix")


class Size(NamedTuple):
    backbone: TinySpec
    head_layers: int


SIZES = [
    Size(TinySpec(), 3),
    Size(TinySpec(image_size=112, patch_size=14, width=256, vision_layers=4, text_layers=4), 4),
    Size(TinySpec(image_size=112, patch_size=14, width=384, vision_layers=4, text_layers=4), 4),
    Size(TinySpec(image_size=224, patch_size=14, width=512, vision_layers=6, text_layers=6), 6),
]


@torch.inference_mode()
def measure() -> list[Row]:
    rows = []
    for size in SIZES:
        models = {kind: _model(size, kind) for kind in ("bfloat16", "float32")}
        tokens = (size.backbone.image_size // size.backbone.patch_size) ** 2
        runs: dict[str, Callable[[], object]] = {kind: partial(model, **given) for kind, (model, given) in models.items()}
        taken = interleaved(runs, REPEATS)
        millions = sum(p.numel() for p in models["float32"][0].parameters()) / 1e6
        name = f"one observation, {millions:.1f} M parameters, {tokens} image tokens"
        rows.append(Row(f"{name}: bfloat16", *taken["bfloat16"].in_ms))
        ratio = taken["bfloat16"].median / taken["float32"].median
        rows.append(Row(f"{name}: float32", *taken["float32"].in_ms, ratio=ratio, against="bfloat16"))
    return rows


def _model(size: Size, kind: str) -> tuple[VLAModel, dict[str, Any]]:
    """A model that only answers, and an observation as its arguments."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(vla_model, "SMALL", 0):
        write_tiny_paligemma(folder, size.backbone)
        head = {"embed_dim": size.backbone.width, "num_layers": size.head_layers, "num_heads": 4, "num_inference_timesteps": 10}
        config = config_from_dict(
            {
                "data": {"train_parquet_files": "unused", "normalization_stats_path": "unused", "state_dim": 7},
                "model": {
                    "vlm_config": {"model_name_or_path": folder, "dtype": kind, "num_cameras": 1},
                    "action_head_config": head,
                },
            }
        )
        torch.manual_seed(0)
        prompts, image = load_prompt_and_image_spec(config)
        model = VLAModel(config, prompts, image).requires_grad_(False).eval().to_device(torch.device("cpu"))
    batch = full_batch(config, 1, prompts.image_tokens + PROMPT, size.backbone.image_size)
    batch["input_ids"][:, : prompts.image_tokens] = prompts.image_id
    batch["image_1_batch"].zero_()
    batch["state_batch"].zero_()
    batch["flow_noise"].zero_()
    return model, {name: value for name, value in batch.items() if name not in TRAINING}
