"""Optimiser groups, schedules and moving average against closed forms and naive loops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from conftest import ConfigFactory
from paligemma_vla.config import OptimizerConfig, SchedulerConfig
from paligemma_vla.model import VLAModel
from paligemma_vla.training.optim import ExponentialMovingAverage, build_optimizer, build_scheduler
from paligemma_vla.training.optim_muon import Muon
from support import identical


@pytest.fixture(scope="module")
def model(session_config: ConfigFactory) -> VLAModel:
    return VLAModel(session_config())


def test_optimizer_decays_matrices_only_and_keeps_separate_rates(model: VLAModel) -> None:
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, vlm_lr=1e-5, weight_decay=0.1, betas=(0.8, 0.9)))
    assert isinstance(optimizer, torch.optim.AdamW)
    settings = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert len(settings) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    decayed = 0
    for name, parameter in model.named_parameters():
        group = settings[parameter]
        assert group["lr"] == (1e-5 if name.startswith("paligemma_vlm.") else 1e-3), name
        assert group["betas"] == (0.8, 0.9)
        plain = name.endswith("bias") or "norm" in name or "embed" in name or name.endswith(".position")
        # patch and time embeddings are layers with weight matrices, not tables that are looked up
        if any(part in name for part in ("patch_embedding.weight", "time_embedding.mlp")) and not name.endswith("bias"):
            plain = False
        assert group["weight_decay"] == (0.0 if plain else 0.1), name
        decayed += not plain
    assert decayed > 10


def test_optimizer_holds_only_what_some_stage_trains(session_config: ConfigFactory) -> None:
    frozen = VLAModel(session_config({"model.vlm_config.freeze_vision_tower": True}))
    frozen.set_stage("head")  # a stage of now is no matter: the optimiser is for all stages
    names = {p: name for name, p in frozen.named_parameters()}
    held = {names[p] for group in build_optimizer(frozen, OptimizerConfig()).param_groups for p in group["params"]}
    expected = {n for n in names.values() if "vision_tower" not in n and "multi_modal_projector" not in n}
    assert held == expected


def test_muon_takes_the_matrices_of_the_layers_and_turns_them_by_orthogonal_steps(model: VLAModel) -> None:
    config = OptimizerConfig(type="muon", lr=1e-3, vlm_lr=1e-4, weight_decay=0.0)
    optimizer = build_optimizer(model, config)
    names = {p: name for name, p in model.named_parameters()}
    groups = {flag: [group for group in optimizer.param_groups if group["orthogonal"] is flag] for flag in (True, False)}
    chosen = {names[p]: group["lr"] for group in groups[True] for p in group["params"]}
    assert set(chosen) == {
        name for name, p in model.named_parameters() if p.ndim == 2 and (".layers." in name or ".blocks." in name)
    }
    assert {name.startswith("paligemma_vlm.") for name, rate in chosen.items() if rate == 1e-4} == {True}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)

    before = {name: p.detach().clone() for p, name in names.items()}
    generator = torch.Generator().manual_seed(0)
    gradients = {p: torch.randn(p.shape, generator=generator) for p in names}
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    optimizer.step()
    for parameter, name in names.items():
        step = before[name] - parameter.detach()
        if name in chosen:  # every direction alike, as large as AdamW's steps are
            stretched = torch.linalg.svdvals(step) / (chosen[name] * 0.2 * max(step.shape) ** 0.5)
            assert 0.5 < stretched.quantile(0.1) <= stretched.max() < 1.5, name
        elif float(gradients[parameter].abs().min()) > 1e-6:
            rate = 1e-4 if name.startswith("paligemma_vlm.") else 1e-3
            torch.testing.assert_close(step, rate * gradients[parameter].sign(), rtol=0.02, atol=1e-7)
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.copy_(before[name])
            parameter.grad = None


def test_muon_goes_on_bit_for_bit_from_what_was_saved(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        matrices, others = ([p for p in network.parameters() if (p.ndim == 2) is chosen] for chosen in (True, False))
        common = {"lr": 1e-2, "weight_decay": 0.01}
        groups = [{"params": matrices, "orthogonal": True, **common}, {"params": others, "orthogonal": False, **common}]
        return network, Muon(groups, betas=(0.9, 0.95), eps=1e-8)

    def learn(network: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)  # as a schedule sets it
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (network(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()

    straight, its_optimizer = made()
    learn(straight, its_optimizer, range(6))
    first, optimizer = made()
    learn(first, optimizer, range(3))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again, resumed = made()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    learn(again, resumed, range(3, 6))
    assert identical(again.state_dict(), straight.state_dict())
    assert identical(resumed.state_dict(), its_optimizer.state_dict())


def rates(
    config: SchedulerConfig, steps: int, total: int, per_epoch: int = 10, vlm_start: int = 0
) -> list[tuple[float, float]]:
    """The (head, backbone) rates of optimiser steps 0, 1, ..., relative to lr."""
    head, vlm = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [head], "lr": 1.0, "part": "head"}, {"params": [vlm], "lr": 1.0, "part": "vlm"}])
    scheduler = build_scheduler(optimizer, config, total, per_epoch, vlm_start)
    used = []
    for _ in range(steps):
        used.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"]))
        optimizer.step()
        scheduler.step()
    return used


def test_schedule_is_linear_warmup_then_cosine_over_the_run() -> None:
    used = rates(SchedulerConfig(warmup_steps=5, min_lr_ratio=0.1), 50, 45)
    for step, (head, vlm) in enumerate(used):
        done = min(1.0, max(0, step - 5) / 40)
        expected = min(1, (step + 1) / 5) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
        assert head == vlm == pytest.approx(expected)
    assert used[0][0] == pytest.approx(0.2)
    assert used[4][0] == used[5][0] == 1.0
    assert used[45][0] == used[49][0] == pytest.approx(0.1)


def test_schedule_length_in_epochs_is_converted_to_steps() -> None:
    """D2: T_max counts epochs, the schedule counts optimiser steps."""
    used = rates(SchedulerConfig(T_max=2.5), 60, total=1000, per_epoch=10)
    for step, (head, _) in enumerate(used):
        assert head == pytest.approx(0.5 * (1 + math.cos(math.pi * min(1, step / 25))), abs=1e-12)


def test_schedule_warms_the_backbone_up_again_where_it_begins_to_learn() -> None:
    used = rates(SchedulerConfig(type="constant", warmup_steps=4), 20, 20, vlm_start=10)
    assert [head for head, _ in used] == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 17)
    assert [vlm for _, vlm in used[10:14]] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(vlm == 0 for _, vlm in used[:10])


def test_moving_average_equals_a_naive_one() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = ExponentialMovingAverage(module, 0.9)
    assert set(average.average) == {"weight"}
    naive = module.weight.detach().clone()
    for n in range(1, 30):
        with torch.no_grad():
            module.weight += torch.randn(2, 3)
        average.update(module)
        decay = min(0.9, (1 + n) / (10 + n))
        naive = decay * naive + (1 - decay) * module.weight.detach()
        torch.testing.assert_close(average.average["weight"], naive)
    assert decay < 0.9 < (1 + 90) / (10 + 90)
