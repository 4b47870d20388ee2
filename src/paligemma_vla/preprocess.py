"""From what a person or a file gives to what the model takes: the one copy that loader, model and `Policy` call.

Prompt to tokens, image to pixels, state and actions to normalised numbers and back. A `Preprocessor` is plain data plus
these functions: it goes into the checkpoint as a dictionary and comes back equal.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.Image import Transpose
from tokenizers import Tokenizer

from paligemma_vla.config import PI0_HEAD, PI05_HEAD, VLAConfig
from paligemma_vla.errors import DataError, ModelError
from paligemma_vla.hub import backbone_errors, check_backbone
from paligemma_vla.normalization import DatasetStatistics, Normalizer
from paligemma_vla.schema import Pixels

Box = tuple[float, float, float, float]
TORCH_FILTERS = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}
LONGEST_PROMPT = 100_000  # characters
FORMS = {PI0_HEAD: "pi0", PI05_HEAD: "pi05"}  # of the text that a head was made for
TURNS = {  # EXIF orientation -> what turns the stored picture as it is to be seen; 1 is as stored
    **{2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE},
    **{6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90},
}
# What Pillow raises for EXIF that is damaged. Such a picture is as stored, as in every viewer.
EXIF_ERRORS = (struct.error, SyntaxError, LookupError, TypeError, ValueError, ZeroDivisionError)


@dataclass(frozen=True)
class ImageSpec:
    """How the backbone wants its images: square side in pixels, and `(pixel / 255 - mean) / std` per channel.

    resize: `stretch` is what PaliGemma's own processor does; `pad` keeps the aspect and fills with black. resizer: who computes
    it. `torch` crops at whole pixels; its colours are next to those of `pillow` (1 of 255; more at edges where one side grows
    and the other shrinks). `openpi` is what LeRobot took over from it: bilinear without a filter against aliasing, in floating
    point, so that the result is not rounded to whole colours again.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = int(Image.Resampling.BICUBIC)
    resize: str = "stretch"
    resizer: str = "pillow"  # of checkpoints that do not say; what is trained now has `torch`

    @property
    def rounds(self) -> bool:
        """Whether images are (3, size, size) uint8; else float32, normalised."""
        return self.resizer != "openpi"

    def blank(self) -> NDArray[Any]:
        """In place of the image of an absent camera, which nothing looks at."""
        return np.zeros((3, self.size, self.size), np.uint8 if self.rounds else np.float32)

    def apply(self, pixels: Pixels, box: Box | None = None) -> NDArray[Any]:
        """An RGB image (H, W, 3) uint8 of any size as (3, size, size), see `rounds`; `box` (left, top, right, bottom; shares of
        the sides) crops first."""
        height, width, _ = pixels.shape
        if self.resize == "pad" and width != height and self.rounds:
            pixels = _pad_to_square(pixels)
            height, width, _ = pixels.shape
        left, top, right, bottom = box or (0.0, 0.0, 1.0, 1.0)
        corners = (left * width, top * height, right * width, bottom * height)
        if self.resizer != "pillow":
            x, y, wide, high = (round(v) for v in (corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]))
            pixels, box = pixels[y : y + max(high, 1), x : x + max(wide, 1)], None
        if not self.rounds:
            unrounded = _resized_unrounded(pixels, self.size, self.resize == "pad")
            mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
            return (unrounded - mean) / std
        if pixels.shape[:2] == (self.size, self.size) and box is None:
            planes = pixels.transpose(2, 0, 1)
        elif self.resizer == "torch":
            planes = _resized(pixels, self.size, self.resample)
        else:
            resized = Image.fromarray(pixels).resize((self.size, self.size), Image.Resampling(self.resample), box=corners)
            planes = np.asarray(resized).transpose(2, 0, 1)
        return np.ascontiguousarray(planes)

    def decoded_side(self) -> int:
        """Side that a picture which is larger by far may be decoded at, in px; 0: at its own size.

        Twice what is wanted: then the resizing after it decides how the picture looks.
        """
        return 2 * self.size if self.resizer == "torch" else 0


def _resized(pixels: Pixels, size: int, resample: int) -> Pixels:
    """(H, W, 3) to (3, size, size), with the filter of Pillow, which torch computes at several times its speed."""
    import torch  # here: commands that only look at data do without

    if not pixels.flags.writeable or min(pixels.strides) < 0:  # torch has no such tensors
        pixels = pixels.copy()
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    mode = TORCH_FILTERS[resample]
    resized: Pixels = torch.nn.functional.interpolate(planes, size=(size, size), mode=mode, antialias=True)[0].numpy()
    return resized


