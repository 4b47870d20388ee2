"""Weights of a trained backbone as 8 or 4 bit integers, through torchao: less memory, at a cost in accuracy that
docs/deploy.md gives.

Activations stay floating. Only `nn.Linear` is quantised: norms, the token table and the patch convolution keep their weights,
and so does the action head, with which the change of the actions would be twice as large for a fifteenth of the memory.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from paligemma_vla import quiet_libraries
from paligemma_vla.errors import ModelError, first_line, needs_extra

Weights = Literal["int8", "int4"]
KINDS: tuple[Weights, ...] = get_args(Weights)
GROUP = 32  # weights that share a scale at 4 bit: the least that the kernels take, hence the most accurate
ROWS = 16  # the CPU's 4 bit kernel takes multiples of it


class InBfloat16(nn.Module):
    """A 4 bit layer: its kernels take bfloat16, whatever the model around it computes in."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.to(torch.bfloat16)).to(x.dtype)
        return y


def quantize(module: nn.Module, kind: Weights, device: torch.device) -> None:
    """Quantise every linear layer of `module`, in place, for computing on `device`, layer by layer.

    int8: one scale per row. int4: one scale and zero per `GROUP` weights of a row; a layer whose width is no multiple of it
    (SigLIP's 4304) becomes int8. Raises `ModelError` where torchao is missing, or has no kernel for the device.
    """
    quiet_libraries()
    with needs_extra(f"weights {kind}", "quantization", ModelError):
        import torchao  # noqa: F401
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            packed = kind == "int4" and layer.in_features % GROUP == 0 and layer.out_features % ROWS == 0
            try:
                module.set_submodule(name, _quantized(layer, packed, device))
            except Exception as error:  # of any kind: torchao has many for a missing kernel
                raise ModelError(
                    f"weights {kind}: {name} cannot be quantised for {device} ({first_line(error)}); int8 computes "
                    f"everywhere, int4 on a CPU or a CUDA GPU of compute capability 8.0 or more"
                ) from error


def _quantized(layer: nn.Linear, packed: bool, device: torch.device) -> nn.Module:
    """The layer with int8 weights, or packed: with int4 weights, two in a byte, as the device's kernel wants them."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if not packed:
        quantize_(layer, Int8WeightOnlyConfig(version=2), device=device)
        return layer
    settings: Any = {"group_size": GROUP, "set_inductor_config": False}
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig as Config
    else:
        Config, settings["int4_packing_format"] = Int4WeightOnlyConfig, "tile_packed_to_4d"
    layer = layer.to(device, torch.bfloat16)
    quantize_(layer, Config(**settings))
    return InBfloat16(layer)


def weight_bytes(module: nn.Module) -> int:
    """Bytes that parameters and buffers take, with the parts of quantised ones counted as they are stored."""
    return sum(_bytes(value) for value in [*module.parameters(), *module.buffers()])


def _bytes(value: Tensor) -> int:
    if is_traceable_wrapper_subclass(value):  # as torchao's are: tensors made of tensors
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes
