"""The experts of pi0 and pi0.5 against what LeRobot 0.6.1 makes of the same tiny random models (fixtures/pi0)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GemmaConfig

from paligemma_vla.config import PI0_HEAD, PI05_HEAD, config_from_dict
from paligemma_vla.errors import CheckpointError
from paligemma_vla.model.action_head.base import KeyValue
from paligemma_vla.model.architectures import known_architecture, paligemma_config
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.normalization import Normalizer, Statistics
from paligemma_vla.preprocess import ImageSpec, PromptEncoder
from paligemma_vla.published import TABLES, UNUSED, our_names
from pi0_fixture import FIXTURES, full_size_tensors

KINDS = {"pi0": PI0_HEAD, "pi05": PI05_HEAD}
EXACT = 1e-5
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")


class Published:
    """One of the models, in ours, and the arrays that LeRobot computed."""

    def __init__(self, kind: str, prompts: PromptEncoder) -> None:
        self.kind, folder = kind, FIXTURES / kind
        self.inputs, self.outputs = (self._arrays(folder / f"{name}.npz") for name in ("inputs", "outputs"))
        self.grad_norms: dict[str, float | None] = json.loads((folder / "grad_norms.json").read_text())
        sizes = json.loads((folder / "sizes.json").read_text())
        text, expert, vision = sizes["paligemma_text"], sizes["action_expert"], dict(sizes["vision"])
        vision.pop("projector_out")
        gemma = GemmaConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=text["width"],
            intermediate_size=text["mlp_dim"],
            num_hidden_layers=text["depth"],
            num_attention_heads=text["num_heads"],
            num_key_value_heads=text["num_kv_heads"],
            head_dim=text["head_dim"],
        )
        self.image_token = sizes["vocab_size"] - 1
        architecture = paligemma_config(gemma, self.image_token, image_size=sizes["image_resolution"][0], **vision)
        head = head_settings(
            kind,
            horizon=6,
            embed_dim=expert["width"],
            num_layers=expert["depth"],
            num_heads=expert["num_heads"],
            mlp_ratio=expert["mlp_dim"] / expert["width"],
        )
        vlm = {"model_name_or_path": "none", "dtype": "float32", "num_cameras": 2}
        raw = {
            "data": {"train_parquet_files": "none", "pad_action_dim": True},
            "model": {"vlm_config": vlm, "action_head_config": head},
        }
        half = (0.5, 0.5, 0.5)
        self.model = VLAModel(config_from_dict(raw), prompts, ImageSpec(56, half, half), architecture.to_dict())
        weights = load_file(folder / "model.safetensors")
        names = our_names(weights, self.model.state_dict(), str(folder))
        self.names = {saved: ours for ours, saved in names.items()}
        self.names[TABLES[1]] = self.names.pop(TABLES[0])  # LeRobot trains the embeddings, and not the table that it loaded
        self.model.load_state_dict({ours: weights[saved] for ours, saved in names.items()})

    @staticmethod
    def _arrays(path: Path) -> dict[str, Tensor]:
        with np.load(path) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    def arguments(self) -> dict[str, Any]:
        """What `VLAModel.forward` takes: pictures as LeRobot resized them, in front of its tokens."""
        tokens, mask = self.inputs["tokens"], self.inputs["token_mask"]
        images = 16 * len(CAMERAS)
        return {
            "image_1_batch": self.outputs[f"image_pre.{CAMERAS[0]}"],
            "image_2_batch": self.outputs[f"image_pre.{CAMERAS[1]}"],
            "raw_prompt_texts_batch": ["", ""],
            "input_ids": torch.cat([torch.full((2, images), self.image_token), tokens], 1),
            "vlm_attention_mask_batch": torch.cat([torch.ones(2, images, dtype=torch.bool), mask], 1),
            "state_batch": self.inputs["state"],
        }

    def context(self) -> tuple[list[KeyValue], Tensor]:
        arguments = self.arguments()
        mask = arguments["vlm_attention_mask_batch"]
        images = [arguments["image_1_batch"], arguments["image_2_batch"]]
        keys_values, _ = self.model.paligemma_vlm(images, ["", ""], arguments["input_ids"], mask)
        return keys_values, mask


@pytest.fixture(params=KINDS)
def published(request: pytest.FixtureRequest, preprocessor: Any) -> Published:
    return Published(request.param, preprocessor.prompts)


def head_settings(kind: str, **sizes: Any) -> dict[str, Any]:
    return {"head": KINDS[kind], "per_action_dim": 32, "num_inference_timesteps": 10, **sizes}


def close(got: Tensor, expected: Tensor, exact: float = EXACT) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max().item() <= exact


def test_keys_and_values_of_the_prefix(published: Published) -> None:
    keys_values, mask = published.context()
    valid = published.outputs["prefix_pad_mask"]
    for number, (key, value) in enumerate(keys_values):
        for got, name in ((key, f"cache_k.{number}"), (value, f"cache_v.{number}")):
            expected = published.outputs[name]
            for row in range(2):  # theirs has slots for the absent third camera
                close(got[row][:, mask[row]], expected[row][:, valid[row]])


def test_velocity_at_a_time(published: Published) -> None:
    keys_values, mask = published.context()
    time = 1 - published.inputs["time"].double()  # theirs runs from noise, 1, to 0
    velocity = published.model.action_head.predict_velocity(
        published.outputs["x_t"], time, keys_values, mask, published.inputs["state"]
    )
    close(-velocity, published.outputs["v_t"])


def test_samples_in_bfloat16_are_about_as_near_as_those_of_lerobot(published: Published) -> None:
    """LeRobot keeps the vision tower in float32; here it is bfloat16, as most of openpi's."""
    model, outputs = published.model.requires_grad_(False), published.outputs
    model.configured_dtype = torch.bfloat16
    model.dtype_on = lambda _: torch.bfloat16  # type: ignore[method-assign]  # however small it is
    model.to_device(torch.device("cpu"))
    actions = model(**published.arguments(), flow_noise=published.inputs["noise"][:, None], num_steps=10)[..., :7]
    exact, theirs = outputs["sample_10_policy"], outputs["sample_10_policy_bf16"]
    assert (actions - exact).abs().max() < 3 * (theirs - exact).abs().max()


