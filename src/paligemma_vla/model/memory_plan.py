"""How much memory a training step needs, counted before any of it is allocated.

The model is built on torch's meta device, where tensors have no storage: weights, gradients and optimiser state are counted on
it. Activations are counted too, not estimated by a formula: forward and backward pass run on tensors that have shapes but no
storage, and the bytes that would be alive are added up.
"""

from __future__ import annotations

import contextlib
import resource
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paligemma_vla.config import VLAConfig, config_from_dict
from paligemma_vla.errors import ConfigError
from paligemma_vla.model.vla_model import AUTOCAST, VLAModel, backbone_layers, large_tables, layer_matrices
from paligemma_vla.preprocess import ImageSpec

FLOAT32 = 4  # bytes of a number: gradients, moments and averages are float32
MOMENTS, MOMENTS_8BIT = 8, 2 * (1 + 4 / 256)  # bytes per weight; 8-bit moments share a scale per 256
SMALLEST_8BIT = 4096  # numbers; smaller tensors keep float32 moments
GPU_RESERVE = 1.0e9  # bytes: the driver's context, workspaces of matrix products, what the allocator cannot use
SMALL_SHARE = 0.02  # of the memory there is: a run whose model takes less begins without counting activations
WORTHWHILE = 0.98  # a remedy is listed if it leaves less than this share of the total
PARTS = ("vision tower", "language model", "adapters", "rest of backbone", "action head")
ROW = "{:<18}{:>12}{:>11}{:>9}{:>11}{:>11}{:>9}"
CGROUPS = Path("/sys/fs/cgroup")


