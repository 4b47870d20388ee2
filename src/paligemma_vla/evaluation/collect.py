"""Demonstrations by a simulator's scripted expert, written as episodes.

What makes them worth imitating (numbers in `CollectConfig`): half of them start with the hand away from home; noise that
is correlated in time is executed while the expert's clean action is stored, so the data shows how to come back; where the
task allows it, some start done already, so that "close" is learnt for what is closed, too, and the instruction, not the
picture, says what to do.

An episode is a function of (seed, task, index): neither the number of workers nor a kill in between changes anything.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.images import encode_image
from paligemma_vla.data.writer import EpisodeWriter, stored_schema
from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.envs import Control, Environment, Start, file_prefix, make_environment, named_tasks
from paligemma_vla.progress import progress_bar
from paligemma_vla.schema import Episode, Observation, image_key
from paligemma_vla.workers import WorkerPool

log = logging.getLogger(__name__)

SEED_DOMAIN = 1  # `rollout` has another, so no evaluation starts where a demonstration of the same seed did
MAX_ATTEMPTS = 20
JPEG_QUALITY = 90
SLIP_STEPS = (4, 12)  # of the simulator
SETTINGS_KEY = "collection"
REVISION = 2  # raised when the same settings no longer give the same episodes: other experts, starts, lengths


@dataclass(frozen=True)
class CollectConfig:
    """What to collect, and how.

    episodes: kept per task.   workers: processes; 0 is this process.   image_size: pixels.
    noise_share: of episodes that are disturbed.   noise_scale: range of the noise's standard deviation, of a full stroke.
    noise_memory: correlation of the noise from one step to the next.   steps_after_success: recorded beyond it.
    slip_share: of episodes in which the gripper does the opposite for a moment, so that things are missed, dropped, or pushed.
    control: what the recorded actions are, `delta`s or `absolute` targets; the robot moves alike.
    action_repeat: simulator steps per recorded action; the numbers of steps here are of the simulator.
    within: share of an episode's limit in which the expert has to succeed; what takes longer is not kept.
    done_every: one in so many episodes starts done, where the task can (0: none), and lasts at least done_steps.
    """

    env: str
    tasks: tuple[str, ...]
    episodes: int
    output_dir: Path
    seed: int = 0
    workers: int = 1
    image_size: int = 64
    noise_share: float = 0.5
    noise_scale: tuple[float, float] = (0.1, 0.3)
    noise_memory: float = 0.9
    slip_share: float = 0.0
    steps_after_success: int = 8
    done_every: int = 6
    done_steps: int = 80
    control: Control = "delta"
    action_repeat: int = 1
    within: float = 1.0

    def settings(self) -> str:
        """Everything that decides what an episode holds, as one line; stored with the episodes."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("tasks", "episodes", "output_dir", "workers")}
        for name, default in (("control", "delta"), ("action_repeat", 1), ("within", 1.0), ("slip_share", 0.0)):
            if kept[name] == default:  # so that folders collected before there was a choice can be continued
                del kept[name]
        return repr({**kept, "revision": REVISION})


@dataclass(frozen=True)
class CollectSummary:
    """What a call of `collect` added. expert_success: kept episodes per attempt, for each task."""

    episodes: int
    frames: int
    expert_success: dict[str, float]
    seconds: float


def collect(config: CollectConfig) -> CollectSummary:
    """Collect demonstrations of every task into one folder, one file prefix per task; goes on where a killed call stopped.

    Raises `SimulatorError` for an unknown environment or task, a task its expert cannot solve, or a folder that holds
    episodes of these tasks collected with other settings.
    """
    started = time.monotonic()
    env = make_environment(config.env, config.image_size)
    env.use_control(config.control, config.action_repeat)
    tasks = named_tasks(env, config.tasks)
    metadata = replace(env.spec.metadata, extra={SETTINGS_KEY: config.settings()})
    env.close()
    episodes = frames = 0
    rates: dict[str, float] = {}
    progress = progress_bar(config.episodes * len(tasks), "demonstrations", "episode")
    with WorkerPool(config.workers) as pool, progress:
        for task in tasks:
            columns = _further_columns(config, task, len(metadata.action_names))
            with EpisodeWriter(config.output_dir, metadata, prefix=file_prefix(task), extra=columns) as writer:
                stored = writer.episodes_written
                progress.update(min(stored, config.episodes))
                attempts = 0
                jobs = ((config, task, index) for index in range(stored, config.episodes))
                for episode, tries in pool.map(_work, jobs):
                    writer.write(episode)
                    episodes, frames, attempts = episodes + 1, frames + episode.length, attempts + tries
                    progress.update()
            if attempts:
                rates[task] = (config.episodes - stored) / attempts
    summary = CollectSummary(episodes, frames, rates, time.monotonic() - started)
    log.info("%d episodes, %d frames in %.1f s; expert success %s", episodes, frames, summary.seconds, rates)
    return summary