@pytest.mark.parametrize("steps", [10, 4])
def test_samples(published: Published, steps: int) -> None:
    noise = published.inputs["noise"][:, None]
    actions = published.model(**published.arguments(), flow_noise=noise, num_steps=steps)
    close(actions, published.outputs[f"sample_{steps}"])


def test_loss_and_gradients(published: Published) -> None:
    """Of the real dimensions, as LeRobot averages them."""
    padded = published.outputs["actions_padded"]
    output = published.model(
        **published.arguments(),
        actions_gt_seq=padded,
        action_mask=(torch.arange(32) < 7).expand(padded.shape),
        flow_time=1 - published.inputs["time"].double()[:, None],
        flow_noise=published.inputs["noise"][:, None],
    )
    close((output.velocity[:, 0] - output.target[:, 0]).square(), published.outputs["loss_elem"], 2e-5)
    loss = output.loss_sum / output.valid_count
    close(loss, published.outputs["policy_loss"])
    loss.backward()
    parameters = dict(published.model.named_parameters())
    trained = 0
    for name, norm in published.grad_norms.items():
        ours = published.names.get(name.removeprefix("model."))
        gradient = None if ours is None else parameters[ours].grad
        if norm:
            assert gradient is not None, name
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-5), name
            trained += 1
        else:
            assert gradient is None or gradient.norm().item() < 1e-6, name
    assert trained > 60


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_of_the_real_sizes(kind: str, preprocessor: Any) -> None:
    published = full_size_tensors(kind)
    published.pop(TABLES[1])  # exports have the one of the two that are tied
    assert len(published) == {"pi0": 777, "pi05": 812}[kind]
    head = head_settings(kind, horizon=50, embed_dim=1024, num_layers=18, num_heads=8)
    vlm = {"model_name_or_path": "google/paligemma-3b-pt-224", "num_cameras": 3}
    data = {"train_parquet_files": "none", "pad_action_dim": True}
    config = config_from_dict({"data": data, "model": {"vlm_config": vlm, "action_head_config": head}})
    architecture = known_architecture("google/paligemma-3b-pt-224")
    assert architecture is not None
    architecture.text_config.vocab_size = 257_152
    half = (0.5, 0.5, 0.5)
    with torch.device("meta"):
        model = VLAModel(config, preprocessor.prompts, ImageSpec(224, half, half), architecture.to_dict())
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, saved in our_names(published, ours, "published").items():
        assert ours[name] == published[saved], name


