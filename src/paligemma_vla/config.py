"""The configuration: YAML in, one typed, frozen, strict object out.

Each section declares its keys and checks what its keys say about each other. All faults are reported at once, each with its
dotted path and the nearest known name. `to_yaml` writes the complete, resolved configuration into the run's folder.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails

from paligemma_vla.errors import ConfigError, closest, first_line
from paligemma_vla.schema import ROTATIONS, describe_fault
from paligemma_vla.storage import is_url, read_file, working_copy

PALIGEMMA = "paligemma_vla.model.paligemma_vlm:PaliGemmaVLM"
FLOW_HEAD = "paligemma_vla.model.action_head.flow_matching:FlowmatchingActionHead"
PI0_HEAD, PI05_HEAD = (f"paligemma_vla.model.action_head.expert:{name}ActionHead" for name in ("Pi0", "Pi05"))
EXPERTS = (PI0_HEAD, PI05_HEAD)
LINEAR_LAYERS = re.compile(r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2)")

# Files of a run's folder.
RUN_CONFIG, RUN_STATISTICS, RUN_ENVIRONMENT = "config.yaml", "normalization_stats.json", "environment.json"

# No count of this project can mean more, and larger numbers overflow in the libraries below.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
ClassPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversion between types, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Faults that no single key shows: (key, message). Called when each key of the section is right by itself."""
        yield from ()

    @model_validator(mode="after")
    def _without_contradictions(self) -> Self:
        if faults := list(self.contradictions()):
            raise ValueError(faults)
        return self


class DataSource(Section):
    path: PathText = Field(description="File, folder or glob of Parquet files.")
    weight: float = Field(1.0, gt=0, le=1e6, description="Share of the samples drawn from here, relative to the other sources.")


def _form(value: Any) -> str:
    """Which form of `train_parquet_files` a value has, so that pydantic reports faults of this form alone."""
    if isinstance(value, (dict, DataSource)):
        return "(source)"
    return "(list)" if isinstance(value, (list, tuple)) else "(path)"


