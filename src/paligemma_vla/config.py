"""The configuration: YAML in, one typed, frozen, strict object out.

Every fault is reported at once, each with its dotted path and the nearest known name. What a run resolved to is written back
by `to_yaml`, complete, into the run's folder and into every checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Hashable, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator, model_validator

from paligemma_vla.errors import ConfigError, closest, first_line
from paligemma_vla.schema import ROTATIONS
from paligemma_vla.storage import is_url, read_file, working_copy

PALIGEMMA = "paligemma_vla.model.paligemma_vlm:PaliGemmaVLM"
FLOW_HEAD = "paligemma_vla.model.action_head.flow_matching:FlowmatchingActionHead"
LARGEST_FILE, MOST_VALUES = 2**20, 100_000
MOST_ACTION_TOKENS = 8192
LINEAR_LAYERS = r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2)"

# No count of this project can mean more, and numbers beyond overflow in the libraries below.
RUN_CONFIG, RUN_STATISTICS, RUN_ENVIRONMENT = "config.yaml", "normalization_stats.json", "environment.json"

Positive = Annotated[int, Field(gt=0, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(min_length=1)]
ClassPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversion between types, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _without_nul(cls, value: Any) -> Any:
        """No file system, and no C string, can hold a NUL character."""
        if any(isinstance(text, str) and "\0" in text for text in (value if isinstance(value, tuple) else (value,))):
            raise ValueError("text without NUL characters")
        return value


class DataSource(Section):
    path: PathText = Field(description="File, folder or glob of Parquet files.")
    weight: float = Field(1.0, gt=0, le=1e6, description="Share of the samples drawn from here, relative to the other sources.")


ParquetFiles = PathText | Annotated[tuple[PathText | DataSource, ...], Field(strict=False, min_length=1)]


def source_paths(files: str | Sequence[str | DataSource]) -> list[str]:
    """Paths of a `train_parquet_files` entry, without weights."""
    if isinstance(files, str):
        return [files]
    return [entry.path if isinstance(entry, DataSource) else entry for entry in files]


class AugmentationConfig(Section):
    enabled: bool = Field(True, description="Random crop/shift and colour in training; evaluation never augments.")
    crop_scale: float = Field(0.95, gt=0.1, le=1, description="Side of the random crop, as a share of the image side.")
    brightness: Fraction = Field(0.2, description="Largest relative change of brightness.")
    contrast: Fraction = Field(0.2, description="Largest relative change of contrast.")
    saturation: Fraction = Field(0.2, description="Largest relative change of saturation.")


def _dimension(value: Any) -> int | str:
    if (type(value) is int and 0 <= value < 4096) or (isinstance(value, str) and value):
        return value
    raise ValueError("a dimension: its number (0 is the first), or its name in the data")


Dimension = Annotated[int | str, PlainValidator(_dimension, json_schema_input_type=int | str)]
Dimensions = Annotated[tuple[Dimension, ...], Field(strict=False, min_length=1)]


class RotationConfig(Section):
    representation: Literal["euler_xyz", "rotvec", "quaternion_xyzw", "quaternion_wxyz", "rotation_6d"] = Field(
        description="How actions (and the state) write a rotation; euler_xyz: radians about the fixed axes x, y, z in turn."
    )
    dimensions: Dimensions = Field(description="Of an action, those that hold it; of several rotations one after the other.")


class ActionsConfig(Section):
    representation: Literal["absolute", "chunk_relative", "delta"] = Field(
        "absolute",
        description="What the model predicts: actions as recorded, from the state at the chunk's start, or each from the last.",
    )
    dimensions: Dimensions | None = Field(
        None, description="Of an action, those that are converted (numbers or names); null: all not named after a gripper."
    )
    state_dimensions: Dimensions | None = Field(
        None, description="Of the state, what each of these starts from; null: the same name, else the same number."
    )
    rotation: RotationConfig | None = Field(None, description="The rotation in the actions: composed, never subtracted.")


class DataConfig(Section):
    train_parquet_files: ParquetFiles = Field(description="File, folder, glob, URL of these, list, or [{path, weight}].")
    val_parquet_files: ParquetFiles | None = Field(None, description="Validation episodes; null: split off val_fraction.")
    val_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share of episodes held out when val_parquet_files is null; 0: no validation."
    )
    exclude_episodes: PathText | None = Field(
        None, description="Episodes to leave out: list written by `paligemma-vla data check`."
    )
    normalization_stats_path: PathText = Field("normalization_stats.json", description="Written by `paligemma-vla stats`.")
    normalization: Literal["min_max", "quantile", "mean_std"] = Field("min_max", description="Kind of normalisation.")
    allow_other_statistics: bool = Field(
        False,
        description="Accept statistics whose range the training data leaves: those of another data set, on purpose.",
    )
    state_dim: Positive = Field(7, le=4096, description="Numbers in the state column.")
    max_seq_len: Positive = Field(
        1, le=4096, description="Frames in a window that ends at the current step; the model sees its last."
    )
    prompt_max_len: Positive = Field(64, le=4096, description="Longest instruction in tokens, `<bos>` and newline included.")
    prompt_overflow: Literal["error", "truncate"] = Field("error", description="What to do with a longer instruction.")
    image_resize: Literal["stretch", "pad"] = Field("stretch", description="stretch as PaliGemma does, or pad to a square.")
    pad_action_dim: bool = Field(
        False, description="Accept data with fewer action numbers than per_action_dim: padded, and left out of the loss."
    )
    actions: ActionsConfig = Field(default_factory=ActionsConfig)
    batch_size: Positive = Field(32, description="Samples per optimiser step, over all processes and accumulation.")
    num_workers: NonNegative = Field(2, le=256, description="Loader processes per training process; 0: load in place.")
    prefetch_factor: Positive = Field(2, le=1024, description="Batches each worker prepares ahead.")
    pin_memory: bool = Field(True, description="Page-locked batches (used with a GPU only).")
    cache_mb: NonNegative = Field(
        256, description="Still-compressed row groups kept in memory in random reading, per loader process, MB."
    )
    reading: Literal["random", "streamed"] | None = Field(
        None,
        description="How training data is read: row by row in random order, or block by block in a shuffled stream; null: "
        "streamed when a training source is a URL.",
    )
    stream_block_mb: float = Field(
        1.0, gt=0, le=4096, description="About what one request reads when data is streamed: whole episodes, MB."
    )
    stream_window: Positive = Field(4, le=4096, description="Blocks that each slot of the batch mixes when data is streamed.")
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)

    @property
    def streamed(self) -> bool:
        """Whether training data is read block by block."""
        if self.reading is None:
            return any(map(is_url, source_paths(self.train_parquet_files)))
        return self.reading == "streamed"


class LoRAConfig(Section):
    """Low-rank adapters (Hu et al. 2021) on linear layers of the backbone, whose own weights are frozen then."""

    rank: Positive = Field(16, le=4096, description="Inner width of an adapter.")
    alpha: float = Field(32.0, gt=0, le=1e6, description="Adapters are scaled by alpha / rank.")
    target_modules: str = Field(
        LINEAR_LAYERS,
        min_length=1,
        max_length=10_000,
        description="Regular expression that the whole name of a linear layer matches; those of frozen towers are left out.",
    )

    @field_validator("target_modules")
    @classmethod
    def _is_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"a regular expression ({error})") from error
        return value


class VLMConfig(Section):
    backbone: ClassPath = Field(PALIGEMMA, description="`package.module:Class`: images + prompts -> (B, T, E).")
    model_name_or_path: PathText = Field(description="Hub id (google/paligemma-3b-pt-224) or a local folder.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    use_aux_camera: bool = Field(False, description="Use image_2 as well.")
    num_cameras: Positive | None = Field(None, le=16, description="More cameras than two; null: 2 with use_aux_camera, else 1.")
    freeze_vision_tower: bool = Field(False, description="SigLIP and its projector keep their weights.")
    freeze_language_model: bool = Field(False, description="Gemma keeps its weights.")
    lora: LoRAConfig | None = Field(None, description="Train adapters instead of the backbone's weights; null: the weights.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="Compute type, in which frozen weights are held too; those that learn are kept in float32. bfloat16 on a "
        "CPU without AVX-512 BF16 computes in float32.",
    )
    attn_implementation: Literal["eager", "sdpa"] | None = Field(None, description="null: transformers' own choice.")
    activation_checkpointing: bool | Literal["selective"] = Field(
        False,
        description="Recompute activations in backward: less memory, ~30 % slower; selective: keep those of matrix products.",
    )

    @property
    def cameras(self) -> int:
        """Number of cameras the model looks at."""
        return self.num_cameras if self.num_cameras is not None else 1 + self.use_aux_camera


class ActionHeadConfig(Section):
    head: ClassPath = Field(FLOW_HEAD, description="`package.module:Class` with `loss` and `get_action`.")
    use_state_input: bool = Field(True, description="Give the head the robot's state.")
    horizon: Positive = Field(8, le=1024, description="Actions in a chunk (K).")
    per_action_dim: Positive = Field(7, le=4096, description="Numbers in one action (A).")
    action_dim: int | None = Field(None, gt=0, description="horizon * per_action_dim; may be left out.")
    embed_dim: Positive = Field(1024, le=65_536, description="Width of the head; need not equal the backbone's.")
    num_layers: Positive = Field(8, le=1000, description="Transformer blocks.")
    num_heads: Positive = Field(8, le=1024, description="Attention heads; must divide embed_dim.")
    mlp_ratio: float = Field(4.0, gt=0, le=64, description="Hidden width of a block's MLP, relative to embed_dim.")
    num_inference_timesteps: Positive = Field(50, le=1000, description="Euler steps when sampling.")
    num_flow_samples: Positive = Field(1, le=256, description="(t, noise) draws per context in training (M).")
    detach_context: bool = Field(False, description="Stop the head's gradient at the backbone.")

    @model_validator(mode="before")
    @classmethod
    def _fill_action_dim(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("action_dim") is None:
            product = raw.get("horizon", 8), raw.get("per_action_dim", 7)
            if all(type(v) is int and v > 0 for v in product):
                raw = {**raw, "action_dim": product[0] * product[1]}
        return raw


class ModelConfig(Section):
    vlm_config: VLMConfig
    action_head_config: ActionHeadConfig = Field(default_factory=ActionHeadConfig)


class StageConfig(Section):
    train: Literal["head", "all"] = Field(description="head: the backbone is frozen; all: everything not frozen in vlm_config.")
    steps: Positive | None = Field(None, description="Optimiser steps of this stage; null (last stage only): to the end.")


class TrainingConfig(Section):
    epochs: Positive = Field(10, description="Passes over the training samples.")
    max_steps: Positive | None = Field(None, description="End after this many optimiser steps, schedule included.")
    seed: int = Field(
        0, ge=0, lt=2**63, description="Order, augmentation, flow time and noise are functions of it and the position."
    )
    grad_clip_norm: float = Field(1.0, gt=0, le=1e30, description="Largest gradient norm.")
    gradient_accumulation_steps: Positive = Field(1, description="Split each batch into this many forward/backward passes.")
    parallel: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp",
        description="How processes hold the model: each all of it (ddp), in shards (fsdp), or in shards within groups.",
    )
    shard_processes: Positive | None = Field(
        None, description="hsdp: processes of a group that shares one copy; null: those of one machine."
    )
    cpu_offload: bool = Field(
        False, description="fsdp, hsdp: weights, gradients and optimiser in the machine's memory; slow, fits far more."
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="Moving average of the weights, used by validation and Policy; 0: off."
    )
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = Field((), description="E.g. head first, then all.")
    log_interval: Positive = Field(10, description="Optimiser steps between log lines.")
    validate_every_n_steps: Positive | None = Field(None, description="null: at the end of each epoch.")
    val_max_samples: Positive = Field(2048, description="Validation samples for the loss, spread over the set.")
    val_action_samples: NonNegative = Field(256, description="Validation samples whose actions are sampled and compared.")
    best_metric: Literal["val/epoch_loss", "val/action_mae"] = Field("val/epoch_loss", description="What best means (lower).")
    save_every_n_epochs: Positive = Field(1, description="Epochs between numbered checkpoints.")
    save_every_n_steps: Positive | None = Field(None, description="Also save in mid-epoch, every so many optimiser steps.")
    keep_last: Positive | None = Field(
        None, description="Checkpoints to keep besides best; null: all of whole epochs, and of the others the last."
    )
    checkpoint_format: Literal["file", "sharded"] | None = Field(
        None,
        description="file: one .pth.tar; sharded: a folder to which every process writes while training goes on; null: sharded "
        "with fsdp and hsdp, unless checkpoint_dir is a URL.",
    )
    stop_when_save_fails: bool = Field(False, description="On a full disk: stop; false: say so, keep the old ones, go on.")
    max_skipped_steps: Positive = Field(
        10, description="Steps in a row with NaN or infinity in loss or gradient; each is skipped, then the run stops."
    )
    checkpoint_dir: PathText = Field("experiments", description="Folder that holds the runs, or its URL (s3://, gs://, ...).")
    experiment_name: str = Field(
        "default", pattern=r"^[\w.\-]*[\w\-][\w.\-]*$", max_length=128, description="Folder of this run."
    )
    stop_after_epoch: Positive | None = Field(None, description="End early, saved, as an interrupted run would be.")
    stop_after_step: Positive | None = Field(None, description="End early, saved, as an interrupted run would be.")
    tensorboard: bool = Field(False, description="Also write TensorBoard events into the run's folder.")

    def processes_per_copy(self, processes: int, on_machine: int) -> int:
        """How many of all processes hold one model together. on_machine: those of one machine."""
        return {"ddp": 1, "fsdp": processes, "hsdp": self.shard_processes or on_machine}[self.parallel]

    @property
    def saves_shards(self) -> bool:
        """Whether checkpoints are folders to which every process writes its part."""
        if self.checkpoint_format is None:
            return self.parallel != "ddp" and not is_url(self.checkpoint_dir)
        return self.checkpoint_format == "sharded"


class OptimizerConfig(Section):
    type: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit keeps the moments in 8 bits (torchao): 2 bytes per weight instead of 8."
    )
    lr: float = Field(1e-4, gt=0, le=1e30, description="Rate of the action head.")
    vlm_lr: float | None = Field(None, gt=0, le=1e30, description="Rate of the backbone; null: the same.")
    weight_decay: float = Field(0.01, ge=0, le=1e6, description="On matrices; never on norms, biases and embeddings.")
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0, le=1)


class SchedulerConfig(Section):
    type: Literal["cosine", "constant"] = "cosine"
    T_max: float | None = Field(None, gt=0, le=1e9, description="Length of the cosine in epochs; null: the whole run.")
    warmup_steps: NonNegative = Field(0, description="Optimiser steps of linear warm-up.")
    min_lr_ratio: Fraction = Field(0.0, description="Rate at the end of the cosine, relative to lr.")


class WandbConfig(Section):
    enabled: bool = Field(False, description="Also set by --use_wandb.")
    project: str = "VLA_Project_DDP"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class VLAConfig(Section):
    """The whole configuration; sections as in the specification."""

    data: DataConfig
    model: ModelConfig
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    lr_scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)

    def to_yaml(self) -> str:
        """The complete configuration; `load_config` reads it back to an equal object."""
        return str(yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120))

    @property
    def run_dir(self) -> Path:
        """The run's folder on this machine: of a run on a URL its working copy."""
        folder = self.training.checkpoint_dir
        return (working_copy(folder) if is_url(folder) else Path(folder)) / self.training.experiment_name

    def run_place(self, name: str) -> str:
        """Path, or URL, of something in the run's folder, as a user would name it."""
        return f"{self.run_url}/{name}" if self.run_url is not None else str(self.run_dir / name)

    @property
    def run_url(self) -> str | None:
        """Where the run's folder is published, when `checkpoint_dir` is a URL."""
        folder = self.training.checkpoint_dir
        return f"{folder.rstrip('/')}/{self.training.experiment_name}" if is_url(folder) else None