def test_weights_that_are_missing_or_unexpected_are_refused_by_name(published: Published) -> None:
    ours, saved = published.model.state_dict(), [*published.names, TABLES[0], UNUSED]
    assert our_names([f"model.{name}" for name in saved], ours, "x").keys() == ours.keys()
    lost = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"x: missing action_head\.layers\.1\.mlp\.up_proj\.weight"):
        our_names([name for name in saved if name != lost], ours, "x")
    with pytest.raises(CheckpointError, match=r"x: unexpected fast_head\.weight"):
        our_names([*saved, "fast_head.weight"], ours, "x")


def test_pictures_are_resized_as_lerobot_does() -> None:
    arrays = np.load(FIXTURES / "resize_with_pad.npz")
    names = [name.removeprefix("in_u8.") for name in arrays.files if name.startswith("in_u8.")]
    assert len(names) == 5
    for name in names:
        expected = arrays[f"out_f32.{name}"]
        half = (0.5, 0.5, 0.5)
        got = ImageSpec(expected.shape[0], half, half, resize="pad", resizer="openpi").apply(arrays[f"in_u8.{name}"])
        assert got.dtype == np.float32
        assert np.abs(got.transpose(1, 2, 0) - expected).max() <= EXACT, name


@pytest.mark.parametrize("kind", ["MEAN_STD", "QUANTILES"])
def test_numbers_are_normalised_as_lerobot_does(kind: str) -> None:
    """Also of a dimension that does not move, and of one whose quantiles are equal."""
    fixture = json.loads((FIXTURES / "processors.json").read_text())
    statistics = Statistics(count=10, **{name: np.array(values) for name, values in fixture["stats"].items()})
    ours = {"MEAN_STD": "lerobot_mean_std", "QUANTILES": "lerobot_quantile"}[kind]
    normalizer, expected = Normalizer(statistics, ours, "state"), fixture[kind]
    raw = np.array(fixture["raw"], np.float32)
    assert normalizer.normalize(raw) == pytest.approx(np.array(expected["normalised_state"]), rel=1e-6, abs=1e-6)
    back = normalizer.denormalize(np.array(expected["model_action"], np.float32))
    assert back == pytest.approx(np.array(expected["unnormalised_action"]), rel=1e-6, abs=1e-6)


def test_prompts_are_worded_as_lerobot_does(preprocessor: Any) -> None:
    fixture = json.loads((FIXTURES / "processors.json").read_text())
    states = np.array(fixture["pi05_state_normalised"], np.float32)
    plain = replace(preprocessor.prompts, form="paligemma", max_len=500)
    for task, state, words, pi0 in zip(fixture["tasks"], states, fixture["pi05_prompts"], fixture["pi0_prompts"], strict=True):
        pi05 = replace(plain, form="pi05")
        assert pi05.text(task, state) == words
        assert pi05.text_ids(words).tolist() == [plain.bos_id, *plain._ids(words)]
        encoder = replace(plain, form="pi0")
        assert encoder.text(task, state) == task
        assert encoder.text_ids(task).tolist() == [plain.bos_id, *plain._ids(pi0)]
