"""A training step with its data, beside the specification taken literally: a tiny model, and a shallow one as wide as 1024.

The literal one computes in float32 and goes by the letter: it decodes windows of eight frames with Pillow, of which the model
uses the last, prepares them with transformers' processor, pads instructions to the longest that is allowed, and trains
transformers' own modules with one (t, noise) a sample, as ours does here. The limit is the rate of products in the step's type.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor, PaliGemmaModel

from benchmarks.common import Row, demo_config, interleaved, matrix_product_flops, write_episodes
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.loader import load_batches
from paligemma_vla.data.order import RunSampler
from paligemma_vla.model.action_head.flow_matching import FlowmatchingActionHead
from paligemma_vla.model.tiny import TinySpec
from paligemma_vla.training.distributed import join
from paligemma_vla.training.trainer import Trainer

STEPS, ROUNDS, WINDOW = 6, 3, 8
SIZES: dict[str, tuple[TinySpec, int, dict[str, Any]]] = {
    "tiny": (TinySpec(), 32, {}),
    "width 1024, 2 + 2 + 2 layers": (
        TinySpec(image_size=112, patch_size=14, vision_layers=2, text_layers=2, width=1024, heads=8),
        16,
        {"model__action_head_config__embed_dim": 1024, "model__action_head_config__num_layers": 2},
    ),
}


def measure() -> list[Row]:
    rows = []
    for size, (spec, batch, overrides) in SIZES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_episodes(folder / "episodes", 8, 60, spec.image_size, cameras=1, state_dim=7, action_dim=7)
            common = {
                "data__batch_size": batch,
                "training__epochs": 1000,
                "training__save_every_n_epochs": 1000,
                "model__action_head_config__num_flow_samples": 1,
                **overrides,
            }
            kinds = ["float32", *(["bfloat16"] if torch.cpu._is_avx512_bf16_supported() else [])]
            configs = {kind: demo_config(folder, spec, 1, **common, model__vlm_config__dtype=kind) for kind in kinds}
            trainers = {kind: Trainer(config, join("cpu")) for kind, config in configs.items()}
            runs: dict[str, Callable[[], object]] = {"literal": Literal(configs["float32"]).train}
            runs |= {kind: partial(ours, trainer) for kind, trainer in trainers.items()}
            taken = interleaved(runs, ROUNDS)
            literal = taken["literal"].rate(STEPS * batch, "samples/s")
            rows.append(Row(f"training, {size}: literal, float32", *literal))
            for kind, trainer in trainers.items():
                limit = matrix_product_flops(getattr(torch, kind))
                share = flops_of_a_step(trainer) * STEPS / taken[kind].median / limit
                rows.append(
                    Row(
                        f"training, {size}: {kind}",
                        *taken[kind].rate(STEPS * batch, "samples/s"),
                        ratio=taken["literal"].median / taken[kind].median,
                        against="literal, float32",
                        share=share,
                        limit=f"{limit / 1e9:.0f} GFLOP/s of {kind} products",
                    )
                )
    return rows


def batches(trainer: Trainer, steps: int) -> Iterator[Any]:
    return load_batches(trainer.data.train, RunSampler(trainer.data.order, 0, steps, 0, 1, 1), trainer.config, pin_memory=False)


def ours(trainer: Trainer) -> None:
    trainer.learning = None
    for batch in batches(trainer, STEPS):
        trainer._enter_stage()
        trainer._train_step([batch])


def flops_of_a_step(trainer: Trainer) -> float:
    """Of matrix products and attention, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        trainer._forward(next(batches(trainer, 1))).loss_sum.backward()
    return float(counter.get_total_flops())


class Literal:
    """The specification by the letter, over the same episodes and weights of the same kind."""

    def __init__(self, config: VLAConfig) -> None:
        torch.manual_seed(0)
        name = config.model.vlm_config.model_name_or_path
        self.config, self.processor = config, AutoProcessor.from_pretrained(name)
        self.backbone = PaliGemmaModel.from_pretrained(name, dtype=torch.float32)
        head = config.model.action_head_config
        self.head = FlowmatchingActionHead(head, self.backbone.config.get_text_config().hidden_size, config.data.state_dim)
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.01)
        self.parameters = parameters
        files = sorted(Path(str(config.data.train_parquet_files)).glob("*.parquet"))
        self.rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        self.rng = np.random.default_rng(0)

    def train(self) -> None:
        for _ in range(STEPS):
            samples = [
                self.sample(int(row)) for row in self.rng.integers(WINDOW, len(self.rows) - 8, self.config.data.batch_size)
            ]
            pixels, state, action = (torch.stack([sample[n] for sample in samples]) for n in range(3))
            longest = self.processor.image_seq_length + self.config.data.prompt_max_len
            texts = ["<image>" * self.processor.image_seq_length + "<bos>open the drawer\n"] * len(samples)
            tokens = self.processor.tokenizer(texts, padding="max_length", max_length=longest, return_tensors="pt")
            ids, mask = tokens["input_ids"][:, :longest], tokens["attention_mask"][:, :longest]
            self.optimizer.zero_grad()
            context = self.backbone(ids, pixels[:, -1], mask, token_type_ids=torch.zeros_like(ids)).last_hidden_state
            output = self.head.loss(context, action, state, mask.bool())
            (output.loss_sum / output.valid_count).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()

    def sample(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels (S, 3, H, W), state (P,) and actions (K * A,) of the window that ends at a row."""
        window = [Image.open(io.BytesIO(row["image_1_bytes"])).convert("RGB") for row in self.rows[row - WINDOW + 1 : row + 1]]
        pixels = self.processor.image_processor(window, return_tensors="pt")["pixel_values"]
        actions = [self.rows[row + step]["action"] for step in range(self.config.model.action_head_config.horizon)]
        return pixels, torch.tensor(self.rows[row]["state"]), torch.tensor(actions).flatten()
