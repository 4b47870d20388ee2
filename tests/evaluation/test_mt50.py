"""MetaWorld as MT50 is published with pictures: against the recipe of LeRobot's environment, in MetaWorld's own words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.envs import make_environment, named_tasks, protocol_seed
from paligemma_vla.evaluation.envs.metaworld import MetaWorldEnvironment


@pytest.fixture(scope="module")
def env() -> Iterator[MetaWorldEnvironment]:
    with closing(make_environment("metaworld:mt50", 96)) as made:
        yield made


@pytest.mark.parametrize("task", ["reach", "drawer-open", "pick-place-wall"])
def test_starts_are_those_of_the_published_environment(env: MetaWorldEnvironment, task: str) -> None:
    import metaworld

    benchmark = metaworld.MT1(f"{task}-v3", seed=42)
    published = benchmark.train_classes[f"{task}-v3"]()
    published.set_task(benchmark.train_tasks[0])
    published._freeze_rand_vec, published.seeded_rand_vec = False, True
    for seed in (3, 4):
        published.seed(seed)
        published.reset(seed=seed)
        seen = env.reset(task, seed, "protocol")["state"]
        # To a millimetre: there, the last episode's object is still in the model when the hand goes home.
        assert np.allclose(seen, published._get_obs()[:4], atol=1e-3)
        ours = env._task().simulator
        assert np.array_equal(ours._target_pos, published._target_pos)
        # After a step: there, what was moved last is seen where it was before.
        published.step(np.zeros(4, np.float32))
        env.step(np.zeros(4))
        assert np.allclose(ours._get_pos_objects(), published._get_pos_objects(), atol=1e-3)


def test_the_picture_is_of_the_published_camera_and_shows_the_goal(env: MetaWorldEnvironment) -> None:
    env.reset("reach", 0, "protocol")
    shown = env.render(96).astype(int)
    model = env._task().simulator.model
    assert np.array_equal(model.camera("corner2").pos, [0.75, 0.075, 0.7])
    goal = model.site("goal").id
    colour = model.site_rgba[goal].copy()
    model.site_rgba[goal, 3] = 0
    hidden = env.render(96).astype(int)
    model.site_rgba[goal] = colour
    changed = np.abs(shown - hidden).max(axis=-1) > 20
    assert 4 < changed.sum() < 400
    assert shown[changed][:, 0].mean() > shown[changed][:, 1:].mean() + 50, "a red ball"
    drawn = env._task().cameras[96].render(env._task().simulator.data)
    assert np.array_equal(shown, drawn[::-1, ::-1]), "turned by 180 degrees"
    assert np.array_equal(env.observe()["image_1"], shown)


def test_all_tasks_have_500_steps_and_the_groups_are_the_published_ones(env: MetaWorldEnvironment) -> None:
    suites = env.suites()
    sizes = {name: len(tasks) for name, tasks in suites.items()}
    assert sizes == {"mt50": 50, "mt50_easy": 28, "mt50_medium": 11, "mt50_hard": 6, "mt50_very_hard": 5}
    assert named_tasks(env, ["mt50_easy", "mt50_medium", "mt50_hard", "mt50_very_hard"]) != suites["mt50"]
    assert {env.max_steps(task) for task in named_tasks(env, ["mt50"])} == {500}
    env.use_control("delta", 4)
    assert (env.max_steps("drawer-open"), env.spec.metadata.cameras) == (125, ("corner2",))
    env.use_control("delta")
    assert not env.can_start_done("drawer-open")


def test_other_environments_have_no_published_starts(env: MetaWorldEnvironment) -> None:
    with closing(make_environment("metaworld")) as other, pytest.raises(SimulatorError, match="metaworld:mt50 has"):
        other.reset("reach", protocol_seed(0, 0), "protocol")
