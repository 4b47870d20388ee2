"""Adapters: they begin as nothing, they alone learn, and merged they are a plain backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import ConfigFactory
from paligemma_vla import Policy
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.loader import VLADataset, build_preprocessor, load_batches
from paligemma_vla.data.order import SampleRef
from paligemma_vla.errors import ModelError
from paligemma_vla.model import VLAModel, vla_model
from paligemma_vla.model.vla_model import arguments_from_batch
from paligemma_vla.training.checkpoint import load_checkpoint
from support import identical, randomize, train_here

VLM = "model.vlm_config"
LORA: dict[str, Any] = {f"{VLM}.lora": {"rank": 4, "alpha": 8.0}}
CPU = torch.device("cpu")


def build(config: VLAConfig, seed: int = 0) -> VLAModel:
    torch.manual_seed(seed)
    preprocessor = build_preprocessor(config)
    return VLAModel(config, preprocessor.prompts, preprocessor.image)


def with_random_adapters(model: VLAModel) -> VLAModel:
    """As if it had been trained: B begins at zero, which would hide everything."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.paligemma_vlm.trainable_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.fixture(scope="module")
def batch(session_config: ConfigFactory) -> dict[str, Any]:
    config = session_config()
    dataset = VLADataset(config.data.train_parquet_files, build_preprocessor(config), config)
    return next(load_batches(dataset, [[SampleRef(n, n) for n in range(4)]], config, pin_memory=False))


def context(model: VLAModel, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        arguments = [batch[key] for key in ("image_1", "raw_prompt_text", "vlm_attention_mask")]
        return model.eval().get_vl_embeddings(*arguments, input_ids=batch["input_ids"])


def test_adapters_begin_as_nothing(session_config: ConfigFactory, batch: dict[str, Any]) -> None:
    adapted, plain = build(session_config(LORA)), build(session_config())
    assert torch.equal(context(adapted, batch), context(plain, batch))
    assert not torch.equal(context(with_random_adapters(adapted), batch), context(plain, batch))


def test_adapter_is_the_papers(session_config: ConfigFactory) -> None:
    """W x + (alpha / rank) B A x (Hu et al. 2021)."""
    model = with_random_adapters(build(session_config(LORA)))
    layer: Any = model.paligemma_vlm.backbone.language_model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape == (4, 32)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 2.0 * (x @ down.T) @ up.T)


@pytest.mark.parametrize(
    ("overrides", "towers"),
    [
        ({}, {"vision_tower", "language_model"}),
        ({f"{VLM}.freeze_vision_tower": True}, {"language_model"}),
        ({f"{VLM}.freeze_language_model": True}, {"vision_tower"}),
        ({f"{VLM}.lora": {"target_modules": r"language_model\.layers\.0\.mlp\.\w+"}}, {"language_model"}),
    ],
)
def test_adapters_stand_where_the_configuration_says(
    session_config: ConfigFactory, overrides: dict[str, Any], towers: set[str]
) -> None:
    model = build(session_config({**LORA, **overrides}))
    names = [name.removeprefix("paligemma_vlm.backbone.") for name, p in model.named_parameters() if p.requires_grad]
    adapted = [name for name in names if not name.startswith("action_head.")]
    assert all(".lora_A." in name or ".lora_B." in name for name in adapted)
    assert {name.split(".")[0] for name in adapted} == towers
    # Per layer of a tower: 4 attention and 2 (SigLIP) or 3 (Gemma) linear layers of its MLP, A and B of each.
    expected = 2 * (6 * ("vision_tower" in towers) + 2 * 7 * ("language_model" in towers))
    assert len(adapted) == (6 if f"{VLM}.lora" in overrides else expected)


def test_pattern_that_no_layer_matches_is_refused_with_examples(session_config: ConfigFactory) -> None:
    with pytest.raises(ModelError, match=r"target_modules: got 'q_proj', .* for example, vision_tower"):
        build(session_config({f"{VLM}.lora": {"target_modules": "q_proj"}}))


