"""VLAModel: the specification's forward in all its forms, freezing, and gradients where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import ConfigFactory
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.loader import Batch, Collator, VLADataset
from paligemma_vla.errors import ModelError
from paligemma_vla.model import VLAModel, vla_model
from paligemma_vla.model.vla_model import arguments_from_batch
from support import randomize


def make_model(config: VLAConfig) -> VLAModel:
    model = VLAModel(config).eval()
    randomize(model.action_head)
    return model


def make_batch(dataset: VLADataset, numbers: tuple[int, ...] = (0, 7, 9, 20)) -> Batch:
    batch = Collator(dataset.preprocessor.prompts)([dataset[n] for n in numbers])
    assert isinstance(batch, dict)
    return batch


@pytest.fixture(scope="module")
def model(session_config: ConfigFactory) -> VLAModel:
    return make_model(session_config(cameras=2))


@pytest.fixture(scope="module")
def batch(two_camera_dataset: VLADataset) -> Batch:
    batch = make_batch(two_camera_dataset)
    assert 0 < batch["image_mask"][:, 1].sum() < 4  # both cases of the second camera
    return batch


@torch.no_grad()
def test_inputs_in_other_forms_give_the_same_answer(model: VLAModel, batch: Batch) -> None:
    """Raw prompts instead of the loader's ids; chunks instead of flat actions; windows of which the last frame is used."""
    arguments = arguments_from_batch(batch)
    output = model(**arguments)
    assert output.valid_count == 2 * batch["action_mask"].sum()
    raw = model(**arguments | {"input_ids": None, "vlm_attention_mask_batch": None})
    torch.testing.assert_close(raw.velocity, output.velocity, atol=1e-6, rtol=0)
    windows = {
        f"image_{n}_batch": torch.stack([torch.zeros_like(batch[f"image_{n}"]), batch[f"image_{n}"]], dim=1) for n in (1, 2)
    }  # (B, S, C, H, W)
    for other in ({"actions_gt_seq": batch["action"].view(4, 4, 2)}, windows):
        assert torch.equal(model(**arguments | other).velocity, output.velocity)


@torch.no_grad()
def test_forward_takes_the_specifications_positional_arguments(model: VLAModel, batch: Batch) -> None:
    """S3.2, word for word: images, prompts, mask, state, second images, actions."""
    torch.manual_seed(0)
    names = ("image_1", "raw_prompt_text", "vlm_attention_mask", "state", "image_2", "action")
    output = model(*(batch[name] for name in names))
    assert output.velocity.shape == (4, 2, 4, 2)
    actions = model(batch["image_1"], batch["raw_prompt_text"], None, batch["state"], batch["image_2"])
    assert actions.shape == (4, 4, 2)
    assert actions.dtype == torch.float32


@torch.no_grad()
def test_forward_without_actions_is_the_heads_sample_on_the_context(model: VLAModel, batch: Batch) -> None:
    arguments = arguments_from_batch(batch, sample=True)
    images = [batch[name] for name in ("image_1", "raw_prompt_text", "vlm_attention_mask", "image_2")]
    context = model.get_vl_embeddings(*images, input_ids=batch["input_ids"], image_mask=batch["image_mask"])
    assert context.shape == (*batch["input_ids"].shape, 32)
    expected = model.action_head.sample(context, batch["vlm_attention_mask"], batch["state"], batch["flow_noise"][:, 0], 4)
    torch.testing.assert_close(model(**arguments), expected)
    ten = model.action_head.sample(context, batch["vlm_attention_mask"], batch["state"], batch["flow_noise"][:, 0], 10)
    torch.testing.assert_close(model(**{**arguments, "num_steps": 10}), ten)
    assert (ten - expected).abs().max() > 1e-4


VISION, HEAD = ("paligemma_vlm.backbone.vision_tower", "paligemma_vlm.backbone.multi_modal_projector"), "action_head"
FROZEN = {tower: {f"model.vlm_config.freeze_{tower}": True} for tower in ("vision_tower", "language_model")}


@pytest.mark.parametrize(
    ("overrides", "stage", "learning"),
    [
        ({}, "all", "vision language head"),
        ({}, "head", "head"),
        (FROZEN["vision_tower"], "all", "language head"),
        (FROZEN["language_model"], "all", "vision head"),
        (FROZEN["vision_tower"] | FROZEN["language_model"], "all", "head"),
        ({"model.action_head_config.detach_context": True}, "all", "head"),
    ],
)
def test_exactly_what_learns_receives_a_gradient(
    session_config: ConfigFactory, batch: Batch, overrides: dict[str, Any], stage: str, learning: str
) -> None:
    """DDP runs without find_unused_parameters (D9): none may be left out, even when no sample has a second camera."""
    for present in (batch["image_mask"], torch.tensor([[True, False]] * 4)):
        model = make_model(session_config(overrides, cameras=2)).train()
        model.set_stage(stage)
        arguments = arguments_from_batch({**batch, "image_mask": present})
        model(**arguments | {"input_ids": None, "vlm_attention_mask_batch": None}).loss_sum.backward()
        for name, parameter in model.named_parameters():
            part = "head" if name.startswith(HEAD) else "vision" if name.startswith(VISION) else "language"
            assert parameter.requires_grad is (part in learning.split()), name
            assert (parameter.grad is not None) is parameter.requires_grad, name
            if parameter.grad is not None and "k_proj.bias" not in name:
                assert parameter.grad.abs().max() > 0, name


