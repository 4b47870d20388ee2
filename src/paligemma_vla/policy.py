"""`Policy`: raw observation in, raw action chunk out. The one path that evaluation, serving and robots use.

A policy is read from a checkpoint of training, from a folder that `paligemma-vla export` wrote (`export/folder.py` says what
stands where in it), or from such a folder on the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from paligemma_vla import flow, schema
from paligemma_vla.config import RUN_STATISTICS, VLAConfig, config_from_dict
from paligemma_vla.errors import CheckpointError, DataError, ModelError, NotFiniteError, VLAError, first_line
from paligemma_vla.hub import POLICY_FILES, download_policy
from paligemma_vla.model.graphs import GraphedModel
from paligemma_vla.model.quantize import Weights
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.observation import ParsedObservation, parse_observation, whole_number
from paligemma_vla.preprocess import Preprocessor
from paligemma_vla.published import is_published, read_published
from paligemma_vla.schema import DatasetMetadata, Pixels
from paligemma_vla.seeding import derive_seed
from paligemma_vla.storage import is_url, read_json, sha256
from paligemma_vla.training.checkpoint import DIGEST, RECORD, is_in_shards, load_checkpoint

MODEL_TYPE, FORMAT = "paligemma_vla", 1
CONFIG, TOKENIZER, PROCESSOR = "config.json", "tokenizer.json", "processor_config.json"
# What processor_config.json says about images, and config.json therefore does not: its name there -> in `ImageSpec`.
IMAGE_SETTINGS = {"image_mean": "mean", "image_std": "std", "resample": "resample"}
AGAIN = "fetch or export it again"


RealTime = Literal["prefix", "guidance"]


@dataclass(frozen=True)
class Continuation:
    """What a robot goes on executing while the answer to its observation is computed (real-time chunking).

    actions: (n, A) float32 in real units, what is left of its last chunk, from the observation on.
    delay: how many of them will be executed before the answer is used.
    """

    actions: NDArray[np.float32]
    delay: int


class Policy:
    """A trained model with the preprocessing it was trained with.

    Made by `from_checkpoint`. `metadata` says what it expects and returns: cameras, dimensions, horizon, control rate, names
    and units, image orientation, versions. Whatever the model predicts, `infer` returns actions as the data has them.
    """

    def __init__(
        self,
        trained: Trained,
        where: str,
        device: torch.device | None = None,
        weights: Weights | None = None,
        compile: bool = False,
    ) -> None:
        """trained: what `load_trained` read from `where`. device: where the model will answer; None keeps it on the CPU, in
        float32 as it was trained, for an export. weights, compile: as in `from_checkpoint`."""
        with file_errors(where):
            self.config = config_from_dict(trained.config, where=f"{where}: config")
            self.preprocessor = Preprocessor.from_dict(trained.preprocessor, where)
            self.robot = DatasetMetadata.from_json(trained.metadata, where)
            self.model = _build_model(trained, self.config, self.preprocessor, where, device)
        if self.config.has_adapters:  # merged into the weights
            self.config = self.config.without_adapters()
        if device is not None:
            self.model.to_device(device, weights)
        self.backbone = trained.backbone
        self.device = next(self.model.parameters()).device
        if compile and self.device.type != "cuda":
            raise ModelError(f"compile: got the device {self.device}, expected cuda, where graphs are captured; leave it out")
        cameras, prompts = self.config.model.vlm_config.cameras, self.preprocessor.prompts
        longest = cameras * prompts.image_tokens + prompts.max_len
        self.graphs = GraphedModel(self.model, longest) if compile else None
        keys = [schema.image_key(n + 1) for n in range(cameras)]
        self._cameras = dict(zip_longest(keys, self.robot.cameras[: len(keys)], fillvalue=""))
        head, robot = self.config.model.action_head_config, self.robot
        described = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(robot).items()}
        camera_names, _, _ = described.pop("cameras"), described.pop("action_rotation"), described.pop("extra")
        self.metadata: dict[str, Any] = {
            **described,  # robot, names and units, image_orientation, control_hz, what an action means
            "cameras": keys,
            "camera_names": camera_names,
            "image_size": self.preprocessor.image.size,
            "state_dim": self.preprocessor.state.dimension,
            "action_dim": self.preprocessor.action.dimension,
            "rotation": _rotation(self.config, robot),
            "horizon": head.horizon,
            "num_inference_timesteps": head.num_inference_timesteps,
            "rtc_max_delay": self.config.training.rtc_max_delay,
            "training": trained.training,
            "weights": weights or "full",
            "versions": trained.versions,
        }

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str = "cpu", weights: Weights | None = None, compile: bool = False
    ) -> Policy:
        """Load a `.pth.tar` of this project, a folder that `paligemma-vla export` wrote, or such a folder on the Hugging Face
        hub (`org/name`, `org/name@revision`); it needs nothing else. Uses the averaged weights when the run kept them.

        weights: quantise the backbone to `int8` or `int4`; None keeps it as it was trained. compile: on CUDA, answer by CUDA
        graphs: the first answer to as many observations takes long, the others less than without.
        Raises `CheckpointError` when it is missing, damaged or not of this project, `ModelError` when it cannot be quantised or
        compiled here.
        """
        return cls(load_trained(path), str(path), torch.device(device), weights, compile)

    def infer(
        self,
        observation: Mapping[str, Any],
        seed: int | None = None,
        num_steps: int | None = None,
        continuation: Continuation | None = None,
        realtime: RealTime | None = None,
    ) -> dict[str, Any]:
        """Answer one observation.

        observation: `image_1 .. image_N`, RGB of any size: (H, W, 3) or (3, H, W), uint8 or floats from 0 to 1, or PIL images;
        cameras after the first may be left out. `state` (P,) in real units. `prompt`. A leading dimension of one is taken as
        a batch. seed: of the initial noise; None draws a fresh one. num_steps: Euler steps; None: the configuration's.
        continuation: what the robot does meanwhile; the answer begins like it, and goes on from there. realtime: how,
        see `realtime_method`.
        Returns {"actions": (K, A) float32 in real units}, action k for the k-th step after the observation. Raises `DataError`
        for a wrong observation, naming each key, `NotFiniteError` when the answer is not finite.
        """
        return {"actions": self.infer_batch([observation], [seed], num_steps, [continuation], realtime)[0]}

    def realtime_method(self, continuation: Continuation | None, realtime: RealTime | None = None) -> RealTime | None:
        """How an answer will continue: `prefix`, as trained (`training.rtc_max_delay`), at no cost; `guidance`, of any policy
        for any delay, at two to three times the cost of the head; None where nothing is left to continue.

        realtime: one of the two for all; None chooses. Raises `DataError` for a prefix that was not trained.
        """
        if continuation is None or not len(continuation.actions):
            return None
        delay, longest = min(continuation.delay, len(continuation.actions)), self.config.training.rtc_max_delay
        if realtime == "prefix" and delay > longest:
            trained = f"up to {longest} steps" if longest else "none (training.rtc_max_delay: 0)"
            raise DataError(f"realtime: got prefix with a delay of {delay} steps, expected {trained}; take guidance")
        return realtime or ("prefix" if delay <= longest and longest else "guidance")

    def parse(self, observation: Mapping[str, Any]) -> ParsedObservation:
        """Check an observation, so that a fault of it is not one of the batch it is answered in. Raises as `infer` does."""
        parsed = parse_observation(observation, self._cameras, self.preprocessor.state.dimension, self.preprocessor.actions)
        prompts = self.preprocessor.prompts
        prompts.text_ids(parsed.prompt)
        prompts.text_ids(prompts.text(parsed.prompt, self.preprocessor.state.normalize(parsed.state)))
        return parsed

    def infer_batch(
        self,
        observations: Sequence[Mapping[str, Any] | ParsedObservation],
        seeds: Sequence[int | None],
        num_steps: int | None = None,
        continuations: Sequence[Continuation | None] | None = None,
        realtime: RealTime | None = None,
    ) -> NDArray[np.float32]:
        """Answer several observations at once: actions (B, K, A) float32 in real units. Arguments and errors as in `infer`.

        Those that continue in different ways are computed one way after the other.
        """
        if continuations is None:
            continuations = [None] * len(seeds)
        if not 0 < len(observations) == len(seeds) == len(continuations):
            counts = f"{len(observations)}, {len(seeds)} seeds and {len(continuations)} continuations"
            raise DataError(f"observations: got {counts}, expected at least one, and one of each for each")
        if num_steps is not None:
            num_steps = whole_number("num_steps", num_steps, 1)
        parsed = [each if isinstance(each, ParsedObservation) else self.parse(each) for each in observations]
        methods = [self.realtime_method(each, realtime) for each in continuations]
        noise = torch.stack([self._noise(seed) for seed in seeds])  # (B, M = 1, K, A)
        answer = np.empty((len(parsed), *noise.shape[2:]), np.float32)[..., : self.preprocessor.action.dimension]
        for method in dict.fromkeys(methods):
            rows = [row for row, each in enumerate(methods) if each == method]
            views = [parsed[row] for row in rows]
            state = np.stack([view.state for view in views])  # (B, P)
            left = [each for row in rows if (each := continuations[row]) is not None]
            going_on = None if method is None else self._ongoing(left, state, method)
            with torch.no_grad() if method == "guidance" else torch.inference_mode():
                predicted = self._sample(views, state, noise[rows], num_steps, going_on)
            answer[rows] = self.preprocessor.decode_actions(predicted, state)
        finite = np.isfinite(answer).all(axis=(1, 2))
        if not finite.all():
            number = int(np.flatnonzero(~finite)[0])
            raise NotFiniteError(
                f"observation {number} of {len(answer)}: the policy's actions are not finite: the training run diverged; use "
                f"an earlier checkpoint, or lower optimizer.lr and train again. Or the state is far from those of the "
                f"training data: got {parsed[number].state.tolist()}"
            )
        return answer

    def _sample(
        self,
        views: Sequence[ParsedObservation],
        state: NDArray[np.float32],
        noise: Tensor,
        num_steps: int | None,
        ongoing: flow.Ongoing | None,
    ) -> NDArray[np.float32]:
        """What the model predicts (B, K, A), normalised, from the states (B, P) and noise (B, 1, K, A)."""
        present = np.array([[image is not None for image in view.images] for view in views])  # (B, N)
        images = [
            torch.from_numpy(np.stack([self._pixels(view.images[n]) for view in views])).to(self.device)
            for n in range(len(self._cameras))
        ]  # N of (B, 3, H, W)
        normalised = self.preprocessor.state.normalize(state)
        pairs = zip(views, normalised, strict=True)
        prompts = [self.preprocessor.prompts.text(view.prompt, values) for view, values in pairs]
        ids, mask = self.preprocessor.prompts.encode(prompts, present)
        actions = (self.graphs or self.model)(
            image_1_batch=images[0],
            raw_prompt_texts_batch=prompts,
            vlm_attention_mask_batch=torch.from_numpy(mask),
            state_batch=torch.from_numpy(normalised).to(self.device),
            image_2_batch=images[1] if len(images) > 1 else None,
            further_images=images[2:],
            input_ids=torch.from_numpy(ids),
            image_mask=torch.from_numpy(present),
            flow_noise=noise.to(self.device),
            num_steps=num_steps,
            ongoing=ongoing,
        )
        predicted: NDArray[np.float32] = actions[..., : self.preprocessor.action.dimension].cpu().numpy()
        return predicted

    def _ongoing(self, continuations: Sequence[Continuation], state: NDArray[np.float32], method: RealTime) -> flow.Ongoing:
        """Continuations as the model sees actions: relative ones start from the new states (B, P); the last one is repeated,
        since a zero means the data's mean."""
        head = self.config.model.action_head_config
        actions = np.zeros((len(state), head.horizon, head.per_action_dim), np.float32)
        rest = [each.actions[: head.horizon] for each in continuations]
        steps = np.arange(head.horizon)
        repeated = np.stack([left[np.minimum(steps, len(left) - 1)] for left in rest])  # (B, K, A)
        actions[..., : repeated.shape[2]] = self.preprocessor.encode_actions(repeated, state)
        length = torch.tensor([len(left) for left in rest], device=self.device)
        delay = torch.tensor([each.delay for each in continuations], device=self.device)
        on_device = torch.from_numpy(actions).to(self.device)
        return flow.Ongoing(on_device, torch.minimum(delay, length), length, guided=method == "guidance")

    def _noise(self, seed: int | None) -> Tensor:
        head = self.config.model.action_head_config
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(derive_seed(whole_number("seed", seed, 0), "policy noise", 0))
        return flow.draw_noise((1, head.horizon, head.per_action_dim), generator, head.noise)  # (M = 1, K, A)

    def _pixels(self, image: Pixels | None) -> Pixels:
        spec = self.preprocessor.image
        return spec.blank() if image is None else spec.apply(image)


