"""A policy with an expert as LeRobot 0.6 loads it: config.json, model.safetensors, the steps before and after the model.

`published.py` reads the same folder back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from paligemma_vla import published, schema
from paligemma_vla.config import EXPERTS
from paligemma_vla.errors import ConfigError
from paligemma_vla.export.folder import staged
from paligemma_vla.normalization import Normalizer, Statistics
from paligemma_vla.policy import Policy
from paligemma_vla.preprocess import FORMS
from paligemma_vla.published import (
    NORMALIZATION,
    RELATIVE,
    RELATIVE_KEYS,
    STATISTICS,
    STEPS,
    TABLES,
    UNUSED,
    WEIGHTS,
    are_relative,
    published_name,
)

AFTER = "policy_postprocessor.json"
TOKENIZER = "google/paligemma-3b-pt-224"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."


def write_lerobot(output: Path, policy: Policy, dtype: str = "float32") -> Path:
    """Write a policy into the folder `output`, new, empty or an earlier export; returns it.

    policy: made with `device=None`. dtype: of the weights in the file. Raises `ConfigError` with everything about the policy
    that LeRobot cannot compute, `CheckpointError` when the folder cannot be written.
    """
    faults = list(_faults(policy))
    if faults:
        raise ConfigError("\n  ".join(["--format lerobot: LeRobot cannot compute this policy:", *faults]))
    with staged(output) as folder:
        steps = _steps(policy, folder)
        for name, written in steps.items():
            (folder / name).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        tensors = {name: value.to(getattr(torch, dtype)).contiguous() for name, value in _tensors(policy).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_config(policy, dtype), indent=2) + "\n", encoding="utf-8")
    return output


def _kind(policy: Policy) -> str:
    return FORMS.get(policy.config.model.action_head_config.head, "")


def _faults(policy: Policy) -> Iterator[str]:
    head, preprocessor = policy.config.model.action_head_config, policy.preprocessor
    if head.head not in EXPERTS:
        yield f"model.action_head_config.head: got {head.head}, expected an expert of pi0 or pi0.5"
        return
    known = {variant: sizes[:4] for variant, sizes in published.VARIANTS.items()}
    sizes = (head.embed_dim, round(head.mlp_ratio * head.embed_dim), head.num_layers, head.num_heads)
    text = policy.model.paligemma_vlm.backbone.config.get_text_config()
    wide = (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads)
    for key, ours, variant in (("action_head_config", sizes, "gemma_300m"), ("vlm_config", wide, "gemma_2b")):
        if ours != known[variant]:
            yield f"model.{key}: got width, MLP, layers, heads {ours}, expected those of {variant}, {known[variant]}"
    if (preprocessor.image.resizer, preprocessor.image.resize) != ("openpi", "pad"):
        got = f"{preprocessor.image.resizer} with {preprocessor.image.resize}"
        yield f"images: got resizing by {got}, expected that of published weights, which --init_from takes over"
    form = preprocessor.prompts.form
    if form != _kind(policy):
        yield f"prompts: got the form {form}, expected {_kind(policy)}, that of published weights, which --init_from takes over"
    if _kind(policy) == "pi0" and not head.use_state_input:
        yield "model.action_head_config.use_state_input: got false, expected true: pi0 reads the state"
    if head.noise != "normal":
        yield f"model.action_head_config.noise: got {head.noise}, expected normal"
    if len(set(cameras := _cameras(policy))) < len(cameras):
        yield f"cameras: got {', '.join(cameras)}, expected another name for each"
    actions = preprocessor.actions
    if actions.representation == "delta" or actions.rotation or actions.dimensions != actions.state_dimensions:
        got = actions.describe(policy.robot)
        yield f"data.actions: got {got}, expected absolute, or chunk_relative from the state of the same number, no rotation"


def _cameras(policy: Policy) -> list[str]:
    named = policy.metadata["camera_names"]
    keys = [schema.image_key(number + 1) for number in range(policy.config.model.vlm_config.cameras)]
    return [f"{IMAGES}{named[number].rpartition('.')[2] if number < len(named) else key}" for number, key in enumerate(keys)]


def _features(policy: Policy) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs."""
    side = policy.preprocessor.image.size
    inputs: dict[str, Any] = {name: {"type": "VISUAL", "shape": [3, side, side]} for name in _cameras(policy)}
    inputs[STATE] = {"type": "STATE", "shape": [policy.preprocessor.state.dimension]}
    return inputs, {ACTION: {"type": "ACTION", "shape": [policy.preprocessor.action.dimension]}}


def _normalization(policy: Policy) -> str:
    """LeRobot's name of a kind. What ours do for a dimension that does not move is in the statistics."""
    ours = policy.preprocessor.normalization
    same = next((theirs for theirs, kind in NORMALIZATION.items() if kind == ours), None)
    return same or ("MEAN_STD" if ours == "mean_std" else "QUANTILES")


