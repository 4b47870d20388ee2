"""Prompts and pixels against the checkpoint's own PaliGemmaProcessor; the rest is plain data that survives a round trip."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PaliGemmaProcessor

from paligemma_vla.config import config_from_dict
from paligemma_vla.errors import DataError, ModelError
from paligemma_vla.preprocess import ImageSpec, Preprocessor, PromptEncoder, load_prompt_and_image_spec

PROMPTS = ["open the drawer", "Pick up the RED cube, please!", "a", "ünï→🤖  double  space"]


@pytest.fixture(scope="module")
def processor(tiny_model_dir: Path) -> PaliGemmaProcessor:
    return PaliGemmaProcessor.from_pretrained(tiny_model_dir)


def load(folder: Path | str, **data: Any) -> tuple[PromptEncoder, ImageSpec]:
    """data: settings of the section `data`."""
    vlm = {"model_name_or_path": str(folder)}
    config = config_from_dict({"data": {"train_parquet_files": "-", **data}, "model": {"vlm_config": vlm}})
    return load_prompt_and_image_spec(config)


def picture(width: int = 50, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_ids_equal_the_processors(
    tiny_model_dir: Path, processor: PaliGemmaProcessor, prompt: str, cameras: int
) -> None:
    encoder, _ = load(tiny_model_dir)
    expected = processor(text=["<image>" * cameras + prompt], images=[[picture(seed=n) for n in range(cameras)]])
    ids, mask = encoder.encode([prompt], np.ones((1, cameras), bool))
    assert ids[0].tolist() == np.asarray(expected["input_ids"])[0].tolist()
    assert mask.all()


def test_prompt_absent_camera_takes_no_image_token(tiny_model_dir: Path) -> None:
    encoder, _ = load(tiny_model_dir)
    n = encoder.image_tokens
    present = np.array([[True, False, True], [True, False, False]])
    ids, mask = encoder.encode(["open the drawer", "close it"], present)
    # camera 2 is absent from the whole batch: no slots; camera 3 of the second sample: padded slots
    assert (ids == encoder.image_id).sum(axis=1).tolist() == [2 * n, n]
    assert ((ids == encoder.image_id) & ~mask).sum() == 0
    assert mask[1, : 2 * n].tolist() == [True] * n + [False] * n
    for row, prompt in enumerate(["open the drawer", "close it"]):
        alone, _ = encoder.encode([prompt], np.ones((1, 1), bool))
        assert ids[row, 2 * n :][mask[row, 2 * n :]].tolist() == alone[0, n:].tolist()


def test_prompt_too_long_is_refused_with_the_remedy(tiny_model_dir: Path) -> None:
    encoder, _ = load(tiny_model_dir, prompt_max_len=8)
    with pytest.raises(DataError, match=r"got \d+ tokens, expected at most data\.prompt_max_len = 8.*prompt_overflow"):
        encoder.encode(["open the drawer and then close the drawer and then open it again"], np.ones((1, 1), bool))


def test_prompt_too_long_is_cut_but_keeps_bos_and_newline(tiny_model_dir: Path) -> None:
    text = "open the drawer and then close the drawer and then open it again"
    whole = load(tiny_model_dir)[0].text_ids(text)
    assert len(load(tiny_model_dir, prompt_max_len=len(whole))[0].text_ids(text)) == len(whole)  # exactly the limit
    cut = load(tiny_model_dir, prompt_max_len=8, prompt_overflow="truncate")[0].text_ids(text)
    assert len(cut) == 8
    assert cut[:-1].tolist() == whole[:7].tolist()
    assert (cut[0], cut[-1]) == (whole[0], whole[-1])


@pytest.mark.parametrize(
    ("prompt", "fault"), [("", "empty instruction"), (" \n\t", "empty"), ("a" * 100_001, "100001 characters")]
)
def test_prompt_that_is_no_instruction_is_refused(tiny_model_dir: Path, prompt: str, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        load(tiny_model_dir, prompt_overflow="truncate")[0].encode(["open the drawer", prompt], np.ones((2, 1), bool))


def test_prompt_image_token_typed_by_a_person_is_no_picture(tiny_model_dir: Path) -> None:
    encoder, _ = load(tiny_model_dir)
    ids, _ = encoder.encode(["open <image> the <image><image> drawer"], np.ones((1, 1), bool))
    assert (ids == encoder.image_id).sum() == encoder.image_tokens
    assert (ids[0, : encoder.image_tokens] == encoder.image_id).all()


@pytest.mark.parametrize("size", [(50, 30), (32, 32), (13, 64), (200, 180)])
def test_pixels_equal_the_siglip_processors(tiny_model_dir: Path, processor: PaliGemmaProcessor, size: tuple[int, int]) -> None:
    assert type(processor.image_processor).__name__ == "SiglipImageProcessorPil"
    _, spec = load(tiny_model_dir)
    image = picture(*size)
    expected = np.asarray(processor.image_processor(images=[image], return_tensors="np")["pixel_values"])[0]
    assert spec.resizer == "torch"
    for resizer in ("pillow", "torch"):
        pixels = replace(spec, resizer=resizer).apply(np.asarray(image)).astype(np.float32) / 255
        got = (pixels - np.reshape(spec.mean, (3, 1, 1))) / np.reshape(spec.std, (3, 1, 1))
        levels = np.abs(got - expected) * min(spec.std) * 255
        if resizer == "pillow":
            assert levels.max() < 1e-3
        else:  # where one side grows and the other shrinks, their order counts at edges that overshoot
            assert (levels > 1.001).mean() <= (0.03 if size == (13, 64) else 0)


@pytest.mark.parametrize("resizer", ["pillow", "torch"])
def test_image_pad_keeps_the_aspect_on_black(resizer: str) -> None:
    spec = ImageSpec(16, (0.5,) * 3, (0.5,) * 3, resize="pad", resizer=resizer)
    white = np.full((16, 32, 3), 255, np.uint8)
    pixels = spec.apply(white)
    assert pixels.shape == (3, 16, 16)
    assert (pixels[:, 5:11] == 255).all()
    assert (pixels[:, :3] == 0).all()
    assert (pixels[:, 13:] == 0).all()
    stretched = replace(spec, resize="stretch").apply(white)
    assert (stretched == 255).all()


@pytest.mark.parametrize("resizer", ["pillow", "torch"])
@pytest.mark.parametrize("resize", ["stretch", "pad"])
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (16, 16), (30, 30)])
def test_image_crop_of_everything_is_no_crop(resize: str, size: tuple[int, int], resizer: str) -> None:
    spec = ImageSpec(16, (0.5,) * 3, (0.5,) * 3, resize=resize, resizer=resizer)
    image = np.asarray(picture(*size))
    difference = spec.apply(image, (0.0, 0.0, 1.0, 1.0)).astype(int) - spec.apply(image)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("resizer", ["pillow", "torch"])
def test_image_crop_shows_the_box(resizer: str) -> None:
    spec = ImageSpec(8, (0.5,) * 3, (0.5,) * 3, resizer=resizer)
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:16, 4:12] = (10, 200, 30)
    got = spec.apply(pixels, (4 / 32, 8 / 32, 12 / 32, 16 / 32))
    assert (got == np.reshape([10, 200, 30], (3, 1, 1))).all()


@pytest.mark.parametrize("resize", ["stretch", "pad"])
@pytest.mark.parametrize("size", [(16, 16), (40, 20), (97, 131), (9, 5)])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_torch_resizes_as_pillow_does(resample: Image.Resampling, size: tuple[int, int], resize: str) -> None:
    """Of any layout in memory: writable or not, turned round, a part of a larger picture."""
    large = np.random.default_rng(0).integers(0, 256, (2 * size[1], size[0] + 3, 3), dtype=np.uint8)
    pixels = large[::-2, 3:]
    assert pixels.shape == (size[1], size[0], 3)
    own = ImageSpec(16, (0.5,) * 3, (0.5,) * 3, int(resample), resize)
    expected = own.apply(np.ascontiguousarray(pixels)).astype(int)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    for same in (pixels, frozen):
        got = replace(own, resizer="torch").apply(same)
        assert np.abs(got - expected).max() <= 1
        assert (got != expected).mean() < 0.1


def test_what_was_saved_without_a_resizer_keeps_pillow(preprocessor: Preprocessor) -> None:
    saved = preprocessor.to_dict()
    assert Preprocessor.from_dict(saved, "here").image == preprocessor.image
    assert saved["image"].pop("resizer") == "torch"
    assert Preprocessor.from_dict(saved, "here").image == replace(preprocessor.image, resizer="pillow")


@pytest.mark.parametrize(
    ("section", "key", "value", "model"),
    [(None, "image_token_index", 7, r"7, 32, \d+"), ("vision_config", "image_size", 64, r"\d+, 64, ")],
)
def test_processor_and_config_that_disagree_on_the_image_token_are_refused(
    tiny_model_dir: Path, tmp_path: Path, section: str | None, key: str, value: int, model: str
) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"the processor has .* = \(\d+, 32, \d+\), the model \({model}"):
        load(folder)


def test_backbone_of_another_kind_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A folder that transformers can load, but no PaliGemma."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma", "vocab_size": 64}))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("processor_class", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"model_name_or_path: .*holds a gemma, expected a PaliGemma"):
        load(folder)


@pytest.mark.parametrize("name", ["google/paligemma-3b-pt-224", "no/such/folder", "."])
def test_backbone_that_cannot_be_loaded_names_licence_login_and_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load(name)
    text = str(caught.value)
    assert f"'{name}'" in text
    for word in ("licence", "hf auth login", "HF_TOKEN", "local folder", "--model_path_override"):
        assert word in text
