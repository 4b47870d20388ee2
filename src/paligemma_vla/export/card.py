"""The model card: README.md of an exported folder, with the YAML head that the hub reads and figures of evaluations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from paligemma_vla.errors import ConfigError, first_line
from paligemma_vla.hub import is_hub_id
from paligemma_vla.policy import Policy
from paligemma_vla.storage import read_json

MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~$&@])")  # characters that Markdown or HTML would take for more than text

SETTINGS = (  # keys of the configuration, for the card
    "training.seed training.ema_decay data.batch_size data.augmentation.enabled optimizer.lr optimizer.vlm_lr "
    "optimizer.weight_decay lr_scheduler.type model.vlm_config.dtype model.vlm_config.freeze_vision_tower "
    "model.vlm_config.freeze_language_model"
)


def model_card(policy: Policy, dtype: str, measurements: Sequence[Measurement]) -> str:
    """README.md of an export: `dtype` is that of its weights."""
    config, statistics = policy.config, policy.preprocessor.statistics
    backbone = config.model.vlm_config.model_name_or_path
    head = {
        "license": "gemma",
        "library_name": "paligemma-vla",
        "pipeline_tag": "robotics",
        **({"base_model": backbone} if is_hub_id(backbone) else {}),
        "tags": ["robotics", "vision-language-action", "flow-matching", "paligemma"],
    }
    digests = [*statistics.digests, *[""] * len(statistics.datasets)]  # older statistics have none
    names = [PurePath(path).name for path in statistics.datasets]
    environment = Environment(autoescape=True, finalize=_escaped, trim_blocks=True, undefined=StrictUndefined)
    environment.filters["number"] = _number
    template = environment.from_string(files("paligemma_vla.export").joinpath("card.md.j2").read_text("utf-8"))
    return template.render(
        policy=policy,
        config=config,
        vlm=config.model.vlm_config,
        head_config=config.model.action_head_config,
        robot=policy.robot,
        image=policy.preprocessor.image,
        statistics=statistics,
        training=policy.metadata["training"],
        head=Markup(yaml.safe_dump(head, sort_keys=False, allow_unicode=True)),
        files=list(zip(names, digests, strict=False)),
        settings=[(key, attrgetter(key)(config)) for key in SETTINGS.split()],
        measurements=measurements,
        dtype=dtype,
    )


def _escaped(value: object) -> Markup:
    """A value on one line, as text and nothing else."""
    return value if isinstance(value, Markup) else Markup(MARKDOWN.sub(r"\\\1", " ".join(str(value).split())))


def _number(value: float) -> str:
    return f"{value:.4g}"


@dataclass(frozen=True)
class Measurement:
    """One file of figures for the card. checkpoint: sha256 of what was measured, None where the file does not say."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str
    checkpoint: str | None


def read_measurement(path: Path) -> Measurement:
    """Read a file of main_eval.py (metrics.json), `rollout` (rollout.json) or the demonstration (demo_summary.json).

    Raises `ConfigError` for any other.
    """
    where = f"--metrics {path}"
    expected = (
        "metrics.json of main_eval.py, rollout.json of `paligemma-vla rollout`, or demo_summary.json of the demonstration"
    )
    raw = read_json(path, ConfigError, f"give {expected}", where=where)
    try:
        if "velocity_loss" in raw:
            return _open_loop(raw)
        return _closed_loop(raw) if "settings" in raw else _demonstration(raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{where}: got other figures ({reason}), expected {expected}") from error


def _open_loop(raw: Mapping[str, Any]) -> Measurement:
    settings, checkpoint, constant = raw["settings"], raw["checkpoint"], raw["baselines"]["mean_action"]
    figures = [(row["name"], row) for row in raw["per_dimension"]] + [("all", raw), ("always the mean action", constant)]
    note = (
        f"{raw['samples']:d} samples of {raw['episodes']:d} episodes, {settings['num_steps']:d} Euler steps, velocity loss "
        f"{_number(raw['velocity_loss'])}; weights {checkpoint['weights']}, device {settings['device']}."
    )
    if raw["data"]["training_files"]:
        note += " Some of these episodes were in the training data: the figures flatter."
    rows = [(name, _number(row["mae"]), _number(row["mse"])) for name, row in figures]
    title = "Open loop: chunks beside recorded actions, in real units"
    return Measurement(title, ("action", "MAE", "MSE"), rows, note, checkpoint["sha256"])


SUCCESSES = ("task", "successes", "rate", "95 % interval (Wilson)")


def _closed_loop(raw: Mapping[str, Any]) -> Measurement:
    settings = raw["settings"]
    condition = ", ".join(f"{name} {settings[name]}" for name in ("prompts", "resets", "image", "policy"))
    note = f"Mean {raw['mean_success']:.3f}; {condition}; weights {settings['weights']}."
    if settings.get("failed_in"):
        note += " Only starts that failed in another rollout were played."
    if settings.get("take_over"):
        note += " An expert took over where the policy had not solved the task; these successes are the policy's alone."
    checkpoint = settings["checkpoint_sha256"] if settings["policy"] == "checkpoint" else None
    return Measurement(f"Closed loop: success in {settings['env']}", SUCCESSES, _successes(raw["tasks"]), note, checkpoint)


def _demonstration(raw: Mapping[str, Any]) -> Measurement:
    means = [f"{name} {value:.3f}" for name, value in raw.items() if name.endswith("mean_success")]
    note = f"Mean success by condition: {', '.join(means)}."
    return Measurement("Closed loop: the demonstration and its controls", SUCCESSES, _successes(raw["tasks"]), note, None)


def _successes(tasks: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, ...]]:
    rows = []
    for task, entry in tasks.items():
        low, high = entry["ci95"]
        count = f"{entry['successes']:d}/{entry['episodes']:d}"
        rows.append((task, count, f"{entry['rate']:.2f}", f"{low:.2f} to {high:.2f}"))
    return rows
