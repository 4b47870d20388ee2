"""PaliGemmaVLM: the answer depends on what is in the prompt, not on padding, kernel, or how many cameras are missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaModel

from conftest import ConfigFactory
from no_waiting import NoWaiting
from paligemma_vla import storage
from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import ModelError
from paligemma_vla.model import PaliGemmaVLM
from paligemma_vla.model.architectures import known_architecture
from paligemma_vla.model.paligemma_vlm import PatchEmbedding
from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma
from paligemma_vla.preprocess import load_prompt_and_image_spec
from pi0_fixture import full_size_tensors

PROMPTS = ["open the drawer", "push the window shut with the red handle", "go"]


def build(config: VLAConfig) -> PaliGemmaVLM:
    return PaliGemmaVLM(config.model.vlm_config, *load_prompt_and_image_spec(config)).eval()


@pytest.fixture(scope="module", params=["eager", "sdpa", None, "PaliGemma 2"])
def any_kernel(
    request: pytest.FixtureRequest, session_config: ConfigFactory, tmp_path_factory: pytest.TempPathFactory
) -> PaliGemmaVLM:
    """Every kernel of PaliGemma, and PaliGemma 2 with its own choice: plain sdpa cannot do Gemma 2's capped scores."""
    if request.param == "PaliGemma 2":
        spec = TinySpec(32, 16, vision_layers=1, text_layers=2, width=32, heads=4, vocabulary=400, second=True)
        folder = write_tiny_paligemma(tmp_path_factory.mktemp("second") / "tiny", spec)
        vlm = build(session_config({"model.vlm_config.model_name_or_path": str(folder)}))
        assert vlm.backbone.config.text_config.model_type == "gemma2"
        return vlm
    return build(session_config({"model.vlm_config.attn_implementation": request.param}))


@pytest.fixture(scope="module")
def vlm(session_config: ConfigFactory) -> PaliGemmaVLM:
    return build(session_config())


def pictures(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, 32, 32), generator=generator, dtype=torch.uint8)


def real(vlm: PaliGemmaVLM, *arguments: Any, **options: Any) -> list[Tensor]:
    """Per sample, the context at its real tokens."""
    with torch.no_grad():
        context, mask = vlm(*arguments, **options)
    return [row[keep] for row, keep in zip(context, mask, strict=True)]


def assert_same(first: list[Tensor], second: list[Tensor], tolerance: float = 2e-5) -> None:
    assert [f.shape for f in first] == [s.shape for s in second]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def test_pass_never_waits_for_the_gpu(any_kernel: PaliGemmaVLM) -> None:
    ids, mask = any_kernel.prompts.encode(PROMPTS, np.ones((len(PROMPTS), 1), bool))
    inputs = pictures(len(PROMPTS)), torch.from_numpy(ids), torch.from_numpy(mask)
    with torch.no_grad(), NoWaiting():
        any_kernel.fuse(*inputs)


def test_eager_equals_sdpa_padded_and_unpadded(session_config: ConfigFactory) -> None:
    eager, sdpa = (build(session_config({"model.vlm_config.attn_implementation": kind})) for kind in ("eager", "sdpa"))
    assert eager.backbone.language_model.config._attn_implementation == "eager"
    assert sdpa.backbone.language_model.config._attn_implementation == "sdpa"
    assert_same(real(eager, [pictures(3)], PROMPTS), real(sdpa, [pictures(3)], PROMPTS))
    assert_same(real(eager, [pictures(1)], PROMPTS[:1]), real(sdpa, [pictures(1)], PROMPTS[:1]))


