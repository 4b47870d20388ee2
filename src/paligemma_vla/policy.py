"""Policy: raw observation in, raw action chunk out. The one path that evaluation, serving and robots use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from paligemma_vla import flow, schema
from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import CheckpointError, DataError
from paligemma_vla.export.folder import Restored, load_trained, restore
from paligemma_vla.model.quantize import Weights
from paligemma_vla.schema import DatasetMetadata
from paligemma_vla.seeding import derive_seed


class Policy:
    """A trained model with the preprocessing it was trained with.

    Made by `from_checkpoint`. `metadata` says what it expects and returns: cameras, dimensions, horizon, control rate, names
    and units, image orientation, versions. Whatever the model predicts, what it returns are actions as the data has them.
    """

    def __init__(
        self, restored: Restored, training: dict[str, Any], versions: dict[str, str], weights: Weights | None = None
    ) -> None:
        self.model, self.preprocessor, self.config = restored.model.eval(), restored.preprocessor, restored.config
        self.device = next(self.model.parameters()).device
        preprocessor, config, metadata = self.preprocessor, self.config, restored.metadata
        head = config.model.action_head_config
        self.metadata: dict[str, Any] = {
            "cameras": [schema.image_key(n + 1) for n in range(config.model.vlm_config.cameras)],
            "camera_names": list(metadata.cameras),
            "image_size": preprocessor.image.size,
            "image_orientation": metadata.image_orientation,
            "state_dim": preprocessor.state.dimension,
            "state_names": list(metadata.state_names),
            "action_dim": preprocessor.action.dimension,
            "action_names": list(metadata.action_names),
            "state_units": list(metadata.state_units),
            "action_units": list(metadata.action_units),
            "action_convention": metadata.action_convention,
            "action_representation": metadata.action_representation,
            "rotation": _rotation(config, metadata),
            "horizon": head.horizon,
            "num_inference_timesteps": head.num_inference_timesteps,
            "control_hz": metadata.control_hz,
            "robot": metadata.robot,
            "training": training,
            "weights": weights or "full",
            "versions": versions,
        }

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "cpu", weights: Weights | None = None) -> Policy:
        """Load a `.pth.tar` of this project, a folder that `paligemma-vla export` wrote, or such a folder on the Hugging Face
        hub (`org/name`, `org/name@revision`); it needs nothing else. Uses the averaged weights when the run kept them.

        weights: quantise the backbone to `int8` or `int4`; None keeps it as it was trained. Raises `CheckpointError` when it is
        missing, damaged or nothing of ours, `ModelError` when it cannot be quantised here.
        """
        trained = load_trained(path)
        restored = restore(trained, path, torch.device(device))
        restored.model.to_device(torch.device(device), weights)
        return cls(restored, trained.training, trained.versions, weights)

    def infer(self, observation: Mapping[str, Any], seed: int | None = None, num_steps: int | None = None) -> dict[str, Any]:
        """Answer one observation.

        observation: `image_1 .. image_N` (H, W, 3) uint8 RGB, any size; cameras after the first may be left out. `state` (P,)
        in real units. `prompt`. seed: of the initial noise; None draws a fresh one. num_steps: Euler steps; None: the
        configuration's. Returns {"actions": (K, A) float32 in real units}. Raises `DataError` for a wrong
        observation, `CheckpointError` when the answer is not finite.
        """
        return {"actions": self.infer_batch([observation], [seed], num_steps)[0]}

    @torch.inference_mode()
    def infer_batch(
        self, observations: Sequence[Mapping[str, Any]], seeds: Sequence[int | None], num_steps: int | None = None
    ) -> NDArray[np.float32]:
        """Answer several observations at once: actions (B, K, A) float32 in real units. Arguments and errors as in `infer`."""
        names = self.metadata["cameras"]
        if num_steps is not None and num_steps < 1:
            raise DataError(f"num_steps: got {num_steps}, expected at least 1 Euler step")
        for observation in observations:
            self._check(observation)
        present = np.array([[observation.get(name) is not None for name in names] for observation in observations])
        images = [
            torch.from_numpy(np.stack([self._pixels(observation.get(name)) for observation in observations])).to(self.device)
            for name in names
        ]
        prompts = [observation["prompt"] for observation in observations]
        ids, mask = self.preprocessor.prompts.encode(prompts, present)
        state = np.stack([np.asarray(observation["state"], np.float32) for observation in observations])  # (B, P)
        noise = torch.stack([self._noise(seed) for seed in seeds]).to(self.device)
        actions = self.model(
            image_1_batch=images[0],
            raw_prompt_texts_batch=prompts,
            vlm_attention_mask_batch=torch.from_numpy(mask),
            state_batch=torch.from_numpy(self.preprocessor.state.normalize(state)).to(self.device),
            image_2_batch=images[1] if len(images) > 1 else None,
            further_images=images[2:],
            input_ids=torch.from_numpy(ids),
            image_mask=torch.from_numpy(present),
            flow_noise=noise,
            num_steps=num_steps,
        )
        predicted = actions[..., : self.preprocessor.action.dimension].cpu().numpy()
        answer = self.preprocessor.decode_actions(predicted, state)
        finite = np.isfinite(answer).all(axis=(1, 2))
        if not finite.all():
            raise CheckpointError(
                f"observation {int(np.flatnonzero(~finite)[0])} of {len(answer)}: the policy's actions are not finite: the "
                f"training run diverged; use an earlier checkpoint, or lower optimizer.lr and train again"
            )
        return answer

    def _noise(self, seed: int | None) -> torch.Tensor:
        head = self.config.model.action_head_config
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(derive_seed(seed, "policy noise", 0))
        return flow.draw_noise((1, head.horizon, head.per_action_dim), generator)  # (M = 1, K, A)

    def _pixels(self, image: Any) -> NDArray[np.uint8]:
        if image is None:
            return np.zeros((3, self.preprocessor.image.size, self.preprocessor.image.size), np.uint8)
        return self.preprocessor.image.apply(Image.fromarray(image))

    def _check(self, observation: Mapping[str, Any]) -> None:
        """Raise `DataError` with everything that is wrong about an observation."""
        names, dimension = self.metadata["cameras"], self.metadata["state_dim"]
        faults = []
        for name in names:
            image = observation.get(name)
            if image is None:
                if name == names[0]:
                    faults.append(f"{name}: missing; got {', '.join(observation)}")
            elif (
                not isinstance(image, np.ndarray)
                or image.dtype != np.uint8
                or image.ndim != 3
                or image.shape[2] != 3
                or image.size == 0
            ):
                got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
                faults.append(f"{name}: got {got}, expected a uint8 array (H, W, 3)")
        try:
            state = np.asarray(observation.get("state", ()))
        except ValueError:  # ragged lists
            state = np.empty(0)
        if state.shape != (dimension,) or not np.issubdtype(state.dtype, np.number) or not np.isfinite(state).all():
            faults.append(f"state: got {state.dtype} {state.shape}, expected {dimension} finite numbers")
        elif not self.preprocessor.actions.starts_from(state):
            rotation = self.preprocessor.actions.rotation
            faults.append(f"state: got {state.tolist()}, expected a rotation in it as {rotation}: a length of 0 is none")
        if not isinstance(observation.get("prompt"), str):
            faults.append(f"prompt: got {type(observation.get('prompt')).__name__}, expected a string")
        faults += [f"{k}: not a camera of this policy; it has {', '.join(names)}" for k in observation if _is_stray(k, names)]
        if faults:
            raise DataError("observation:\n  " + "\n  ".join(faults))


def _rotation(config: VLAConfig, metadata: DatasetMetadata) -> dict[str, Any] | None:
    """How the returned actions write a rotation, and in which dimensions (null: the data names the one, not the other)."""
    named = config.data.actions.rotation
    if named is not None:
        return {"representation": named.representation, "dimensions": list(named.dimensions)}
    return {"representation": metadata.action_rotation, "dimensions": None} if metadata.action_rotation else None


def _is_stray(key: str, names: Sequence[str]) -> bool:
    return key.startswith("image_") and key not in names
