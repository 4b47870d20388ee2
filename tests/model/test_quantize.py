"""Quantised weights: smaller as torchao stores them, and near to what they were by the step of their grid."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ConfigFactory
from paligemma_vla import Policy
from paligemma_vla.errors import ModelError
from paligemma_vla.model import VLAModel, vla_model
from paligemma_vla.model.quantize import GROUP, KINDS, InBfloat16, quantize, weight_bytes
from support import randomize

CPU = torch.device("cpu")


class Small(nn.Module):
    """int4 fits the first layer; the second has no whole number of groups, the third no whole number of tiles of rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fits, self.odd_width, self.odd_rows = nn.Linear(64, 48), nn.Linear(48, 64), nn.Linear(64, 24)
        self.norm, self.table, self.conv = nn.LayerNorm(64), nn.Embedding(10, 64), nn.Conv2d(3, 64, 4)
        self.requires_grad_(False)


def quantised(kind: Any) -> tuple[Small, Small]:
    full, small = Small(), Small()
    quantize(small, kind, CPU)
    return full, small


def weight_of(layer: nn.Module) -> torch.Tensor:
    """What the layer multiplies by: its answers to unit vectors."""
    linear = layer.linear if isinstance(layer, InBfloat16) else layer
    eye = torch.eye(linear.in_features)
    return (layer(eye) - layer(torch.zeros_like(eye))).T


def test_int8_weights_lie_within_half_a_step_of_their_rows_grid() -> None:
    full, small = quantised("int8")
    for name in ("fits", "odd_width", "odd_rows"):
        weight = getattr(full, name).weight
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        error = (weight_of(getattr(small, name)) - weight).abs()
        assert (error <= 0.51 * step + 1e-6).all()
        assert error.max() > 0.2 * step.min()  # it is quantised


def test_int4_weights_lie_within_half_a_step_of_their_groups_grid() -> None:
    full, small = quantised("int4")
    assert isinstance(small.fits, InBfloat16)
    groups = full.fits.weight.view(48, 64 // GROUP, GROUP)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (weight_of(small.fits) - full.fits.weight).abs().view(groups.shape).amax(-1)
    assert (error <= 0.55 * step + 0.008).all()  # and bfloat16 has eight bits
    assert error.mean() > 0.25 * step.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_only_linear_layers_are_quantised(kind: str) -> None:
    full, small = quantised(kind)
    for name in ("norm", "table", "conv"):
        assert torch.equal(getattr(small, name).weight, getattr(full, name).weight)
    for name in ("odd_width", "odd_rows"):  # which 4 bit does not fit
        assert type(getattr(small, name).weight.data).__name__ == "Int8Tensor"
        assert torch.equal(getattr(small, name).bias, getattr(full, name).bias)


def test_weight_bytes_count_what_is_stored() -> None:
    assert weight_bytes(nn.Linear(10, 3)) == 4 * 33
    _, small = quantised("int8")
    # int8 values and zero points, a float32 scale per row; the bias as it was
    assert 64 * 48 + 4 * 48 + 4 * 48 <= weight_bytes(small.fits) <= 64 * 48 + 5 * 48 + 4 * 48
    _, small = quantised("int4")
    # half a byte each, scale and zero in bfloat16 per group, the bias in bfloat16
    assert weight_bytes(small.fits) == 64 * 48 // 2 + 2 * 2 * 48 * (64 // GROUP) + 2 * 48


@pytest.fixture(scope="module")
def observation() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 40, 28, 3), dtype=np.uint8)
    return {"image_1": pictures[0], "image_2": pictures[1], "state": np.ones(3, np.float32), "prompt": "open the drawer"}


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.01), ("int4", 0.1)])
def test_quantised_policy_is_smaller_and_near(
    policy: Policy, checkpoint: Any, observation: dict[str, Any], kind: Any, bound: float
) -> None:
    small = Policy.from_checkpoint(checkpoint, weights=kind)
    assert small.metadata["weights"] == kind
    assert policy.metadata["weights"] == "full"
    linears = [layer for layer in policy.model.paligemma_vlm.modules() if isinstance(layer, nn.Linear)]
    saved = weight_bytes(policy.model) - weight_bytes(small.model)
    assert saved > (0.6 if kind == "int8" else 0.7) * sum(weight_bytes(layer) for layer in linears)
    assert weight_bytes(small.model.action_head) == weight_bytes(policy.model.action_head)
    full = policy.infer(observation, seed=0)["actions"]
    difference = np.abs(small.infer(observation, seed=0)["actions"] - full).max()
    assert 0 < difference < bound * np.abs(full).max()


def test_missing_torchao_or_kernel_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"weights int4: fits cannot be quantised for meta .*int8 computes everywhere"):
        quantize(Small(), "int4", torch.device("meta"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ModelError, match=r"weights int8: .*pip install 'paligemma-vla\[quantization\]'"):
        quantize(Small(), "int8", CPU)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("int4", 0.2)])
def test_model_that_computes_in_bfloat16_is_quantised(
    tiny_config: ConfigFactory, kind: Any, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`to_device` holds its matrices in bfloat16 first: torchao starts from those."""
    monkeypatch.setattr(vla_model, "SMALL", 0)
    torch.manual_seed(0)
    model = randomize(VLAModel(tiny_config({"model.vlm_config.dtype": "bfloat16"})), scale=0.1).eval().requires_grad_(False)
    small = copy.deepcopy(model).to_device(CPU, kind)
    full = model.to_device(CPU)
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    prompts = ["open the drawer", "push it"]
    with torch.no_grad():
        expected, got = (m.get_vl_embeddings(pictures, prompts).float() for m in (full, small))
    assert weight_bytes(small.paligemma_vlm) < weight_bytes(full.paligemma_vlm)
    assert 0 < (got - expected).norm() < bound * expected.norm()