def _rotation(config: VLAConfig, metadata: DatasetMetadata) -> dict[str, Any] | None:
    """How the returned actions write a rotation, and in which dimensions (null: the data names the one, not the other)."""
    named = config.data.actions.rotation
    if named is not None:
        return {"representation": named.representation, "dimensions": list(named.dimensions)}
    return {"representation": metadata.action_rotation, "dimensions": None} if metadata.action_rotation else None


@dataclass(frozen=True)
class Trained:
    """What training left, and a policy is made of; plain data but for the weights.

    training: step, epoch, averaged_weights, best_metric (None when nothing was validated). metadata: `DatasetMetadata` as JSON.
    The other parts are those of a checkpoint.
    """

    config: dict[str, Any]
    preprocessor: dict[str, Any]
    backbone: dict[str, Any]
    metadata: str
    versions: dict[str, str]
    training: dict[str, Any]
    state_dict: dict[str, Tensor]


def load_trained(location: str | Path, statistics: bool = True) -> Trained:
    """Read a checkpoint (`.pth.tar`, path or URL, or a folder of shards), an exported folder, a pi0 or pi0.5 as LeRobot writes
    it, or such a folder on the hub (`org/name`, `org/name@revision`).

    statistics: whether they are needed: a published base has none. The averaged weights are taken where the run kept them.
    Raises `CheckpointError` for what is missing or damaged.
    """
    here = download_policy(location)
    if not is_url(here) and Path(here).is_dir() and not is_in_shards(Path(here)):
        if is_published(Path(here)):
            with file_errors(here):
                return read_published(Path(here), statistics)
        return _read_folder(Path(here))
    saved = load_checkpoint(here)
    average = saved["ema"]["average"] if saved["ema"] is not None else {}
    best = float(saved["best_metric"])
    training = {
        "step": saved["step"],
        "epoch": saved["epoch"],
        "averaged_weights": saved["ema"] is not None,
        "best_metric": best if math.isfinite(best) else None,
    }
    parts = {name: saved[name] for name in ("config", "preprocessor", "backbone", "metadata", "versions")}
    return Trained(**parts, training=training, state_dict={**saved["state_dict"], **average})


