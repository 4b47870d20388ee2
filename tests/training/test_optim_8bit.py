"""AdamW with moments in 8 bits: near AdamW, a quarter of its memory, in plain data, and resumed exactly.

torchao compiles its step for each shape, which takes seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from paligemma_vla.config import OptimizerConfig
from paligemma_vla.errors import ConfigError, TrainingError
from paligemma_vla.training.optim import build_optimizer
from support import distance, identical

EIGHT_BIT = OptimizerConfig(lr=1e-3, type="adamw_8bit")


class Toy(nn.Module):
    """Two layers large enough to be held in 8 bits, one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Of two shapes in all, since each is compiled.
        first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.layers = nn.Sequential(first, nn.GELU(), second, nn.LayerNorm(64))

    def set_stage(self, train: str) -> None:
        """As VLAModel has it."""

    def learn(self, optimizer: Any, steps: int) -> None:
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            optimizer.zero_grad()
            x = torch.randn(8, 64, generator=generator)
            (self.layers(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()


def trained(config: OptimizerConfig, steps: int) -> tuple[Toy, Any]:
    model = Toy()
    optimizer = build_optimizer(model, config)  # type: ignore[arg-type]
    model.learn(optimizer, steps)
    return model, optimizer


@pytest.mark.timeout(400)
def test_moments_in_8_bits_stay_near_adamw_in_a_quarter_of_its_memory() -> None:
    exact, reference = trained(OptimizerConfig(lr=1e-3), 20)
    near, optimizer = trained(EIGHT_BIT, 20)
    assert distance(near.parameters(), exact.parameters()) < 0.1 * distance(exact.parameters(), Toy().parameters())
    states = [tree_leaves(each.state_dict()["state"]) for each in (optimizer, reference)]
    sizes = [sum(value.nbytes for value in values if isinstance(value, torch.Tensor)) for values in states]
    assert sizes[0] < 0.35 * sizes[1]
    assert {type(value) for value in states[0]} == {torch.Tensor, bool}  # none of torchao's: it can be read anywhere


@pytest.mark.timeout(400)
def test_state_goes_through_a_file_and_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained(EIGHT_BIT, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = Toy()
    again.load_state_dict(saved["model"])
    resumed = build_optimizer(again, EIGHT_BIT)  # type: ignore[arg-type]
    resumed.load_state_dict(saved["optimizer"])
    for each, its_optimizer in ((model, optimizer), (again, resumed)):
        its_optimizer.param_groups[0]["lr"] = 5e-4  # as a schedule sets it
        each.learn(its_optimizer, 3)
    assert identical(model.state_dict(), again.state_dict())
    assert identical(optimizer.state_dict(), resumed.state_dict())


def test_missing_torchao_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.delitem(sys.modules, "paligemma_vla.training.optim_8bit", raising=False)
    with pytest.raises(ConfigError, match=r"adamw_8bit needs torchao: .*pip install 'paligemma-vla\[quantization\]'"):
        trained(EIGHT_BIT, 1)


def test_machine_without_a_compiler_is_told_what_to_do() -> None:
    from torch._inductor import config as inductor
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    no_compiler = inductor.patch({"cpp.cxx": ("/nonexistent/c++",), "fx_graph_cache": False})
    told = pytest.raises(TrainingError, match=r"adamw_8bit cannot be compiled here .*install a C\+\+ compiler \(g\+\+\), or")
    with fresh_cache(), no_compiler, told:
        trained(EIGHT_BIT, 1)
    torch._dynamo.reset()