_by_form = Discriminator(_form, custom_error_type="form", custom_error_message="a path, or a list of paths and {path, weight}")
ParquetFile = Annotated[Annotated[PathText, Tag("(path)")] | Annotated[DataSource, Tag("(source)")], _by_form]
FileList = Annotated[tuple[ParquetFile, ...], Field(strict=False, min_length=1)]
ParquetFiles = Annotated[Annotated[PathText, Tag("(path)")] | Annotated[FileList, Tag("(list)")], _by_form]


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
    dimensions: Dimensions = Field(description="Dimensions of an action; several rotations follow one another.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        kind, count = self.representation, len(self.dimensions)
        if count % ROTATIONS[kind]:
            yield "dimensions", f"got {count}, expected {ROTATIONS[kind]} for {kind}, or a multiple for several rotations"


class ActionsConfig(Section):
    representation: Literal["absolute", "chunk_relative", "delta"] = Field(
        "absolute",
        description="What the model predicts: actions as recorded, from the state at the chunk's start, or each from the last.",
    )
    dimensions: Dimensions | None = Field(None, description="Actions' dimensions to convert; null: all but the gripper's.")
    state_dimensions: Dimensions | None = Field(None, description="State dimensions they start at; null: same name or number.")
    rotation: RotationConfig | None = Field(None, description="The rotation in the actions: composed, never subtracted.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        dimensions, starts = self.dimensions, self.state_dimensions
        if self.representation == "absolute" and (dimensions or starts):
            key = "dimensions" if dimensions else "state_dimensions"
            yield key, "got a list with representation: absolute, which converts nothing; delete it, or change representation"
        elif starts and len(starts) != len(dimensions or ()):
            yield "state_dimensions", f"got {len(starts)}, expected {len(dimensions or ())}, one for each of dimensions"


class DataConfig(Section):
    train_parquet_files: ParquetFiles = Field(description="File, folder, glob, URL of these, list, or [{path, weight}].")
    val_parquet_files: ParquetFiles | None = Field(None, description="Validation episodes; null: split off val_fraction.")
    val_fraction: float = Field(0.05, ge=0, lt=1, description="Share of episodes held out without val_parquet_files.")
    exclude_episodes: PathText | None = Field(None, description="List of episodes to leave out, from `data check`.")
    labels: Literal["all", "interventions"] = Field(
        "all", description="Steps that are learnt; interventions: where files have the column actor, those alone."
    )
    normalization_stats_path: PathText = Field("normalization_stats.json", description="Written by `paligemma-vla stats`.")
    normalization: Literal["min_max", "quantile", "mean_std", "lerobot_quantile", "lerobot_mean_std"] = Field(
        "min_max", description="Kind of normalisation; lerobot_*: of policies that LeRobot trained."
    )
    allow_other_statistics: bool = Field(False, description="Accept statistics of another data set.")
    state_dim: Positive = Field(7, le=4096, description="Numbers in the state column.")
    max_seq_len: Positive = Field(1, le=4096, description="Frames in a window that ends at the current step; the last is used.")
    prompt_max_len: Positive = Field(64, le=4096, description="Longest instruction in tokens, `<bos>` and newline included.")
    prompt_overflow: Literal["error", "truncate"] = Field("error", description="What to do with a longer instruction.")
    image_resize: Literal["stretch", "pad"] = Field("stretch", description="stretch as PaliGemma does, or pad to a square.")
    pad_action_dim: bool = Field(False, description="Accept actions of fewer numbers: padded, and left out of the loss.")
    actions: ActionsConfig = Field(default_factory=ActionsConfig)
    batch_size: Positive = Field(32, description="Samples per optimiser step, over all processes and accumulation.")
    num_workers: NonNegative = Field(2, le=256, description="Loader processes per training process; 0: load in that process.")
    prefetch_factor: Positive = Field(2, le=1024, description="Batches each worker prepares ahead.")
    pin_memory: bool = Field(True, description="Page-locked batches (used with a GPU only).")
    cache_mb: NonNegative = Field(256, description="Compressed row groups kept in memory, per loader process, MB.")
    reading: Literal["random", "streamed"] | None = Field(None, description="Order; null: streamed if a source is a URL.")
    stream_block_mb: float = Field(1.0, gt=0, le=4096, description="Size of a block when data is streamed: whole episodes, MB.")
    stream_window: Positive = Field(4, le=4096, description="Blocks that each slot of the batch mixes when data is streamed.")
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)

    @property
    def streamed(self) -> bool:
        """Whether training data is read block by block."""
        if self.reading is None:
            return any(map(is_url, source_paths(self.train_parquet_files)))
        return self.reading == "streamed"


class LoRAConfig(Section):
    """Low-rank adapters (Hu et al. 2021) on linear layers, whose own weights are frozen then."""

    rank: Positive = Field(16, le=4096, description="Inner width of an adapter.")
    alpha: float = Field(32.0, gt=0, le=1e6, description="Adapters are scaled by alpha / rank.")
    target_modules: re.Pattern[str] = Field(LINEAR_LAYERS, description="Regular expression for full names of linear layers.")


class VLMConfig(Section):
    backbone: ClassPath = Field(PALIGEMMA, description="`package.module:Class`: images + prompts -> (B, T, E).")
    model_name_or_path: PathText = Field(description="Hub id (google/paligemma-3b-pt-224) or a local folder.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    use_aux_camera: bool = Field(False, description="Use image_2 as well.")
    num_cameras: Positive | None = Field(None, le=16, description="More cameras than two; null: 2 with use_aux_camera, else 1.")
    freeze_vision_tower: bool = Field(False, description="SigLIP and its projector keep their weights.")
    freeze_language_model: bool = Field(False, description="Gemma keeps its weights.")
    lora: LoRAConfig | None = Field(None, description="Train adapters instead of the backbone's weights; null: the weights.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute type; weights that learn are float32.")
    attn_implementation: Literal["eager", "sdpa"] | None = Field(None, description="null: transformers' own choice.")
    activation_checkpointing: Literal[False, True, "selective"] = Field(False, description="Recompute activations in backward.")

    @property
    def cameras(self) -> int:
        """Number of cameras the model looks at."""
        return self.num_cameras if self.num_cameras is not None else 1 + self.use_aux_camera

    @property
    def frozen(self) -> bool:
        """Whether nothing of the backbone learns."""
        return self.freeze_vision_tower and self.freeze_language_model

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.num_cameras == 1 and self.use_aux_camera:
            yield "num_cameras", "got 1 with use_aux_camera: true; delete one of the two"
        if self.frozen and self.lora is not None:
            yield "lora", "frozen towers get no adapters, and both are frozen; delete lora, or unfreeze one"


class ActionHeadConfig(Section):
    head: ClassPath = Field(FLOW_HEAD, description="`package.module:Class` with `loss` and `get_action`.")
    use_state_input: bool = Field(True, description="Give the head the robot's state.")
    horizon: Positive = Field(8, le=1024, description="Actions in a chunk (K).")
    per_action_dim: Positive = Field(7, le=4096, description="Numbers in one action (A).")
    action_dim: int | None = Field(
        default_factory=lambda data: data["horizon"] * data["per_action_dim"],
        description="horizon * per_action_dim; may be left out.",
    )
    embed_dim: Positive = Field(1024, le=65_536, description="Width of the head; need not equal the backbone's.")
    num_layers: Positive = Field(8, le=1000, description="Transformer blocks.")
    num_heads: Positive = Field(8, le=1024, description="Attention heads; must divide embed_dim.")
    mlp_ratio: float = Field(4.0, ge=0.1, le=64, description="Hidden width of a block's MLP, relative to embed_dim.")
    num_inference_timesteps: Positive = Field(50, le=1000, description="Euler steps when sampling.")
    num_flow_samples: Positive = Field(1, le=256, description="(t, noise) draws per context in training (M).")
    noise: Literal["uniform", "normal"] = Field(
        default_factory=lambda data: "normal" if data.get("head") in EXPERTS else "uniform",
        description="Distribution of noise, and of flow time with it; left out: normal, as pi0, with its heads.",
    )
    detach_context: bool = Field(False, description="Stop the head's gradient at the backbone (knowledge insulation).")
    lora: LoRAConfig | None = Field(None, description="Adapters beside linear layers of the head; what has none learns itself.")

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, raw: Any) -> Any:
        """`action_dim: null` means the same as no action_dim."""
        return {k: v for k, v in raw.items() if (k, v) != ("action_dim", None)} if isinstance(raw, dict) else raw

    def contradictions(self) -> Iterator[tuple[str, str]]:
        product = self.horizon * self.per_action_dim
        if self.action_dim != product:
            factors = f"horizon * per_action_dim = {self.horizon} * {self.per_action_dim} = {product}"
            yield "action_dim", f"got {self.action_dim}, expected {factors}; delete it, or fix horizon"
        if self.embed_dim % (2 * self.num_heads):
            yield "num_heads", f"got {self.num_heads}, expected 2 * num_heads to divide embed_dim ({self.embed_dim})"


class ModelConfig(Section):
    vlm_config: VLMConfig
    action_head_config: ActionHeadConfig = Field(default_factory=ActionHeadConfig)


class StageConfig(Section):
    train: Literal["head", "all"] = Field(description="head: the backbone is frozen; all: everything not frozen in vlm_config.")
    steps: Positive | None = Field(None, description="Optimiser steps of this stage; null (last stage only): to the end.")


class TrainingConfig(Section):
    epochs: Positive = Field(10, description="Passes over the training samples.")
    max_steps: Positive | None = Field(None, description="End after this many optimiser steps, schedule included.")
    seed: int = Field(0, ge=0, lt=2**63, description="Order, augmentation, flow time and noise depend on it and the position.")
    init_from: PathText | None = Field(None, description="Policy whose weights a new run begins with; null: the backbone's.")
    init_statistics: Literal["kept", "own"] = Field("kept", description="With init_from: the policy's, or those of this data.")
    grad_clip_norm: float = Field(1.0, gt=0, le=1e30, description="Largest gradient norm.")
    gradient_accumulation_steps: Positive = Field(1, description="Split each batch into this many forward/backward passes.")
    parallel: Literal["ddp", "fsdp", "hsdp"] = Field("ddp", description="Copies of the model, shards, or shards in groups.")
    shard_processes: Positive | None = Field(None, description="hsdp: processes that share one copy; null: a machine's.")
    cpu_offload: bool = Field(False, description="fsdp, hsdp: keep weights and optimiser in the machine's memory: slow.")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="Moving average of the weights, for validation and Policy; 0: off.")
    rtc_max_delay: NonNegative = Field(0, description="Learn to continue chunks: most actions given at once; 0: off.")
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = Field((), description="E.g. head first, then all.")
    log_interval: Positive = Field(10, description="Optimiser steps between log lines.")
    validate_every_n_steps: Positive | None = Field(None, description="null: at the end of each epoch.")
    val_max_samples: Positive = Field(2048, description="Validation samples for the loss, evenly over the set.")
    val_action_samples: NonNegative = Field(256, description="Validation samples whose actions are sampled and compared.")
    best_metric: Literal["val/epoch_loss", "val/action_mae"] = Field("val/epoch_loss", description="What best means (lower).")
    save_every_n_epochs: Positive = Field(1, description="Epochs between numbered checkpoints.")
    save_every_n_steps: Positive | None = Field(None, description="Also save in mid-epoch, every so many optimiser steps.")
    keep_last: Positive | None = Field(None, description="Checkpoints kept besides best; null: every numbered one.")
    checkpoint_format: Literal["file", "sharded"] | None = Field(None, description="null: sharded with fsdp and hsdp on disk.")
    stop_when_save_fails: bool = Field(False, description="On a full disk: stop; false: log it, keep the old ones, continue.")
    max_skipped_steps: Positive = Field(10, description="Steps in a row that may be skipped for NaN or infinity.")
    checkpoint_dir: PathText = Field("experiments", description="Folder of the runs, or its URL (s3://, gs://, ...).")
    experiment_name: str = Field(
        "default", pattern=r"^[\w.\-]*[\w\-][\w.\-]*$", max_length=128, description="This run's folder."
    )
    stop_after_epoch: Positive | None = Field(None, description="End early, saved, as an interrupted run would be.")
    stop_after_step: Positive | None = Field(None, description="End early, saved, as an interrupted run would be.")
    tensorboard: bool = Field(False, description="Also write TensorBoard events into the run's folder.")

    def processes_per_copy(self, processes: int, on_machine: int) -> int:
        """How many of all processes share one copy of the model. on_machine: processes of one machine."""
        return {"ddp": 1, "fsdp": processes, "hsdp": self.shard_processes or on_machine}[self.parallel]

    @property
    def saves_shards(self) -> bool:
        """Whether checkpoints are folders to which every process writes its part."""
        if self.checkpoint_format is None:
            return self.parallel != "ddp" and not is_url(self.checkpoint_dir)
        return self.checkpoint_format == "sharded"

    def contradictions(self) -> Iterator[tuple[str, str]]:
        for number, stage in enumerate(self.stages, 1):
            if (stage.steps is None) != (number == len(self.stages)):
                yield f"stages.{number - 1}.steps", "every stage but the last gives its steps, the last gives none"
                break
        if self.best_metric == "val/action_mae" and self.val_action_samples == 0:
            yield "best_metric", "got val/action_mae with val_action_samples: 0; raise it, or take val/epoch_loss"
        if re.fullmatch(r"(\w*:)?/*|~.*|\w+:/(?!/).*", self.checkpoint_dir):
            yield "checkpoint_dir", f"got '{self.checkpoint_dir}', expected a folder (`~` is not expanded) or a URL with a path"
        if self.parallel == "ddp" and self.cpu_offload:
            yield "cpu_offload", "got true with parallel: ddp, which keeps the whole model on each GPU; take fsdp or hsdp"
        if self.parallel != "hsdp" and self.shard_processes is not None:
            yield "shard_processes", f"got {self.shard_processes} with parallel: {self.parallel}; delete it, or take hsdp"
        if self.checkpoint_format == "sharded" and is_url(self.checkpoint_dir):
            yield "checkpoint_format", "got sharded with a URL as checkpoint_dir; take file, or a folder all machines share"


