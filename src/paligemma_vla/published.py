"""pi0 and pi0.5 as LeRobot and openpi publish them, to a policy of ours: names of tensors, sizes, preprocessing.

A folder of LeRobot's has config.json, model.safetensors, and the steps before and after the model with their statistics in
files of their own; an export of openpi's its own config.json, and statistics in assets/*/norm_stats.json. Every tensor is
accounted for: what is missing, unexpected or of another shape is refused by name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from paligemma_vla import versions
from paligemma_vla.actions import ABSOLUTE, ActionTransform
from paligemma_vla.config import config_from_dict
from paligemma_vla.errors import CheckpointError, first_line
from paligemma_vla.model.action_head.expert import LONGEST, SHORTEST
from paligemma_vla.normalization import FLOAT32_MAX, DatasetStatistics, Statistics
from paligemma_vla.preprocess import FORMS, ImageSpec, PromptEncoder
from paligemma_vla.schema import DatasetMetadata
from paligemma_vla.storage import read_json

if TYPE_CHECKING:
    from paligemma_vla.policy import Trained

HEADS = {form: head for head, form in FORMS.items()}
# What a variant stands for: width, width of the MLPs, layers, heads, heads of keys and values, numbers in a head.
VARIANTS = {"gemma_2b": (2048, 16384, 18, 8, 1, 256), "gemma_300m": (1024, 4096, 18, 8, 1, 256)}
GEMMA = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
# Of PaliGemma's tokenizer. <image> itself is the first number that their table of tokens has no row for.
BOS, PAD = 2, 0
TOKENIZER, WEIGHTS = "tokenizer.json", "model.safetensors"
NORMALIZATION = {"MEAN_STD": "lerobot_mean_std", "QUANTILES": "lerobot_quantile", "MIN_MAX": "min_max"}
PARTS = {"MEAN_STD": ("mean", "std"), "QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max")}  # of the statistics
STATISTICS = ("min", "max", "mean", "std", "q01", "q99")
STEPS, NORMALIZER = "policy_preprocessor.json", "normalizer_processor"
RELATIVE = "relative_actions_processor"
RELATIVE_KEYS = ("use_relative_actions", "relative_exclude_joints", "action_feature_names")  # in config.json
RESOLUTION = (224, 224)  # of openpi's
FIELDS = (
    *("type", "input_features", "output_features", "paligemma_variant", "action_expert_variant", "dtype", "chunk_size"),
    *("max_state_dim", "max_action_dim", "num_inference_steps", "image_resolution", "normalization_mapping"),
    "tokenizer_max_length",
)
HALF = (0.5, 0.5, 0.5)
AGAIN = "fetch it again"
logger = logging.getLogger(__name__)

# A published name begins with the left, ours with the right; in either direction the first that fits counts.
PREFIXES = (
    ("paligemma_with_expert.paligemma.lm_head.", "paligemma_vlm.backbone.language_model.embed_tokens."),  # they are tied
    ("paligemma_with_expert.paligemma.model.", "paligemma_vlm.backbone."),
    ("paligemma_with_expert.gemma_expert.model.norm.", "action_head.norm_out."),
    ("paligemma_with_expert.gemma_expert.model.layers.", "action_head.layers."),
    ("", "action_head."),
)
TOWERS = (".vision_tower.vision_model.", ".vision_tower.")  # with and without a module around it, by transformers' version
SAVED_BY_LEROBOT = "model."  # before every name
UNUSED = "paligemma_with_expert.gemma_expert.lm_head.weight"  # random, and never read
TABLES = tuple(f"paligemma_with_expert.paligemma.{name}.weight" for name in ("lm_head", "model.language_model.embed_tokens"))


def our_names(published: Iterable[str], ours: Iterable[str], where: str) -> dict[str, str]:
    """For each tensor of a model of ours the name of the published one. Raises `CheckpointError` for what does not fit.

    Of a table that is there twice, that of the embeddings is taken: LeRobot trains it without the other.
    """
    plain = {name.removeprefix(SAVED_BY_LEROBOT): name for name in published}
    if TABLES[1] in plain:
        plain.pop(TABLES[0], None)
    plain.pop(UNUSED, None)
    wanted, found, unexpected = set(ours), {}, []
    for name, saved in plain.items():
        begin, replaced = next(pair for pair in PREFIXES if name.startswith(pair[0]))
        form = replaced + name[len(begin) :]
        fitting = next((one for one in (form, form.replace(*TOWERS)) if one in wanted), None)
        if fitting is None:
            unexpected.append(name)
        else:
            found[fitting] = saved
    faults = {"unexpected": unexpected, "missing": sorted(wanted - found.keys())}
    if any(faults.values()):
        raise CheckpointError(f"{where}: {_listed(faults)}; is it a pi0 or pi0.5, and complete?")
    return found


def published_name(name: str) -> str:
    """The published name of a tensor of ours."""
    theirs, ours = next(pair for pair in PREFIXES if name.startswith(pair[1]))
    published = theirs + name[len(ours) :]
    return published if TOWERS[0] in published else published.replace(TOWERS[1], TOWERS[0])


def _listed(faults: Mapping[str, list[str]]) -> str:
    lists = {kind: (", ".join(names[:3]), len(names)) for kind, names in faults.items() if names}
    return "; ".join(f"{kind} {shown}{f' and {count - 3} more' * (count > 3)}" for kind, (shown, count) in lists.items())


def is_published(folder: Path) -> bool:
    """Whether a folder is one of LeRobot's, of a kind that is known here, or an export of openpi's."""
    try:
        raw = json.loads((folder / "config.json").read_bytes())
        return raw.get("type") in HEADS or _is_openpi(raw)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _is_openpi(raw: Mapping[str, Any]) -> bool:
    return "type" not in raw and {"action_horizon", "action_dim", "action_expert_variant"} <= raw.keys()


def read_published(folder: Path, statistics: bool = True) -> Trained:
    """A folder of LeRobot's as what training left. Raises `CheckpointError`, or what `file_errors` turns into one.

    The tokenizer is PaliGemma's own: tokenizer.json in the folder, or that of the model which the folder names. statistics:
    whether they are needed; a base that was not fine-tuned has none.
    """
    from paligemma_vla.model.vla_model import VLAModel
    from paligemma_vla.policy import Trained

    raw = read_json(folder / "config.json", CheckpointError, AGAIN)
    tensors: Mapping[str, NDArray[Any]] = {}
    steps = _steps(folder)
    if _is_openpi(raw):
        tensors = _assets(folder, statistics)
        raw = _as_lerobot(folder, raw, tensors)
    elif files := [step["state_file"] for step in steps if step.get("registry_name") == NORMALIZER and "state_file" in step]:
        tensors = _numbers(folder / files[0])
    config = configuration(raw)
    actions = _actions(raw, steps)
    backbone = architecture(raw)
    image = ImageSpec(raw["image_resolution"][0], HALF, HALF, resize="pad", resizer="openpi")
    side = raw["image_resolution"][0] // VISION["patch_size"]
    form, longest = raw.get("prompt_form", raw["type"]), raw["tokenizer_max_length"]
    prompts = PromptEncoder(
        _tokenizer(folder, steps), BOS, PAD, backbone["image_token_index"], side**2, longest, "truncate", form
    )
    measured = replace(_statistics(folder, raw, tensors, statistics), actions=actions)
    measured.actions.check(f"{folder}: relative actions", len(measured.state.min), len(measured.action.min))
    config["data"]["state_dim"] = len(measured.state.min)
    if actions.converts:
        numbers = {"dimensions": list(actions.dimensions), "state_dimensions": list(actions.state_dimensions)}
        config["data"]["actions"] = {"representation": actions.representation, **numbers}
    names = DatasetMetadata(cameras=tuple(name.rpartition(".")[2] for name in _cameras(raw)))
    parsed = config_from_dict(config, where=f"{folder}: config")
    with torch.device("meta"):  # for names and shapes
        model = VLAModel(parsed, prompts, image, backbone)
    return Trained(
        config=config,
        preprocessor={
            "prompts": asdict(prompts),
            "image": {**asdict(image), "mean": list(HALF), "std": list(HALF)},
            "statistics": measured.to_dict(),
            "normalization": config["data"]["normalization"],
        },
        backbone=backbone,
        metadata=names.to_json(),
        versions=versions(),
        training={"step": 0, "epoch": 0, "averaged_weights": False, "best_metric": None},
        state_dict=_weights(folder, {name: tuple(value.shape) for name, value in model.state_dict().items()}),
    )


def _check(raw: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for fields that are missing, or of which other values would change what is computed."""
    missing = [name for name in FIELDS if name not in raw]
    if missing:
        raise CheckpointError(f"config.json: got no {', '.join(missing)}, expected the fields of a pi0 or pi0.5; {AGAIN}")
    mappings = {name: raw[name] for name in ("input_features", "output_features", "normalization_mapping")}
    side = raw["image_resolution"]
    for name, fits, expected in (
        *((name, isinstance(value, dict), "an object") for name, value in mappings.items()),
        *((name, raw[name] in VARIANTS, f"one of {', '.join(VARIANTS)}") for name in FIELDS if name.endswith("_variant")),
        ("image_resolution", isinstance(side, list) and len(side) == 2 and side[0] == side[1], "a square"),
        ("min_period", raw.get("min_period", SHORTEST) == SHORTEST, SHORTEST),
        ("max_period", raw.get("max_period", LONGEST) == LONGEST, LONGEST),
    ):
        if not fits:
            raise CheckpointError(f"config.json: {name}: got {raw.get(name)!r}, expected {expected}")
    if (kind := raw["normalization_mapping"].get("VISUAL", "IDENTITY")) != "IDENTITY":
        raise CheckpointError(f"config.json: normalization_mapping.VISUAL: got {kind}, expected IDENTITY")