def fingerprint(location: str | Path) -> str | None:
    """What distinguishes a checkpoint or an export from others: sha256 of the file, or of the file of a folder that holds
    those of the others. None for a URL, which is fetched only to be read."""
    if is_url(str(location)):
        return None
    here = Path(download_policy(location)).resolve()
    if here.is_dir() and is_published(here):  # its config.json says nothing of the other files
        files = sorted(path for kind in POLICY_FILES for path in here.rglob(kind))
        digests = "\n".join(f"{path.relative_to(here)} {sha256(path)}" for path in files)
        return hashlib.sha256(digests.encode()).hexdigest()
    if here.is_dir():
        return sha256(here / (RECORD if is_in_shards(here) else CONFIG))
    beside = here.with_name(f"{here.name}{DIGEST}")
    words = beside.read_text(encoding="ascii").split() if beside.is_file() else []
    return words[0] if len(words) == 2 else sha256(here)  # more of them: a kill came in the middle of a save


def _build_model(
    trained: Trained, config: VLAConfig, preprocessor: Preprocessor, where: str, device: torch.device | None
) -> VLAModel:
    """The model of `trained`, on the CPU. Adapters are merged into the weights here and nowhere else, so that a checkpoint
    and its export are one model.

    Matrices are in the type in which `device` computes from the start, so that they are never in memory in float32.
    """
    model = VLAModel(config, preprocessor.prompts, preprocessor.image, backbone_config=trained.backbone)
    model.requires_grad_(False)
    adapted = config.has_adapters
    if device is None:
        model.float()  # weights that do not learn are built in bfloat16
    elif not adapted:  # adapters are added in float32
        model.cast_for(device)
    try:
        model.load_state_dict(trained.state_dict)
    except RuntimeError as error:
        _, _, faults = str(error).partition(":")
        raise CheckpointError(f"{where}: weights and configuration do not fit: {' '.join(faults.split())[:400]}") from error
    if adapted:
        dtype = torch.float32 if device is None else model.dtype_on(device.type)
        model.merge_adapters(dtype)
    return model.eval()