def demonstrate(env: Environment, config: CollectConfig, task: str, index: int) -> tuple[Episode, int]:
    """Let the expert solve `task`: episode number `index`, and after how many attempts the first one succeeded."""
    # Two in a row start done, so that one of them starts away from home and one does not.
    done = config.done_every > 0 and (index // 2) % config.done_every == config.done_every - 1
    start_done, start_away = done and env.can_start_done(task), index % 2 == 1
    for attempt in range(MAX_ATTEMPTS):
        rng = np.random.default_rng([SEED_DOMAIN, config.seed, zlib.crc32(task.encode()), index, attempt])
        start = Start(task, int(rng.integers(2**31)), start_away=start_away, start_done=start_done)
        first = start.reset(env)
        prompts = env.prompts(task, "own")
        prompt = prompts[rng.integers(len(prompts))]
        steps = range(
            config.done_steps // config.action_repeat if start_done else 0, round(config.within * env.max_steps(task))
        )
        recorded = _follow_expert(env, config, first, steps, rng)
        if recorded is not None:
            seen, actions, executed = recorded
            episode = build_episode(env, seen, actions, prompt, is_terminal=True)
            extra: dict[str, Sequence[Any]] = {schema.EXECUTED: executed, schema.RESET: [start.to_json()] * len(actions)}
            return replace(episode, extra=extra), attempt + 1
    raise SimulatorError(f"{config.env} task '{task}': its expert failed {MAX_ATTEMPTS} times in a row at episode {index}")


def correlated_noise(rng: np.random.Generator, config: CollectConfig, dims: int) -> Iterator[NDArray[np.float64]]:
    """Endless AR(1) noise (dims,): n' = m n + sqrt(1 - m^2) e, whose standard deviation stays that of e."""
    scale = rng.uniform(*config.noise_scale) if rng.random() < config.noise_share else 0.0
    memory = config.noise_memory**config.action_repeat
    noise = rng.normal(0.0, scale, dims)
    while True:
        yield noise
        noise = memory * noise + np.sqrt(1 - memory**2) * rng.normal(0.0, scale, dims)


def _slip(rng: np.random.Generator, config: CollectConfig, limit: int) -> range:
    """The steps of an episode of at most `limit` in which the gripper slips: mostly none, since few experts pick up what they
    have dropped."""
    if config.slip_share == 0.0 or rng.random() >= config.slip_share:
        return range(0)
    begin, lasting = int(rng.integers(limit)), int(rng.integers(SLIP_STEPS[0], SLIP_STEPS[1] + 1))
    return range(begin, begin + max(1, lasting // config.action_repeat))


def _follow_expert(
    env: Environment, config: CollectConfig, first: Observation, steps: range, rng: np.random.Generator
) -> tuple[list[Observation], list[NDArray[np.float32]], list[NDArray[np.float32]]] | None:
    """Follow the noisy expert from the first observation, for at least `steps.start` and at most `steps.stop` steps.

    Returns what was seen, the clean actions that belonged to it, and the executed ones, until `steps_after_success` beyond the
    first success; None when there was no success.
    """
    seen, actions, executed = [first], [], []
    noises = correlated_noise(rng, config, env.spec.action_dim - 1)
    slip = _slip(rng, config, steps.stop)
    beyond = config.steps_after_success // config.action_repeat
    solved_at: int | None = None
    for step in range(steps.stop):
        action = env.expert_action()
        actions.append(action)
        disturbed = action.copy()
        disturbed[:-1] += next(noises) * env.spec.action_scale[:-1]
        if step in slip:
            disturbed[-1] = env.spec.action_low[-1] + env.spec.action_high[-1] - disturbed[-1]
        executed.append(np.clip(disturbed, env.spec.action_low, env.spec.action_high).astype(np.float32))
        result = env.step(executed[-1])
        if result.success and solved_at is None:
            solved_at = step
        if solved_at is not None and step + 1 >= max(solved_at + 1 + beyond, steps.start):
            break
        if step + 1 < steps.stop and not result.done:
            seen.append(env.observe())
    return None if solved_at is None else (seen, actions, executed)


def build_episode(
    env: Environment, seen: Sequence[Observation], actions: Sequence[NDArray[np.floating]], prompt: str, is_terminal: bool
) -> Episode:
    """What was seen before each action, and the actions (A,), as it is written."""
    images: list[list[bytes | None]] = []
    for number in range(len(env.spec.metadata.cameras)):
        pictures = [cast(dict[str, Any], view)[image_key(number + 1)] for view in seen]
        images.append([encode_image(picture, "jpeg", JPEG_QUALITY) for picture in pictures])
    states = np.stack([view["state"] for view in seen])  # (length, P)
    return Episode(images, states, np.stack(actions).astype(np.float32), prompt, is_terminal)


def _further_columns(config: CollectConfig, task: str, action_dim: int) -> dict[str, pa.DataType]:
    """Columns to write beside those of every episode: all of them, or those of the task's episodes that are there already.

    A folder must not mix episodes of one task from two settings; it would be a data set that no command makes.
    """
    columns = {schema.EXECUTED: pa.list_(pa.float32(), action_dim), schema.RESET: pa.string()}
    for path in sorted(Path(config.output_dir).glob(f"{file_prefix(task)}-?????.parquet"))[:1]:
        stored = stored_schema(path)
        metadata = (stored.metadata or {}).get(schema.METADATA_KEY, b"{}")
        settings = schema.DatasetMetadata.from_json(metadata, str(path)).extra.get(SETTINGS_KEY)
        if settings != config.settings():
            raise SimulatorError(
                f"{path}: episodes collected with other settings\n  got      {settings}\n  expected {config.settings()}\n"
                "  collect into another folder, or delete these files"
            )
        if missing := [name for name in columns if name not in stored.names]:
            absent = f"{path}: has no column {', '.join(missing)}, so those that are added have none either"
            log.warning("%s; to replay them, collect into another folder", absent)
        columns = {name: kind for name, kind in columns.items() if name in stored.names}
    return columns


@lru_cache(maxsize=1)
def _environment(name: str, image_size: int, control: Control, action_repeat: int) -> Environment:
    """The simulator of this process, kept from job to job."""
    env = make_environment(name, image_size)
    env.use_control(control, action_repeat)
    return env


def _work(job: tuple[CollectConfig, str, int]) -> tuple[Episode, int]:
    config, task, index = job
    return demonstrate(_environment(config.env, config.image_size, config.control, config.action_repeat), config, task, index)