def test_frozen_backbone_keeps_no_graph(session_config: ConfigFactory, batch: Batch) -> None:
    model = make_model(session_config(cameras=2)).train()
    contexts: list[torch.Tensor] = []
    model.paligemma_vlm.register_forward_hook(lambda module, args, output: contexts.append(output[0]))
    for stage in ("head", "all"):
        model.set_stage(stage)
        model(**arguments_from_batch(batch))
    assert [context.requires_grad for context in contexts] == [False, True]


def test_bfloat16_learns_with_activation_checkpointing(
    session_config: ConfigFactory, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What backward recomputes must be what forward computed, kernel included."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    keys = {"model.vlm_config.dtype": "bfloat16", "model.vlm_config.activation_checkpointing": True}
    learning = VLAModel(session_config(keys, cameras=2)).train()
    learning(**arguments_from_batch(batch)).loss_sum.backward()
    gradients = [p.grad for p in learning.paligemma_vlm.trainable_parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@torch.no_grad()
@pytest.mark.parametrize("hardware", [True, False])
def test_bfloat16_computes_in_bfloat16_on_float32_masters(
    session_config: ConfigFactory, model: VLAModel, batch: Batch, monkeypatch: pytest.MonkeyPatch, hardware: bool
) -> None:
    """A CPU without instructions for bfloat16 computes in float32: there it would be slower, not faster."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware)
    half = VLAModel(session_config({"model.vlm_config.dtype": "bfloat16"}, cameras=2)).eval()
    half.load_state_dict(model.state_dict())
    kinds: list[torch.dtype] = []
    half.paligemma_vlm.backbone.language_model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: kinds.append(output.dtype)
    )
    got, expected = half(**arguments_from_batch(batch)), model(**arguments_from_batch(batch))
    assert kinds == [torch.bfloat16 if hardware else torch.float32]
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert got.loss_sum.dtype == torch.float32
    assert (got.velocity - expected.velocity).norm() / expected.velocity.norm() < 0.05
    actions = half(**arguments_from_batch(batch, sample=True))
    assert actions.dtype == torch.float32


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("model.vlm_config.backbone", "no.such.module:Class"),
        ("model.vlm_config.backbone", "os:system"),
        ("model.action_head_config.head", "..:Head"),
        ("model.action_head_config.head", "torch.nn:Linear"),
    ],
)
def test_class_that_cannot_be_used_names_the_key(session_config: ConfigFactory, key: str, path: str) -> None:
    with pytest.raises(ModelError, match=f"{key}: .*{path}"):
        VLAModel(session_config({key: path}))


def test_another_backbone_and_head_can_be_named_in_the_configuration(session_config: ConfigFactory, batch: Batch) -> None:
    overrides: dict[str, Any] = {
        "model.vlm_config.backbone": f"{__name__}:EveryTokenTheSame",
        "model.action_head_config.head": f"{__name__}:StateEcho",
    }
    model = VLAModel(session_config(overrides, cameras=2))
    actions = model(**arguments_from_batch(batch, sample=True))
    torch.testing.assert_close(actions, batch["state"][:, :1, None].expand(-1, 4, 2) + 1)


class EveryTokenTheSame(torch.nn.Module):
    """The smallest backbone that keeps the promise: `hidden_size` and (images, prompts) -> context, mask."""

    hidden_size = 6

    def __init__(self, config: Any, prompts: Any, image: Any, backbone_config: Any = None) -> None:
        super().__init__()
        self.token = torch.nn.Parameter(torch.ones(6))

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [self.token]

    def forward(self, images: Any, prompts: Any, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batch = len(prompts)
        return self.token.expand(batch, 3, 6), torch.ones(batch, 3, dtype=torch.bool)


class StateEcho(torch.nn.Module):
    """A head that answers the first number of the state, plus the mean of the context."""

    def __init__(self, config: Any, context_dim: int, state_dim: int) -> None:
        super().__init__()
        self.shape = (config.horizon, config.per_action_dim)

    def get_action(self, context: Any, state: Any, mask: Any, noise: Any, num_steps: Any) -> torch.Tensor:
        return state[:, :1, None].expand(-1, *self.shape) + context.mean((1, 2), keepdim=True)


@pytest.mark.parametrize(("small", "learns", "expected"), [(1e9, False, "float32"), (1e9, True, None), (0, False, None)])
def test_small_models_that_only_answer_compute_in_float32(
    session_config: ConfigFactory, small: float, learns: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vla_model, "SMALL", small)
    model = VLAModel(session_config({"model.vlm_config.dtype": "bfloat16"})).requires_grad_(learns)
    model.to_device(torch.device("cpu"))
    where_possible = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    assert model.dtype is getattr(torch, expected or where_possible)
    assert model.dtype_on("cuda") is torch.bfloat16
