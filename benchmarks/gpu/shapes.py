"""Models of the published shapes with random weights, and batches and observations for them: no checkpoint is needed."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from transformers import PaliGemmaConfig

from paligemma_vla import Policy
from paligemma_vla.config import VLAConfig, VLMConfig
from paligemma_vla.model.architectures import known_architecture, read_architecture
from paligemma_vla.model.memory_plan import full_batch
from paligemma_vla.model.tiny import write_tiny_paligemma
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.normalization import DatasetStatistics, Statistics
from paligemma_vla.preprocess import ImageSpec, Preprocessor
from paligemma_vla.schema import image_key


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


def moved(value: Any, device: torch.device) -> Any:
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
    return {key: value if key == "image_mask" else moved(value, device) for key, value in batch.items()}


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

    def __init__(self, image_id: int, image_tokens: int, max_len: int) -> None:
        self.image_id, self.image_tokens, self.max_len = image_id, image_tokens, max_len

    def text(self, prompt: str, state: object) -> str:
        return prompt

    def text_ids(self, prompt: str) -> Any:
        return np.full(self.max_len, 5)

    def encode(self, prompts: list[str], image_mask: Any) -> tuple[Any, Any]:
        images = np.full((len(prompts), image_mask.shape[1] * self.image_tokens), self.image_id)
        ids = np.concatenate([images, np.stack([self.text_ids(prompt) for prompt in prompts])], axis=1)
        return ids, np.ones(ids.shape, bool)


def policy_and_observation(config: VLAConfig, shapes: dict[str, Any], device: torch.device) -> tuple[Policy, dict[str, Any]]:
    """A policy that computes from the start in the type of the device, and what it looks at."""
    model = build(config, shapes, device).requires_grad_(False).to_device(device).eval()
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
        self.device, self.graphs = next(model.parameters()).device, None
        cameras = [image_key(number + 1) for number in range(config.model.vlm_config.cameras)]
        self._cameras = dict.fromkeys(cameras, "")
        self.metadata = {"cameras": cameras, "state_dim": preprocessor.state.dimension}


def _preprocessor(config: VLAConfig, shapes: dict[str, Any]) -> Preprocessor:
    one = np.ones(7)
    numbers = Statistics(-one, one, 0 * one, one, -one, one, 100)
    image = ImageSpec(shapes["vision_config"]["image_size"], (0.5,) * 3, (0.5,) * 3)
    prompts: Any = _Prompts(_image_id(shapes), _image_tokens(shapes), config.data.prompt_max_len)
    return Preprocessor(prompts, image, DatasetStatistics(numbers, numbers), config.data.normalization)
