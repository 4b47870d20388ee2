"""Open-loop evaluation: a policy's chunks beside the recorded ones, on every step of some episodes.

Observations go through `Policy`, so preprocessing is the robot's. Errors are in real units and leave out steps past an
episode's end (D7). The velocity loss is the training objective on the fixed (t, noise) of validation (D8). Every sample's
noise is a function of (seed, sample), so figures do not depend on the batch size.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.config import config_from_dict
from paligemma_vla.data.index import EpisodeIndex, hex_digest, real_name, share_episodes
from paligemma_vla.data.loader import Collator, VLADataset, read_chunk
from paligemma_vla.data.order import SampleRef, ValidationSampler
from paligemma_vla.data.reader import EpisodeReader, check_cameras
from paligemma_vla.errors import DataError, VLAError
from paligemma_vla.model.vla_model import arguments_from_batch
from paligemma_vla.policy import Policy
from paligemma_vla.progress import progress_bar
from paligemma_vla.seeding import derive_seed
from paligemma_vla.storage import atomic_file

EULER_STEPS = (1, 2, 5, 10, 20, 50)
LATENCY_CALLS, LATENCY_SECONDS = 10, 2.0
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class OpenLoopConfig:
    """How to evaluate.

    batch_size: observations at a time. max_samples: evenly spread over the data; None takes every step. num_steps: Euler
    steps of the main figures; None for the checkpoint's. euler_samples: samples of the steps-versus-error table.
    episodes_shown: episodes whose chunks are kept for plots. predictions_path: Parquet file of every prediction, or None.
    """

    batch_size: int = 64
    max_samples: int | None = None
    num_steps: int | None = None
    seed: int = 0
    euler_samples: int = 256
    episodes_shown: int = 3
    predictions_path: Path | None = None


@dataclass(frozen=True)
class Trace:
    """One episode for a plot: actions (L, A), and chunks predicted (n, K, A) at the steps `starts` (n,)."""

    episode: int
    prompt: str
    actions: Floats
    starts: NDArray[np.int64]
    predicted: Floats


@dataclass(frozen=True)
class OpenLoopResult:
    """metrics: what `metrics.json` holds.  traces: for the report."""

    metrics: dict[str, Any]
    traces: tuple[Trace, ...]


def evaluate(policy: Policy, data: str | Sequence[str] | EpisodeIndex, config: OpenLoopConfig | None = None) -> OpenLoopResult:
    """Compare `policy` with the episodes of `data` (file, folder, glob, list or index).

    Raises `DataError` when data and checkpoint do not fit, naming every field that differs.
    """
    config = config or OpenLoopConfig()
    began = time.perf_counter()
    index = data if isinstance(data, EpisodeIndex) else EpisodeIndex.build(data, "--eval_data_path")
    check_same_robot(index, policy)
    seen, cameras = policy.config, policy.config.model.vlm_config.cameras
    if index.layout.cameras < cameras:
        cameras, key = index.layout.cameras, "model.vlm_config."
        seen = config_from_dict(seen.model_dump(mode="json"), {f"{key}num_cameras": cameras, f"{key}use_aux_camera": False})
    dataset = VLADataset(index, policy.preprocessor, seen)
    check_cameras(index, range(cameras))
    try:
        figures, chosen = _errors(policy, dataset, config)
        euler = _euler_table(policy, dataset, config)
        traces = tuple(_traces(policy, dataset, config))
    except torch.OutOfMemoryError as error:
        raise VLAError(f"out of memory with --batch_size {config.batch_size}: reduce it, or use --device cpu") from error
    metrics = {
        **figures,
        "euler_steps": euler,
        "samples": chosen,
        "samples_available": index.steps,
        "episodes": len(index),
        "settings": {
            "num_steps": config.num_steps or policy.metadata["num_inference_timesteps"],
            "seed": config.seed,
            "batch_size": config.batch_size,
            "device": str(policy.device),
        },
        "data": {"paths": list(index.paths), "training_files": count_training_files(index, policy)},
        "wall_s": round(time.perf_counter() - began, 2),
    }
    return OpenLoopResult(metrics, traces)


def check_same_robot(index: EpisodeIndex, policy: Policy) -> None:
    """Raise `DataError` with every way in which data and checkpoint are of different robots, cameras or rates."""
    layout, expected = index.layout, schema.described_layout(policy.metadata)
    in_order = schema.cameras_in_order(expected, layout)
    differences = schema.robot_differences(layout, expected, 0 if in_order else expected.cameras)
    faults = [f"{name}: {text}" for name, text in differences.items()]
    if layout.cameras < expected.cameras and not in_order:
        wanted = f"got {layout.cameras}, the checkpoint takes {expected.cameras}"
        faults.append(f"cameras: {wanted}; add columns (null where one is absent)")
    if faults:
        remedy = "evaluate on episodes of the robot that the checkpoint was trained for"
        raise DataError("\n  ".join([f"{index.paths[0]}: data and checkpoint do not fit; {remedy}", *faults]))


def count_training_files(index: EpisodeIndex, policy: Policy) -> int:
    """How many of the evaluated files the checkpoint's statistics were computed from: those figures flatter.

    Files are the same by content, wherever they lie (older statistics know names only), unless other episodes of them were
    selected.
    """
    statistics = policy.preprocessor.statistics
    known = statistics.digests or tuple(map(real_name, statistics.datasets))
    trained = list(zip(known, statistics.datasets, strict=True))
    evaluated = map(hex_digest, index.digests.tolist()) if statistics.digests else map(real_name, index.paths)
    return sum(
        any(same == key and share_episodes(path, name) for key, name in trained)
        for same, path in zip(evaluated, index.paths, strict=True)
    )


@dataclass(frozen=True)
class Sample:
    """One step of an episode: what the policy sees, and the chunk that followed.

    actions (K, A) in real units, the last one repeated past the episode's end; mask (K,) is False there.
    """

    index: int
    episode: int
    step: int
    observation: dict[str, Any]
    actions: Floats
    mask: NDArray[np.bool_]


def read_observation(reader: EpisodeReader, episode: int, step: int) -> dict[str, Any]:
    """A step as a robot would present it: state, prompt, and `image_1 ...` (H, W, 3) uint8 of the cameras that have a picture.

    Raises `DataError` naming file, row and column.
    """
    index = reader.index
    file, row = int(index.file[episode]), int(index.start[episode]) + step
    rows, number = reader.group_of(file, row)
    observation = {"state": rows.state[number], "prompt": rows.prompt[number].as_py()}
    for camera, picture in enumerate(rows.pictures(number), start=1):
        if picture is not None:
            observation[schema.image_key(camera)] = picture.decode()
    return observation


def read_sample(dataset: VLADataset, sample: int) -> Sample:
    """Decode one step and the actions that followed. Raises as `read_observation`."""
    episode, step = dataset.locate(sample)
    actions, mask = read_chunk(dataset.reader, episode, step, dataset.config.model.action_head_config.horizon)
    actions = dataset.preprocessor.actions.canonical(actions)  # rotations written as the policy writes them
    return Sample(sample, episode, step, read_observation(dataset.reader, episode, step), actions, mask)


def _batches(dataset: VLADataset, count: int, batch_size: int) -> Iterator[tuple[list[SampleRef], list[Sample]]]:
    """So many steps, evenly spread over the data."""
    for refs in ValidationSampler(len(dataset), count, batch_size, 0, 1):
        yield refs, [read_sample(dataset, ref.sample) for ref in refs]


def predict(policy: Policy, samples: Sequence[Sample], seed: int, num_steps: int | None) -> Floats:
    """Chunks (B, K, A) in real units."""
    seeds = [derive_seed(seed, "open loop", sample.index) for sample in samples]
    return policy.infer_batch([sample.observation for sample in samples], seeds, num_steps)


class ErrorSums:
    """Sums of absolute and of squared errors (2, K, A), over the valid steps only; the range of the true."""

    def __init__(self, horizon: int, dimension: int) -> None:
        self.sums, self.count = np.zeros((2, horizon, dimension)), np.zeros(horizon, np.int64)
        self.low, self.high = np.full(dimension, np.inf), np.full(dimension, -np.inf)

    def add(self, predicted: NDArray[Any], true: Floats, mask: NDArray[np.bool_]) -> None:
        """predicted broadcasts to true (B, K, A); mask (B, K)."""
        difference = np.where(mask[..., None], predicted - true.astype(np.float64), 0.0)
        self.sums += np.abs(difference).sum(0), np.square(difference).sum(0)
        self.count += mask.sum(0)
        self.low, self.high = np.minimum(self.low, true[mask].min(0)), np.maximum(self.high, true[mask].max(0))

    @property
    def total(self) -> dict[str, float]:
        mae, mse = (float(sums.sum() / (self.count.sum() * sums.shape[1])) for sums in self.sums)
        return {"mae": mae, "mse": mse}

    def per_dimension(self) -> list[dict[str, float]]:
        means = self.sums.sum(1) / self.count.sum()
        return [{"mae": float(mae), "mse": float(mse)} for mae, mse in means.T]

    def per_step(self) -> list[dict[str, Any]]:
        """One entry per horizon step; null where no episode is long enough to have that step."""
        rows = []
        for step, count in enumerate(self.count.tolist()):
            mae, mse = ((self.sums[:, step].mean(1) / count).tolist()) if count else (None, None)
            rows.append({"step": step, "mae": mae, "mse": mse, "count": count})
        return rows


def _errors(policy: Policy, dataset: VLADataset, config: OpenLoopConfig) -> tuple[dict[str, Any], int]:
    """The pass over the data: figures of the policy and of the baselines, and the number of samples."""
    dimension, horizon = policy.metadata["action_dim"], policy.metadata["horizon"]
    table = {name: ErrorSums(horizon, dimension) for name in ("policy", "mean_action", "zero_action")}
    wanted = min(config.max_samples or len(dataset), len(dataset))
    loss, count = np.zeros(2), 0
    with contextlib.ExitStack() as stack:
        writer = None
        if config.predictions_path is not None:
            file = stack.enter_context(atomic_file(config.predictions_path))
            writer = stack.enter_context(pq.ParquetWriter(file, prediction_schema(policy), compression="ZSTD"))
        bar = stack.enter_context(progress_bar(wanted, "open loop", "sample"))
        for refs, batch in _batches(dataset, wanted, config.batch_size):
            loss += _velocity_loss(policy, dataset, refs)
            predicted = predict(policy, batch, config.seed, config.num_steps)
            guesses = {"policy": predicted, "mean_action": _mean_action(policy, batch), "zero_action": np.zeros(dimension)}
            for name, guess in guesses.items():
                table[name].add(guess, *_recorded(batch))
            if writer is not None:
                writer.write_table(_prediction_rows(batch, predicted, writer.schema))
            count += len(batch)
            bar.update(len(batch))
    return {**_figures(policy, table), "velocity_loss": float(loss[0] / loss[1])}, count


def _recorded(batch: Sequence[Sample]) -> tuple[Floats, NDArray[np.bool_]]:
    """True chunks (B, K, A) and their mask (B, K)."""
    return np.stack([sample.actions for sample in batch]), np.stack([sample.mask for sample in batch])


def _mean_action(policy: Policy, batch: Sequence[Sample]) -> NDArray[Any]:
    """What comes of always predicting the mean of the training data, in real units: broadcasts to (B, K, A)."""
    mean, actions = policy.preprocessor.statistics.action.mean, policy.preprocessor.actions
    if not actions.converts:
        return mean
    chunk = np.broadcast_to(mean.astype(np.float32), (len(batch), actions.horizon, len(mean)))
    return actions.decode(chunk, np.stack([np.asarray(sample.observation["state"], np.float32) for sample in batch]))


@torch.inference_mode()
def _velocity_loss(policy: Policy, dataset: VLADataset, refs: list[SampleRef]) -> NDArray[np.float64]:
    """Sum of the training objective's squared errors over a batch, and their number (2,)."""
    batch = Collator(dataset.preprocessor.prompts)(dataset.__getitems__(refs))
    batch = {key: value.to(policy.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    output = policy.model(**arguments_from_batch(batch))
    return np.array([output.loss_sum.item(), output.valid_count.item()])


def _figures(policy: Policy, table: dict[str, ErrorSums]) -> dict[str, Any]:
    sums = table["policy"]
    dimension = len(sums.low)
    names = policy.metadata["action_names"] or [f"action[{n}]" for n in range(dimension)]
    units = policy.metadata["action_units"] or [""] * dimension
    statistics, converted = policy.preprocessor.statistics.action, policy.preprocessor.actions.dimensions
    mean, zero = table["mean_action"].per_dimension(), table["zero_action"].per_dimension()
    per_dimension = [
        {
            "name": names[n],
            "unit": units[n],
            **entry,
            "mean_action_mae": mean[n]["mae"],
            "zero_action_mae": zero[n]["mae"],
            "recorded_range": [float(sums.low[n]), float(sums.high[n])],
            # Of a dimension that the model sees converted, the statistics do not know it.
            "training_range": None if n in converted else [float(statistics.min[n]), float(statistics.max[n])],
        }
        for n, entry in enumerate(sums.per_dimension())
    ]
    total, constant = sums.total, table["mean_action"].total["mse"]
    return {
        **total,
        # 1 is perfect, 0 is no better than always playing the mean action, as R squared.
        "explained": 1 - total["mse"] / constant if constant > 0 else None,
        "baselines": {name: table[name].total for name in ("mean_action", "zero_action")},
        "per_dimension": per_dimension,
        "per_step": sums.per_step(),
    }


def _euler_table(policy: Policy, dataset: VLADataset, config: OpenLoopConfig) -> list[dict[str, Any]]:
    """Error and time for each number of Euler steps, on the same samples from the same noise.

    `change`: mean absolute difference from the finest integration, in real units: what the coarser one costs.
    """
    used = config.num_steps or policy.metadata["num_inference_timesteps"]
    counts = sorted({*EULER_STEPS, used})
    wanted = min(config.euler_samples, config.max_samples or config.euler_samples)
    errors = {n: ErrorSums(policy.metadata["horizon"], policy.metadata["action_dim"]) for n in counts}
    change, seconds, seen = dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0.0), 0
    first: list[Sample] = []
    for _, batch in _batches(dataset, wanted, config.batch_size):
        if not first:
            first = batch[:1]
            predict(policy, batch, config.seed, 1)  # the first call pays for allocation and kernels
        predicted = {}
        for n in counts:
            began = time.perf_counter()
            predicted[n] = predict(policy, batch, config.seed, n)
            seconds[n] += time.perf_counter() - began
            errors[n].add(predicted[n], *_recorded(batch))
        for n in counts:
            change[n] += float(np.abs(predicted[n] - predicted[counts[-1]]).mean(axis=(1, 2)).sum())
        seen += len(batch)
    return [
        {
            "steps": n,
            **errors[n].total,
            "change": change[n] / seen,
            "ms_per_observation": _latency(policy, first, n),
            "ms_per_observation_in_batches": 1000 * seconds[n] / seen,
            "samples": seen,
            "used": n == used,
        }
        for n in counts
    ]


def _latency(policy: Policy, sample: Sequence[Sample], num_steps: int) -> float:
    """Median milliseconds from one raw observation to its chunk, asked for alone, as a robot does."""
    times: list[float] = []
    predict(policy, sample, 0, num_steps)
    while len(times) < LATENCY_CALLS and sum(times) < LATENCY_SECONDS:
        began = time.perf_counter()
        predict(policy, sample, 0, num_steps)
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


def _traces(policy: Policy, dataset: VLADataset, config: OpenLoopConfig) -> Iterator[Trace]:
    """Whole episodes, spread over the data, with a chunk predicted at every `horizon`-th step."""
    length, horizon = dataset.index.length, policy.metadata["horizon"]
    first = np.cumsum(length, dtype=np.int64) - length  # sample at which each episode begins
    shown = min(config.episodes_shown, len(length))
    for episode in np.unique(np.linspace(0, len(length) - 1, shown).round().astype(int)):
        starts = np.arange(0, length[episode], horizon, dtype=np.int64)
        steps = [read_sample(dataset, int(first[episode] + start)) for start in starts]
        parts = [steps[n : n + config.batch_size] for n in range(0, len(steps), config.batch_size)]
        predicted = np.concatenate([predict(policy, part, config.seed, config.num_steps) for part in parts])
        actions = np.concatenate([step.actions[step.mask] for step in steps])  # (L, A)
        yield Trace(int(episode), steps[0].observation["prompt"], actions, starts, predicted)


def prediction_schema(policy: Policy) -> pa.Schema:
    """Columns of predictions.parquet: episode, step (int32); predicted, true (K lists of A float32, real units); mask (K bool,
    False past the episode's end, where `true` repeats the last action); prompt."""
    horizon = policy.metadata["horizon"]
    chunk = pa.list_(pa.list_(pa.float32(), policy.metadata["action_dim"]), horizon)
    columns = [("episode", pa.int32()), ("step", pa.int32()), ("predicted", chunk), ("true", chunk)]
    columns += [("mask", pa.list_(pa.bool_(), horizon)), ("prompt", pa.string())]
    return pa.schema(columns, metadata={"action_names": json.dumps(list(policy.metadata["action_names"]))})


def _prediction_rows(samples: Sequence[Sample], predicted: Floats, columns: pa.Schema) -> pa.Table:
    rows = [
        (s.episode, s.step, chunk.tolist(), s.actions.tolist(), s.mask.tolist(), s.observation["prompt"])
        for s, chunk in zip(samples, predicted, strict=True)
    ]
    return pa.table(list(zip(*rows, strict=True)), schema=columns)
