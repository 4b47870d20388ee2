"""A new run from the weights of a trained policy (`training.init_from`).

The run begins at step 0 with its own data, schedule, optimiser and moving average. The backbone comes with its architecture,
tokenizer and image settings, so `model_name_or_path` need not be there. What the data decides may differ: horizon, numbers in
state and action, cameras (no weight depends on their number). A tensor of another shape keeps the steps, or the dimensions of
the same names, that it has in common with the policy's; the rest is made anew. What else decides a shape must be the policy's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paligemma_vla.actions import ActionTransform
from paligemma_vla.config import EXPERTS, VLAConfig, config_from_dict
from paligemma_vla.errors import CheckpointError, ConfigError, DataError, ModelError
from paligemma_vla.model.architectures import read_architecture, tower_sizes
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.policy import AGAIN, Policy, file_errors, load_trained
from paligemma_vla.preprocess import ImageSpec, Preprocessor, PromptEncoder
from paligemma_vla.schema import ACTION, STATE, DatasetMetadata, Layout, robot_differences
from paligemma_vla.storage import is_url

# What decides the shapes, or the meaning, of the head's weights.
HEAD_KEYS = ("head", "embed_dim", "num_layers", "num_heads", "mlp_ratio")
HORIZON = "horizon"
# Tensors whose shape follows from the data: along which axis, and from what.
RESIZED = {
    "action_head.position": (0, HORIZON),
    "action_head.action_encoder.weight": (1, ACTION),
    "action_head.velocity.weight": (0, ACTION),
    "action_head.velocity.bias": (0, ACTION),
    "action_head.state_encoder.0.weight": (1, STATE),
}
HEAD, ADAPTERS, BASE_LAYER = "action_head.", (".lora_A.", ".lora_B."), ".base_layer."
EITHER = "take the policy's value, or delete training.init_from"


class SourcePolicy:
    """The policy that `training.init_from` names: a checkpoint, an exported folder, or one on the hub.

    Raises `CheckpointError` for what is missing or damaged.
    """

    other_statistics = "set training.init_statistics: own, with the statistics of this data (`paligemma-vla stats`)"

    def __init__(self, config: VLAConfig, location: str) -> None:
        self.config, self.location = config, location
        self.trained = load_trained(location, self.keeps_statistics)
        with file_errors(location):
            self.before = config_from_dict(self.trained.config, where=f"{location}: config")
            self.preprocessor = Preprocessor.from_dict(self.trained.preprocessor, location)
            metadata = DatasetMetadata.from_json(self.trained.metadata, location)
        dimensions = self.preprocessor.state.dimension, self.preprocessor.action.dimension
        self.layout = Layout(self.before.model.vlm_config.cameras, *dimensions, metadata)

    @property
    def keeps_statistics(self) -> bool:
        return self.config.training.init_statistics == "kept"

    def prompt_and_image_spec(self) -> tuple[PromptEncoder, ImageSpec]:
        """The backbone's tokenizer and image settings, with the configured length of instructions and way to resize."""
        data, before = self.config.data, self.preprocessor
        prompts = replace(before.prompts, max_len=data.prompt_max_len, overflow=data.prompt_overflow)
        return prompts, replace(before.image, resize=data.image_resize)

    def check(self) -> None:
        """Raise `ConfigError` with every setting that these weights do not fit: key, got, expected."""
        faults = [*self._other_settings(), *self._other_backbone(), *self._same_run()]
        if faults:
            raise ConfigError("\n  ".join([f"training.init_from: {self.location} does not fit this configuration", *faults]))

    def _other_settings(self) -> Iterator[str]:
        models = self.config.model, self.before.model
        # Of an expert actions of any number are padded to one width.
        keys = HEAD_KEYS if models[1].action_head_config.head not in EXPERTS else (*HEAD_KEYS, "per_action_dim")
        head, known_head = ({key: vars(each.action_head_config)[key] for key in keys} for each in models)
        pairs = [(f"action_head_config.{key}", head[key], known_head[key]) for key in keys]
        pairs.append(("vlm_config.backbone", models[0].vlm_config.backbone, models[1].vlm_config.backbone))
        for key, got, expected in pairs:
            if got != expected:
                yield f"model.{key}: got {got}, expected {expected}; {EITHER}"
        kind, known_kind = self.config.data.normalization, self.preprocessor.normalization
        if self.keeps_statistics and kind != known_kind:
            yield f"data.normalization: got {kind}, expected {known_kind}; take the policy's value, or {self.other_statistics}"

    def _other_backbone(self) -> Iterator[str]:
        """The weights come from the policy, so a backbone that has moved, or is not there, is the same."""
        vlm, known = self.config.model.vlm_config, self.before.model.vlm_config.model_name_or_path
        if vlm.model_name_or_path == known:
            return
        try:
            sizes, known_sizes = tower_sizes(read_architecture(vlm)), tower_sizes(self.trained.backbone)
        except ModelError:
            return
        keys = sorted(key for key in sizes.keys() | known_sizes.keys() if sizes.get(key) != known_sizes.get(key))
        if keys:
            got = ", ".join(f"{key} {sizes.get(key)} instead of {known_sizes.get(key)}" for key in keys[:3])
            yield (
                f"model.vlm_config.model_name_or_path: got {vlm.model_name_or_path} with {got}, expected the backbone of the "
                f"policy ({known}); {EITHER}"
            )

    def _same_run(self) -> Iterator[str]:
        """A new run of the same name would move the policy's own aside."""
        run_dir, url = self.config.run_dir.resolve(), self.config.run_url
        if is_url(self.location):
            within = url is not None and self.location.startswith(f"{url}/")
        else:
            within = Path(self.location).resolve().is_relative_to(run_dir)
        if within:
            yield (
                f"training.experiment_name: got {self.config.training.experiment_name}, the run of this policy, which would be "
                f"moved aside; give another name, or go on with it (--resume_checkpoint auto)"
            )

    def check_dimensions(self, layout: Layout) -> None:
        """Raise `DataError` when the statistics to keep do not have one number for each of the data's."""
        pairs = [(STATE, layout.state_dim, self.layout.state_dim), (ACTION, layout.action_dim, self.layout.action_dim)]
        faults = [f"{name}: got {got} numbers, expected the policy's {known}" for name, got, known in pairs if got != known]
        if faults:
            raise DataError(f"training.init_statistics: kept: {'; '.join(faults)}; {self.other_statistics}")

    def load_into(self, model: VLAModel, device: torch.device, layout: Layout) -> list[str]:
        """Copy the weights into a model that is still on the CPU; returns a line for each tensor of another shape.

        device: where it will train. layout: of the run's data. Raises `CheckpointError` for weights of another backbone.
        """
        model.cast_for(device)  # norms that do not learn are built in bfloat16, but are float32 where it trains
        weights, changed, faults = self._weights(), [], []
        for name, target in model.state_dict().items():
            source = weights.pop(name.replace(BASE_LAYER, "."), None)
            if source is not None and source.shape == target.shape:
                target.copy_(source)
            elif any(part in name for part in ADAPTERS):  # those of a new run begin at zero
                continue
            elif name.startswith(HEAD):
                changed.append(f"{name}: {self._resize(name, target, source, layout)}")
            else:
                faults.append(name)
        changed += [f"{name}: {_shape(source)} before, left out" for name, source in weights.items() if name.startswith(HEAD)]
        faults += [name for name in weights if not name.startswith(HEAD)]
        if faults:
            raise CheckpointError(f"{self.location}: the weights do not fit its own backbone: {', '.join(faults[:3])}; {AGAIN}")
        return changed

    def _weights(self) -> dict[str, Tensor]:
        """The weights by name. Adapters are merged, as in an export: the new run has its own, or none."""
        if not self.before.has_adapters:
            return dict(self.trained.state_dict)
        return dict(Policy(self.trained, self.location).model.state_dict())

    def _resize(self, name: str, target: Tensor, source: Tensor | None, layout: Layout) -> str:
        """Copy what a tensor has in common with `source`, of another shape; says what became of it."""
        if source is None:
            return f"{_shape(target)} now, made anew"
        if name not in RESIZED:
            return f"{_shape(source)} before, {_shape(target)} now, made anew"
        axis, kind = RESIZED[name]
        now, before = self._labels(kind, layout), self._labels(kind, self.layout)
        common = [label for label in now if label in before]
        for label in common:
            target.select(axis, now.index(label)).copy_(source.select(axis, before.index(label)))
        if not common:
            kept = f"made anew: {kind} has no names in common"
        else:
            kept = f"the first {len(common)} kept" if kind == HORIZON else f"kept: {', '.join(common)}"
        return f"{_shape(source)} before, {_shape(target)} now, {kept}"

    def _labels(self, kind: str, layout: Layout) -> tuple[str, ...]:
        """What stands for each position along an axis: the number of a step, or the name of a dimension, if it has one."""
        if kind == HORIZON:
            config = self.before if layout is self.layout else self.config
            return tuple(map(str, range(config.model.action_head_config.horizon)))
        return layout.metadata.state_names if kind == STATE else layout.metadata.action_names

    def describe(self, changed: list[str], preprocessor: Preprocessor, layout: Layout) -> str:
        """What the run begins with, for a person. changed: what `load_into` returned; the others are of the run."""
        training, differences = self.trained.training, self._differences(preprocessor.actions, layout)
        averaged = ", averaged" if training["averaged_weights"] else ""
        kept = "the policy's (training.init_statistics: kept)"
        statistics = kept if self.keeps_statistics else f"{self.config.data.normalization_stats_path}, not the policy's"
        lines = [
            f"the weights of {self.location} (step {training['step']}{averaged})" + (", but" if changed else ""),
            *(f"  {line}" for line in changed),
            f"statistics: {statistics}",
            *(f"not as in the policy's data: {name}: {text}" for name, text in differences.items()),
        ]
        return "\n".join(lines)

    def _differences(self, actions: ActionTransform, layout: Layout) -> dict[str, Any]:
        """In what the data, and how it is shown to the model, is not what the policy knows: `got X, expected Y` by name."""
        cameras = self.config.model.vlm_config.cameras
        pairs = {
            "number of cameras": (cameras, self.layout.cameras),
            "data.image_resize": (self.config.data.image_resize, self.preprocessor.image.resize),
            "data.actions": tuple(each.describe(layout.metadata) for each in (actions, self.preprocessor.actions)),
        }
        settings = {name: f"got {got}, expected {known}" for name, (got, known) in pairs.items() if got != known}
        return robot_differences(layout, self.layout, min(cameras, self.layout.cameras)) | settings


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