class OptimizerConfig(Section):
    type: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw", description="adamw_8bit keeps the moments in 8 bits (torchao); muon is for models trained from scratch."
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


Bounds = Annotated[tuple[float | None, ...], Field(strict=False, min_length=1)]
Rates = Annotated[tuple[Annotated[float, Field(gt=0)] | None, ...], Field(strict=False, min_length=1)]


class ControlConfig(Section):
    """What `serve` may send: a number for each of an action's, in the data's units; null for one without."""

    action_low: Bounds | None = Field(None, description="Smallest numbers of an action that is sent; null: the data's.")
    action_high: Bounds | None = Field(None, description="Largest; null: the data's.")
    action_rate: Rates | None = Field(None, description="Largest changes from one action to the next; null: any.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        for number, (low, high) in enumerate(zip(self.action_low or (), self.action_high or (), strict=False)):
            if low is not None and high is not None and low > high:
                yield f"action_low.{number}", f"got {low:g}, expected at most action_high.{number}, {high:g}"


class VLAConfig(Section):
    """The whole configuration; sections as in the specification."""

    data: DataConfig
    model: ModelConfig
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    lr_scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    control: ControlConfig = Field(default_factory=ControlConfig)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        batch_size, parts = self.data.batch_size, self.training.gradient_accumulation_steps
        if batch_size % parts:
            text = f"got {parts}, expected a divisor of data.batch_size ({batch_size})"
            yield "training.gradient_accumulation_steps", text
        horizon, delay = self.model.action_head_config.horizon, self.training.rtc_max_delay
        if delay >= horizon:
            yield "training.rtc_max_delay", f"got {delay}, expected less than the horizon, {horizon}; 0 switches it off"
        if self.model.vlm_config.frozen and any(stage.train == "all" for stage in self.training.stages):
            yield "training.stages", "the whole backbone is frozen in model.vlm_config, so no stage can train all"
        if self.training.parallel != "ddp" and self.optimizer.type != "adamw":
            got = f"got {self.optimizer.type} with parallel: {self.training.parallel}"
            yield "optimizer.type", f"{got}; take adamw, or parallel: ddp"
        numbers = self.model.action_head_config.per_action_dim
        for name, given in self.control:
            if given is not None and len(given) != numbers and not self.data.pad_action_dim:
                yield f"control.{name}", f"got {len(given)} numbers, expected per_action_dim, {numbers} (null: no own limit)"

    def to_yaml(self) -> str:
        """The complete configuration; `load_config` reads it back to an equal object."""
        return str(yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120))

    def without_adapters(self) -> VLAConfig:
        """That of the same policy with its adapters merged into the weights."""
        model = self.model
        vlm = model.vlm_config.model_copy(update={"lora": None})
        head = model.action_head_config.model_copy(update={"lora": None})
        return self.model_copy(update={"model": model.model_copy(update={"vlm_config": vlm, "action_head_config": head})})

    @property
    def has_adapters(self) -> bool:
        return self.model.vlm_config.lora is not None or self.model.action_head_config.lora is not None

    @property
    def run_dir(self) -> Path:
        """The run's folder on this machine: of a run on a URL its working copy."""
        folder = self.training.checkpoint_dir
        return (working_copy(folder) if is_url(folder) else Path(folder)) / self.training.experiment_name

    def run_location(self, name: str) -> str:
        """Path or URL of a file in the run's folder, as a user would name it."""
        return f"{self.run_url}/{name}" if self.run_url is not None else str(self.run_dir / name)

    @property
    def run_url(self) -> str | None:
        """Where the run's folder is published, when `checkpoint_dir` is a URL."""
        folder = self.training.checkpoint_dir
        return f"{folder.rstrip('/')}/{self.training.experiment_name}" if is_url(folder) else None


