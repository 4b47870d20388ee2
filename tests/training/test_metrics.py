"""Where numbers go: metrics.jsonl survives kills and resumes; wandb gets what the specification names."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ConfigFactory
from paligemma_vla.errors import ConfigError
from paligemma_vla.training.metrics import JsonLines, Tracker


def test_json_lines_resume_drops_what_came_after_the_checkpoint_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"

    def log(start_step: int, *steps: int) -> list[int]:
        sink = JsonLines(path, start_step)
        for step in steps:
            sink.log(step, {"train/batch_loss": 0.5})
        lines = path.read_text().splitlines()  # there at once, not only when closed
        sink.file.close()
        return [json.loads(line)["step"] for line in lines]

    assert log(0, 1, 2, 3, 3, 4) == [1, 2, 3, 3, 4]
    with path.open("a") as file:
        file.write('{"step": 5, "x"')
    assert log(3, 4) == [1, 2, 3, 3, 4]
    assert log(0) == []  # a run that begins anew


def fake_wandb(monkeypatch: pytest.MonkeyPatch, init: Callable[..., Any]) -> None:
    module = types.SimpleNamespace(init=init, errors=types.SimpleNamespace(Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_gets_project_run_name_whole_config_and_every_metric(
    tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S10.1: run name `<experiment>_ddp_<timestamp>`."""
    started: dict[str, Any] = {}
    logged: list[tuple[dict[str, Any], int]] = []

    def init(**options: Any) -> Any:
        started.update(options)
        return types.SimpleNamespace(log=lambda metrics, step: logged.append((metrics, step)), finish=lambda: None)

    fake_wandb(monkeypatch, init)
    config = tiny_config({"wandb.enabled": True, "wandb.project": "P", "wandb.entity": "me", "wandb.mode": "offline"})
    tracker = Tracker(config, 0)
    tracker.log(3, {"train/lr": 0.1})
    tracker.close()
    assert (started["project"], started["entity"], started["mode"]) == ("P", "me", "offline")
    assert re.fullmatch(r"run_ddp_\d{8}_\d{6}", started["name"])
    assert started["config"] == config.model_dump(mode="json")
    assert logged == [({"train/lr": 0.1}, 3)]


def test_wandb_that_cannot_start_or_is_not_there_names_the_remedy(
    tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    fake_wandb(monkeypatch, init)
    with pytest.raises(ConfigError, match=r"wandb login.*wandb\.mode=offline"):
        Tracker(tiny_config({"wandb.enabled": True}), 0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install"):
        Tracker(tiny_config({"wandb.enabled": True}), 0)


def test_tensorboard_events_hold_the_numbers(tiny_config: ConfigFactory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config({"training.tensorboard": True})
    tracker = Tracker(config, 0)
    for step in (1, 2):
        tracker.log(step, {"val/epoch_loss": 0.5 * step, "val/action_mae_per_dim": [1.0, 2.0]})
    tracker.close()
    events = EventAccumulator(str(config.run_dir / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/epoch_loss")] == [(1, 0.5), (2, 1.0)]
