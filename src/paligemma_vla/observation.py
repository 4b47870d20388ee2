"""One observation of a robot, however it is written: checked, and turned into what `Policy` works with.

Numbers may be in a list, in NumPy or in torch, with a batch dimension of one or without. What could mean two things is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from paligemma_vla.actions import ActionTransform
from paligemma_vla.errors import DataError, Faults, closest, first_line
from paligemma_vla.preprocess import to_upright_rgb
from paligemma_vla.schema import PROMPT, STATE, Pixels

IMAGE = "an RGB picture: a uint8 array (H, W, 3), floats from 0 to 1, or a PIL image"


class ParsedObservation(NamedTuple):
    """images: RGB, one per camera of the policy; None: absent. state: (P,) in real units."""

    images: list[Pixels | None]
    state: NDArray[np.float32]
    prompt: str


def parse_observation(
    observation: Mapping[str, Any], cameras: Mapping[str, str], state_dim: int, actions: ActionTransform
) -> ParsedObservation:
    """Read an observation as `Policy.infer` takes it. Raises `DataError` with everything that is wrong about it.

    cameras: the keys of the policy's cameras, and their names in the data (empty where it has none). actions: what the policy
    predicts; it may start from a rotation in the state.
    """
    if not isinstance(observation, Mapping):
        raise DataError(f"observation: got {type(observation).__name__}, expected a dictionary of {', '.join(cameras)}, ...")
    faults, images, first = Faults(), [], next(iter(cameras))
    for key in cameras:
        with faults.collect():
            if key == first and observation.get(key) is None:
                got = (
                    f"got None, expected {IMAGE}" if key in observation else f"missing; got {', '.join(map(str, observation))}"
                )
                raise DataError(f"{key}: {got}")
            images.append(_image(key, observation.get(key)))
    with faults.collect():
        state = _state(observation.get(STATE), state_dim, actions)
    with faults.collect():
        prompt = _prompt(observation.get(PROMPT))
    keys = (*cameras, STATE, PROMPT)
    names = {**{_last(name): key for key, name in cameras.items() if name}, **{key: key for key in keys}}
    for key in (str(key) for key in observation if key not in keys):
        known = names.get(_last(key))  # of `observation.images.wrist`, as LeRobot writes it
        hint = f"; did you mean '{known}'?" if known else closest(key, keys)
        faults.errors.append(DataError(f"{key}: not a key of this policy{hint}"))
    if faults.errors:
        raise DataError("\n  ".join(["observation:", *map(str, faults.errors)]))
    return ParsedObservation(images, state, prompt)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def whole_number(name: str, value: Any, low: int) -> int:
    """An integer of any library, from `low` to 2**64 - 1. Raises `DataError`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not low <= number < 2**64:
        raise DataError(f"{name}: got {value!r:.80}, expected a whole number from {low} to 2**64 - 1")
    return number


def _numbers(value: Any, dimensions: int) -> NDArray[Any] | None:
    """What a list, an array or a tensor holds, without leading dimensions of one beyond `dimensions`; None: no numbers."""
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.float() if value.dtype == torch.bfloat16 else value  # NumPy has none
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a ragged list, a tensor without storage
        return None
    if not np.can_cast(array.dtype, np.float32, "same_kind"):
        return None
    while array.ndim > dimensions and len(array) == 1:
        array = array[0]
    return array


def _got(value: Any, numbers: NDArray[Any] | None) -> str:
    return type(value).__name__ if numbers is None else f"{numbers.dtype} {numbers.shape}"


def _image(key: str, value: Any) -> Pixels | None:
    if value is None:
        return None
    if isinstance(value, Image.Image):
        return _from_pillow(key, value)
    pixels = _numbers(value, 3)
    got = _got(value, pixels)
    if pixels is not None and pixels.ndim == 3 and pixels.shape[0] == 3 != pixels.shape[2]:
        pixels = pixels.transpose(1, 2, 0)  # (3, H, W), as torch writes pictures
    if pixels is None or pixels.shape[2:] != (3,) or not pixels.size:
        raise DataError(f"{key}: got {got}, expected {IMAGE}")
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise DataError(f"{key}: got {got} from {low:g} to {high:g}, expected {IMAGE}")
        if high == 1 and np.isin(pixels, (0, 1)).all():  # full colours, or the darkest of 0 to 255
            raise DataError(f"{key}: got {got} of 0 and 1 alone, which may end at 1 or at 255; expected a uint8 array")
        pixels = np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise DataError(f"{key}: got {got}, expected {IMAGE}")
    return pixels


def _from_pillow(key: str, image: Image.Image) -> Pixels:
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{key}: got a PIL image of mode {image.mode}, expected 8 bits per channel")
    try:
        return np.asarray(to_upright_rgb(image))
    except Exception as error:  # its file is decoded here, and may hold any bytes
        raise DataError(f"{key}: the PIL image cannot be decoded ({first_line(error)})") from error


def _state(value: Any, dimension: int, actions: ActionTransform) -> NDArray[np.float32]:
    numbers = _numbers(value, 1)
    if numbers is None or numbers.shape != (dimension,):
        raise DataError(f"state: got {_got(value, numbers)}, expected {dimension} numbers")
    with np.errstate(over="ignore"):
        state = numbers.astype(np.float32)
    unusable = np.flatnonzero(~np.isfinite(state))
    if len(unusable):
        raise DataError(f"state[{unusable[0]}]: got {numbers[unusable[0]]}, expected a finite number within float32")
    if not actions.starts_from(state):
        rotation = actions.rotation
        raise DataError(f"state: got {numbers.tolist()}, expected a rotation in it as {rotation}: a length of 0 is none")
    return state


def _prompt(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) == 1:  # a batch of one
        value = value[0]
    if not isinstance(value, str):
        raise DataError(f"prompt: got {type(value).__name__}, expected a string")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"prompt: got {value!a:.80}, expected text without lone surrogates")
    return value