@dataclass
class Part:
    """One part of the model: its parameters, how many of them learn, and bytes. average: the moving average of the weights."""

    parameters: int = 0
    learning: int = 0
    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    average: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one training process, in bytes.

    config, architecture, device, available, processes: what was planned, as in `plan_memory`. shards: processes that share one
    model. samples: in one pass. tokens: of context, per sample. gathered: most bytes of gathered weights at a time; leaving:
    the most after the activations are freed, when gradients are on their way into the shards. activations: most bytes alive in
    the forward pass; step: in the whole step, gradients included; both None where they were not counted. remedies: settings
    that save memory, with the total each would leave. one_at_a_time: the machine has memory for one full model only, so the
    processes must build it one after the other.
    """

    config: VLAConfig
    architecture: dict[str, Any]
    device: str
    available: float | None
    processes: int
    shards: int
    parts: Mapping[str, Part]
    samples: int
    tokens: int
    gathered: float = 0.0
    leaving: float = 0.0
    activations: float | None = None
    step: float | None = None
    remedies: Sequence[tuple[str, float]] = ()
    one_at_a_time: bool = False

    @property
    def standing(self) -> float:
        """Weights, gradients, optimiser state and averages: what no step can do without."""
        return sum(part.total for part in self.parts.values())

    @property
    def host(self) -> float:
        """What lies in the machine's memory instead of the device's (`training.cpu_offload`)."""
        return self.standing if self.config.training.cpu_offload and not self.device.startswith("cpu") else 0.0

    @property
    def full_weights(self) -> float:
        """All weights, which each process builds in the machine's memory before they are sharded or moved."""
        return self.shards * sum(part.weights for part in self.parts.values())

    @property
    def reserve(self) -> float:
        return GPU_RESERVE if self.device.startswith("cuda") else 0.0

    @property
    def total(self) -> float:
        """The peak. Gradients are allocated while activations are freed, so the two are not added."""
        gradients = sum(part.gradients for part in self.parts.values())
        peak = max(self.gathered + (self.step or 0), self.leaving + gradients)
        return max(0, self.standing - gradients - self.host) + peak + self.reserve

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available

    def table(self) -> str:
        """The plan in GB, for a person."""
        lines = [ROW.format("memory (GB)", "parameters", "learn", "weights", "gradients", "optimiser", "average")]
        for name, part in self.parts.items():
            sizes = (part.weights, part.gradients, part.optimizer, part.average)
            lines.append(ROW.format(name, _millions(part.parameters), _millions(part.learning), *map(_gb, sizes)))
        counted = "not counted"
        if self.activations is not None and self.step is not None:
            counted = f"{_gb(self.activations)}; with the gradients that replace them at most {_gb(self.step)}"
        lines.append(f"activations of {self.samples} samples at a time, {self.tokens} context tokens each: {counted}")
        if self.shards > 1:
            lines.append(f"1/{self.shards} of the model on each process; gathered at a time: {_gb(self.gathered)}")
        if self.host:
            lines.append(f"of this in the machine's memory, for each process: {_gb(self.host)}")
        if self.reserve:
            lines.append(f"driver and allocator: {_gb(self.reserve)}")
        verdict = ""
        if self.available is not None:
            verdict = f" of {_gb(self.available)} on {self.device}: {'fits' if self.fits else 'DOES NOT FIT'}"
        lines.append(f"together {_gb(self.total)}{verdict}")
        lines += [f"  {setting:<58} -> {_gb(total)}" for setting, total in self.remedies]
        return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def plan_memory(
    config: VLAConfig,
    architecture: dict[str, Any],
    device: torch.device,
    available: float | None,
    processes: int = 1,
    on_machine: int = 1,
    follow: bool = True,
) -> MemoryPlan:
    """Plan the training of `config` on a backbone of `architecture` (its config.json as a dictionary).

    device: may be absent from this machine. available: bytes left on it, None if unknown. processes: of the whole run,
    on_machine: of one machine. follow: count activations too, which takes a second or two.
    """
    side, patch = (int(architecture["vision_config"][name]) for name in ("image_size", "patch_size"))
    image = ImageSpec(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = VLAModel(config, NotImplemented, image, architecture)
    model.cast_for(device)
    shards = config.training.processes_per_copy(processes, on_machine)
    samples = -(-config.data.batch_size // (processes * config.training.gradient_accumulation_steps))
    tokens = config.model.vlm_config.cameras * (side // patch) ** 2 + config.data.prompt_max_len
    parts = _count_parts(model, config, shards)
    gathered = _count_gathered(model) if shards > 1 else (0.0, 0.0)
    step = _follow_step(model, config, samples, tokens, side, shards > 1) if follow else (None, None)
    return MemoryPlan(config, architecture, str(device), available, processes, shards, parts, samples, tokens, *gathered, *step)


def with_remedies(plan: MemoryPlan) -> MemoryPlan:
    """The plan with activations counted, and with the settings that would lower its total, the gentlest first."""

    def planned(config: VLAConfig) -> MemoryPlan:
        device = torch.device(plan.device)
        return plan_memory(config, plan.architecture, device, plan.available, plan.processes, plan.shards)

    settings: list[tuple[str, Any]] = [
        ("model.vlm_config.activation_checkpointing", True),
        ("training.gradient_accumulation_steps", 2 * plan.config.training.gradient_accumulation_steps),
        ("training.cpu_offload", True),
        ("training.parallel", "fsdp"),
        ("optimizer.type", "adamw_8bit"),
        ("model.vlm_config.freeze_vision_tower", True) if plan.config.model.vlm_config.lora else ("model.vlm_config.lora", {}),
    ]
    current = plan if plan.step is not None else planned(plan.config)
    remedies = []
    for key, value in settings:
        with contextlib.suppress(ConfigError):  # it contradicts another setting
            total = planned(config_from_dict(plan.config.model_dump(mode="json"), {key: value})).total
            if total < WORTHWHILE * current.total:
                remedies.append((f"{key}: {str(value).lower()}", total))
    return replace(current, remedies=remedies)


def plan_run(
    config: VLAConfig, architecture: dict[str, Any], device: torch.device, processes: int, on_machine: int = 1
) -> MemoryPlan:
    """The plan of a run that is about to begin here. Activations are counted only for a model of more than `SMALL_SHARE`.

    processes, on_machine: as in `plan_memory`. Raises `ConfigError` when weights, gradients and optimiser alone do not fit.
    """
    available, machine = device_memory(device), available_bytes()
    if available is not None and device.type == "cpu":
        available /= on_machine
    plan = plan_memory(config, architecture, device, available, processes, on_machine, follow=False)
    models = 1 if plan.shards > 1 else on_machine  # built at the same time
    _check_standing(plan, "this machine" if device.type == "cpu" else plan.device, plan.standing - plan.host, available)
    _check_standing(plan, "this machine", models * plan.full_weights + on_machine * plan.host, machine)
    if available is None or plan.standing >= SMALL_SHARE * available:
        plan = plan_memory(config, architecture, device, available, processes, on_machine)
    all_at_once = on_machine * (plan.full_weights + plan.host)
    return replace(plan, one_at_a_time=plan.shards > 1 and all_at_once > machine)


def _check_standing(plan: MemoryPlan, where: str, needed: float, available: float | None) -> None:
    if available is None or needed <= available:
        return
    biggest = max(plan.parts, key=lambda name: plan.parts[name].total)
    key, remedy = "model.vlm_config", "train adapters (lora), freeze a tower, or take a smaller backbone"
    if biggest == "action head":
        key, remedy = "model.action_head_config", "lower embed_dim, num_layers or mlp_ratio"
    raise ConfigError(
        f"{key}: weights, gradients and optimiser take {_gb(needed)} GB, most of it for the {biggest} "
        f"({_millions(plan.parts[biggest].parameters)} parameters); {where} has {_gb(available)} GB left; {remedy}; "
        f"`paligemma-vla plan` shows what each change saves"
    )


def _count_parts(model: VLAModel, config: VLAConfig, shards: int) -> dict[str, Part]:
    parts = {name: Part() for name in PARTS}
    one_moment = layer_matrices(model) if config.optimizer.type == "muon" else set()
    for name, parameter in model.named_parameters():
        part, count = parts[_part_of(name)], parameter.numel()
        part.parameters += count
        part.weights += parameter.nbytes / shards
        if parameter.requires_grad:
            in_8_bits = config.optimizer.type == "adamw_8bit" and count >= SMALLEST_8BIT
            part.learning += count
            part.gradients += FLOAT32 * count / shards
            moments = MOMENTS_8BIT if in_8_bits else FLOAT32 if parameter in one_moment else MOMENTS
            part.optimizer += moments * count / shards
            if config.training.ema_decay:  # validation keeps the weights that the average stands in for
                part.average += 2 * FLOAT32 * count / shards
    return {name: part for name, part in parts.items() if part.parameters}


def _part_of(name: str) -> str:
    if ".lora_" in name:
        return "adapters"
    if name.startswith("action_head."):
        return "action head"
    if ".vision_tower." in name or ".multi_modal_projector." in name:
        return "vision tower"
    return "language model" if ".language_model." in name else "rest of backbone"


def _count_gathered(model: VLAModel) -> tuple[float, float]:
    """`MemoryPlan.gathered` and `.leaving`. Turns the layers of a sharded model to the type that they are gathered in."""
    layers, tables = backbone_layers(model), large_tables(model)
    for module in (module for layer in layers for module in layer.modules() if isinstance(module, AUTOCAST)):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(model.dtype)
    alone = {parameter for unit in [*layers, *tables] for parameter in unit.parameters()}
    rest, rest_gradient = _sizes(parameter for parameter in model.parameters() if parameter not in alone)
    layer, layer_gradient = (max(sizes) for sizes in zip((0, 0), *(_sizes(unit.parameters()) for unit in layers), strict=True))
    table, table_gradient = (max(sizes) for sizes in zip((0, 0), *(_sizes(unit.parameters()) for unit in tables), strict=True))
    # During the pass: a layer, the next one and its message, and a layer's gradient.
    gathered = rest + table + 4 * layer + layer_gradient
    # At its end: layers or a table, their gradients, and the sums of these over the processes.
    leaving = rest + rest_gradient + max(2 * layer + 2 * layer_gradient, table + 2 * table_gradient)
    return float(gathered), float(leaving)


def _sizes(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Bytes of weights, and of their gradients."""
    sizes = [(parameter.nbytes, FLOAT32 * parameter.numel() * parameter.requires_grad) for parameter in parameters]
    return sum(weight for weight, _ in sizes), sum(gradient for _, gradient in sizes)


def _follow_step(
    model: VLAModel, config: VLAConfig, samples: int, tokens: int, side: int, sharded: bool
) -> tuple[float, float] | tuple[None, None]:
    """Most bytes alive beside weights and batch, in a forward pass and in the whole step; None if shapes alone do not do.

    sharded: gradients of layers and large tables leave as soon as they are complete.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and needed for large models only

    model.train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")  # autocast acts on fake tensors of the CPU, not on those of the meta device
            for unit in [*backbone_layers(model), *large_tables(model)] if sharded else []:
                for parameter in unit.parameters():
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(_free_gradient)
            batch = full_batch(config, samples, tokens, side)
            inputs = [value for value in tree_leaves(batch) if isinstance(value, Tensor)]
            with _LiveBytes([*model.parameters(), *model.buffers(), *inputs]) as alive:
                loss = model(**batch).loss_sum
                forward = float(alive.peak)
                loss.backward()
            return forward, float(alive.peak)
    except Exception:  # of any kind: a user's own backbone or head may look at values
        return None, None


def full_batch(config: VLAConfig, samples: int, tokens: int, side: int) -> dict[str, Any]:
    """Arguments of `VLAModel.forward` for a training step, as tensors without meaning: every camera is present."""
    head, cameras = config.model.action_head_config, config.model.vlm_config.cameras
    chunk, draws = (head.horizon, head.per_action_dim), head.num_flow_samples
    images = [torch.empty(samples, 3, side, side, dtype=torch.uint8) for _ in range(cameras)]
    return {
        "image_1_batch": images[0],
        "raw_prompt_texts_batch": [""] * samples,
        "vlm_attention_mask_batch": torch.ones(samples, tokens, dtype=torch.bool),
        "state_batch": torch.empty(samples, config.data.state_dim),
        "image_2_batch": images[1] if cameras > 1 else None,
        "further_images": images[2:],
        "input_ids": torch.zeros(samples, tokens, dtype=torch.long),
        "image_mask": torch.ones(samples, cameras, dtype=torch.bool),
        "actions_gt_seq": torch.empty(samples, head.horizon * head.per_action_dim),
        "action_mask": torch.ones(samples, *chunk, dtype=torch.bool),
        "flow_time": torch.empty(samples, draws),
        "flow_noise": torch.empty(samples, draws, *chunk),
        "flow_prefix": torch.ones(samples, draws, dtype=torch.long) if config.training.rtc_max_delay else None,
    }


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages, and their peak, leaving out those of the `standing` tensors."""

    def __init__(self, standing: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._kept = [tensor.untyped_storage() for tensor in standing]  # alive, so that no new storage takes one of their ids
        self._sizes = {id(storage): 0 for storage in self._kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # the model asks whether every camera is present, which needs values: they are
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, id(storage))

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def device_memory(device: torch.device) -> float | None:
    """Bytes left on a device; None if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return available_bytes() if device.type == "cpu" else None


def available_bytes() -> int:
    """Bytes this process may still allocate: the least that the machine, its control groups and its own limit leave."""
    bounds: list[int] = [psutil.virtual_memory().available, *_left_in_control_groups()]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        bounds.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(bounds))


def _left_in_control_groups() -> Iterator[int]:
    """Of cgroup v2 and v1: of the process's own group, and of the root that a container sees."""
    listed = Path("/proc/self/cgroup")
    lines = listed.read_text().splitlines() if listed.exists() else []
    groups = {kind: group.strip("/") for _, kind, group in (line.split(":", 2) for line in lines)}
    for root, kind, limit, used, reclaimable in [
        (CGROUPS, "", "memory.max", "memory.current", "inactive_file"),
        (CGROUPS / "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ]:
        for folder in (root, root / groups.get(kind, "")):
            with contextlib.suppress(OSError, ValueError):  # there is no such group, or no limit ("max")
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                # Cached files count as used, but the kernel gives the inactive ones up when memory is short.
                numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield left + int(numbers.get(reclaimable, 0))
