"""The real shapes on one GPU: correct first, then how fast, then in how much memory.

    benchmarks/gpu/full_size.sh            (which also brings what the machine lacks; see there)

1. The tiny model answers and learns on the GPU as it does on the CPU, or nothing is timed.
2. PaliGemma 3B with random weights: latency of one observation, with 1 and 2 cameras, at 50 and 10 Euler steps.
3. Training on two cameras: samples per second and peak memory of the head alone, of adapters (LoRA), and of everything, beside
   what the memory plan says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.common import Row, demo_config, environment, write_episodes
from transformers import PaliGemmaConfig

from paligemma_vla import Policy
from paligemma_vla.config import VLAConfig, VLMConfig, load_config, parse_assignments
from paligemma_vla.data.loader import build_preprocessor
from paligemma_vla.model.architectures import known_architecture, read_architecture
from paligemma_vla.model.memory_plan import full_batch, plan_memory
from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.normalization import DatasetStatistics, Statistics
from paligemma_vla.preprocess import ImageSpec, Preprocessor
from paligemma_vla.schema import image_key
from paligemma_vla.training.optim import build_optimizer

CONFIG = Path(__file__).parents[2] / "configs" / "vla_config_24gb.yaml"
TRAINING: dict[str, dict[str, Any]] = {
    "head only": {
        "model.vlm_config.lora": None,
        "model.vlm_config.freeze_vision_tower": True,
        "model.vlm_config.freeze_language_model": True,
    },
    "LoRA": {},
    "full": {"model.vlm_config.lora": None},
}
COMMON = {"training.stages": [], "training.ema_decay": 0.0}
TOLERANCE = 2e-4  # float32 on both sides, sums in another order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="paligemma-3b-pt-224", help="a published name, or `tiny` to try the benchmark itself"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the configuration")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = check_against_cpu(device)
    shapes = shapes_of(args.model)
    result = {**environment("benchmarks/gpu/full_size.sh"), "model": args.model, "gpu": _name(device)}
    for measure in (measure_latency, measure_training):
        for row in measure(shapes, device, {**COMMON, **parse_assignments(args.set)}, args.repeats):
            rows.append(row)
            print(f"{row.name:<58}{row.value:>12,.4g}  {row.unit}", flush=True)
            args.output.write_text(json.dumps({**result, "rows": [vars(row) for row in rows]}, indent=2) + "\n")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def shapes_of(name: str) -> dict[str, Any]:
    """`config.json` of a published PaliGemma, or of the tiny one, as a dictionary."""
    if name == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            write_tiny_paligemma(folder)
            return read_architecture(VLMConfig(model_name_or_path=folder))
    architecture = known_architecture(name)
    if architecture is None:
        raise SystemExit(f"--model: got {name}, expected the name of a published PaliGemma, such as paligemma2-3b-pt-224")
    return dict(architecture.to_dict())


def check_against_cpu(device: torch.device) -> list[Row]:
    """Actions and gradients of the tiny model on both sides; raises when they differ by more than rounding."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_episodes(folder / "episodes", episodes=2, length=20, side=64, cameras=2, state_dim=7, action_dim=7)
        config = demo_config(folder, TinySpec(), cameras=2)
        preprocessor = build_preprocessor(config)
        models = []
        for place in (torch.device("cpu"), device):
            torch.manual_seed(0)
            model = VLAModel(config, preprocessor.prompts, preprocessor.image)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
            models.append(model.to_device(place))
        shapes = model.paligemma_vlm.backbone_dict()
    batch = random_batch(config, shapes, 4, torch.device("cpu"))
    gradients, actions = [], []
    for model in models:
        place = next(model.parameters()).device
        moved = {key: _moved(value, place) for key, value in batch.items()}
        model.zero_grad()
        output = model(**moved)
        (output.loss_sum / output.valid_count).backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
        sampling = {k: v for k, v in moved.items() if k not in ("actions_gt_seq", "action_mask", "flow_time")}
        with torch.no_grad():
            actions.append(model.eval()(**sampling).cpu())
    errors = {
        "gradients, relative": float((gradients[0] - gradients[1]).norm() / gradients[0].norm()),
        "actions, absolute": float((actions[0] - actions[1]).abs().max()),
    }
    rows = [Row(f"tiny model, GPU against CPU: {name}", value, "", "lower") for name, value in errors.items()]
    for row in rows:
        print(f"{row.name:<58}{row.value:>12.2e}", flush=True)
        if not row.value < TOLERANCE:
            raise SystemExit(f"{row.name}: got {row.value:.2e}, expected below {TOLERANCE:.0e}; nothing was timed")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return rows


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _image_tokens(shapes: dict[str, Any]) -> int:
    """Per camera."""
    vision = shapes["vision_config"]
    return int(vision["image_size"] // vision["patch_size"]) ** 2


def random_batch(config: VLAConfig, shapes: dict[str, Any], samples: int, device: torch.device) -> dict[str, Any]:
    """A batch of random numbers in which every camera is there and every instruction is as long as it may be."""
    generator = torch.Generator().manual_seed(0)
    text = config.data.prompt_max_len
    tokens = config.model.vlm_config.cameras * _image_tokens(shapes) + text
    batch = full_batch(config, samples, tokens, shapes["vision_config"]["image_size"])
    batch["input_ids"][:, :-text] = _image_id(shapes)
    batch["input_ids"][:, -text:].random_(3, 250, generator=generator)
    for image in (batch["image_1_batch"], batch["image_2_batch"], *batch["further_images"]):
        if image is not None:
            image.random_(0, 256, generator=generator)
    for name in ("state_batch", "actions_gt_seq", "flow_time", "flow_noise"):
        batch[name].uniform_(0 if name == "flow_time" else -1, 1, generator=generator)
    # Presence is asked on the CPU, where the loader made it: asking a GPU would wait for it.
    return {key: value if key == "image_mask" else _moved(value, device) for key, value in batch.items()}


def _image_id(shapes: dict[str, Any]) -> int:
    return int(PaliGemmaConfig.from_dict(shapes).image_token_id)


def build(config: VLAConfig, shapes: dict[str, Any], device: torch.device) -> VLAModel:
    """The model of real shapes with random weights, made where it will run."""
    image = ImageSpec(shapes["vision_config"]["image_size"], (0.5,) * 3, (0.5,) * 3)
    torch.manual_seed(0)
    with device:
        model = VLAModel(config, _Prompts(0, 0, 0), image, shapes)  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.zeros_(parameter)
    return model.to_device(device)


class _Prompts:
    """Stands where the encoder of instructions would: what is measured begins with token ids of the greatest length."""

    def __init__(self, image_id: int, image_tokens: int, text: int) -> None:
        self.image_id, self.image_tokens, self.text = image_id, image_tokens, text

    def text_ids(self, prompt: str) -> Any:
        return np.full(self.text, 5)

    def encode(self, prompts: list[str], image_mask: Any) -> tuple[Any, Any]:
        images = np.full((len(prompts), self.image_tokens), self.image_id)
        ids = np.concatenate([images, np.stack([self.text_ids(prompt) for prompt in prompts])], axis=1)
        return ids, np.ones(ids.shape, bool)


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of a call, after two that warm up."""
    times = []
    for number in range(repeats + 2):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_latency(shapes: dict[str, Any], device: torch.device, common: dict[str, Any], repeats: int) -> Iterator[Row]:
    """One observation through `Policy`: from the pixels of the cameras to actions in real units."""
    for cameras in (1, 2):
        policy, observation = _policy(shapes, device, {**common, "model.vlm_config.use_aux_camera": cameras == 2})
        for steps in (50, 10):
            taken = seconds_of(partial(policy.infer, observation, seed=0, num_steps=steps), device, repeats)
            name = f"one observation, {cameras} camera{'s' * (cameras > 1)}, {steps} Euler steps"
            yield Row(name, taken * 1e3, "ms", "lower")


def _policy(shapes: dict[str, Any], device: torch.device, common: dict[str, Any]) -> tuple[Policy, dict[str, Any]]:
    config = load_config(CONFIG, {**common, **TRAINING["head only"]})
    model = build(config, shapes, device).requires_grad_(False).to_device(device)
    side = shapes["vision_config"]["image_size"]
    rng = np.random.default_rng(0)
    observation: dict[str, Any] = {
        f"image_{n + 1}": rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for n in range(config.model.vlm_config.cameras)
    }
    observation |= {"state": np.zeros(7, np.float32), "prompt": "open the drawer"}
    return Untrained(model, _preprocessor(config, shapes), config), observation


class Untrained(Policy):
    """A policy of random weights, which no checkpoint holds."""

    def __init__(self, model: VLAModel, preprocessor: Preprocessor, config: VLAConfig) -> None:
        self.model, self.preprocessor, self.config = model, preprocessor, config
        self.device = next(model.parameters()).device
        cameras = [image_key(number + 1) for number in range(config.model.vlm_config.cameras)]
        self._cameras = dict.fromkeys(cameras, "")
        self.metadata = {"cameras": cameras, "state_dim": preprocessor.state.dimension}


def _preprocessor(config: VLAConfig, shapes: dict[str, Any]) -> Preprocessor:
    one = np.ones(7)
    numbers = Statistics(-one, one, 0 * one, one, -one, one, 100)
    image = ImageSpec(shapes["vision_config"]["image_size"], (0.5,) * 3, (0.5,) * 3)
    image_tokens = config.model.vlm_config.cameras * _image_tokens(shapes)
    prompts: Any = _Prompts(_image_id(shapes), image_tokens, config.data.prompt_max_len)
    return Preprocessor(prompts, image, DatasetStatistics(numbers, numbers), config.data.normalization)


def measure_training(shapes: dict[str, Any], device: torch.device, common: dict[str, Any], repeats: int) -> Iterator[Row]:
    """Whole optimiser steps on one batch that lies on the device already, beside what was planned."""
    for kind, overrides in TRAINING.items():
        config = load_config(CONFIG, {**common, **overrides})
        name = f"training, {kind}, batch {config.data.batch_size}, 2 cameras"
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        taken = seconds_of(_training_step(config, shapes, device), device, repeats)
        yield Row(name, config.data.batch_size / taken, "samples/s", "higher")
        if device.type == "cuda":
            yield Row(f"{name}: peak memory", torch.cuda.max_memory_reserved(device) / 1e9, "GB", "lower")
        yield Row(f"{name}: planned", plan_memory(config, shapes, device, None).total / 1e9, "GB", "lower")


def _training_step(config: VLAConfig, shapes: dict[str, Any], device: torch.device) -> Callable[[], None]:
    model = build(config, shapes, device).train()
    optimizer = build_optimizer(model, config.optimizer)
    batch = random_batch(config, shapes, config.data.batch_size, device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        output = model(**batch)
        (output.loss_sum / output.valid_count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