def test_padding_may_be_anything_anywhere(any_kernel: PaliGemmaVLM) -> None:
    """On the left, longer, or made of other tokens: what is masked has no influence."""
    images, prompts = pictures(2), any_kernel.prompts
    ids, mask = (torch.from_numpy(array) for array in prompts.encode(PROMPTS[:2], torch.ones(2, 1, dtype=torch.bool).numpy()))
    expected = real(any_kernel, [images], PROMPTS[:2], ids, mask)
    left = torch.full((2, 5), prompts.pad_id)
    no = torch.zeros(2, 5, dtype=torch.bool)
    assert_same(real(any_kernel, [images], PROMPTS[:2], torch.cat([left, ids], 1), torch.cat([no, mask], 1)), expected)
    assert_same(real(any_kernel, [images], PROMPTS[:2], torch.cat([ids, left], 1), torch.cat([mask, no], 1)), expected)
    assert_same(real(any_kernel, [images], PROMPTS[:2], torch.where(mask, ids, 300), mask), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_prefix_is_bidirectional(any_kernel: PaliGemmaVLM, padded: bool, training: bool) -> None:
    """The last word of an instruction reaches the context at its first token, under every kernel, with and without padding."""
    images, prompts = pictures(2 if padded else 1), any_kernel.prompts
    first = torch.from_numpy(prompts.text_ids("open the drawer"))
    n = prompts.image_tokens
    extra = 6 if padded else 0
    length = n + len(first) + extra
    ids, mask = torch.full((len(images), length), prompts.pad_id), torch.zeros(len(images), length, dtype=torch.bool)
    ids[:, :n], mask[:, :n] = prompts.image_id, True
    ids[0, n : n + len(first)], mask[0, n : n + len(first)] = first, True
    if padded:
        ids[1, n:], mask[1, n:] = 300, True
    changed = ids.clone()
    changed[0, n + len(first) - 1] = 301
    any_kernel.train(training)
    before, after = (real(any_kernel, [images], PROMPTS[: len(images)], x, mask)[0] for x in (ids, changed))
    any_kernel.eval()
    assert (before[n] - after[n]).abs().max() > 1e-4  # at <bos>
    assert (before[0] - after[0]).abs().max() > 1e-4  # at the first image token


@pytest.mark.parametrize("present", [[False, False, False], [False, True, False], [True, False, True]])
def test_one_camera_equals_two_with_the_second_absent(any_kernel: PaliGemmaVLM, present: list[bool]) -> None:
    first, second = pictures(3), pictures(3, seed=1)
    mask = torch.tensor([[True, there] for there in present])
    together = real(any_kernel, [first, second], PROMPTS, image_mask=mask)
    for n, there in enumerate(present):
        images = [first[n : n + 1], second[n : n + 1]] if there else [first[n : n + 1]]
        assert_same([together[n]], real(any_kernel, images, PROMPTS[n : n + 1]))


def test_absent_pictures_have_no_influence_and_cost_nothing(vlm: PaliGemmaVLM) -> None:
    seen: list[int] = []
    handle = vlm.backbone.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])),
        with_kwargs=True,
    )
    mask = torch.tensor([[True, False], [True, True], [True, False]])
    outputs = [real(vlm, [pictures(3), pictures(3, seed)], PROMPTS, image_mask=mask) for seed in (1, 1, 2)]
    handle.remove()
    assert seen == [4, 4, 4]
    assert_same(outputs[0], outputs[1], 0)
    assert_same([outputs[0][0], outputs[0][2]], [outputs[2][0], outputs[2][2]], 0)
    assert (outputs[0][1] - outputs[2][1]).abs().max() > 1e-4


def test_three_cameras_mixed(vlm: PaliGemmaVLM) -> None:
    """In their order: swapped, the answer is another."""
    cameras = [pictures(2, seed) for seed in range(3)]
    mask = torch.tensor([[True, False, True], [True, True, False]])
    together = real(vlm, cameras, PROMPTS[:2], image_mask=mask)
    assert_same([together[0]], real(vlm, [cameras[0][:1], cameras[2][:1]], PROMPTS[:1]))
    assert_same([together[1]], real(vlm, [cameras[0][1:], cameras[1][1:]], PROMPTS[1:2]))
    assert (together[1] - real(vlm, [cameras[1][1:], cameras[0][1:]], PROMPTS[1:2])[0]).abs().max() > 1e-4


def test_uint8_pictures_equal_normalised_float_ones(vlm: PaliGemmaVLM, session_config: ConfigFactory) -> None:
    _, spec = load_prompt_and_image_spec(session_config())
    images = pictures(3)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    assert_same(real(vlm, [images], PROMPTS), real(vlm, [(images / 255 - mean) / std], PROMPTS))


def test_weights_are_those_of_the_conditional_generation_checkpoint(vlm: PaliGemmaVLM, tiny_model_dir: Path) -> None:
    whole = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model_dir).model.state_dict()
    ours = vlm.backbone.state_dict()
    assert ours.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(ours[name], value), name
    assert {p.dtype for p in vlm.parameters()} == {torch.float32}
    assert not any("lm_head" in name for name in ours)


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def build_from(folder: Path, session_config: ConfigFactory) -> PaliGemmaVLM:
    return build(session_config({"model.vlm_config.model_name_or_path": str(folder)}))


def test_half_precision_checkpoints_give_float32_masters(copy: Path, session_config: ConfigFactory) -> None:
    PaliGemmaForConditionalGeneration.from_pretrained(copy).to(torch.bfloat16).save_pretrained(copy)
    assert load_file(copy / "model.safetensors").popitem()[1].dtype == torch.bfloat16
    assert {p.dtype for p in build_from(copy, session_config).parameters()} == {torch.float32}


