"""How fast, beside what the device can do: reading its memory, and large matrix products, both measured in the same run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.common import Row, Times, best_seconds, interleaved
from benchmarks.gpu.correct import with_graphs
from benchmarks.gpu.shapes import build, policy_and_observation, random_batch
from torch.utils.flop_counter import FlopCounterMode

from paligemma_vla import Policy
from paligemma_vla.config import VLAConfig, load_config
from paligemma_vla.model.memory_plan import device_memory, plan_memory
from paligemma_vla.policy import Continuation
from paligemma_vla.training.optim import build_optimizer

CONFIG = Path(__file__).parents[2] / "configs" / "vla_config_24gb.yaml"
COMMON = {"training.stages": [], "training.ema_decay": 0.0}
FULL = {"model.vlm_config.lora": None}
FROZEN = {**FULL, "model.vlm_config.freeze_vision_tower": True, "model.vlm_config.freeze_language_model": True}
TRAINING: dict[str, dict[str, Any]] = {"full": FULL, "LoRA": {}, "head only": FROZEN}
# The most samples that the plan lets into the memory learn fastest; recomputing is for small cards.
SIZES = [{"data.batch_size": size, "model.vlm_config.activation_checkpointing": False} for size in (64, 32, 16, 8)]
MARGIN = 0.92  # of the memory that is free
Given = Mapping[str, Any]


class Limits:
    """What the device reads from memory (bytes/s), and computes in matrix products in the type of the model (operations/s)."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.device, side = device, 8192 if on_gpu else 1024
        numbers = torch.ones(2**30 if on_gpu else 2**27, device=device)
        self.read = numbers.nbytes / self._best(numbers.sum)
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_gpu else None) for _ in range(2))
        self.products = 2 * side**3 / self._best(lambda: a @ b)

    def _best(self, run: Callable[[], object]) -> float:
        best_seconds(partial(synchronized, run, self.device), 2)  # clocks rise, a kernel is chosen
        return best_seconds(partial(synchronized, run, self.device), 10)

    def rows(self) -> Iterator[Row]:
        yield Row("memory, read", self.read / 1e9, "GB/s", "higher")
        yield Row("matrix products", self.products / 1e12, "TFLOP/s", "higher")


def synchronized(run: Callable[[], object], device: torch.device) -> None:
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_latency(
    cameras: int, shapes: Given, device: torch.device, common: Given, repeats: int, limits: Limits
) -> Iterator[Row]:
    """One observation through `Policy`: from the pixels of the cameras to actions in real units."""
    gc.collect()  # the model before
    torch.compiler.reset()  # kernels for these shapes, as in a server
    changes = {**COMMON, **common, **FROZEN, "training.rtc_max_delay": 4, "model.vlm_config.use_aux_camera": cameras == 2}
    policy, observation = policy_and_observation(load_config(CONFIG, changes), dict(shapes), device)
    going_on = Continuation(np.zeros((6, 7), np.float32), 4)
    kinds = {"eager": policy, "captured": with_graphs(policy, False), "compiled and captured": with_graphs(policy, True)}
    for steps, continuation in ((50, None), (50, going_on), (10, None)):
        asked = {"observation": observation, "seed": 0, "num_steps": steps, "continuation": continuation}
        began = time.perf_counter()
        kinds["compiled and captured"].infer(**asked)
        first = time.perf_counter() - began
        taken = interleaved({name: partial(kind.infer, **asked) for name, kind in kinds.items()}, repeats)
        what = f"one observation, {cameras} camera{'s' * (cameras > 1)}, {steps} Euler steps"
        what += ", prefix" * (continuation is not None)
        yield from _compared(what, taken, _floor(policy, asked, limits), limits)
        yield Row(f"{what}: compiling and capturing", first, "s", "lower")


def _compared(what: str, taken: dict[str, Times], floor: float, limits: Limits) -> Iterator[Row]:
    """floor: seconds that nothing can go below."""
    for kind, times in taken.items():
        yield Row(
            f"{what}: {kind}",
            *times.in_ms,
            ratio=None if kind == "eager" else taken["eager"].median / times.median,
            against=None if kind == "eager" else "eager",
            share=floor / times.median,
            limit=f"{floor * 1e3:.2f} ms, {limits.read / 1e9:.0f} GB/s and {limits.products / 1e12:.3g} TFLOP/s",
        )


def _floor(policy: Policy, asked: dict[str, Any], limits: Limits) -> float:
    """Seconds for the weights that are used once, read or multiplied, whichever takes longer, and the blocks' at each step."""
    with FlopCounterMode(display=False) as counter:
        policy.infer(**{**asked, "num_steps": 1})
    once, each_step = 0, 0
    for name, weight in policy.model.named_parameters():
        if "action_head.blocks." in name and "modulation" not in name:
            each_step += weight.nbytes
        elif "embed_tokens" not in name:  # of a table only a few rows are read
            once += weight.nbytes
    return max(once / limits.read, counter.get_total_flops() / limits.products) + asked["num_steps"] * each_step / limits.read


def measure_training(shapes: Given, device: torch.device, common: Given, repeats: int, limits: Limits) -> Iterator[Row]:
    """Whole optimiser steps on one batch that lies on the device already, beside what was planned."""
    asked = [{}] if "data.batch_size" in common else SIZES
    kinds = [(kind, changes, asked) for kind, changes in TRAINING.items()]
    for kind, changes, sizes in [*kinds, (f"LoRA as {CONFIG.name}", {}, [{}])]:
        for size in sizes:
            config = load_config(CONFIG, {**COMMON, **changes, **size, **common})
            plan = plan_memory(config, dict(shapes), device, device_memory(device))
            if plan.total > MARGIN * (plan.available or 0) and size is not sizes[-1]:
                continue
            try:
                rows = list(_trained(kind, config, shapes, device, repeats, limits))
            except torch.OutOfMemoryError:
                print(f"training, {kind}, {size}: out of memory, planned {plan.total / 1e9:.1f} GB", flush=True)
                continue
            yield from rows
            yield Row(f"{rows[0].name}: planned", plan.total / 1e9, "GB", "lower")
            break


def _trained(kind: str, config: VLAConfig, shapes: Given, device: torch.device, repeats: int, limits: Limits) -> Iterator[Row]:
    gc.collect()  # the model before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    samples, step = config.data.batch_size, _training_step(config, shapes, device)
    with FlopCounterMode(display=False) as counter:
        step()
    times = interleaved({"step": partial(synchronized, step, device)}, repeats)["step"]
    slowest, fastest = samples / max(times.seconds), samples / min(times.seconds)
    name = f"training, {kind}, batch {samples}, {config.model.vlm_config.cameras} cameras"
    yield Row(
        name,
        samples / times.median,
        "samples/s",
        "higher",
        (slowest, fastest),
        share=counter.get_total_flops() / times.median / limits.products,
        limit=f"{limits.products / 1e12:.3g} TFLOP/s, recomputing counted",
    )
    if device.type == "cuda":
        yield Row(f"{name}: peak memory", torch.cuda.max_memory_reserved(device) / 1e9, "GB", "lower")


def _training_step(config: VLAConfig, shapes: Given, device: torch.device) -> Callable[[], None]:
    model = build(config, dict(shapes), device).train()
    optimizer = build_optimizer(model, config.optimizer)
    batch = random_batch(config, dict(shapes), config.data.batch_size, device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        output = model(**batch)
        (output.loss_sum / output.valid_count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step