def _config(policy: Policy, dtype: str) -> dict[str, Any]:
    head, (inputs, outputs), kind = policy.config.model.action_head_config, _features(policy), _normalization(policy)
    side = policy.preprocessor.image.size
    return {
        "type": _kind(policy),
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": dtype,
        "chunk_size": head.horizon,
        "n_action_steps": head.horizon,
        "max_state_dim": head.per_action_dim,
        "max_action_dim": head.per_action_dim,
        "num_inference_steps": head.num_inference_timesteps,
        "image_resolution": [side, side],
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": kind, "ACTION": kind},
        "tokenizer_max_length": policy.preprocessor.prompts.max_len,
        **_relative(policy),
    }


def _relative(policy: Policy) -> dict[str, Any]:
    """Which actions are relative, as config.json has it; empty where none is. Where the data's names would mislead, our own."""
    size, relative = policy.preprocessor.action.dimension, policy.preprocessor.actions.dimensions
    expected = [number in relative for number in range(size)]
    for names in (list(policy.robot.action_names), [f"action_{number:04}" for number in range(size)]):
        excluded = [name for name, converted in zip(names, expected, strict=False) if not converted]
        if len(names) == size and are_relative(size, excluded, names) == expected:
            break
    return dict(zip(RELATIVE_KEYS, (True, excluded, names), strict=True)) if relative else {}


def _tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """The weights under the published names, with the table that nothing reads."""
    tensors = {published_name(name): value for name, value in policy.model.state_dict().items()}
    width = policy.config.model.action_head_config.embed_dim
    tensors[UNUSED] = torch.zeros(len(tensors[TABLES[0]]), width)
    return tensors


def _steps(policy: Policy, folder: Path) -> dict[str, Any]:
    """The two files of steps by name; their statistics are written."""
    (inputs, outputs), kind, pi05 = _features(policy), _normalization(policy), _kind(policy) == "pi05"
    mapping = {"VISUAL": "IDENTITY", "STATE": kind, "ACTION": kind}
    normalize = _step("normalizer_processor", eps=1e-08, features={**inputs, **outputs}, norm_map=mapping)
    unnormalize = _step("unnormalizer_processor", eps=1e-08, features=outputs, norm_map=mapping)
    tokenize = _step(
        "tokenizer_processor",
        max_length=policy.preprocessor.prompts.max_len,
        task_key="task",
        padding_side="right",
        padding="max_length",
        truncation=True,
        tokenizer_name=TOKENIZER,
    )
    to_device = _step("device_processor", device="cpu", float_dtype=None)
    begin = [_step("rename_observations_processor", rename_map={}), _step("to_batch_processor")]
    relative, absolute = [], []
    if settings := _relative(policy):
        names = dict(zip(("enabled", "exclude_joints", "action_names"), settings.values(), strict=True))
        relative, absolute = [_step(RELATIVE, **names)], [_step("absolute_actions_processor", enabled=True)]
    normalized = [*relative, normalize]
    words = [*normalized, _step("pi05_prepare_state_tokenizer_processor_step"), tokenize, to_device]
    before = [*begin, *(words if pi05 else [_step("pi0_new_line_processor"), tokenize, to_device, *normalized])]
    after = [unnormalize, *absolute, to_device]
    statistics = {
        f"{name}.{part}": torch.from_numpy(values)
        for name, normalizer, measured in (
            (STATE, policy.preprocessor.state, policy.preprocessor.statistics.state),
            (ACTION, policy.preprocessor.action, policy.preprocessor.statistics.action),
        )
        for part, values in _equivalent(normalizer, measured, policy.preprocessor.normalization).items()
    }
    for steps, step, name in ((before, normalize, STEPS), (after, unnormalize, AFTER)):
        file = f"{name.removesuffix('.json')}_step_{steps.index(step)}_{step['registry_name']}.safetensors"
        step["state_file"] = file
        save_file(statistics, folder / file)
    return {name: {"name": name.removesuffix(".json"), "steps": steps} for name, steps in ((STEPS, before), (AFTER, after))}


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def _equivalent(normalizer: Normalizer, measured: Statistics, kind: str) -> dict[str, Any]:
    """Statistics with which LeRobot's formula is our normalisation: of its own kinds as they are."""
    values = {part: getattr(measured, part).astype(np.float32) for part in STATISTICS}
    if kind == "mean_std":
        values |= {"mean": normalizer.center, "std": normalizer.scale}
    elif kind in ("min_max", "quantile"):
        low, high = normalizer.center - normalizer.scale, normalizer.center + normalizer.scale
        values |= {"min": low, "max": high} if kind == "min_max" else {"q01": low, "q99": high}
        values |= {"min": np.minimum(values["min"], low), "max": np.maximum(values["max"], high)}
    return values