@contextmanager
def file_errors(location: str | Path) -> Iterator[None]:
    """What is read inside comes from files that anybody may have edited: any error is a `CheckpointError`.

    A `ModelError` passes: a class that is not installed here is no damage.
    """
    try:
        yield
    except (CheckpointError, ModelError):
        raise
    except VLAError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # of any kind: an edited file can hold anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{location}: does not describe a policy ({reason}); {AGAIN}") from error


def _read_folder(folder: Path) -> Trained:
    """An exported folder, whose files hold each fact once, as a checkpoint holds it.

    Every file is compared with its sha256: a flipped byte in a weight would move a robot otherwise than it learned.
    """
    raw = read_config(folder)
    with file_errors(folder):
        shards = sorted(name for name in raw["files"] if name.endswith(".safetensors"))
        for name in (RUN_STATISTICS, TOKENIZER, PROCESSOR, *shards):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: no such file; {AGAIN}")
            if sha256(folder / name) != raw["files"][name]:
                raise CheckpointError(f"{folder / name}: damaged or edited: its sha256 differs from {CONFIG}; {AGAIN}")
        described, tokenizer = raw["preprocessor"], (folder / TOKENIZER).read_text(encoding="utf-8")
        images = read_json(folder / PROCESSOR, CheckpointError, AGAIN)["image_processor"]
        settings = {ours: images[theirs] for theirs, ours in IMAGE_SETTINGS.items()}
        preprocessor = {
            **described,
            "prompts": {**described["prompts"], "tokenizer_json": tokenizer},
            "image": {**described["image"], **settings, "size": images["size"]["height"]},
            "statistics": read_json(folder / RUN_STATISTICS, CheckpointError, AGAIN),
        }
        return Trained(
            config=raw["configuration"],
            preprocessor=preprocessor,
            backbone=raw["backbone"],
            metadata=json.dumps(raw["metadata"]),
            versions=dict(raw["versions"]),
            training={name: raw["training"][name] for name in ("step", "epoch", "averaged_weights", "best_metric")},
            state_dict={name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()},
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported folder; raises `CheckpointError` when that is not what the folder is."""
    path = folder / CONFIG
    missing = "a folder that `paligemma-vla export` wrote has one (a run keeps its checkpoints as checkpoints/*.pth.tar)"
    raw = read_json(path, CheckpointError, AGAIN, missing)
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path}: got a model of type {raw.get('model_type')!r}, expected '{MODEL_TYPE}': a folder that `paligemma-vla "
            f"export` wrote; to train from a backbone name it in model.vlm_config.model_name_or_path"
        )
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{path}: got format {raw.get('format')!r}, expected {FORMAT}; update paligemma-vla, or {AGAIN}")
    return raw
