"""The model card: README.md of an exported folder, with the YAML head that the hub reads.

Names, instructions and paths come out of files that others wrote: each is escaped, so that none becomes a heading, a link or
another column.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePath

import yaml

from paligemma_vla.config import VLAConfig
from paligemma_vla.export.folder import Restored, Trained
from paligemma_vla.export.markdown import number, table, text
from paligemma_vla.export.measurements import Measurement
from paligemma_vla.preprocess import Preprocessor
from paligemma_vla.schema import DatasetMetadata, image_key

FILES_SHOWN = 20


def model_card(trained: Trained, restored: Restored, dtype: str, measurements: Sequence[Measurement]) -> str:
    """README.md of an export: `dtype` is that of its weights."""
    config, preprocessor, metadata = restored.config, restored.preprocessor, restored.metadata
    name, backbone = config.training.experiment_name, config.model.vlm_config.model_name_or_path
    head = {
        "license": "gemma",
        "library_name": "paligemma-vla",
        "pipeline_tag": "robotics",
        **({"base_model": backbone} if is_hub_id(backbone) else {}),
        "tags": ["robotics", "vision-language-action", "flow-matching", "paligemma"],
    }
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n",
        f"# {text(name)}\n",
        f"A robot policy: pictures, an instruction and the robot's state to its next {config.model.action_head_config.horizon} "
        f"actions. The backbone {text(backbone)} (PaliGemma) reads pictures and instruction; a flow-matching head turns noise "
        f"into actions. Trained with PaliGemma-VLA {text(trained.versions['paligemma-vla'])}; weights in {dtype}.\n",
        _use(config),
        _interface(config, preprocessor, metadata),
        _data(preprocessor, metadata),
        _procedure(config, trained),
        _metrics(config, trained, measurements),
        _limits(preprocessor),
        LICENCE,
    ]
    return "\n".join(sections)


def is_hub_id(name: str) -> bool:
    """Whether a backbone's name is one on the hub, as far as that can be told from here, rather than a folder."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _use(config: VLAConfig) -> str:
    cameras = ", ".join(f'"{image_key(n + 1)}": image_{n + 1}' for n in range(config.model.vlm_config.cameras))
    return f"""## Use

```python
from paligemma_vla import Policy
policy = Policy.from_checkpoint("this folder, or its id on the hub")
actions = policy.infer({{{cameras}, "state": state, "prompt": "..."}})["actions"]
```
"""


def _interface(config: VLAConfig, preprocessor: Preprocessor, metadata: DatasetMetadata) -> str:
    head, side = config.model.action_head_config, preprocessor.image.size
    rate = f"{metadata.control_hz:g} a second" if metadata.control_hz else "rate not recorded"
    rows = []
    for n in range(config.model.vlm_config.cameras):
        called = f" '{metadata.cameras[n]}'" if n < len(metadata.cameras) else ""
        optional = "; may be left out" if n else ""
        what = f"camera{called}, RGB, {metadata.image_orientation}{optional}"
        rows.append([image_key(n + 1), what, f"(H, W, 3) uint8, resized to {side} x {side} ({preprocessor.image.resize})"])
    rows += [
        ["state", "the robot's state, real units", f"({preprocessor.state.dimension},)"],
        ["prompt", "the instruction", f"at most {preprocessor.prompts.max_len} tokens"],
        ["actions (out)", f"a chunk, real units; {rate}", f"({head.horizon}, {preprocessor.action.dimension}) float32"],
    ]
    parts = ["## Inputs and outputs\n", *table(("name", "what", "shape"), rows), ""]
    for title, names, statistics in (
        ("state", metadata.state_names, preprocessor.statistics.state),
        ("action", metadata.action_names, preprocessor.statistics.action),
    ):
        ranges = zip(statistics.min, statistics.max, strict=True)
        numbers = [
            [names[n] if names else f"{title}[{n}]", f"{number(low)} to {number(high)}"] for n, (low, high) in enumerate(ranges)
        ]
        parts += [*table((title, "range in training"), numbers), ""]
    if metadata.action_convention:
        parts.append(f"What an action means: {text(metadata.action_convention)}.\n")
    return "\n".join(parts)


