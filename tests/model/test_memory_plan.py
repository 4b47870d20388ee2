"""The memory plan against what torch really allocates, and what it tells a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from conftest import ConfigFactory
from paligemma_vla.config import VLAConfig, config_from_dict
from paligemma_vla.data.loader import build_preprocessor
from paligemma_vla.errors import ConfigError
from paligemma_vla.model import memory_plan as planning
from paligemma_vla.model.architectures import known_architecture, read_architecture
from paligemma_vla.model.memory_plan import MemoryPlan, plan_memory, plan_run, with_remedies
from paligemma_vla.model.vla_model import VLAModel, arguments_from_batch
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


def allocated_in_a_step(config: VLAConfig) -> float:
    """Most bytes that torch's allocator had given out during a forward and backward pass, by its own record."""
    preprocessor = build_preprocessor(config)
    model = VLAModel(config, preprocessor.prompts, preprocessor.image).to_device(CPU).train()
    head, side = config.model.action_head_config, preprocessor.image.size
    prompt = "open the drawer and " * 8  # cut to prompt_max_len
    chunk = (head.horizon, head.per_action_dim)
    present = np.ones((SAMPLES, 2), bool)
    ids, mask = preprocessor.prompts.encode([prompt] * SAMPLES, present)
    assert ids.shape[1] == planned(config, follow=False).tokens
    batch: dict[str, Any] = {
        **{f"image_{n}": torch.randint(0, 256, (SAMPLES, 3, side, side), dtype=torch.uint8) for n in (1, 2)},
        "raw_prompt_text": [prompt] * SAMPLES,
        "input_ids": torch.from_numpy(ids),
        "vlm_attention_mask": torch.from_numpy(mask),
        "image_mask": torch.from_numpy(present),
        "state": torch.randn(SAMPLES, config.data.state_dim),
        "action": torch.randn(SAMPLES, head.horizon * head.per_action_dim),
        "action_mask": torch.ones(SAMPLES, *chunk, dtype=torch.bool),
        "flow_time": torch.rand(SAMPLES, head.num_flow_samples),
        "flow_noise": torch.randn(SAMPLES, head.num_flow_samples, *chunk),
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model(**arguments_from_batch(batch)).loss_sum.backward()
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_standing_memory_is_that_of_the_model_and_its_optimiser(tiny_config: ConfigFactory, kind: str, dtype: str) -> None:
    """Two kilobytes are the optimiser's step counters."""
    config = tiny_config({**KINDS[kind], f"{VLM}.dtype": dtype, "training.ema_decay": 0.5})
    preprocessor = build_preprocessor(config)
    model = VLAModel(config, preprocessor.prompts, preprocessor.image).to_device(CPU)
    optimizer, average = build_optimizer(model, config.optimizer), ExponentialMovingAverage(model, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    parts = planned(config).parts.values()
    assert sum(part.weights for part in parts) == sum(p.nbytes for p in model.parameters())
    assert sum(part.gradients for part in parts) == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert sum(part.optimizer for part in parts) == moments
    assert sum(part.average for part in parts) == 2 * sum(t.nbytes for t in average.average.values())


def test_parts_are_told_apart(tiny_config: ConfigFactory) -> None:
    parts = planned(tiny_config({f"{VLM}.lora": {}})).parts
    assert list(parts) == ["vision tower", "language model", "adapters", "action head"]
    assert [part.learning == part.parameters for part in parts.values()] == [False, False, True, True]
    assert parts["vision tower"].learning == parts["language model"].learning == 0


@pytest.mark.parametrize(
    ("name", "millions"),
    [("paligemma-3b-pt-224", 2923.3), ("google/paligemma-3b-mix-448", 2924.2), ("google/paligemma2-3b-pt-224", 3032.2)],
)
def test_published_shapes_have_the_published_number_of_parameters(
    tiny_config: ConfigFactory, name: str, millions: float
) -> None:
    """PaliGemma's as Keras' model pages state them; PaliGemma 2 3B is 3.03 B. The head is not counted."""
    architecture = known_architecture(name)
    assert architecture is not None
    parts = plan_memory(tiny_config(), architecture.to_dict(), GPU, None, follow=False).parts
    backbone = sum(part.parameters for part in parts.values()) - parts["action head"].parameters
    assert backbone / 1e6 == pytest.approx(millions, abs=1.0)


def test_larger_published_models_have_the_size_of_their_names(tiny_config: ConfigFactory) -> None:
    for name, billions in (("paligemma2-10b-pt-224", 9.66), ("paligemma2-28b-pt-896", 27.65)):
        architecture = known_architecture(f"google/{name}")
        assert architecture is not None
        parts = plan_memory(tiny_config(), architecture.to_dict(), GPU, None, follow=False).parts
        assert sum(part.parameters for part in parts.values()) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", ["google/paligemma-10b-pt-224", "google/gemma-2b", "paligemma-3b-pt-256", "models/mine"])
def test_other_names_are_not_known(name: str) -> None:
    assert known_architecture(name) is None


@pytest.mark.parametrize("name", ["google/paligemma-3b-pt-224", "google/paligemma2-3b-pt-224"])
def test_configuration_for_24_gb_fits_22(name: str) -> None:
    """Batch 8, two cameras, adapters and activation checkpointing."""
    from paligemma_vla.config import load_config

    config = load_config(Path(__file__).parents[2] / "configs" / "vla_config_24gb.yaml")
    vlm = config.model.vlm_config
    assert (config.data.batch_size, vlm.cameras, vlm.activation_checkpointing) == (8, 2, True)
    assert vlm.lora is not None
    architecture = known_architecture(name)
    assert architecture is not None
    plan = plan_memory(config, architecture.to_dict(), GPU, 22e9)
    assert plan.step is not None
    assert 10e9 < plan.total < 22e9
    assert plan.fits
    everything = config.model_copy(
        update={"model": config.model.model_copy(update={"vlm_config": vlm.model_copy(update={"lora": None})})}
    )
    assert not plan_memory(everything, architecture.to_dict(), GPU, 22e9).fits


def test_remedies_save_what_they_promise(tiny_config: ConfigFactory) -> None:
    config = tiny_config({"data.batch_size": 64}, cameras=2)
    plan = with_remedies(planned(config, available=1.0))
    assert not plan.fits
    promised = dict(plan.remedies)
    assert f"{VLM}.activation_checkpointing: true" in promised
    for text, total in plan.remedies:
        assert total < plan.total, text
    halved = planned(tiny_config({"data.batch_size": 64, "training.gradient_accumulation_steps": 2}, cameras=2))
    assert promised["training.gradient_accumulation_steps: 2"] == halved.total
    table = plan.table()
    assert "DOES NOT FIT" in table
    assert all(text in table for text in promised)


def test_processes_share_the_batch(tiny_config: ConfigFactory) -> None:
    config = tiny_config({"data.batch_size": 16})
    assert [planned(config, processes=n).samples for n in (1, 2, 4)] == [16, 8, 4]
    alone, shared = planned(config), planned(config, processes=4)
    assert alone.activations is not None
    assert shared.activations is not None
    assert shared.activations < alone.activations


def test_step_that_cannot_be_followed_leaves_the_rest(tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of the user's own may look at values."""

    def asks_values(self: VLAModel, *_: Any, **__: Any) -> None:
        torch.zeros(3).tolist()
        raise RuntimeError("no values here")

    monkeypatch.setattr(VLAModel, "forward", asks_values)
    plan = planned(tiny_config())
    assert (plan.activations, plan.step) == (None, None)
    assert plan.standing > 0
    assert "not counted" in plan.table()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with a gigabyte left, and a GPU with a tenth of one."""
    monkeypatch.setattr(planning, "available_bytes", lambda: 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**8, 10**9))


def run_plan(config: VLAConfig, device: torch.device) -> MemoryPlan:
    return plan_run(config, read_architecture(config.model.vlm_config), device, 1)


@pytest.mark.usefixtures("machine")
def test_head_that_cannot_be_trained_here_is_refused(tiny_config: ConfigFactory) -> None:
    run_plan(tiny_config({f"{HEAD}.embed_dim": 1024, "training.ema_decay": 0.0}), CPU)  # 29 M parameters
    with pytest.raises(ConfigError) as caught:
        run_plan(tiny_config({f"{HEAD}.embed_dim": 2048}), CPU)
    message = str(caught.value)
    assert message.startswith("model.action_head_config: weights, gradients and optimiser take 3.0")
    assert "most of it for the action head (12" in message
    assert "this machine has 1.00 GB left; lower embed_dim, num_layers" in message


@pytest.mark.usefixtures("machine")
def test_model_is_held_against_the_gpus_memory_and_built_in_the_machines(tiny_config: ConfigFactory) -> None:
    run_plan(tiny_config({f"{HEAD}.embed_dim": 128}), GPU)
    with pytest.raises(ConfigError, match=r"cuda:0 has 0\.10 GB left"):
        run_plan(tiny_config({f"{HEAD}.embed_dim": 1024}), GPU)


def test_processes_build_in_turn_where_their_machine_has_no_memory_for_all(
    tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole models pass through it on their way into shards: eight at once, or one."""
    architecture = read_architecture(tiny_config().model.vlm_config)

    def planned_here(left: float, parallel: str) -> bool:
        monkeypatch.setattr(planning, "available_bytes", lambda: left)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
        return plan_run(tiny_config({"training.parallel": parallel}), architecture, GPU, 8, 8).one_at_a_time

    one = planned(tiny_config()).full_weights
    assert not planned_here(8 * one, "fsdp")
    assert planned_here(8 * one - 1, "fsdp")
    assert planned_here(one, "fsdp")
    assert not planned_here(8 * one, "ddp")
    for left, parallel in ((one - 1, "fsdp"), (8 * one - 1, "ddp")):
        with pytest.raises(ConfigError, match="this machine has"):
            planned_here(left, parallel)


def test_head_of_any_size_is_counted_without_memory(tiny_config: ConfigFactory) -> None:
    config = tiny_config({f"{HEAD}.embed_dim": 65_536, f"{HEAD}.num_layers": 100, f"{HEAD}.horizon": 1000})
    count = planned(config, follow=False).parts["action head"].parameters
    assert count == pytest.approx(100 * 25 * 65_536**2, rel=0.01)


def test_small_model_is_not_followed_at_the_start_of_a_run(tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_bytes", lambda: 10**11)
    assert run_plan(tiny_config(), CPU).step is None
    monkeypatch.setattr(planning, "available_bytes", lambda: 10**8)
    assert run_plan(tiny_config(), CPU).step is not None


def test_shards_divide_what_stands_and_leave_what_passes(tiny_config: ConfigFactory) -> None:
    """With published sizes; a whole model and its shards hold the same, on as many processes."""
    architecture = known_architecture("google/paligemma-3b-pt-224")
    assert architecture is not None
    config = tiny_config({"data.batch_size": 64, f"{VLM}.dtype": "bfloat16", f"{VLM}.activation_checkpointing": True})
    sharded = config_from_dict(config.model_dump(mode="json"), {"training.parallel": "fsdp"})
    grouped = config_from_dict(config.model_dump(mode="json"), {"training.parallel": "hsdp"})
    whole, shards, groups = (
        plan_memory(each, architecture.to_dict(), GPU, 80e9, processes=16, on_machine=8) for each in (config, sharded, grouped)
    )
    assert (whole.shards, shards.shards, groups.shards) == (1, 16, 8)
    assert shards.standing == pytest.approx(whole.standing / 16)
    assert groups.standing == pytest.approx(whole.standing / 8)
    assert shards.gathered == groups.gathered > 2 * 257216 * 2048  # the table of tokens, in float32
    assert shards.step is not None
    assert whole.step is not None
    assert shards.step < whole.step / 2  # neither gradients nor autocast's copies of weights add up
    assert "training.parallel: fsdp" in planning._remedies(whole)
    assert "training.parallel: fsdp" not in planning._remedies(shards)
    offloaded = config_from_dict(sharded.model_dump(mode="json"), {"training.cpu_offload": True})
    plan = plan_memory(offloaded, architecture.to_dict(), GPU, 80e9, processes=16, on_machine=8)
    assert plan.host == plan.standing
    assert plan.total < shards.total
    assert "of this in the machine's memory" in plan.table()


def test_selective_recomputation_holds_between_all_and_nothing(tiny_config: ConfigFactory) -> None:
    steps = [
        planned(tiny_config({f"{VLM}.activation_checkpointing": how}, cameras=2)).step for how in (True, "selective", False)
    ]
    assert None not in steps
    assert steps == sorted(steps, key=lambda step: step or 0)
    assert len(set(steps)) == 3
