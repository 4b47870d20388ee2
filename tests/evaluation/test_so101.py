"""SO-101 behind the interface of simulators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.envs import make_environment
from paligemma_vla.evaluation.envs.so101 import MAX_STEPS, SO101Environment

TASK = "pick-place"


@pytest.fixture(scope="module")
def env() -> Iterator[SO101Environment]:
    with closing(make_environment("so101", 64)) as made:
        yield made


def test_its_expert_puts_the_cube_on_the_disc(env: SO101Environment) -> None:
    for seed, away in ((0, False), (1, True)):
        env.reset(TASK, seed, start_away=away)
        took = next(step for step in range(MAX_STEPS) if env.step(env.expert_action()).success)
        assert took < 80


def test_an_episode_is_a_function_of_its_start_and_actions(env: SO101Environment) -> None:
    def play(seed: int) -> list[np.ndarray]:
        first = env.reset(TASK, seed, start_away=True)
        states = [env.step(np.array([0.5, 0.2, -0.3, 0.0])).state for _ in range(3)]
        return [*first.values(), *states, *env.observe().values()]

    once = play(3)
    play(4)
    assert all(map(np.array_equal, once, play(3)))


def test_the_picture_shows_where_the_cube_has_to_go(env: SO101Environment) -> None:
    seen = {}
    for seed in (0, 1):
        env.reset(TASK, seed)
        picture = env.render(128).astype(int)
        green = (picture[..., 1] > picture[..., 0] + 60) & (picture[..., 1] > picture[..., 2] + 30)
        assert green.sum() > 20
        across = np.nonzero(green)[1].mean()
        seen[seed] = across, env._env.goal_pos[1]
    (first, left), (second, other) = seen.values()
    assert (first - second) * (left - other) > 0, "the camera looks at the robot, so its y points to the right"


def test_it_says_what_it_takes(env: SO101Environment) -> None:
    layout = env.spec.layout
    assert env.reset(TASK, 0)["state"].shape == (layout.state_dim,) == (14,)
    assert (layout.metadata.control_hz, env.spec.action_low[3]) == (10, 0)
    assert not set(env.prompts(TASK, "own")) & set(env.prompts(TASK, "unseen"))
    for _ in range(8):  # at first the hand turns downwards
        env.step(env.expert_action())
    held, _, after = (env.step(env.hold_action()).state for _ in range(3))
    assert np.abs(after[-3:] - held[-3:]).max() < 0.01
    with pytest.raises(SimulatorError, match="got 'absolute' with 1"):
        env.use_control("absolute")
    with pytest.raises(SimulatorError, match="did you mean 'pick-place'"):
        env.reset("pickplace", 0)
    with pytest.raises(SimulatorError, match="it has neither"):
        env.reset(TASK, 0, "protocol")
