"""AdamW whose moments are held in 8 bits (Dettmers et al. 2021): torchao's, with plain data in its state and rates.

Imported only when `optimizer.type: adamw_8bit` asks for it: torchao is an extra, and compiles its step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torchao.optim import AdamW8bit as TorchaoAdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from paligemma_vla.errors import TrainingError, first_line

PARTS = ("codes", "scale", "qmap")


class AdamW8bit(TorchaoAdamW8bit):  # type: ignore[misc]
    """Moments of tensors of 4,096 numbers and more take one byte each, in blocks of 256 with a scale; smaller ones stay."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        self._rates: list[Tensor] = []
        super().__init__(groups, betas=betas, eps=eps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Keeps the rate a number, as every scheduler and log knows it; torchao's step wants a tensor."""
        rate = param_group["lr"]
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = rate
        self._rates.append(torch.tensor(rate, dtype=torch.float32))

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            group["lr"] = rate.fill_(group["lr"])
        try:
            with warnings.catch_warnings():  # of a cache of compiled graphs that torchao's types cannot use
                warnings.filterwarnings("ignore", "OptimState8bit does not implement", UserWarning)
                return super().step(closure)
        except TorchDynamoException as error:
            raise TrainingError(
                f"optimizer.type: the step of adamw_8bit cannot be compiled here ({first_line(error)}); install a C++ compiler "
                f"(g++), or take adamw"
            ) from error
        finally:
            for group, value in zip(self.param_groups, rates, strict=True):
                group["lr"] = value

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors only, so that a checkpoint can be read where there is no torchao."""
        state = super().state_dict()
        return {**state, "state": {key: _mapped(entry, _unpacked) for key, entry in state["state"].items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        packed = {key: _mapped(entry, _packed) for key, entry in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": packed})


def _mapped(entry: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: change(value) for name, value in entry.items()}


def _unpacked(value: Any) -> Any:
    if not isinstance(value, OptimState8bit):
        return value
    return {**{part: getattr(value, part) for part in PARTS}, "signed": value.signed}


def _packed(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return OptimState8bit(*(value[part] for part in PARTS), value["signed"], torch.float32)
