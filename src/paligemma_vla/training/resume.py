"""What may change between a checkpoint and the run that goes on from it, and what would make it another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paligemma_vla.config import VLAConfig, VLMConfig, config_from_dict
from paligemma_vla.errors import CheckpointError, DataError, ModelError
from paligemma_vla.normalization import DatasetStatistics

# Keys that change neither what is learned from which samples nor what `best` means, but how long, how fast and where.
FREE = {
    "data.num_workers",
    "data.prefetch_factor",
    "data.pin_memory",
    "data.cache_mb",
    "data.allow_other_statistics",
    "model.vlm_config.activation_checkpointing",
    "model.vlm_config.attn_implementation",
    "training.epochs",
    "training.max_steps",
    "training.gradient_accumulation_steps",
    "training.parallel",
    "training.shard_processes",
    "training.cpu_offload",
    "training.checkpoint_format",
    "training.log_interval",
    "training.validate_every_n_steps",
    "training.save_every_n_epochs",
    "training.save_every_n_steps",
    "training.keep_last",
    "training.stop_when_save_fails",
    "training.max_skipped_steps",
    "training.checkpoint_dir",
    "training.experiment_name",
    "training.stop_after_epoch",
    "training.stop_after_step",
    "training.tensorboard",
    "wandb.enabled",
    "wandb.project",
    "wandb.entity",
    "wandb.mode",
}
# Places: what lies there may have moved. Its content is compared instead, or comes out of the checkpoint.
PLACES = {
    "data.train_parquet_files",
    "data.val_parquet_files",
    "data.exclude_episodes",
    "data.normalization_stats_path",
    "model.vlm_config.model_name_or_path",
    "model.vlm_config.revision",
}


def check_same_run(saved: Mapping[str, Any], config: VLAConfig, fingerprint: Mapping[str, str | None], where: str) -> None:
    """Raise `CheckpointError` with every difference that would make a resume silently another run."""
    old = config_from_dict(saved["config"], where=f"{where}: config")
    before, now = _settings(old), _settings(config)
    # A list of stages or of weighted sources is one value: `flatten` does not go into it.
    differences = [
        f"{key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if key not in FREE | PLACES and before.get(key) != now.get(key)
    ]
    for name, key in (("training", "train_parquet_files"), ("validation", "val_parquet_files")):
        if saved["data"][name] != fingerprint[name]:
            differences.append(
                f"data.{key}: other {name} episodes ({_short(saved['data'][name])} in the checkpoint, "
                f"{_short(fingerprint[name])} now)"
            )
    if saved["data"].get("order") != fingerprint.get("order"):
        differences.append(
            f"data.train_parquet_files: got the order {saved['data'].get('order')!r} in the checkpoint, expected "
            f"{fingerprint.get('order')!r}: weighted sources come in another order when they are streamed by this version"
        )
    if _other_backbone(saved, old.model.vlm_config, config.model.vlm_config):
        differences.append(
            f"model.vlm_config.model_name_or_path: {old.model.vlm_config.model_name_or_path} in the checkpoint, "
            f"{config.model.vlm_config.model_name_or_path} now, which is of other sizes or cannot be read"
        )
    if _other_statistics(saved, config):
        differences.append(f"data.normalization_stats_path: {config.data.normalization_stats_path} holds other statistics")
    if differences:
        raise CheckpointError(
            "\n  ".join(
                [
                    f"{where}: this would be another run; take back what differs (the checkpoint's own configuration is "
                    f"config.yaml of its run), start a run of its own, or go on all the same with --force",
                    *differences,
                ]
            )
        )


def _settings(config: VLAConfig) -> dict[str, Any]:
    """Dotted keys of a configuration, with the way of reading that null stands for; another order is another run."""
    settings = flatten(config.model_dump(mode="json"))
    settings["data.reading"] = "streamed" if config.data.streamed else "random"
    if not config.data.streamed:
        del settings["data.stream_block_mb"], settings["data.stream_window"]
    return settings


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _other_backbone(saved: Mapping[str, Any], before: VLMConfig, now: VLMConfig) -> bool:
    """Whether another backbone is named. Its weights come out of the checkpoint, so one that has only moved is the same."""
    if now.model_name_or_path == before.model_name_or_path:
        return False
    from paligemma_vla.model.architectures import read_architecture  # heavy, and needed for this alone

    try:
        named = read_architecture(now)
    except ModelError:
        return True
    return _sizes(named) != _sizes(saved["backbone"])


def _sizes(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Whole numbers of the two towers: widths, layers, heads, vocabulary."""
    towers = {name: architecture.get(name, {}) for name in ("vision_config", "text_config")}
    return {key: value for key, value in flatten(towers).items() if type(value) is int}


def _other_statistics(saved: Mapping[str, Any], config: VLAConfig) -> bool:
    """The checkpoint's own are used in any case: a file that is gone, or cannot be read, contradicts nothing."""
    try:
        now = DatasetStatistics.load(config.data.normalization_stats_path).to_dict()
    except DataError:
        return False
    return any(now[name] != saved["preprocessor"]["statistics"][name] for name in ("state", "action"))


def _short(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else fingerprint[:12]
