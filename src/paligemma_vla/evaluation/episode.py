"""One closed-loop episode: a policy acts in an environment until the task is solved or time is up; and its video."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from paligemma_vla import schema
from paligemma_vla.data.video import VideoWriter
from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.collect import build_episode
from paligemma_vla.evaluation.envs import Environment, EnvSpec, Resets, Start, protocol_seed
from paligemma_vla.evaluation.execution import Execution, Motion, Timing, execute_chunks, measure_motion
from paligemma_vla.schema import DatasetMetadata, Episode

if TYPE_CHECKING:
    from paligemma_vla.policy import Continuation, Policy

Prompts = Literal["own", "opposite", "unseen"]
ImageSource = Literal["camera", "grey"]
Actor = Literal["checkpoint", "random"]
TakeOver = Literal["expert"]
Picture = NDArray[np.uint8]  # (H, W, 3)
log = logging.getLogger(__name__)

SEED_DOMAIN = 2  # `collect` has another, so no evaluation starts where a demonstration of the same seed did
GREY = 127
VIDEO_SIZE, VIDEO_FPS, VIDEO_CRF = 256, 20, 30
FRAME_HZ = 40  # frames drawn of a simulated second, at most: an 80 Hz robot is shown at half speed, a 20 Hz one as it was
LAST_FRAMES = 12  # the last picture stays, long enough to see how the episode ended


@dataclass(frozen=True)
class Condition:
    """What an episode is played with, besides task and number.

    prompts: whose instructions. resets: see `Environment.reset`. image: `grey` replaces every picture by a uniform one.
    policy: `random` plays uniform actions. num_steps: Euler steps, None for the checkpoint's own number.
    execute, delay, execution: see `Timing`. max_steps: actions until the episode is over, None: the environment's number.
    record: folder for what is seen at every step; slower, since every step is rendered then.
    take_over: `expert`: where the policy has not solved the task after `take_over_after` actions (None: see `split_limit`), the
    environment's expert goes on from there.
    """

    seed: int = 0
    prompts: Prompts = "own"
    resets: Resets = "demo"
    image: ImageSource = "camera"
    policy: Actor = "checkpoint"
    num_steps: int | None = None
    execute: int | None = None
    delay: int = 0
    execution: Execution = "blocking"
    max_steps: int | None = None
    record: Path | None = None
    take_over: TakeOver | None = None
    take_over_after: int | None = None


@dataclass(frozen=True)
class EpisodeOutcome:
    """How an episode went. seed: of its reset. success: the policy solved the task alone. steps: until it was solved, or all of
    them. actions: of each step (A,). motion: while the policy acted. recorded: what was seen and done at every step, and
    what its numbers mean.

    taken_over_at: actions of the policy before the expert's first; None where it did not act. solved_with_help: it then solved
    the task.
    """

    task: str
    index: int
    seed: int
    prompt: str
    success: bool
    steps: int
    actions: list[NDArray[np.floating]] = field(repr=False)
    motion: Motion = field(repr=False)
    recorded: tuple[Episode, DatasetMetadata] | None = field(default=None, repr=False)
    taken_over_at: int | None = None
    solved_with_help: bool = False

    @property
    def jerk(self) -> float | None:
        return self.motion.jerk


def check_compatible(metadata: Mapping[str, Any], spec: EnvSpec) -> None:
    """Raise `SimulatorError` naming the fields in which a policy's metadata and an environment differ.

    What one of them does not say cannot differ; of how pictures stand, where it shows only as failure, that is logged.
    """
    got, expected = schema.described_layout(metadata), spec.layout
    in_order = schema.cameras_in_order(got, expected)
    differences = schema.robot_differences(got, expected, cameras=0 if in_order else None)
    faults = [f"{name}: {text}" for name, text in differences.items()]
    more = got.cameras - expected.cameras
    if (in_order and more < 0) or (not in_order and not got.metadata.cameras and more):
        faults.append(f"cameras: got {got.cameras}, expected {expected.cameras}")
    if faults:
        raise SimulatorError("\n  ".join(["the checkpoint does not fit the environment:", *faults]))
    if not got.metadata.image_orientation:
        stand = expected.metadata.image_orientation or "not said either"
        log.warning("image_orientation: the checkpoint's data did not say it, here it is %s; compare two pictures", stand)


def instructions(env: Environment, task: str, kind: Prompts) -> tuple[str, ...]:
    """The instructions that `kind` stands for; raises `SimulatorError` when the task has none of that kind."""
    if kind != "opposite":
        found = env.prompts(task, kind)
    else:
        opposite = env.opposite(task)
        found = env.prompts(opposite, "own") if opposite else ()
    if not found:
        raise SimulatorError(f"--prompts {kind}: task '{task}' has none of these; expected --prompts own")
    return found


def play(env: Environment, policy: Policy | None, task: str, index: int, condition: Condition) -> EpisodeOutcome:
    """Play episode number `index` of `task`; start and instruction depend on (seed, task, index) alone.

    Every condition meets the same start, so conditions can be compared episode by episode.
    """
    seeds = np.random.SeedSequence([SEED_DOMAIN, condition.seed, zlib.crc32(task.encode()), index])
    reset_seed, choice, noise_seed = (int(word) for word in seeds.generate_state(3))
    prompts = instructions(env, task, condition.prompts)
    prompt = prompts[choice % len(prompts)]
    if condition.resets == "protocol":
        reset_seed = protocol_seed(condition.seed, index)
    start = Start(task, reset_seed, condition.resets)
    seen, states, actions, solved = [start.reset(env)], [], [], False
    own, limit = split_limit(env, task, condition)
    chosen = _actions(env, policy, condition, seen, prompt, np.random.default_rng(noise_seed))
    for action in chain(islice(chosen, own), _expert_actions(env)):
        actions.append(action)
        result = env.step(action)
        states.append(result.state)
        solved = result.success
        if solved or len(actions) == limit:
            break
        if condition.record is not None:
            seen.append(env.observe())
    helped = len(actions) > own
    recorded = None
    if condition.record is not None:
        executed = [np.clip(action, env.spec.action_low, env.spec.action_high) for action in actions]
        episode = build_episode(env, seen, executed, prompt, solved)
        actors = [schema.POLICY] * min(own, len(actions)) + [schema.INTERVENTION] * max(0, len(actions) - own)
        extra: dict[str, list[Any]] = {schema.SUCCESS: [solved] * len(actions), schema.ACTOR: actors}
        extra[schema.RESET] = [start.to_json()] * len(actions)
        recorded = replace(episode, extra=extra), env.spec.metadata
    motion = measure_motion(states[:own], env.spec.metadata)
    outcome = EpisodeOutcome(task, index, reset_seed, prompt, solved and not helped, len(actions), actions, motion, recorded)
    return replace(outcome, taken_over_at=own if helped else None, solved_with_help=solved and helped)


def split_limit(env: Environment, task: str, condition: Condition) -> tuple[int, int]:
    """After how many actions the expert takes over, and after how many the episode is over.

    Unless `take_over_after` says otherwise, the policy has the episode's own limit, so that its successes are those of a
    rollout without help, or half of what the simulator allows where that is less. The expert then has as long as an episode.
    Raises `SimulatorError` where the expert would never act.
    """
    limit, longest = condition.max_steps or env.max_steps(task), env.longest_episode(task)
    if limit > longest:
        raise SimulatorError(f"--max_steps: got {limit}, expected at most {longest}, the longest episode of '{task}'")
    if condition.take_over is None:
        return limit, limit
    own = min(limit, longest // 2) if condition.take_over_after is None else condition.take_over_after
    if not 0 <= own < longest:
        raise SimulatorError(f"--take_over_after: got {own}, expected less than {longest}, the longest episode of '{task}'")
    return own, min(own + limit, longest)


def _expert_actions(env: Environment) -> Iterator[NDArray[np.floating]]:
    while True:
        yield env.expert_action()


def _actions(
    env: Environment,
    policy: Policy | None,
    condition: Condition,
    seen: list[schema.Observation],
    prompt: str,
    rng: np.random.Generator,
) -> Iterator[NDArray[np.floating]]:
    """Endless actions (A,): random ones, or those of chunks as `condition` executes them.

    seen: ends with the present observation. Unless all are recorded it is rendered here, once per chunk: that is the slow part.
    """
    while condition.policy == "random":
        yield rng.uniform(env.spec.action_low, env.spec.action_high)
    assert policy is not None
    timing, looked = Timing(condition.execution, condition.delay, condition.execute), False

    def ask(continuation: Continuation | None) -> NDArray[np.floating]:
        nonlocal looked
        if looked and condition.record is None:
            seen[:] = [env.observe()]
        view, looked = seen[-1], True
        observation: dict[str, Any] = {**view, schema.PROMPT: prompt}
        if condition.image == "grey":
            observation |= {key: np.full_like(image, GREY) for key, image in view.items() if key.startswith("image_")}
        seed = int(rng.integers(2**31))
        how: dict[str, Any] = {"num_steps": condition.num_steps, "continuation": continuation, "realtime": timing.realtime}
        return np.asarray(policy.infer(observation, seed=seed, **how)["actions"])

    yield from execute_chunks(env, ask, timing)


def write_video(path: Path, env: Environment, outcome: EpisodeOutcome, resets: Resets) -> None:
    """Take the actions of an episode again and draw it, larger than the policy saw it: `path` (.mp4), and its end beside it
    (.jpg)."""

    def draw(step: int) -> Picture:
        # At twice the size and averaged: the camera has no antialiasing.
        pixels = env.render(2 * VIDEO_SIZE).reshape(VIDEO_SIZE, 2, VIDEO_SIZE, 2, 3)
        helping = outcome.taken_over_at is not None and step > outcome.taken_over_at
        text = f"{outcome.prompt} (expert)" if helping else outcome.prompt
        return caption(pixels.mean((1, 3)).astype(np.uint8), text, outcome.success)

    every = max(1, round(env.spec.metadata.control_hz / FRAME_HZ))  # steps
    env.reset(outcome.task, outcome.seed, resets)
    frames = [draw(0)]
    for step, action in enumerate(outcome.actions, start=1):
        env.step(action)
        if step % every == 0 or step == outcome.steps:
            frames.append(draw(step))
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, "h264", VIDEO_FPS, VIDEO_CRF, keyframe_every=250) as video:
        for frame in [*frames, *[frames[-1]] * LAST_FRAMES]:
            video.write(frame, str(path))
    Image.fromarray(frames[-1]).save(path.with_suffix(".jpg"), quality=85)


def caption(image: Picture, text: str, success: bool) -> Picture:
    """The picture (H, W, 3) with `text` on a strip at its lower edge, green for a success and red for a failure."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(10, picture.height // 18))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > 0.96 * picture.width:
            lines.append(word)
        else:
            lines[-1] = longer
    strip = len(lines) * (picture.height // 12)
    colour = (20, 105, 60) if success else (150, 40, 40)
    draw.rectangle((0, picture.height - strip, picture.width, picture.height), fill=colour)
    middle = (picture.width / 2, picture.height - strip / 2)
    draw.multiline_text(middle, "\n".join(lines), font=font, fill=(255, 255, 255), anchor="mm", align="center")
    return np.asarray(picture)