def _resized_unrounded(pixels: Pixels, size: int, pad: bool) -> NDArray[np.float32]:
    """(H, W, 3) uint8 to (3, size, size) float32 in [0, 1]; with `pad` the odd row or column of black is the last one."""
    import torch
    import torch.nn.functional as F

    whole = np.array(pixels, order="C")  # a copy: torch takes no array that cannot be written
    planes = torch.from_numpy(whole).permute(2, 0, 1)[None].float() / 255
    height, width, _ = pixels.shape
    if (height, width) != (size, size):
        ratio = max(height, width) / size
        shape = (max(1, int(height / ratio)), max(1, int(width / ratio))) if pad else (size, size)
        planes = F.interpolate(planes, size=shape, mode="bilinear", align_corners=False).clamp_(0, 1)
        top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
        planes = F.pad(planes, (left, size - shape[1] - left, top, size - shape[0] - top))
    resized: NDArray[np.float32] = planes[0].numpy()
    return resized


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """A picture of 8 bits per channel as RGB, turned as its EXIF orientation says. Raises as Pillow for damaged pixels."""
    image.load()  # EXIF may follow the pixels of a PNG
    turn = exif_turn(image)
    return image.convert("RGB") if turn is None else image.convert("RGB").transpose(turn)


def exif_turn(image: Image.Image) -> Transpose | None:
    """How a picture has to be turned, by the EXIF that has been read."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except EXIF_ERRORS:
        return None


def _pad_to_square(pixels: Pixels) -> Pixels:
    height, width, _ = pixels.shape
    side = max(height, width)
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


@dataclass(eq=False)
class PromptEncoder:
    """Instruction and number of images to token ids, as `PaliGemmaProcessor` lays them out: images, bos, text, newline.

    form: `paligemma`; `pi0`, whose text keeps what stands around it; `openpi`, the same in one line without underscores; or
    `pi05`, whose text also has the state (`text`).
    An absent camera's slots hold padding that nothing attends to; a camera absent from the whole batch has no slots.
    Raises `DataError` for an empty instruction, or one longer than `max_len` unless `overflow` is `truncate`.
    """

    tokenizer_json: str
    bos_id: int
    pad_id: int
    image_id: int
    image_tokens: int
    max_len: int
    overflow: str
    form: str = "paligemma"

    def __post_init__(self) -> None:
        self._tokenizer = Tokenizer.from_str(self.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._newline = self._ids("\n")
        self.text_ids = lru_cache(maxsize=4096)(self._text_ids)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, prompt: str, state: NDArray[np.float32]) -> str:
        """What is encoded for an instruction and a normalised state (P,): with the form `pi05` both, the state in 256 bins."""
        if self.form not in ("openpi", "pi05"):
            return prompt
        task = prompt.strip().replace("_", " ").replace("\n", " ")
        if self.form == "openpi":
            return task
        bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
        return f"Task: {task}, State: {' '.join(map(str, bins))};\nAction: "

    def _text_ids(self, prompt: str) -> NDArray[np.int64]:
        """`<bos> prompt \\n` as ids."""
        if not prompt.strip():
            raise DataError("prompt: got an empty instruction, expected some words")
        if len(prompt) > LONGEST_PROMPT:  # tokens of ten million characters would take ten seconds and a gigabyte
            raise DataError(f"prompt: got {len(prompt)} characters, expected an instruction of at most {LONGEST_PROMPT}")
        # The image token written in a prompt would be taken for a picture.
        if self.form == "paligemma":
            prompt = prompt.strip() + "\n"
        elif self.form != "pi05" and not prompt.endswith("\n"):
            prompt += "\n"
        ids = [self.bos_id, *(i for i in self._ids(prompt) if i != self.image_id)]
        if len(ids) > self.max_len:
            if self.overflow != "truncate":
                raise DataError(
                    f"prompt: got {len(ids)} tokens, expected at most data.prompt_max_len = {self.max_len}: "
                    f"{prompt[:60]!r}...; raise it, or set data.prompt_overflow: truncate"
                )
            end = [] if self.form == "pi05" else self._newline
            ids = ids[: self.max_len - len(end)] + end
        return np.array(ids, np.int64)

    def encode(self, prompts: Sequence[str], image_mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Prompts and image_mask (B, N) to input_ids (B, T) and attention mask (B, T), padded on the right."""
        texts = [self.text_ids(prompt) for prompt in prompts]
        present = np.flatnonzero(image_mask.any(axis=0))
        images = self.image_tokens * len(present)
        ids = np.full((len(texts), images + max(len(text) for text in texts)), self.pad_id, np.int64)
        mask = np.zeros(ids.shape, bool)
        slots = np.repeat(image_mask[:, present], self.image_tokens, axis=1)
        ids[:, :images] = np.where(slots, self.image_id, self.pad_id)
        mask[:, :images] = slots
        for row, text in enumerate(texts):
            ids[row, images : images + len(text)] = text
            mask[row, images : images + len(text)] = True
        return ids, mask

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptEncoder, tuple(asdict(self).values())