class InvalidConfig(ConfigError):
    """A configuration with faults. usable: what the right keys make, where enough of them are right. wrong: the others."""

    def __init__(self, where: str, faults: Sequence[str], usable: VLAConfig | None, wrong: Set[str]) -> None:
        self.where, self.faults, self.usable, self.wrong = where, list(faults), usable, wrong
        count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        super().__init__("\n  ".join([f"{where}: {count} in the configuration", *faults]))


def own_statistics(config_path: str | Path) -> str | None:
    """The statistics beside a configuration that lies in a run's folder: that folder may have moved since it named them."""
    path = Path(config_path)
    statistics = path.with_name(RUN_STATISTICS)
    is_run = path.name == RUN_CONFIG and path.with_name(RUN_ENVIRONMENT).is_file() and statistics.is_file()
    return str(statistics) if is_run else None


def json_schema() -> str:
    """JSON schema of the configuration, for completion and checking in editors (configs/vla_config.schema.json)."""
    return json.dumps(VLAConfig.model_json_schema(), indent=2) + "\n"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.2) and refuses a key given twice, and aliases that grow without end."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _unfolded(node, {})
        return node


def _unfolded(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Number of values under a node with every alias written out: nine lines of aliases can stand for a billion.

    sizes: what is known already, by the node's id; infinity while a node is being counted, so one within itself is found.
    """
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        parts: list[Any] = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        sizes[id(node)] = 1 + sum(_unfolded(part, sizes) for part in parts)
    if sizes[id(node)] > MOST_VALUES:
        problem = f"more than {MOST_VALUES} values, with every alias written out,"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return sizes[id(node)]


class _Dumper(yaml.SafeDumper):
    """SafeDumper that knows the same numbers, so that a string which looks like one is quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),  # one way to match: a million digits take no time
        list("-+0123456789."),
    )


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    given = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor` gives defaults, which keys beside it may replace
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, Hashable):
            if key in given:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            given.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML; a fault raises `ConfigError` with file, line and column."""
    if len(text) > LARGEST_FILE:
        raise ConfigError(
            f"{where}: got more than {LARGEST_FILE // 2**20} MB, expected a configuration; name folders or globs of data "
            f"instead of single files"
        )
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except RecursionError as error:
        raise ConfigError(f"{where}: not valid YAML: brackets or indentations nested too deeply") from error
    except Exception as error:  # of any kind: PyYAML raises KeyError for `!!bool x`, AttributeError for `!!timestamp x`, ...
        raise ConfigError(f"{where}: not valid YAML: {_kind(error)}{' '.join(str(error).split())}") from error


def _kind(error: Exception) -> str:
    """What to say before an error's text where the text alone ('x', for a KeyError) says nothing."""
    return "" if isinstance(error, (yaml.YAMLError, TypeError, ValueError)) else "a value that its tag cannot take: "


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn `["a.b=1", "c=x"]` (the --set flag) into {"a.b": 1, "c": "x"}; values are YAML."""
    overrides = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment}: expected dotted.key=value, e.g. --set optimizer.lr=3e-4")
        overrides[key.strip()] = parse_yaml(value, f"--set {assignment}")
    return overrides


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> VLAConfig:
    """Read and check a configuration file (a path or URL).

    overrides: {dotted key: value}, applied before checking (command-line flags).
    Raises `ConfigError` with every fault at once.
    """
    try:
        text = read_file(path, LARGEST_FILE + 1).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot read the configuration ({first_line(error)}); run from the project's folder, or name it with "
            f"--config_path"
        ) from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: got {type(raw).__name__}, expected a mapping with the sections data, model, training, ...")
    return config_from_dict(raw, overrides, where=str(path))


def config_from_dict(raw: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, where: str = "config") -> VLAConfig:
    """Check a configuration given as nested dictionaries; see `load_config`."""
    merged: dict[str, Any] = _copy(raw)
    for dotted, value in (overrides or {}).items():
        *parents, leaf = dotted.split(".")
        section = merged
        for name in parents:
            child = section.get(name)
            section[name] = child if isinstance(child, dict) else {}
            section = section[name]
        section[leaf] = value
    usable: VLAConfig | None
    wrong: set[str] = set()
    try:
        usable = VLAConfig.model_validate(merged)
        faults = []
    except ValidationError as error:
        faults = _describe(error)
        usable, wrong = _mended(merged, error)
    if usable is not None:
        faults += _contradictions(usable, wrong)
        if not faults:
            return usable
    raise InvalidConfig(where, faults, usable, wrong)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return value


def _describe(error: ValidationError) -> list[str]:
    faults: dict[str, str] = {}
    for item in error.errors():
        path = _dotted(item["loc"])
        name = str(item["loc"][-1])
        if item["type"] == "extra_forbidden":
            faults[path] = f"{path}: unknown key{closest(name, _known_keys(item['loc'][:-1]))}"
        elif item["type"] == "missing":
            faults[path] = f"{path}: missing; it has no default"
        else:
            text = f"got {_quoted(item['input'])}, expected: {_lower(item['msg'])}"
            faults.setdefault(path, f"{path}: {text}")
    # A union (str or list of str or ...) is reported once per member: the fault furthest inside is the one that helps.
    unions = ("data.train_parquet_files", "data.val_parquet_files")
    return [
        text
        for path, text in faults.items()
        if not (path.startswith(unions) and any(other.startswith(f"{path}.") for other in faults))
    ]


def _quoted(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) < 80 else text[:77] + "..."


def _dotted(location: tuple[int | str, ...]) -> str:
    """Dotted path of a fault, without the names that pydantic gives to the members of a union."""
    members = ("str", "constrained-str", "DataSource")
    location = tuple(part if str(part).isprintable() else repr(part) for part in location)
    inner = [part for part in location[:-1] if part not in members and not str(part).startswith(("tuple[", "function-"))]
    last = location[-1]
    union_member = last in members and "parquet_files" in ".".join(map(str, inner))
    return ".".join(map(str, inner if union_member or str(last).startswith("tuple[") else [*inner, last]))


def _mended(raw: dict[str, Any], error: ValidationError) -> tuple[VLAConfig | None, set[str]]:
    """A configuration of the keys that are right, None where too few are, and the keys that are wrong: so that what the
    right ones contradict can be told together with the wrong ones."""
    mended = _copy(raw)
    wrong: set[str] = set()
    for item in error.errors():
        section: Any = mended
        *parents, leaf = item["loc"]
        for number, part in enumerate(parents):
            if not isinstance(section.get(part), dict):
                leaf, parents = part, parents[:number]  # a fault inside a list, or below something that is no section
                break
            section = section[part]
        wrong.add(".".join(map(str, [*parents, leaf])))
        section.pop(leaf, None)
        if leaf in ("train_parquet_files", "model_name_or_path"):
            section[leaf] = "-"
    with contextlib.suppress(ValidationError):
        return VLAConfig.model_validate({"data": {"train_parquet_files": "-"}, **mended}), wrong
    mended["model"] = {**mended.get("model", {}), "vlm_config": {"model_name_or_path": "-"}}
    wrong.add("model.vlm_config")
    with contextlib.suppress(ValidationError):
        return VLAConfig.model_validate({"data": {"train_parquet_files": "-"}, **mended}), wrong
    return None, wrong


def _lower(message: str) -> str:
    message = re.sub(r"^(Value error, |Input should be )", "", message)
    return message[:1].lower() + message[1:]


def _known_keys(parents: tuple[int | str, ...]) -> list[str]:
    """Names known under a path, by walking the section classes."""
    model: Any = VLAConfig
    for name in parents:
        if isinstance(name, int):
            model = StageConfig
        elif name == "DataSource":
            model = DataSource
        elif isinstance(model, type) and issubclass(model, BaseModel) and name in model.model_fields:
            model = model.model_fields[name].annotation
            model = next((part for part in get_args(model) if isinstance(part, type)), model)  # of `Section | None`
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _contradictions(config: VLAConfig, wrong: Set[str] = frozenset()) -> list[str]:
    """Faults that no single key shows. Those that rest on a key (or section) in `wrong` are left out."""
    head, data, training = config.model.action_head_config, config.data, config.training
    vlm = config.model.vlm_config
    product = head.horizon * head.per_action_dim
    last = len(training.stages) - 1
    open_stages = [n for n, stage in enumerate(training.stages) if (stage.steps is None) != (n == last)]
    whole_backbone_frozen = vlm.freeze_vision_tower and vlm.freeze_language_model
    head_path, vlm_path = "model.action_head_config", "model.vlm_config"
    checks = [
        (
            head.action_dim != product,
            [f"{head_path}.{name}" for name in ("action_dim", "horizon", "per_action_dim")],
            f"got {head.action_dim}, expected horizon * per_action_dim = {head.horizon} * {head.per_action_dim} = {product}; "
            f"delete it, or fix horizon",
        ),
        (
            head.embed_dim % (2 * head.num_heads) != 0,
            [f"{head_path}.num_heads", f"{head_path}.embed_dim"],
            f"got {head.num_heads}, expected embed_dim ({head.embed_dim}) to be a multiple of 2 * num_heads",
        ),
        (
            head.num_flow_samples * head.horizon > MOST_ACTION_TOKENS,
            [f"{head_path}.num_flow_samples", f"{head_path}.horizon"],
            f"got {head.num_flow_samples}, expected num_flow_samples * horizon ({head.horizon}) of at most "
            f"{MOST_ACTION_TOKENS}: so many action tokens per sample pass through the head",
        ),
        (
            int(head.mlp_ratio * head.embed_dim) < 1,
            [f"{head_path}.mlp_ratio", f"{head_path}.embed_dim"],
            f"got {head.mlp_ratio}, expected at least one hidden unit: mlp_ratio * embed_dim ({head.embed_dim}) of at least 1",
        ),
        (
            vlm.num_cameras == 1 and vlm.use_aux_camera,
            [f"{vlm_path}.num_cameras", f"{vlm_path}.use_aux_camera"],
            "got 1 with use_aux_camera: true; delete one of the two",
        ),
        (
            data.batch_size % training.gradient_accumulation_steps != 0,
            ["training.gradient_accumulation_steps", "data.batch_size"],
            f"got {training.gradient_accumulation_steps}, expected a divisor of data.batch_size ({data.batch_size})",
        ),
        (
            bool(open_stages),
            [f"training.stages.{next(iter(open_stages), 0)}.steps"],
            "every stage but the last gives its steps, the last gives none",
        ),
        (
            training.best_metric == "val/action_mae" and training.val_action_samples == 0,
            ["training.best_metric", "training.val_action_samples"],
            "got val/action_mae with val_action_samples 0, which measures none; raise it, or take val/epoch_loss",
        ),
        (
            re.fullmatch(r"(\w*:)?/*|~.*|\w+:/(?!/).*", training.checkpoint_dir) is not None,
            ["training.checkpoint_dir"],
            f"got '{training.checkpoint_dir}', expected a folder, or a URL with a place in it; `~` is not expanded",
        ),
        (
            whole_backbone_frozen and vlm.lora is not None,
            [f"{vlm_path}.lora", f"{vlm_path}.freeze_vision_tower", f"{vlm_path}.freeze_language_model"],
            "frozen towers get no adapters, and both are frozen; delete lora, or unfreeze one",
        ),
        (
            whole_backbone_frozen and any(stage.train == "all" for stage in training.stages),
            ["training.stages", vlm_path],
            "the whole backbone is frozen in model.vlm_config, so no stage can train all",
        ),
        (
            training.parallel == "ddp" and training.cpu_offload,
            ["training.cpu_offload", "training.parallel"],
            "got true with parallel: ddp, which keeps the whole model on each GPU; take fsdp or hsdp",
        ),
        (
            training.parallel != "hsdp" and training.shard_processes is not None,
            ["training.shard_processes", "training.parallel"],
            f"got {training.shard_processes} with parallel: {training.parallel}; delete it, or take hsdp",
        ),
        (
            training.parallel != "ddp" and config.optimizer.type == "adamw_8bit",
            ["optimizer.type", "training.parallel"],
            f"got adamw_8bit with parallel: {training.parallel}; take adamw, whose moments are in shards then, or ddp",
        ),
        (
            training.checkpoint_format == "sharded" and is_url(training.checkpoint_dir),
            ["training.checkpoint_format", "training.checkpoint_dir"],
            "got sharded with a URL as checkpoint_dir; take file, or a folder that all machines share",
        ),
        *_action_checks(data.actions),
    ]
    return [
        f"{keys[0]}: {text}"
        for broken, keys, text in checks
        if broken and not any(key == bad or key.startswith(f"{bad}.") for key in keys for bad in wrong)
    ]


def _action_checks(actions: ActionsConfig) -> list[tuple[bool, list[str], str]]:
    """Contradictions within `data.actions`: whether there is one, the keys it rests on, what to say."""
    path = "data.actions"
    dimensions, starts = actions.dimensions, actions.state_dimensions
    given = [name for name in ("dimensions", "state_dimensions") if getattr(actions, name) is not None]
    checks = [
        (
            actions.representation == "absolute" and bool(given),
            [f"{path}.{name}" for name in (*given, "representation")],
            "got a list with representation: absolute, which converts nothing; delete it, or take another representation",
        ),
        (
            given == ["state_dimensions"],
            [f"{path}.state_dimensions", f"{path}.dimensions"],
            "got a list without dimensions, expected both: it says what each of them starts from",
        ),
        (
            dimensions is not None and starts is not None and len(dimensions) != len(starts),
            [f"{path}.state_dimensions", f"{path}.dimensions"],
            f"got {len(starts or ())}, expected {len(dimensions or ())}, one for each of dimensions",
        ),
    ]
    if actions.rotation is not None:
        kind, count = actions.rotation.representation, len(actions.rotation.dimensions)
        keys = [f"{path}.rotation.{name}" for name in ("dimensions", "representation")]
        text = f"got {count}, expected {ROTATIONS[kind]}, as many as {kind} takes, or a multiple for several rotations"
        checks.append((count % ROTATIONS[kind] != 0, keys, text))
    return checks


if __name__ == "__main__":  # `make schema`
    sys.stdout.write(json_schema())