def own_statistics(config_path: str | Path) -> str | None:
    """The statistics beside a configuration in a run's folder, which may have moved since it named them."""
    path = Path(config_path)
    statistics = path.with_name(RUN_STATISTICS)
    is_run = path.name == RUN_CONFIG and path.with_name(RUN_ENVIRONMENT).is_file() and statistics.is_file()
    return str(statistics) if is_run else None


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.2), and refuses a key given twice."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that knows the same numbers, so that a string which looks like one is quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),  # one way to match: a million digits take no time
        list("-+0123456789."),
    )


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    given: set[str] = set()
    for key, _ in node.value:
        if str(key.value) in given and key.tag != "tag:yaml.org,2002:merge":
            raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is given twice", key.start_mark)
        given.add(str(key.value))
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML. Raises `ConfigError` with file, and line and column where the parser gives them."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except Exception as error:  # of any kind: PyYAML raises KeyError for `!!bool x`, AttributeError for `!!timestamp x`, ...
        kind = "" if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: "
        raise ConfigError(f"{where}: not valid YAML: {kind}{' '.join(str(error).split())}") from error


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
        text = read_file(path).decode("utf-8")
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
    merged = dict(raw)
    for dotted, value in (overrides or {}).items():
        *parents, leaf = dotted.split(".")
        section = merged
        for name in parents:
            child = section.get(name)
            section[name] = section = dict(child) if isinstance(child, Mapping) else {}  # a copy: `raw` stays as it is
        section[leaf] = value
    try:
        return VLAConfig.model_validate(merged)
    except ValidationError as error:
        found = error.errors(include_url=False)
    faults: list[str] = []
    for fault in found:
        below = [other for other in found if other is not fault and other["loc"][: len(fault["loc"])] == fault["loc"]]
        if not (fault["type"] == "too_short" and below):  # pydantic counts a list without its wrong entries
            faults += _messages(fault)
    count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
    raise ConfigError("\n  ".join([f"{where}: {count} in the configuration", *faults]))


