"""What a training step will hold in memory, told before any of it is allocated.

Weights, gradients and optimiser are counted on the very model, built without storage. Activations are not estimated by a
formula: the step itself (forward and backward, with its recomputation and its copies in bfloat16) runs on tensors that have
shapes but no storage, and what would be alive is counted.
"""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paligemma_vla.config import VLAConfig, config_from_dict
from paligemma_vla.errors import ConfigError
from paligemma_vla.model.vla_model import AUTOCAST, VLAModel, backbone_layers, large_tables
from paligemma_vla.preprocess import ImageSpec

T = TypeVar("T")
GB = 1e9
FLOAT32 = 4
RESERVE = {"cuda": 1.0e9}  # the driver's context, workspaces of matrix products, and what the allocator cannot use
MOMENTS, MOMENTS_8BIT = 8, 2 * (1 + 4 / 256)  # bytes per weight; in 8 bits with a scale per block of 256
SMALL_SHARE = 0.02
WORTHWHILE = 0.98
_REMEDIES = {
    "action head": ("model.action_head_config", "lower embed_dim, num_layers or mlp_ratio"),
    "": ("model.vlm_config", "train adapters (lora), freeze a tower, or take a smaller backbone"),
}
SMALLEST_8BIT = 4096  # numbers in a tensor whose moments are held in 8 bits
PARTS = ("vision tower", "language model", "adapters", "rest of backbone", "action head")


@dataclass
class Part:
    """One part of the model; everything but `parameters` and `learning` (how many) in bytes. average: of the weights (EMA)."""

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
    """Memory of one training process.

    config, architecture, processes, shards, device, available: what was planned, as in `plan_memory`. parts: by name. samples:
    in one pass. tokens: of context, per sample. gathered: most bytes of weights in shards that are whole at a time; leaving: of
    them and of gradients on their way into shards, when activations have gone. activations: most bytes alive in the forward
    pass; step: most bytes of activations and gradients together in the whole step; both None where they were not counted.
    remedies: changes that save memory, and the total that each would leave. one_at_a_time: whether this machine has memory for
    one full model only, which each process builds there before it is sharded.
    """

    config: VLAConfig
    architecture: dict[str, Any]
    processes: int
    shards: int
    device: str
    available: float | None
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
        """Bytes of weights, gradients, optimiser and averages: without them no step is possible."""
        return sum(part.total for part in self.parts.values())

    @property
    def total(self) -> float:
        """Bytes at the worst moment. Gradients come while activations go: the two are not simply added, unless they leave for
        their shards at once."""
        gradients = sum(part.gradients for part in self.parts.values())
        if self.shards > 1:
            step = max(self.gathered + (self.step or 0), self.leaving + gradients)
            return max(0, self.standing - gradients - self.host) + step + self.reserve
        return self.standing - gradients + max(gradients, self.step or 0) + self.reserve

    @property
    def host(self) -> float:
        """Bytes of them that lie in the machine's memory instead of the device's."""
        offloaded = self.config.training.cpu_offload and not self.device.startswith("cpu")
        return self.standing if offloaded else 0.0

    @property
    def whole(self) -> float:
        """Bytes of all weights, which each process makes in the machine's memory before they go elsewhere or into shards."""
        return self.shards * sum(part.weights for part in self.parts.values())

    @property
    def reserve(self) -> float:
        return RESERVE.get(self.device.partition(":")[0], 0)

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available

    def table(self) -> str:
        """The plan for a person to read, in GB, with what to change when it does not fit."""
        head = (
            f"{'memory (GB)':<18}{'parameters':>12}{'learn':>11}{'weights':>9}{'gradients':>11}{'optimiser':>11}{'average':>9}"
        )
        lines = [head]
        for name, part in self.parts.items():
            lines.append(
                f"{name:<18}{_millions(part.parameters):>12}{_millions(part.learning):>11}{_gb(part.weights):>9}"
                f"{_gb(part.gradients):>11}{_gb(part.optimizer):>11}{_gb(part.average):>9}"
            )
        what = f"activations of {self.samples} samples at a time, {self.tokens} context tokens each"
        if self.activations is None or self.step is None:
            lines.append(f"{what}: not counted")
        else:
            lines.append(f"{what}: {_gb(self.activations)}; with the gradients that replace them at most {_gb(self.step)}")
        if self.shards > 1:
            lines.append(f"1/{self.shards} of the model on each process; gathered at a time: {_gb(self.gathered)}")
        if self.host:
            lines.append(f"of this in the machine's memory, for each process: {_gb(self.host)}")
        if self.reserve:
            lines.append(f"driver and allocator: {_gb(self.reserve)}")
        left = "" if self.available is None else f" of {_gb(self.available)} on {self.device}"
        verdict = "" if self.available is None else ": fits" if self.fits else ": DOES NOT FIT"
        lines.append(f"together {_gb(self.total)}{left}{verdict}")
        lines += [f"  {change:<58} -> {_gb(total)}" for change, total in self.remedies]
        return "\n".join(lines)


