"""Runs with an expert: the same however many processes compute them, in copies or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import ConfigFactory
from paligemma_vla.config import PI0_HEAD, PI05_HEAD
from ranks import Reference, assert_same_curve
from support import train_here
from zygote import Zygote

HEAD = "model.action_head_config"
SIZES: dict[str, Any] = {f"{HEAD}.num_layers": 2, f"{HEAD}.num_heads": 4, f"{HEAD}.per_action_dim": 4}
PADDED = {"data.pad_action_dim": True, "data.prompt_max_len": 64}
LORA = {"model.vlm_config.lora": {"rank": 2}, "model.action_head_config.lora": {"rank": 2}}
CHANGES: dict[str, dict[str, Any]] = {
    "copies": {},
    "shards": {"training.parallel": "fsdp"},
    "shards, recomputed": {"training.parallel": "fsdp", "model.vlm_config.activation_checkpointing": True},
}


@pytest.fixture(scope="module", params=[PI0_HEAD, PI05_HEAD], ids=["pi0", "pi05"])
def reference(
    request: pytest.FixtureRequest, session_config: ConfigFactory, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Reference:
    folder = tmp_path_factory.mktemp("expert")
    changes = {
        f"{HEAD}.head": request.param,
        "training.checkpoint_dir": str(folder / "runs"),
        "training.max_steps": 8,
        **SIZES,
        **PADDED,
    }
    config = session_config(changes)
    train_here(config)
    return Reference(config, folder, zygote)


@pytest.mark.parametrize("name", CHANGES)
def test_two_processes_train_as_one(reference: Reference, name: str, tmp_path: Path) -> None:
    config = reference.another(name.replace(", ", "_"), CHANGES[name])
    reference.train(config, 2)
    assert_same_curve(config, reference.config)


def test_adapters_learn_alike_in_two_processes(reference: Reference) -> None:
    """No adapter stands where nothing is read: copies of a model wait for the gradient of each."""
    alone, together = (reference.another(name, {**LORA, "training.max_steps": 3}) for name in ("lora_1", "lora_2"))
    train_here(alone)
    reference.train(together, 2)
    assert_same_curve(together, alone)