def _data(preprocessor: Preprocessor, metadata: DatasetMetadata) -> str:
    statistics = preprocessor.statistics
    names = [PurePath(path).name for path in statistics.datasets]
    digests = [*statistics.digests, *[""] * len(names)]
    rows = [[name, digest] for name, digest in zip(names, digests, strict=False)]
    shown = table(("file", "digest of its contents"), rows[:FILES_SHOWN])
    more = [f"\n... and {len(rows) - FILES_SHOWN} more files"] if len(rows) > FILES_SHOWN else []
    extra = [f"- {text(key)}: {text(value)}" for key, value in sorted(metadata.extra.items())]
    return "\n".join(
        [
            "## Training data\n",
            f"- robot: {text(metadata.robot) or 'not recorded'}",
            f"- steps in the statistics: {statistics.action.count:,} of {len(names)} files; normalised by "
            f"{text(preprocessor.normalization)}",
            *extra,
            "",
            *shown,
            *more,
            "",
        ]
    )


def _procedure(config: VLAConfig, trained: Trained) -> str:
    vlm, training, optimizer = config.model.vlm_config, config.training, config.optimizer
    frozen = [name for name, yes in (("vision", vlm.freeze_vision_tower), ("language", vlm.freeze_language_model)) if yes]
    stages = ", ".join(f"{stage.train} {stage.steps or 'to the end'}" for stage in training.stages)
    averaged = "averaged" if trained.training["averaged_weights"] else "not averaged"
    rows = [
        ["optimiser steps, epochs", f"{trained.training['step']:,}, {trained.training['epoch']}"],
        ["batch", f"{config.data.batch_size}"],
        ["rates (head, backbone)", f"{optimizer.lr:g}, {optimizer.vlm_lr or optimizer.lr:g}; {config.lr_scheduler.type}"],
        ["weight decay", f"{optimizer.weight_decay:g}"],
        ["stages", stages or "all at once"],
        ["frozen", ", ".join(frozen) or "nothing"],
        ["moving average of the weights", f"{training.ema_decay:g}; these weights are {averaged}"],
        ["compute type", vlm.dtype],
        ["augmentation", "on" if config.data.augmentation.enabled else "off"],
        ["seed", f"{training.seed}"],
    ]
    return "\n".join(["## Training procedure\n", *table(("setting", "value"), rows), "", "All settings are in config.json.\n"])


def _metrics(config: VLAConfig, trained: Trained, measurements: Sequence[Measurement]) -> str:
    best = trained.training["best_metric"]
    told = (
        f"Best {text(config.training.best_metric)} during training: {number(best)}."
        if best is not None
        else "None in training."
    )
    parts = ["## Metrics\n", f"{told}\n"]
    for measurement in measurements:
        parts += [f"### {measurement.title}\n", *measurement.lines, ""]
    return "\n".join(parts)


def _limits(preprocessor: Preprocessor) -> str:
    return f"""## Intended use and limits

For research on this robot, with these cameras, this control rate and instructions like those it was trained on. Elsewhere its
actions mean nothing: the state and action ranges above are all it has seen ({preprocessor.statistics.action.count:,} steps).

It does not know when it fails, recognises neither people nor obstacles, and every answer starts from random noise. Run it
behind limits on speed, force and workspace, with an emergency stop in reach. Figures measured in a simulator say little about
a robot.
"""


LICENCE = """## Licence

Weights fine-tuned from PaliGemma are a Model Derivative under the [Gemma Terms of Use](https://ai.google.dev/gemma/terms): pass
these terms on with them, say that they were modified (they were: fine-tuned for robot control), and keep to the [Prohibited Use
Policy](https://ai.google.dev/gemma/prohibited_use_policy). The code, PaliGemma-VLA, is under Apache-2.0.
"""