def _gb(amount: float) -> str:
    return f"{amount / GB:.2f}"


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
    """The plan of `config` on a backbone of `architecture` (its config.json as a dictionary).

    device: may be one that is not here. available: bytes it has left, None where that is unknown. processes: of the whole run,
    on_machine: of one machine. follow: count activations too, which takes a second or two.
    """
    shards = config.training.processes_per_copy(processes, on_machine)
    model = _without_storage(config, architecture, device)
    samples = -(-config.data.batch_size // (processes * config.training.gradient_accumulation_steps))
    side, patch = (int(architecture["vision_config"][name]) for name in ("image_size", "patch_size"))
    tokens = config.model.vlm_config.cameras * (side // patch) ** 2 + config.data.prompt_max_len
    parts = _count(model, config, shards)
    whole = _hold_as_gathered(model) if shards > 1 else (0.0, 0.0)
    peaks = _follow_a_step(model, config, samples, tokens, side, shards > 1) if follow else (None, None)
    return MemoryPlan(config, architecture, processes, shards, str(device), available, parts, samples, tokens, *whole, *peaks)


def with_remedies(plan: MemoryPlan) -> MemoryPlan:
    """The plan with activations, and with what each change that saves memory would make of it, the gentlest first."""

    def planned(config: VLAConfig) -> MemoryPlan:
        device = torch.device(plan.device)
        return plan_memory(config, plan.architecture, device, plan.available, plan.processes, plan.shards)

    whole = plan if plan.step is not None else planned(plan.config)
    totals = [(text, planned(changed).total) for text, changed in _changes(plan)]
    return replace(whole, remedies=[(text, total) for text, total in totals if total < WORTHWHILE * whole.total])


def plan_run(
    config: VLAConfig, architecture: dict[str, Any], device: torch.device, processes: int, on_machine: int = 1
) -> MemoryPlan:
    """The plan of a run that is about to begin, against the memory that is left here. processes, on_machine: see `plan_memory`.

    The step is followed only where the model takes more than a small share of that: it takes a second.
    Raises `ConfigError` when weights, gradients and optimiser alone exceed what there is.
    """
    available = device_memory(device)
    if available is not None and device.type == "cpu":
        available /= on_machine
    plan = plan_memory(config, architecture, device, available, processes, on_machine, follow=False)
    host_available = available_bytes()
    _check_standing(plan, on_machine, host_available)
    at_once = on_machine * (plan.whole + plan.host)
    one_at_a_time = plan.shards > 1 and host_available is not None and at_once > host_available
    if available is None or plan.standing >= SMALL_SHARE * available:
        plan = plan_memory(config, architecture, device, available, processes, on_machine)
    return replace(plan, one_at_a_time=one_at_a_time)


def _check_standing(plan: MemoryPlan, on_machine: int, host_available: float | None) -> None:
    """host_available: bytes this machine has left."""
    where = "this machine" if plan.device.startswith("cpu") else plan.device
    made_at_once = 1 if plan.shards > 1 else on_machine
    for name, needed, available in [
        (where, plan.standing - plan.host, plan.available),
        ("this machine", made_at_once * plan.whole + on_machine * plan.host, host_available),
    ]:
        if available is not None and needed > available:
            biggest = max(plan.parts, key=lambda part: plan.parts[part].total)
            key, remedy = _REMEDIES.get(biggest, _REMEDIES[""])
            raise ConfigError(
                f"{key}: weights, gradients and optimiser take {_gb(needed)} GB, most of it for the {biggest} "
                f"({_millions(plan.parts[biggest].parameters)} parameters); {name} has {_gb(available)} GB left; {remedy}; "
                f"`paligemma-vla plan` shows what each change saves"
            )


def device_memory(device: torch.device) -> float | None:
    """Bytes that are left on a device; None where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return available_bytes() if device.type == "cpu" else None


def _changes(plan: MemoryPlan) -> list[tuple[str, VLAConfig]]:
    config = plan.config
    vlm, training = config.model.vlm_config, config.training
    learns = vlm.lora is None and not (vlm.freeze_vision_tower and vlm.freeze_language_model)
    halved = 2 * training.gradient_accumulation_steps
    changes: list[tuple[bool, str, dict[str, Any]]] = [
        (
            not vlm.activation_checkpointing,
            "model.vlm_config.activation_checkpointing: selective",
            {"model.vlm_config.activation_checkpointing": "selective"},
        ),
        (
            vlm.activation_checkpointing is not True,
            "model.vlm_config.activation_checkpointing: true",
            {"model.vlm_config.activation_checkpointing": True},
        ),
        (
            config.data.batch_size % halved == 0,
            f"training.gradient_accumulation_steps: {halved}",
            {"training.gradient_accumulation_steps": halved},
        ),
        (
            training.parallel == "ddp" and plan.processes > 1 and config.optimizer.type == "adamw",
            "training.parallel: fsdp",
            {"training.parallel": "fsdp"},
        ),
        (
            training.parallel != "ddp" and not training.cpu_offload and not plan.device.startswith("cpu"),
            "training.cpu_offload: true",
            {"training.cpu_offload": True},
        ),
        (vlm.dtype == "float32", "model.vlm_config.dtype: bfloat16", {"model.vlm_config.dtype": "bfloat16"}),
        (
            config.optimizer.type == "adamw" and training.parallel == "ddp",
            "optimizer.type: adamw_8bit",
            {"optimizer.type": "adamw_8bit"},
        ),
        (
            learns and not vlm.freeze_vision_tower,
            "model.vlm_config.freeze_vision_tower: true",
            {"model.vlm_config.freeze_vision_tower": True},
        ),
        (learns, "model.vlm_config.lora: {rank: 16, alpha: 32}", {"model.vlm_config.lora": {}}),
        (
            learns or vlm.lora is not None,
            "the head alone (docs/finetuning.md)",
            {
                "model.vlm_config.freeze_vision_tower": True,
                "model.vlm_config.freeze_language_model": True,
                "model.vlm_config.lora": None,
                "training.stages": [],
            },
        ),
    ]
    return [(text, _changed(config, keys)) for possible, text, keys in changes if possible]


def _changed(config: VLAConfig, keys: Mapping[str, Any]) -> VLAConfig:
    return config_from_dict(config.model_dump(mode="json"), keys)


def _without_storage(config: VLAConfig, architecture: dict[str, Any], device: torch.device) -> VLAModel:
    """The model as it will train on `device`, on torch's meta device."""
    image = ImageSpec(int(architecture["vision_config"]["image_size"]), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = VLAModel(config, NotImplemented, image, architecture)
    model.cast_for(device)
    return model


def _count(model: VLAModel, config: VLAConfig, shards: int) -> dict[str, Part]:
    parts = {name: Part() for name in PARTS}
    for name, parameter in model.named_parameters():
        part, count = parts[_part_of(name)], parameter.numel()
        part.parameters += count
        part.weights += parameter.nbytes / shards
        if parameter.requires_grad:
            in_8_bits = config.optimizer.type == "adamw_8bit" and count >= SMALLEST_8BIT
            part.learning += count
            part.gradients += FLOAT32 * count / shards
            part.optimizer += (MOMENTS_8BIT if in_8_bits else MOMENTS) * count / shards
            if config.training.ema_decay:
                part.average += 2 * FLOAT32 * count / shards  # while it is validated, the weights it stands in for are kept
    return {name: part for name, part in parts.items() if part.parameters}


def _part_of(name: str) -> str:
    if name.startswith("action_head."):
        return "action head"
    if ".lora_" in name:
        return "adapters"
    if ".vision_tower." in name or ".multi_modal_projector." in name:
        return "vision tower"
    return "language model" if ".language_model." in name else "rest of backbone"


def _hold_as_gathered(model: VLAModel) -> tuple[float, float]:
    """Turn the matrices of layers to the type they are gathered in; returns `MemoryPlan.gathered` and `.leaving`."""
    units = backbone_layers(model)
    for module in (module for layer in units for module in layer.modules() if isinstance(module, AUTOCAST)):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(model.arithmetic.dtype)
    tables = large_tables(model)
    apart = {parameter for unit in [*units, *tables] for parameter in unit.parameters()}
    rest = [parameter for parameter in model.parameters() if parameter not in apart]
    largest = max((_bytes(unit.parameters()) for unit in units), default=0)
    summed = max((_sums(unit.parameters()) for unit in units), default=0)
    table = max((_bytes(unit.parameters()) for unit in tables), default=0)
    summed_table = max((_sums(unit.parameters()) for unit in tables), default=0)
    # A layer, the next one, and that one's message; in the end a table, its gradient, and the sum of that, may be more.
    gathered = _bytes(rest) + table + 4 * largest + summed
    leaving = _bytes(rest) + _sums(rest) + max(2 * largest + 2 * summed, table + 2 * summed_table)
    return float(gathered), float(leaving)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _sums(parameters: Iterable[Tensor]) -> int:
    """Bytes of their gradients as they are summed."""
    return sum(FLOAT32 * parameter.numel() for parameter in parameters if parameter.requires_grad)


def _follow_a_step(
    model: VLAModel, config: VLAConfig, samples: int, tokens: int, side: int, in_shards: bool
) -> tuple[float, float] | tuple[None, None]:
    """Most bytes alive beyond weights and batch, in a forward pass and in the whole step; None if it cannot be followed.

    in_shards: gradients of layers and large tables go as soon as they are there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # heavy, and needed for large models only

    head, cameras = config.model.action_head_config, config.model.vlm_config.cameras
    chunk, draws = (head.horizon, head.per_action_dim), head.num_flow_samples
    model.train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _give_shapes(model)
            if in_shards:
                for unit in [*backbone_layers(model), *large_tables(model)]:
                    for parameter in unit.parameters():
                        if parameter.requires_grad:
                            parameter.register_post_accumulate_grad_hook(_let_go)
            images = [torch.empty(samples, 3, side, side, dtype=torch.uint8) for _ in range(cameras)]
            batch: dict[str, Any] = {
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
            }
            standing = [*model.parameters(), *model.buffers(), *(v for v in tree_leaves(batch) if isinstance(v, Tensor))]
            with _LiveBytes(standing) as alive:
                loss = model(**batch).loss_sum
                forward = float(alive.peak)
                loss.backward()
            return forward, float(alive.peak)
    except Exception:  # of any kind: a backbone or head of the user's own may ask what shapes alone cannot answer
        return None, None


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _give_shapes(model: nn.Module) -> None:
    """Replace tensors of the meta device by ones that claim to be on the CPU: only there does autocast see them."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
            module.register_parameter(name, fake)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most there were. `standing` tensors are not counted."""

    def __init__(self, standing: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes = {id(tensor.untyped_storage()): 0 for tensor in standing}
        self._kept = [tensor.untyped_storage() for tensor in standing]  # an id may be used again once its owner has gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # what a model asks of values (do image tokens and images match?) is answered with yes
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def available_bytes() -> int | None:
    """Memory this process may still take: the least of what the machine, its control group and its own limit leave.

    None where the system does not tell (it is no Linux).
    """
    if not sys.platform.startswith("linux"):
        return None
    return min((left for left in (_machine(), *_control_groups(), _own_limit()) if left is not None), default=None)


def _machine() -> int | None:
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _own_limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    taken = _kilobytes(Path("/proc/self/status"), "VmSize:")
    return None if limit == resource.RLIM_INFINITY or taken is None else max(0, limit - taken)


def _kilobytes(path: Path, name: str) -> int | None:
    return _read(path, lambda text: next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name)))


def _control_groups() -> Iterator[int | None]:
    """What is left of the limits of cgroup v2 and v1, of the process's own group and of the root a container sees.

    File pages count as taken, though the kernel gives the inactive ones up: they are added again.
    """
    own = _read(Path("/proc/self/cgroup"), lambda text: [line.split(":", 2) for line in text.splitlines()]) or []
    groups = {"": "/", **{kind: group for _, kind, group in own if kind in ("", "memory")}}
    for root, kind, limit, taken, given_up in [
        ("/sys/fs/cgroup", "", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ]:
        for folder in (Path(root), Path(root + groups.get(kind, "/"))):
            most, used = _read(folder / limit, int), _read(folder / taken, int)
            inactive = _read(folder / "memory.stat", partial(_field, name=given_up)) or 0
            yield None if most is None or used is None else max(0, most - used + inactive)


def _field(text: str, name: str) -> int:
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def _read(path: Path, parse: Callable[[str], T]) -> T | None:
    """What a file of the kernel says; None where it is missing or says something else (`max`)."""
    try:
        return parse(path.read_text())
    except (OSError, ValueError, LookupError, StopIteration):
        return None
