"""Low-rank adapters (Hu et al. 2021) beside linear layers, through peft: added, found, merged into the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from paligemma_vla.config import LoRAConfig
from paligemma_vla.errors import ModelError


def adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of every linear layer with an adapter."""
    from peft.tuners.lora import LoraLayer  # heavy: only where there are adapters

    return ((name, part) for name, part in module.named_modules() if isinstance(part, LoraLayer))


def add_adapters(module: nn.Module, lora: LoRAConfig, key: str, left_out: Sequence[str] = ()) -> None:
    """Put adapters beside the linear layers that `lora` names, whose own weights no longer learn. They begin at zero (B = 0).

    key: of `lora` in the configuration, for messages. left_out: how names begin of layers that get none. Raises `ModelError`
    when no layer is left.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    chosen = [name for name in linear if lora.target_modules.fullmatch(name) and not f"{name}.".startswith(tuple(left_out))]
    if not chosen:
        raise ModelError(
            f"{key}.target_modules: got {lora.target_modules.pattern!r}, which matches the whole name of no linear layer that "
            f"is not frozen; there are, for example, {', '.join([*linear[:2], *linear[-2:]])}"
        )
    learns = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=chosen, lora_dropout=0.0)  # type: ignore[arg-type]
    inject_adapter_in_model(settings, module)
    for name, parameter in module.named_parameters():  # peft freezes all but the adapters
        parameter.requires_grad_(learns.get(name, ".lora_" in name))
    for _, layer in adapted(module):
        for part in (layer.lora_A, layer.lora_B):
            part.float()  # peft takes the type of the weights beside, which may be bfloat16


def merge_adapters(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Add the adapters to the weights beside them, in float32, and keep the sums in `dtype`: plain layers remain."""
    for name, layer in list(adapted(module)):
        base = layer.get_base_layer().float()
        layer.merge()
        module.set_submodule(name, base.to(dtype))
