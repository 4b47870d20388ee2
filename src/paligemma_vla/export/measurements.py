"""Figures for the model card, out of the files that this project's evaluations write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paligemma_vla.errors import ConfigError, first_line
from paligemma_vla.export.markdown import number, table, text


@dataclass(frozen=True)
class Measurement:
    """One file of figures for the card. checkpoint: sha256 of what was measured, None where the file does not say."""

    title: str
    lines: tuple[str, ...]
    checkpoint: str | None


def read_measurement(path: Path) -> Measurement:
    """Read a file of main_eval.py (metrics.json), `rollout` (rollout.json) or the demonstration (demo_summary.json).

    Raises `ConfigError` for any other.
    """
    try:
        raw = json.loads(path.read_bytes())
        for keys, read in READERS:
            if keys <= raw.keys():
                return read(raw)
    except OSError as error:
        raise ConfigError(f"--metrics {path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"--metrics {path}: cannot be read as figures of ours ({reason})") from error
    raise ConfigError(
        f"--metrics {path}: not figures of ours; expected metrics.json of main_eval.py, rollout.json of `paligemma-vla "
        f"rollout`, or demo_summary.json of the demonstration"
    )


def _open_loop(raw: Mapping[str, Any]) -> Measurement:
    settings, facts, constant = raw["settings"], raw["checkpoint"], raw["baselines"]["mean_action"]
    rows = [[row["name"], row["mae"], row["mse"]] for row in raw["per_dimension"]]
    rows += [["all", raw["mae"], raw["mse"]], ["always the mean action", constant["mae"], constant["mse"]]]
    lines = table(("action", "MAE", "MSE"), [[name, number(mae), number(mse)] for name, mae, mse in rows])
    lines += [
        "",
        f"{raw['samples']:d} samples of {raw['episodes']:d} episodes, {settings['num_steps']:d} Euler steps, velocity loss "
        f"{number(raw['velocity_loss'])}; weights {text(facts['weights'])}, device {text(settings['device'])}.",
    ]
    if raw["data"]["training_files"]:
        lines.append("Some of these episodes were in the training data: the figures flatter.")
    return Measurement("Open loop: chunks beside recorded actions, in real units", tuple(lines), facts["sha256"])


def _closed_loop(raw: Mapping[str, Any]) -> Measurement:
    settings = raw["settings"]
    names = ("prompts", "resets", "image", "policy")
    condition = ", ".join(f"{name} {text(settings[name])}" for name in names)
    return Measurement(
        f"Closed loop: success in {text(settings['env'])}",
        (*_successes(raw["tasks"]), "", f"Mean {raw['mean_success']:.3f}; {condition}; weights {text(settings['weights'])}."),
        settings["checkpoint_sha256"] if settings["policy"] == "checkpoint" else None,
    )


def _demonstration(raw: Mapping[str, Any]) -> Measurement:
    means = [[name.removesuffix("_mean_success"), f"{raw[name]:.3f}"] for name in raw if name.endswith("mean_success")]
    lines = (*_successes(raw["tasks"]), "", *table(("condition", "mean success"), means))
    return Measurement("Closed loop: the demonstration and its controls", lines, None)


READERS = (
    ({"mae", "velocity_loss", "per_dimension"}, _open_loop),
    ({"settings", "tasks", "mean_success", "episodes"}, _closed_loop),
    ({"tasks", "mean_success", "wrong_prompt_mean_success"}, _demonstration),
)


def _successes(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for task, entry in tasks.items():
        low, high = entry["ci95"]
        count = f"{entry['successes']:d}/{entry['episodes']:d}"
        rows.append([task, count, f"{entry['rate']:.2f}", f"{low:.2f} to {high:.2f}"])
    return table(("task", "successes", "rate", "95 % interval (Wilson)"), rows)
