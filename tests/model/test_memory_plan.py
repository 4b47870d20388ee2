"""The memory plan against what torch really allocates, and what it tells a person."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from conftest import ConfigFactory
from paligemma_vla.config import VLAConfig, config_from_dict, load_config
from paligemma_vla.data.loader import build_preprocessor
from paligemma_vla.errors import ConfigError
from paligemma_vla.model import memory_plan
from paligemma_vla.model.architectures import known_architecture, read_architecture
from paligemma_vla.model.memory_plan import MemoryPlan, available_bytes, full_batch, plan_memory, plan_run, with_remedies
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.training.optim import ExponentialMovingAverage, build_optimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
VLM, HEAD = "model.vlm_config", "model.action_head_config"
SAMPLES = 8
KINDS: dict[str, dict[str, Any]] = {
    "everything": {},
    "everything, recomputing": {f"{VLM}.activation_checkpointing": True},
    "vision frozen": {f"{VLM}.freeze_vision_tower": True},
    "adapters": {f"{VLM}.lora": {"rank": 4}},
    "adapters, recomputing": {f"{VLM}.lora": {"rank": 4}, f"{VLM}.activation_checkpointing": True},
    "head": {f"{VLM}.freeze_vision_tower": True, f"{VLM}.freeze_language_model": True},
}


def planned(config: VLAConfig, device: torch.device = CPU, available: float | None = None, **options: Any) -> MemoryPlan:
    return plan_memory(config, read_architecture(config.model.vlm_config), device, available, **options)


def published(name: str) -> dict[str, Any]:
    architecture = known_architecture(name)
    assert architecture is not None
    return dict(architecture.to_dict())


def allocated_in_a_step(config: VLAConfig) -> float:
    """Most bytes that torch's allocator had given out during a forward and backward pass, by its own record."""
    preprocessor = build_preprocessor(config)
    model = VLAModel(config, preprocessor.prompts, preprocessor.image).to_device(CPU).train()
    prompt = "open the drawer and " * 8  # cut to prompt_max_len
    ids, _ = preprocessor.prompts.encode([prompt] * SAMPLES, np.ones((SAMPLES, 2), bool))
    assert ids.shape[1] == planned(config, follow=False).tokens
    batch = full_batch(config, SAMPLES, ids.shape[1], preprocessor.image.size) | {"input_ids": torch.from_numpy(ids)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model(**batch).loss_sum.backward()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return float(peak)


@pytest.mark.parametrize("kind", KINDS)
def test_step_is_counted_as_torch_allocates_it(tiny_config: ConfigFactory, kind: str) -> None:
    prompts = {"data.prompt_max_len": 16, "data.prompt_overflow": "truncate"}
    overrides = {"data.batch_size": SAMPLES, f"{HEAD}.embed_dim": 64, **prompts, **KINDS[kind]}
    config = tiny_config(overrides, cameras=2)
    counted = planned(config).step
    assert counted == pytest.approx(allocated_in_a_step(config), rel=0.02)


@pytest.mark.parametrize("kind", ["everything", "vision frozen", "adapters", "head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_standing_memory_is_that_of_the_model_and_its_optimiser(tiny_config: ConfigFactory, kind: str, dtype: str) -> None:
    config = tiny_config({**KINDS[kind], f"{VLM}.dtype": dtype, "training.ema_decay": 0.5})
    preprocessor = build_preprocessor(config)
    model = VLAModel(config, preprocessor.prompts, preprocessor.image).to_device(CPU)
    optimizer, average = build_optimizer(model, config.optimizer), ExponentialMovingAverage(model, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    parts = planned(config, follow=False).parts.values()
    assert sum(part.weights for part in parts) == sum(p.nbytes for p in model.parameters())
    assert sum(part.gradients for part in parts) == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert sum(part.optimizer for part in parts) == moments
    assert sum(part.average for part in parts) == 2 * sum(t.nbytes for t in average.average.values())


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        ("paligemma-3b-pt-224", 2923.3, 1.0),
        ("google/paligemma-3b-mix-448", 2924.2, 1.0),
        ("google/paligemma2-3b-pt-224", 3032.2, 1.0),
        ("google/paligemma2-10b-pt-224", 9660, 100),
        ("google/paligemma2-28b-pt-896", 27_650, 280),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(
    tiny_config: ConfigFactory, name: str, millions: float, tolerance: float
) -> None:
    """PaliGemma's as Keras' model pages state them, PaliGemma 2's as its names and paper do. The head is not counted."""
    parts = plan_memory(tiny_config(), published(name), GPU, None, follow=False).parts
    backbone = sum(part.parameters for part in parts.values()) - parts["action head"].parameters
    assert backbone / 1e6 == pytest.approx(millions, abs=tolerance)


@pytest.mark.parametrize("name", ["google/paligemma-3b-pt-224", "google/paligemma2-3b-pt-224"])
def test_configuration_for_24_gb_fits_22(name: str) -> None:
    """Batch 8, two cameras, adapters and activation checkpointing."""
    config = load_config(Path(__file__).parents[2] / "configs" / "vla_config_24gb.yaml")
    vlm = config.model.vlm_config
    assert (config.data.batch_size, vlm.cameras, vlm.activation_checkpointing) == (8, 2, True)
    plan = plan_memory(config, published(name), GPU, 22e9)
    assert plan.step is not None
    assert 10e9 < plan.total < 22e9
    assert plan.fits
    everything = config_from_dict(config.model_dump(mode="json"), {f"{VLM}.lora": None})
    assert not plan_memory(everything, published(name), GPU, 22e9, follow=False).fits


def test_remedies_save_what_they_promise(tiny_config: ConfigFactory) -> None:
    """What is set already, or contradicts another setting, is none."""
    config = tiny_config({"data.batch_size": 64}, cameras=2)
    plan = with_remedies(planned(config, available=1.0))
    promised = dict(plan.remedies)
    kept = [f"{VLM}.activation_checkpointing: true", "training.gradient_accumulation_steps: 2", "optimizer.type: adamw_8bit"]
    assert list(promised) == [*kept, f"{VLM}.lora: {{}}"]
    halved = config_from_dict(config.model_dump(mode="json"), {"training.gradient_accumulation_steps": 2})
    assert promised["training.gradient_accumulation_steps: 2"] == planned(halved).total < plan.total
    assert "DOES NOT FIT" in plan.table()
    assert all(text in plan.table() for text in promised)
    head = tiny_config(KINDS["head"] | {"data.batch_size": 1, "optimizer.type": "adamw_8bit"})
    assert not with_remedies(planned(head)).remedies


def test_step_that_needs_values_is_left_out(tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a head of the user's own."""
    monkeypatch.setattr(VLAModel, "forward", lambda self, **_: torch.zeros(3).tolist()[5])
    plan = planned(tiny_config())
    assert (plan.activations, plan.step) == (None, None)
    assert plan.standing > 0
    assert "not counted" in plan.table()


def run_plan(config: VLAConfig, device: torch.device, processes: int = 1) -> MemoryPlan:
    return plan_run(config, read_architecture(config.model.vlm_config), device, processes, processes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Bytes left on the machine, and on its GPU."""

    def set_left(here: float, gpu: float) -> None:
        monkeypatch.setattr(memory_plan, "available_bytes", lambda: here)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu, gpu))

    return set_left


def test_model_that_cannot_be_trained_here_is_refused(tiny_config: ConfigFactory, machine: Callable[..., None]) -> None:
    machine(1e9, 1e8)
    run_plan(tiny_config({f"{HEAD}.embed_dim": 1024, "training.ema_decay": 0.0}), CPU)  # 29 M parameters
    with pytest.raises(ConfigError) as caught:
        run_plan(tiny_config({f"{HEAD}.embed_dim": 2048}), CPU)
    message = str(caught.value)
    assert message.startswith("model.action_head_config: weights, gradients and optimiser take 3.0")
    assert "most of it for the action head (12" in message
    assert "this machine has 1.00 GB left; lower embed_dim, num_layers" in message
    run_plan(tiny_config({f"{HEAD}.embed_dim": 128}), GPU)
    with pytest.raises(ConfigError, match=r"cuda:0 has 0\.10 GB left"):
        run_plan(tiny_config({f"{HEAD}.embed_dim": 1024}), GPU)


def test_models_are_built_one_at_a_time_where_memory_is_short(tiny_config: ConfigFactory, machine: Callable[..., None]) -> None:
    """Each process builds the full model in the machine's memory before it is sharded."""

    def one_at_a_time(left: float, parallel: str) -> bool:
        machine(left, 1e9)
        return run_plan(tiny_config({"training.parallel": parallel}), GPU, 8).one_at_a_time

    one = planned(tiny_config(), follow=False).full_weights
    assert [one_at_a_time(left, "fsdp") for left in (8 * one, 8 * one - 1, one)] == [False, True, True]
    assert not one_at_a_time(8 * one, "ddp")
    for left, parallel in ((one - 1, "fsdp"), (8 * one - 1, "ddp")):
        with pytest.raises(ConfigError, match="this machine has"):
            one_at_a_time(left, parallel)


def test_activations_of_a_small_model_are_not_counted_at_a_start(tiny_config: ConfigFactory, machine: Any) -> None:
    machine(1e11, 0)
    assert run_plan(tiny_config(), CPU).step is None
    machine(1e8, 0)
    assert run_plan(tiny_config(), CPU).step is not None


def test_shards_divide_what_stands(tiny_config: ConfigFactory) -> None:
    """With published sizes, on 16 processes of two machines."""
    config = tiny_config({"data.batch_size": 64, f"{VLM}.dtype": "bfloat16", f"{VLM}.activation_checkpointing": True})

    def plan(follow: bool, **keys: Any) -> MemoryPlan:
        raw = {f"training.{name}": value for name, value in keys.items()}
        changed = config_from_dict(config.model_dump(mode="json"), raw)
        return plan_memory(changed, published("google/paligemma-3b-pt-224"), GPU, 80e9, 16, 8, follow)

    whole, shards, groups = plan(True), plan(True, parallel="fsdp"), plan(False, parallel="hsdp")
    assert (whole.shards, shards.shards, groups.shards) == (1, 16, 8)
    assert shards.standing == pytest.approx(whole.standing / 16)
    assert groups.standing == pytest.approx(whole.standing / 8)
    assert shards.gathered == groups.gathered > 2 * 257216 * 2048  # the table of tokens, in float32
    assert (shards.step or 0) < (whole.step or 0) / 2  # neither gradients nor autocast's copies of weights add up
    offloaded = plan(False, parallel="fsdp", cpu_offload=True)
    assert offloaded.host == offloaded.standing
    assert offloaded.total < shards.total
    assert "of this in the machine's memory" in offloaded.table()


@pytest.mark.parametrize("files", [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")])
def test_available_bytes_heed_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, str]) -> None:
    """Of either version; inactive pages of files count as free."""
    monkeypatch.setattr(memory_plan, "CGROUPS", tmp_path)
    folder = tmp_path if files[0] == "memory.max" else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    for name, number in zip(files, (5000, 3000), strict=True):
        (folder / name).write_text(f"{number}\n")
    (folder / "memory.stat").write_text("anon 1\ninactive_file 700\ntotal_inactive_file 700\n")
    assert available_bytes() == 2700
    (folder / files[0]).write_text("max\n")
    assert (available_bytes() or 2**30) > 5000