class Preprocessor:
    """Everything between a raw observation and the model's inputs, and between its outputs and raw actions."""

    def __init__(self, prompts: PromptEncoder, image: ImageSpec, statistics: DatasetStatistics, normalization: str) -> None:
        self.prompts, self.image, self.statistics, self.normalization = prompts, image, statistics, normalization
        self.state = Normalizer(statistics.state, normalization, "state")
        self.action = Normalizer(statistics.action, normalization, "action")
        self.actions = statistics.actions

    def encode_actions(self, actions: NDArray[np.float32], state: NDArray[np.float32]) -> NDArray[np.float32]:
        """Recorded actions (..., K, A) after the state (..., P), both in real units, to what the model predicts, normalised."""
        return self.action.normalize(self.actions.encode(actions, state))

    def decode_actions(self, predicted: NDArray[np.float32], state: NDArray[np.float32]) -> NDArray[np.float32]:
        """The inverse: what the model predicts (..., K, A) to actions in real units; state (..., P) in real units."""
        return self.actions.decode(self.action.denormalize(predicted), state)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (str, int, float, list, dict) for the checkpoint."""
        image = asdict(self.image)
        return {
            "prompts": asdict(self.prompts),
            "image": {**image, "mean": list(image["mean"]), "std": list(image["std"])},
            "statistics": self.statistics.to_dict(),
            "normalization": self.normalization,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Preprocessor:
        image = {**raw["image"], "mean": tuple(raw["image"]["mean"]), "std": tuple(raw["image"]["std"])}
        return cls(
            PromptEncoder(**raw["prompts"]),
            ImageSpec(**image),
            DatasetStatistics.from_dict(raw["statistics"], where),
            raw["normalization"],
        )


def load_prompt_and_image_spec(config: VLAConfig, backbone: str | None = None) -> tuple[PromptEncoder, ImageSpec]:
    """Read tokenizer and image settings from a backbone's own `PaliGemmaProcessor` (D5), and check it against its config.

    backbone: hub id or folder, instead of the configuration's.
    Raises `ModelError` when they cannot be loaded or disagree on the image token.
    """
    from transformers import AutoConfig, AutoProcessor, PaliGemmaProcessor  # heavy: only where a backbone is loaded

    data, revision = config.data, config.model.vlm_config.revision
    name = backbone or config.model.vlm_config.model_name_or_path
    check_backbone(name, revision)
    with backbone_errors(name):
        processor = AutoProcessor.from_pretrained(name, revision=revision)
        architecture = AutoConfig.from_pretrained(name, revision=revision)
    if not isinstance(processor, PaliGemmaProcessor):
        raise ModelError(
            f"model.vlm_config.model_name_or_path: '{name}' holds a {architecture.model_type}, expected a PaliGemma; for "
            f"another backbone name its class in model.vlm_config.backbone"
        )
    tokenizer, images = processor.tokenizer, processor.image_processor
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    side = images.size["height"]
    tokens = (side // architecture.vision_config.patch_size) ** 2
    got = image_id, side, images.image_seq_length
    expected = architecture.image_token_id, architecture.vision_config.image_size, tokens
    if got != expected:
        raise ModelError(
            f"{name}: the processor has (<image> token, image size, tokens per image) = {got}, the model "
            f"{expected}; processor and weights do not belong together"
        )
    text, bos, pad = tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token_id, tokenizer.pad_token_id
    form = FORMS.get(config.model.action_head_config.head, "paligemma")
    prompts = PromptEncoder(text, bos, pad, image_id, tokens, data.prompt_max_len, data.prompt_overflow, form)
    mean, std = (tuple(float(v) for v in values) for values in (images.image_mean, images.image_std))
    resample = int(images.resample)
    resizer = "torch" if resample in TORCH_FILTERS else "pillow"
    return prompts, ImageSpec(side, mean, std, resample, data.image_resize, resizer)  # type: ignore[arg-type]