def configuration(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Our configuration for a config.json of LeRobot's. Raises `CheckpointError` for what is not known here."""
    _check(raw)
    if raw["max_state_dim"] != raw["max_action_dim"]:
        widths = f"{raw['max_state_dim']} and {raw['max_action_dim']}"
        raise CheckpointError(f"config.json: max_state_dim and max_action_dim: got {widths}, expected the same number")
    kinds = {raw["normalization_mapping"][name] for name in ("STATE", "ACTION")}
    if len(kinds) != 1 or not kinds <= NORMALIZATION.keys():
        got, known = ", ".join(sorted(kinds)), ", ".join(NORMALIZATION)
        expected = f"expected one of {known} for both"
        raise CheckpointError(f"config.json: normalization_mapping: got {got} of state and action, {expected}")
    width, hidden, layers, heads, *_ = VARIANTS[raw["action_expert_variant"]]
    return {
        "data": {
            "train_parquet_files": "none",
            "normalization": NORMALIZATION[kinds.pop()],
            "image_resize": "pad",
            "pad_action_dim": True,
            "prompt_max_len": raw["tokenizer_max_length"],
            "prompt_overflow": "truncate",
        },
        "model": {
            "vlm_config": {
                "model_name_or_path": "google/paligemma-3b-pt-224",
                "num_cameras": len(_cameras(raw)),
                "dtype": raw["dtype"],
            },
            "action_head_config": {
                "head": HEADS[raw["type"]],
                "use_state_input": raw["type"] == "pi0",
                "horizon": raw["chunk_size"],
                "per_action_dim": raw["max_action_dim"],
                "embed_dim": width,
                "num_layers": layers,
                "num_heads": heads,
                "mlp_ratio": hidden / width,
                "num_inference_timesteps": raw["num_inference_steps"],
            },
        },
    }


def _actions(raw: Mapping[str, Any], steps: Iterable[Mapping[str, Any]]) -> ActionTransform:
    """What the numbers under `action` are: as recorded, or from the state but for excluded dimensions."""
    step = next((each["config"] for each in steps if each.get("registry_name") == RELATIVE), None)
    if step is None:
        step = dict(zip(("enabled", "exclude_joints", "action_names"), map(raw.get, RELATIVE_KEYS), strict=True))
    converted = are_relative(raw["output_features"]["action"]["shape"][0], step["exclude_joints"], step["action_names"])
    dimensions = tuple(number for number, relative in enumerate(converted) if relative and step["enabled"])
    return ActionTransform("chunk_relative", dimensions, dimensions, horizon=raw["chunk_size"]) if dimensions else ABSOLUTE


def are_relative(size: int, excluded: Sequence[str] | None, names: Sequence[str] | None) -> list[bool]:
    """Which of `size` dimensions LeRobot converts: not those in whose names there is an excluded one."""
    known = [name.lower() for name in (names or ())[:size]]
    words = [word.lower() for word in excluded or () if word]
    return [not any(word in name for word in words) for name in known] + [True] * (size - len(known))


def architecture(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone of a config.json of LeRobot's: PaliGemma 3B without the tokens of places and regions in its table."""
    from transformers import GemmaConfig

    from paligemma_vla.model.architectures import IMAGE_TOKEN, paligemma_config

    sizes: dict[str, Any] = dict(zip(GEMMA, VARIANTS[raw["paligemma_variant"]], strict=True))
    text = GemmaConfig(**sizes, vocab_size=IMAGE_TOKEN)
    return dict(paligemma_config(text, IMAGE_TOKEN, image_size=raw["image_resolution"][0], **VISION).to_dict())


def _cameras(raw: Mapping[str, Any]) -> list[str]:
    """Features of cameras, in their order; those that are declared to be empty change no answer."""
    kinds = {name: feature["type"] for name, feature in raw["input_features"].items()}
    return [name for name, kind in kinds.items() if kind == "VISUAL" and ".empty_camera_" not in name]


def _steps(folder: Path) -> list[dict[str, Any]]:
    """The steps before the model; none where the folder has no file of them, as openpi's export."""
    if not (folder / STEPS).is_file():
        return []
    return list(read_json(folder / STEPS, CheckpointError, AGAIN)["steps"])


def _tokenizer(folder: Path, steps: Iterable[Mapping[str, Any]]) -> str:
    from huggingface_hub import hf_hub_download

    if (folder / TOKENIZER).is_file():
        return (folder / TOKENIZER).read_text(encoding="utf-8")
    named = (step["config"].get("tokenizer_name") for step in steps)
    name = next((one for one in named if one), "google/paligemma-3b-pt-224")
    try:
        path = Path(name) / TOKENIZER if Path(name).is_dir() else Path(hf_hub_download(name, TOKENIZER))
        return path.read_text(encoding="utf-8")
    except Exception as error:  # of any kind: network, licence, a name that cannot be one
        raise CheckpointError(
            f"{folder}: its tokenizer, that of {name}, cannot be had ({first_line(error)}); accept the licence and log in "
            f"(`hf auth login`), or copy that model's {TOKENIZER} into the folder"
        ) from error


def _assets(folder: Path, needed: bool) -> dict[str, NDArray[Any]]:
    """openpi's statistics under LeRobot's names."""
    files = sorted((folder / "assets").rglob("norm_stats.json"))
    if len(files) > 1 and needed:
        robots = ", ".join(str(file.parent.relative_to(folder)) for file in files[:5])
        raise CheckpointError(f"{folder}: got statistics of {robots}, expected those of one robot; delete the others")
    if len(files) != 1:
        return {}
    known = read_json(files[0], CheckpointError, AGAIN)["norm_stats"]
    names = {"state": "observation.state", "actions": "action"}
    return {
        f"{theirs}.{part}": np.array(values, np.float32)
        for name, theirs in names.items()
        for part, values in known[name].items()
        if values is not None
    }


def _as_lerobot(folder: Path, raw: Mapping[str, Any], statistics: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """openpi's config.json as LeRobot would have it. The kind follows from the names of the tensors."""
    with safe_open(folder / WEIGHTS, "np") as file:
        kind = "pi05" if "time_mlp_in.weight" in file.keys() else "pi0"  # noqa: SIM118 - it is no dictionary
    reads_state = kind == "pi05" and raw.get("discrete_state_input", True)
    unsaid = {"use_relative_actions": False, **({"discrete_state_input": True} if kind == "pi05" else {})}
    if assumed := {key: value for key, value in unsaid.items() if key not in raw}:
        listed = json.dumps(assumed)
        logger.warning("%s: an export of openpi does not say how it was trained; assumed: %s; add what holds", folder, listed)
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    width, mode = raw["action_dim"], "QUANTILES" if kind == "pi05" else "MEAN_STD"
    sizes = {name: len(statistics.get(f"{name}.mean", np.zeros(width))) for name in ("observation.state", "action")}
    inputs: dict[str, Any] = {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, *RESOLUTION]} for name in cameras}
    return {
        "type": kind,
        "input_features": {**inputs, "observation.state": {"type": "STATE", "shape": [sizes["observation.state"]]}},
        "output_features": {"action": {"type": "ACTION", "shape": [sizes["action"]]}},
        "paligemma_variant": raw["paligemma_variant"],
        "action_expert_variant": raw["action_expert_variant"],
        "dtype": raw["precision"],
        "chunk_size": raw["action_horizon"],
        "max_state_dim": width,
        "max_action_dim": width,
        "num_inference_steps": 10,
        "image_resolution": list(RESOLUTION),
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        "tokenizer_max_length": {"pi0": 48, "pi05": 200}[kind],
        "prompt_form": "pi05" if reads_state else "openpi",
        **{key: raw.get(key) for key in RELATIVE_KEYS},
    }


def _numbers(path: Path) -> dict[str, NDArray[Any]]:
    return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}