def publish(folder: Path) -> None:
    """Name tensors and files as in google/paligemma-3b-pt-224: shards with an index, a file for the settings of images."""
    whole = folder / "model.safetensors"
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in load_file(whole).items()}
    whole.unlink()
    names, index = sorted(tensors), {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        part = names[number::3]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(part, file))
    sizes = {"total_size": sum(value.nbytes for value in tensors.values())}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": sizes, "weight_map": index}))
    processor = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    images = {**processor.pop("image_processor"), **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def test_a_model_under_the_published_names_answers_equally(copy: Path, session_config: ConfigFactory) -> None:
    before = build_from(copy, session_config)
    publish(copy)
    after = build_from(copy, session_config)
    images = pictures(3)
    for one, other in zip(real(before, [images], PROMPTS), real(after, [images], PROMPTS), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"), [("missing", r"missing: .*fc1\.bias"), ("unexpected", r"unexpected: .*fc3\.bias")]
)
def test_published_weights_that_are_not_all_ours_are_refused_by_name(
    copy: Path, session_config: ConfigFactory, change: str, message: str
) -> None:
    publish(copy)
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(name for name in index["weight_map"] if name.endswith("fc1.bias"))
    file = copy / index["weight_map"][name]
    tensors = load_file(file)
    if change == "missing":
        del tensors[name], index["weight_map"][name]
    else:
        added = name.replace("fc1", "fc3")
        tensors[added], index["weight_map"][added] = tensors[name].clone(), file.name
    save_file(tensors, file, {"format": "pt"})
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        build_from(copy, session_config)


@pytest.mark.parametrize("side", [224, 448])
def test_names_and_shapes_of_the_published_models_are_ours(side: int) -> None:
    """Those of google/paligemma-3b-pt-224 and -448, as the tensors of pi0 have them; of 448 px four times the positions."""
    begin = "paligemma_with_expert.paligemma.model."
    tensors = full_size_tensors("pi0")
    published = {name.removeprefix(begin): shape for name, shape in tensors.items() if name.startswith(begin)}
    positions = "vision_tower.vision_model.embeddings.position_embedding.weight"
    published[positions] = ((side // 14) ** 2, 1152)
    architecture = known_architecture(f"google/paligemma-3b-pt-{side}")
    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in PaliGemmaModel(architecture).state_dict().items()}
    published["language_model.embed_tokens.weight"] = (257_216, 2048)  # in front of <image>, which pi0's does without
    assert len(published) == 603
    assert {name.replace(".vision_model.", "."): shape for name, shape in published.items()} == ours


POINTERS = ("model.safetensors", "tokenizer.json", "config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *(("a tensor lost", r"weights missing.*q_proj"), ("cut short", "cannot load"), ("a pickle instead", "cannot load")),
        *((name, rf"{name}: it is a pointer of git-lfs") for name in POINTERS),
    ],
)
def test_damaged_weights_are_refused(copy: Path, session_config: ConfigFactory, damage: str, message: str) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    if damage == "a tensor lost":
        del tensors[next(name for name in tensors if "self_attn.q_proj" in name and "vision" not in name)]
        save_file(tensors, file, {"format": "pt"})
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage in POINTERS:
        (copy / damage).write_bytes(storage.POINTER)
    else:
        file.unlink()
        torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=message):
        build_from(copy, session_config)


def test_activation_checkpointing_recomputes_and_changes_no_gradient(session_config: ConfigFactory) -> None:
    results = []
    for enabled in (False, True):
        vlm = build(session_config({"model.vlm_config.activation_checkpointing": enabled})).train()
        calls: list[int] = []
        vlm.backbone.language_model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        context, mask = vlm([pictures(2)], PROMPTS[:2])
        (context * mask[..., None]).square().sum().backward()
        results.append((len(calls), {name: p.grad for name, p in vlm.named_parameters()}))
    (plain_calls, plain), (again_calls, again) = results
    assert (plain_calls, again_calls) == (1, 2)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("present", [[[True, True], [True, True]], [[True, True], [True, False]]])
def test_fewer_operations_give_what_transformers_gives(session_config: ConfigFactory, present: list[list[bool]]) -> None:
    """Context and gradients beside transformers' own model, whose modules are as it made them."""
    vlm = build(session_config({"model.vlm_config.num_cameras": 2}))
    original = PaliGemmaModel.from_pretrained(vlm.config.model_name_or_path, dtype=torch.float32)
    images, there = [pictures(2, 1), pictures(2, 2)], torch.tensor(present)
    ids, mask = (torch.from_numpy(array) for array in vlm.prompts.encode(PROMPTS[:2], there.numpy()))
    pixels = torch.stack(images, 1).flatten(0, 1)[there.flatten()]
    expected = original(
        input_ids=ids,
        pixel_values=(pixels.float() - vlm.pixel_mean) / vlm.pixel_std,
        attention_mask=mask.long(),
        position_ids=mask.long().cumsum(1).clamp(min=1),
        token_type_ids=torch.zeros_like(ids),
    ).last_hidden_state
    context, _ = vlm(images, PROMPTS[:2], ids, mask, there)
    torch.testing.assert_close(context[mask], expected[mask], atol=2e-5, rtol=0)
    for output in (context, expected):
        (output[mask] * torch.linspace(-1, 1, output.shape[-1])).sum().backward()
    own = dict(vlm.backbone.named_parameters())
    learned = {name: parameter.grad for name, parameter in original.named_parameters() if parameter.grad is not None}
    assert len(learned) > 20
    for name, gradient in learned.items():
        torch.testing.assert_close(own[name].grad, gradient, atol=2e-4, rtol=1e-4)


def test_patches_are_a_matrix_product() -> None:
    convolution = nn.Conv2d(3, 8, kernel_size=4, stride=4)
    pixels = torch.randn(2, 3, 12, 12)
    expected = convolution(pixels)
    convolution.__class__ = PatchEmbedding
    torch.testing.assert_close(convolution(pixels), expected, atol=1e-5, rtol=0)
