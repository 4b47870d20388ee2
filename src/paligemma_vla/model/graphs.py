"""Sampling by CUDA graphs: one launch from pixels to actions, where Python would launch each kernel of each Euler step.

A graph computes at the shapes and the addresses that it was captured with. So contexts are padded to the longest that a policy
takes, and what differs between calls is copied into tensors that stay: one graph serves all calls with as many observations
and Euler steps, another one those that also continue a prefix.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from paligemma_vla.errors import first_line
from paligemma_vla.model.action_head.base import FlowActionHead
from paligemma_vla.model.vla_model import VLAModel, backbone_layers

log = logging.getLogger(__name__)
GRAPHS = 32  # kept at most: what has other shapes then is computed without one
WARM_UP = 3  # calls before a capture: they compile, choose kernels and allocate workspaces, which a capture must not

Run = Callable[[Sequence[Tensor]], Tensor]
Replay = Callable[[], Tensor]


def capture(run: Run, inputs: Sequence[Tensor], pool: Any) -> Replay:
    """Record the kernels that `run(inputs)` launches. The result launches them again, on what is in `inputs` by then.

    pool: memory that the graphs share, of which one runs at a time.
    """
    with torch.cuda.device(inputs[0].device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            answer = run(inputs)

    def replay() -> Tensor:
        graph.replay()
        return answer.clone()  # the next call writes over it

    return replay


class GraphedModel:
    """Is called as `VLAModel.forward` is to sample actions, and returns the same.

    model: on its device and in eval mode; its weights must stay where they are. tokens: longest context T. fused: also compile
    the layers of the backbone and the work of an Euler step (`torch.compile`), which are fewer kernels then. The model itself
    computes what no graph can: guidance, which needs gradients, observations of which some lack a camera, what has too many
    shapes.
    """

    def __init__(self, model: VLAModel, tokens: int, fused: bool = True) -> None:
        self.model, self.device = model, next(model.parameters()).device
        # Fused attention copies a mask whose rows are no multiple of 8 long. The head's has one column more: the state.
        self.tokens = -(-(tokens + 1) // 8) * 8 - 1
        self.captured: dict[tuple[object, ...], _Graph | None] = {}
        self._to_capture: list[Callable[[], VLAModel]] = [lambda: model]
        if fused:
            self._to_capture.insert(0, cache(partial(_fused, model)))  # first what is fastest
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self._lock = threading.Lock()  # callers share the tensors of a graph

    def __call__(self, **arguments: Any) -> Tensor:
        """Actions (B, K, A), normalised, float32. Arguments of `VLAModel.forward`; input_ids and image_mask must be given."""
        ongoing, present = arguments["ongoing"], arguments["image_mask"]
        alike = bool((present == present[:1]).all())
        if alike and not (ongoing is not None and ongoing.guided):
            with self._lock, torch.inference_mode():
                fixed = self._in_fixed_shape(arguments)
                shapes = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(fixed))
                if shapes not in self.captured and len(self.captured) < GRAPHS:
                    self.captured[shapes] = self._capture(fixed)
                if (graph := self.captured.get(shapes)) is not None:
                    return graph(fixed)
        actions: Tensor = self.model(**arguments)
        return actions

    def _in_fixed_shape(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments that differ in the numbers of their tensors only, where as many observations are asked alike."""
        ids, mask = arguments["input_ids"], arguments["vlm_attention_mask_batch"]
        present: list[bool] = arguments["image_mask"][0].tolist()
        missing = self.tokens - ids.shape[1]
        assert missing >= 0, (ids.shape, self.tokens)
        return {
            **arguments,
            "input_ids": F.pad(ids, (0, missing)),
            "vlm_attention_mask_batch": F.pad(mask, (0, missing)),
            "raw_prompt_texts_batch": None,  # they are encoded
            # A camera that all lack is left out, as it has no place among the tokens either.
            "image_2_batch": arguments["image_2_batch"] if all(present[1:2]) else None,
            "further_images": list(compress(arguments["further_images"], present[2:])),
            "image_mask": None,
        }

    def _capture(self, arguments: dict[str, Any]) -> _Graph | None:
        """None where that is impossible: drivers, compilers and models of others may forbid it, and a robot can wait longer."""
        while self._to_capture:
            try:
                return _Graph(self._to_capture[0](), arguments, self.device, self._pool)
            except Exception as error:  # of any kind
                del self._to_capture[0]
                remains = "a CUDA graph without it is captured" if self._to_capture else "kernels are launched one by one"
                what = "torch.compile" if self._to_capture else "a CUDA graph"
                log.warning("compile: %s failed (%s); %s, and answers take longer", what, first_line(error), remains)
        return None


class _Graph:
    """A model at fixed shapes: its inputs on the device, and the kernels that make actions of them."""

    def __init__(self, model: VLAModel, arguments: dict[str, Any], device: torch.device, pool: Any) -> None:
        leaves, form = tree_flatten(arguments)
        self.inputs = [leaf.to(device, copy=True) for leaf in leaves if isinstance(leaf, Tensor)]

        def run(inputs: Sequence[Tensor]) -> Tensor:
            tensors = iter(inputs)
            filled = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            actions: Tensor = model(**tree_unflatten(filled, form))
            return actions

        self.replay = capture(run, self.inputs, pool)

    def __call__(self, arguments: dict[str, Any]) -> Tensor:
        given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        for kept, new in zip(self.inputs, given, strict=True):
            kept.copy_(new)
        return self.replay()


def _fused(model: VLAModel) -> VLAModel:
    """The model, weights shared, with the layers of its backbone and the work of an Euler step compiled."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    fused = copy.deepcopy(model, shared)
    for layer in backbone_layers(fused):
        layer.compile()
    if isinstance(fused.action_head, FlowActionHead):
        fused.action_head.compile_step()
    return fused