RUN = {**LORA, "training.stages": [{"train": "head", "steps": 2}, {"train": "all"}], "training.ema_decay": 0.0}
LAST = "checkpoint_epoch_2.pth.tar"


@pytest.fixture(scope="module")
def trained(session_config: ConfigFactory) -> Any:
    """The trainer of a finished run with adapters."""
    return train_here(session_config({**RUN, "training.experiment_name": "lora"}))


def test_only_adapters_and_head_learn(trained: Any) -> None:
    before = build(trained.config, trained.config.training.seed).state_dict()
    after = trained.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(".lora_" in name or name.startswith("action_head.") for name in moved)
    assert sum(".lora_B." in name for name in moved) == sum(".lora_B." in name for name in before)


def test_run_with_adapters_resumes_bit_for_bit(trained: Any, session_config: ConfigFactory) -> None:
    name = {"training.experiment_name": "lora_part"}
    part = session_config({**RUN, **name, "training.stop_after_step": 4})
    train_here(part)
    train_here(session_config({**RUN, **name}), resume=part.run_dir / "checkpoints" / "last.pth.tar")
    expected, got = (load_checkpoint(config.run_dir / "checkpoints" / LAST) for config in (trained.config, part))
    for key in ("state_dict", "optimizer"):
        assert identical(got[key], expected[key]), key


def test_policy_answers_as_the_trained_model(trained: Any, batch: dict[str, Any]) -> None:
    policy = Policy.from_checkpoint(trained.config.run_dir / "checkpoints" / LAST)
    arguments = arguments_from_batch(batch, sample=True)
    with torch.no_grad():
        expected = trained.model.eval()(**arguments)
        torch.testing.assert_close(policy.model(**arguments), expected, atol=1e-5, rtol=0)


def rounded(model: VLAModel) -> VLAModel:
    """With weights that bfloat16 can hold, as published ones are: what is left is how they are used."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.mark.parametrize("overrides", [LORA, {f"{VLM}.freeze_vision_tower": True, f"{VLM}.freeze_language_model": True}])
def test_backbone_that_never_learns_is_loaded_and_held_in_bfloat16(
    session_config: ConfigFactory, overrides: dict[str, Any]
) -> None:
    model = build(session_config({**overrides, f"{VLM}.dtype": "bfloat16"}))
    model.set_stage("all")
    model.to_device(CPU)
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            matrix = isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
            held = model.dtype if matrix and not parameter.requires_grad else torch.float32
            assert parameter.dtype is held, f"{name}.{part}"
            if parameter.requires_grad:
                assert ".lora_" in name or name.startswith("action_head") or part == "position"


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU computes in float32")
@pytest.mark.parametrize("frozen", ["vision", "all"])
def test_held_weights_give_the_very_answer_of_cast_ones(
    session_config: ConfigFactory, batch: dict[str, Any], frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast turns float32 weights to bfloat16 for every product; held so, they are the same numbers.

    Only Gemma's embedding, which multiplies in the type of its weights, rounds once more: as in Google's own bfloat16.
    """
    monkeypatch.setattr(vla_model, "SMALL", 0)
    overrides = {f"{VLM}.dtype": "bfloat16", f"{VLM}.freeze_vision_tower": frozen == "vision"}
    held, cast = (rounded(build(session_config(overrides))) for _ in range(2))
    for model in (held, cast):
        randomize(model.action_head)
        rounded(model).eval()
    if frozen == "all":
        held.requires_grad_(False)
        embedding = cast.paligemma_vlm.backbone.language_model.embed_tokens
        embedding.weight.data = embedding.weight.data.bfloat16()
    held.to_device(CPU)
    assert sum(p.nbytes for p in held.parameters()) < 0.9 * sum(p.nbytes for p in cast.parameters())
    arguments = arguments_from_batch(batch, sample=True)
    with torch.no_grad():
        assert torch.equal(context(held, batch), context(cast, batch))
        assert torch.equal(held(**arguments), cast(**arguments))
