"""The exported folder, and what a policy is made of, wherever it comes from.

Each fact stands in one file:

    config.json                 the run's configuration, the backbone's architecture, what the data meant, how training ended,
                                and the sha256 of the other files
    model.safetensors           weights, in shards with model.safetensors.index.json beyond 5 GB
    normalization_stats.json    statistics of state and action
    tokenizer.json, tokenizer_config.json, processor_config.json     a PaliGemmaProcessor for transformers; we read two of them
    README.md                   the model card: for people, read by no program of ours
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from paligemma_vla.config import RUN_STATISTICS, VLAConfig, config_from_dict
from paligemma_vla.errors import CheckpointError, ModelError, VLAError, first_line
from paligemma_vla.export.hub import local_copy
from paligemma_vla.model.vla_model import Arithmetic, VLAModel
from paligemma_vla.preprocess import Preprocessor
from paligemma_vla.schema import DatasetMetadata
from paligemma_vla.storage import is_url, sha256
from paligemma_vla.training.checkpoint import DIGEST, RECORD, is_in_shards, load_checkpoint

MODEL_TYPE, FORMAT = "paligemma_vla", 1
CONFIG, CARD = "config.json", "README.md"
TOKENIZER, PROCESSOR = "tokenizer.json", "processor_config.json"
# What processor_config.json says about pictures, and config.json therefore does not: its name there -> in `ImageSpec`.
PICTURE = {"image_mean": "mean", "image_std": "std", "resample": "resample"}
AGAIN = "fetch or export it again"


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


def load_trained(place: str | Path) -> Trained:
    """Read a checkpoint (`.pth.tar`, path or URL, or a folder of shards), an exported folder, or one on the hub (`org/name`,
    `org/name@revision`).

    The averaged weights are taken where the run kept them. Raises `CheckpointError` for what is missing or damaged.
    """
    here = local_copy(place)
    if not is_url(here) and Path(here).is_dir() and not is_in_shards(Path(here)):
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


@dataclass(frozen=True)
class Restored:
    """The parts of a policy. model: on the CPU, without adapters; config describes that model."""

    model: VLAModel
    preprocessor: Preprocessor
    config: VLAConfig
    metadata: DatasetMetadata


def restore(trained: Trained, where: str | Path, device: torch.device | None = None) -> Restored:
    """Build the model of `trained`. Adapters are folded into the weights beside them: here, and nowhere else, so that a
    checkpoint and its export are one model.

    device: where the model will answer: its matrices are held from the start as that device computes, so that they are never
    in memory in float32. None: everything in float32, as it was trained. Raises `CheckpointError` when the parts do not fit
    each other.
    """
    with describing(where):
        config = config_from_dict(trained.config, where=f"{where}: config")
        preprocessor = Preprocessor.from_dict(trained.preprocessor, str(where))
        metadata = DatasetMetadata.from_json(trained.metadata, str(where))
        model = VLAModel(config, preprocessor.prompts, preprocessor.image, backbone_config=trained.backbone)
        model.requires_grad_(False)
        adapted = config.model.vlm_config.lora is not None
        if device is None:
            model.float()  # weights that do not learn are built in bfloat16; an export holds all as they were trained
        elif not adapted:  # adapters are added up in float32
            model.cast_for(device)
        _load_weights(model, trained.state_dict, str(where))
        if adapted:
            held = torch.float32 if device is None else Arithmetic.on(device.type, model.configured_dtype).dtype
            model.paligemma_vlm.merge_adapters(held)
            config = config_from_dict(trained.config, {"model.vlm_config.lora": None})
        return Restored(model, preprocessor, config, metadata)


def _load_weights(model: VLAModel, weights: dict[str, Tensor], where: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        _, _, faults = str(error).partition(":")
        raise CheckpointError(f"{where}: weights and configuration do not fit: {' '.join(faults.split())[:400]}") from error


def fingerprint(place: str | Path) -> str | None:
    """What tells a checkpoint or an export from others: sha256 of the file, or of the one file of a folder that holds those
    of the rest. None for a URL, which is fetched only to be read."""
    if is_url(str(place)):
        return None
    here = Path(local_copy(place)).resolve()
    if here.is_dir():
        return sha256(here / (RECORD if is_in_shards(here) else CONFIG))
    beside = here.with_name(f"{here.name}{DIGEST}")
    words = beside.read_text(encoding="ascii").split() if beside.is_file() else []
    return words[0] if len(words) == 2 else sha256(here)  # more of them: a kill came in the middle of a save


@contextmanager
def describing(place: str | Path) -> Iterator[None]:
    """What is read inside comes out of files that anybody may have edited: whatever is wrong is a `CheckpointError`.

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
        raise CheckpointError(f"{place}: does not describe a policy ({reason}); {AGAIN}") from error


def _read_folder(folder: Path) -> Trained:
    raw = read_config(folder)
    with describing(folder):
        shards = _check_files(folder, raw["files"])
        return Trained(
            config=raw["configuration"],
            preprocessor=_preprocessor(folder, raw["preprocessor"]),
            backbone=raw["backbone"],
            metadata=json.dumps(raw["metadata"]),
            versions=dict(raw["versions"]),
            training={name: raw["training"][name] for name in ("step", "epoch", "averaged_weights", "best_metric")},
            state_dict={name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()},
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported folder; raises `CheckpointError` when that is not what the folder is."""
    path = folder / CONFIG
    raw = _read_json(path)
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path}: got a model of type {raw.get('model_type')!r}, expected '{MODEL_TYPE}': a folder that `paligemma-vla "
            f"export` wrote; to train from a backbone name it in model.vlm_config.model_name_or_path"
        )
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{path}: got format {raw.get('format')!r}, expected {FORMAT}; update paligemma-vla, or {AGAIN}")
    return raw


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: not there; a folder that `paligemma-vla export` wrote has one (a run keeps its checkpoints as "
            f"checkpoints/*.pth.tar)"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise CheckpointError(f"{path}: cannot be read as JSON ({first_line(error)}); {AGAIN}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: got {type(raw).__name__}, expected a JSON object; {AGAIN}")
    return raw


def _check_files(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """Hold what will be read against its sha256; returns the names of the files with weights.

    A flipped byte in a weight would move a robot otherwise than it learned.
    """
    shards = sorted(name for name in expected if name.endswith(".safetensors"))
    for name in (RUN_STATISTICS, TOKENIZER, PROCESSOR, *shards):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: not there; {AGAIN}")
        if sha256(folder / name) != expected[name]:
            raise CheckpointError(f"{folder / name}: damaged or edited: its sha256 differs from {CONFIG}; {AGAIN}")
    return shards


def _preprocessor(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's description of the preprocessing, put together again."""
    pictures = _read_json(folder / PROCESSOR)["image_processor"]
    image = {ours: pictures[theirs] for theirs, ours in PICTURE.items()}
    return {
        **raw,
        "prompts": {**raw["prompts"], "tokenizer_json": (folder / TOKENIZER).read_text(encoding="utf-8")},
        "image": {**raw["image"], **image, "size": pictures["size"]["height"]},
        "statistics": _read_json(folder / RUN_STATISTICS),
    }
