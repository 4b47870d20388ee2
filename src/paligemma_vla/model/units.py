"""What of a model in shards is gathered as one, and what autocast takes copies of."""

from __future__ import annotations

from torch import nn

from paligemma_vla.model.vla_model import VLAModel

LARGE_TABLE = 2**20  # numbers; a smaller table is not worth a message of its own


def layers(model: VLAModel) -> list[nn.Module]:
    """What is gathered one by one: the layers of the backbone.

    The head stays gathered through the step, with the little that is left: sampling passes through it once per Euler step.
    """
    return [layer for module in model.paligemma_vlm.modules() if isinstance(module, nn.ModuleList) for layer in module]


def large_tables(model: VLAModel) -> list[nn.Module]:
    """Tables of tokens: looked up once, they need not stay gathered."""
    tables = [module for module in model.paligemma_vlm.modules() if isinstance(module, nn.Embedding)]
    return [table for table in tables if table.weight.numel() >= LARGE_TABLE]


def matrices(module: nn.Module) -> list[nn.Module]:
    """The modules whose weights autocast turns into the type that is computed in."""
    return [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]


def others(module: nn.Module) -> list[nn.Module]:
    """The modules that have weights besides: norms."""
    known = set(matrices(module))
    return [part for part in module.modules() if part not in known and next(part.parameters(recurse=False), None) is not None]