def _statistics(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], needed: bool) -> DatasetStatistics:
    """Of state and action. What was not published limits nothing."""
    measured = []
    for kind, name in (("STATE", "observation.state"), ("ACTION", "action")):
        features = raw["input_features"] if kind == "STATE" else raw["output_features"]
        given = {
            part: tensors[f"{name}.{part}"].astype(np.float64).reshape(-1) for part in STATISTICS if f"{name}.{part}" in tensors
        }
        missing = [part for part in PARTS[raw["normalization_mapping"][kind]] if part not in given]
        if missing and needed:
            raise CheckpointError(
                f"{folder}: got no {', '.join(missing)} of {name}, expected statistics of the data it was trained with; a "
                f"base is trained first: --init_from, with training.init_statistics: own"
            )
        measured.append(_complete(given, features[name]["shape"][0]))
    return DatasetStatistics(state=measured[0], action=measured[1])


def _complete(given: Mapping[str, NDArray[np.float64]], size: int) -> Statistics:
    """With the widest numbers that do not contradict those that are given."""
    low, high = given.get("min", np.full(size, -FLOAT32_MAX)), given.get("max", np.full(size, FLOAT32_MAX))
    rest = {"q01": low, "q99": high, "mean": np.clip(0.0, low, high), "std": np.ones(size)}
    return Statistics(min=low, max=high, **{part: given.get(part, values) for part, values in rest.items()}, count=1)


def _weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors under our names, of the shapes of our model. Raises `CheckpointError` with every fault by name."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: got no {WEIGHTS}, expected the weights there; {AGAIN}")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    names = our_names(tensors, shapes, str(folder))
    wrong = [
        f"{saved}: got {tuple(tensors[saved].shape)}, expected {shapes[ours]}"
        for ours, saved in names.items()
        if tuple(tensors[saved].shape) != shapes[ours]
    ]
    if wrong:
        raise CheckpointError(
            f"{folder}: tensors of another shape: {'; '.join(wrong[:3])}; is it the model of its config.json?"
        )
    return {ours: tensors[saved] for ours, saved in names.items()}
