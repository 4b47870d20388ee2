"""What makes a processor wait for its GPU, found without one."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a processor wait for its GPU, or copies from its memory: neither can be part of a CUDA graph."""

    refused = (torch.ops.aten._local_scalar_dense, torch.ops.aten.lift_fresh, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.refused, func
        return func(*args, **(kwargs or {}))