def _messages(fault: ErrorDetails) -> Iterator[str]:
    """Messages of one fault that pydantic found."""
    location = tuple(part for part in fault["loc"] if not str(part).startswith("("))  # the forms of `_form`
    path = ".".join(map(str, location))
    error = fault.get("ctx", {}).get("error")
    if isinstance(error, ValueError) and isinstance(error.args[0], list):  # of `Section.contradictions`
        yield from (f"{path}.{key}: {text}".removeprefix(".") for key, text in error.args[0])
    elif fault["type"] == "extra_forbidden":
        yield f"{path}: unknown key{closest(str(location[-1]), _keys_at(location[:-1]))}"
    elif fault["type"] == "missing":
        yield f"{path}: missing; it has no default"
    elif fault["type"] != "default_factory_not_called":  # of action_dim, when what it follows from is wrong
        yield describe_fault({**fault, "loc": location})


def _keys_at(location: Sequence[int | str]) -> list[str]:
    """Names of the keys of the section at a location."""
    schema = VLAConfig.model_json_schema()
    node: Any = schema
    for name in location:
        named = re.findall(r"#/\$defs/(\w+)", json.dumps(node["properties"].get(name, {}))) if isinstance(name, str) else []
        node = schema["$defs"][named[0]] if named else node
    return list(node["properties"])


if __name__ == "__main__":  # `make schema`: for completion and checking in editors
    sys.stdout.write(json.dumps(VLAConfig.model_json_schema(), indent=2) + "\n")
