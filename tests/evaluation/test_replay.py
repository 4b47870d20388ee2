"""Replaying recorded actions in MetaWorld: bit for bit where nothing is wrong, and the fault by name where something is."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from paligemma_vla import schema
from paligemma_vla.cli.main import main
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation import replay as module
from paligemma_vla.evaluation.collect import CollectConfig, demonstrate
from paligemma_vla.evaluation.envs.metaworld import MetaWorldEnvironment
from paligemma_vla.evaluation.episode import Condition, play
from paligemma_vla.evaluation.recorded import read_recorded
from paligemma_vla.evaluation.replay import ReplayConfig, describe_difference, replay, replay_episode
from paligemma_vla.evaluation.replay_findings import fit_slopes
from paligemma_vla.evaluation.rollout import RECORDED
from paligemma_vla.schema import DatasetMetadata, Episode
from support import write_episodes

EXTRA = {schema.EXECUTED: pa.list_(pa.float32(), 4), schema.RESET: pa.string()}
TASK = "drawer-close"
Recording = tuple[DatasetMetadata, list[Episode]]


class Blind(MetaWorldEnvironment):
    """Draws nothing, which is what takes the time."""

    def render(self, size):
        return np.zeros((size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def env():
    environment = Blind()
    yield environment
    environment.close()


@pytest.fixture(autouse=True)
def _one_simulator(env, monkeypatch):
    """All tests share one simulator, as it was made."""

    def make(name: str) -> MetaWorldEnvironment:
        assert name == "metaworld"
        env.use_control("delta")
        return env

    monkeypatch.setattr(module, "make_environment", make)
    module._environment.cache_clear()
    yield
    module._environment.cache_clear()


def demonstrations(env, control: str = "delta", repeat: int = 4, episodes: int = 2) -> Recording:
    """Of one task, each disturbed by noise."""
    env.use_control(control, repeat)
    config = CollectConfig("metaworld", (TASK,), episodes, Path(), noise_share=1.0, control=control, action_repeat=repeat)
    return env.spec.metadata, [demonstrate(env, config, TASK, number)[0] for number in range(episodes)]


@pytest.fixture(scope="module")
def slow(env) -> Recording:
    """Four demonstrations at 20 Hz."""
    return demonstrations(env, episodes=4)


def write(folder: Path, recording: Recording, change: Callable[[Episode], Episode] = lambda episode: episode) -> str:
    """Write changed episodes; returns the folder."""
    metadata, episodes = recording
    with EpisodeWriter(folder, metadata, extra=EXTRA) as writer:
        for episode in episodes:
            writer.write(change(episode))
    return str(folder)


def multiplied(*factors: float, label_only: bool = False) -> Callable[[Episode], Episode]:
    """Multiplies the actions; those that were executed too, unless label_only."""

    def change(episode: Episode) -> Episode:
        factor = np.float32(factors)
        executed = list(np.stack(episode.extra[schema.EXECUTED]) * (1 if label_only else factor))
        return replace(episode, action=episode.action * factor, extra={**episode.extra, schema.EXECUTED: executed})

    return change


def played(tmp_path: Path, data: str, **options) -> dict:
    result = replay(ReplayConfig("metaworld", (data,), tmp_path / "out", **options))
    assert json.loads((tmp_path / "out" / "replay.json").read_text()) == json.loads(json.dumps(result))
    return result


@pytest.mark.parametrize("control", ["delta", "absolute"])
@pytest.mark.parametrize("repeat", [1, 4])
def test_replay_of_demonstrations_goes_where_the_recording_went(env, tmp_path, control, repeat):
    result = played(tmp_path, write(tmp_path / "data", demonstrations(env, control, repeat)))
    counts = {"episodes": 2, "recorded_successes": 2, "successes": 2, "both": 2, "deviations": 0}
    assert result["tasks"] == {TASK: counts} and result["findings"] == []
    assert all(set(entry["largest_difference"].values()) == {0.0} for entry in result["episodes"]), "to the last bit"


@pytest.mark.parametrize(("control", "number", "name"), [("delta", 1, "delta_y"), ("absolute", 0, "target_x")])
def test_replay_names_the_action_whose_sign_is_turned(env, tmp_path, capsys, control, number, name):
    signs = [-1.0 if n == number else 1.0 for n in range(4)]
    data = write(tmp_path / "data", demonstrations(env, control), multiplied(*signs))
    assert main(["replay", "--env", "metaworld", "--data", data, "--output_dir", str(tmp_path), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert f"action {name} moves the state the other way than in the recording" in printed and "see the findings" in printed
    result = json.loads((tmp_path / "replay.json").read_text())
    assert [(one["action"], one["factor"]) for one in result["findings"] if one["kind"] == "sign"] == [(name, -1.0)]
    assert result["tasks"][TASK]["deviations"] == 2
    found = result["episodes"][0]["deviation"]
    assert found["dimension"] == f"hand_{name[-1]}" and found["unit"] == "m"
    assert abs(found["recorded"] - found["replayed"]) > found["tolerance"]


def test_replay_names_two_turned_signs_together(slow, tmp_path):
    found = played(tmp_path, write(tmp_path / "data", slow, multiplied(-1, 1, 1, -1)))["findings"]
    assert [(one["kind"], one["action"]) for one in found] == [("sign", "delta_x"), ("sign", "gripper")]


def test_replay_estimates_another_scale_and_says_what_is_clipped(slow, tmp_path):
    (found,) = played(tmp_path, write(tmp_path / "half", slow, multiplied(1, 1, 0.4, 1)))["findings"]
    assert (found["kind"], found["action"]) == ("scale", "delta_z") and found["factor"] == pytest.approx(2.5, rel=0.2)
    found = played(tmp_path, write(tmp_path / "millimetres", slow, multiplied(10, 1, 1, 1)))["findings"]
    assert ("range", "delta_x") in [(one["kind"], one["action"]) for one in found]


def test_replay_tells_labels_that_are_not_what_was_executed(slow, tmp_path):
    data = write(tmp_path / "data", slow, multiplied(1, 1, -1, 1, label_only=True))
    result = played(tmp_path, data)
    assert [(one["kind"], one["action"]) for one in result["findings"]] == [("label", "delta_z")]
    assert result["tasks"][TASK]["both"] == 4
    assert played(tmp_path, data, column="action")["tasks"][TASK]["deviations"] == 4


def test_replay_tells_a_start_that_was_cut_off(slow, tmp_path):
    def cut(episode: Episode) -> Episode:
        extra = {name: values[6:] for name, values in episode.extra.items()}
        return replace(
            episode, images=[one[6:] for one in episode.images], state=episode.state[6:], action=episode.action[6:], extra=extra
        )

    assert "start" in [one["kind"] for one in played(tmp_path, write(tmp_path / "data", slow, cut))["findings"]]


def test_replay_of_a_failed_rollout_fails_as_it_did(env, tmp_path):
    env.use_control("delta")
    outcome = play(env, None, "drawer-open", 0, Condition(policy="random", resets="stock", record=tmp_path))
    episode, metadata = outcome.recorded
    with EpisodeWriter(tmp_path / "data", metadata, extra=RECORDED) as writer:
        writer.write(episode)
    (entry,) = played(tmp_path, str(tmp_path / "data"))["episodes"]
    assert (entry["success"], entry["recorded_success"], entry["deviation"]) == (False, False, None)
    assert set(entry["largest_difference"].values()) == {0.0}


def test_replay_takes_some_tasks_and_episodes_and_leaves_out_what_does_not_say_how_it_starts(slow, tmp_path, caplog):
    data = write(tmp_path / "data", slow)
    assert len(played(tmp_path, data, episodes=1, tasks=(f"{TASK}-v3",))["episodes"]) == 1
    with pytest.raises(SimulatorError, match=f"--tasks: got faucet-open, expected some of {TASK}"):
        played(tmp_path, data, tasks=("faucet-open",))
    with EpisodeWriter(tmp_path / "data", slow[0], "other") as writer:
        writer.write(slow[1][0])
    result = played(tmp_path, data)
    assert (result["without_start"], len(result["episodes"])) == (1, 4) and "1 episodes do not say" in caplog.text
    with pytest.raises(SimulatorError, match=r"no column 'reset'.*replay_episode, see docs/replay.md"):
        played(tmp_path, str(tmp_path / "data" / "other-00000.parquet"))


def test_replay_refuses_data_of_another_robot(tmp_path):
    write_episodes(tmp_path / "data")
    with pytest.raises(SimulatorError, match=r"does not fit the environment 'metaworld':\n  state: got 3"):
        played(tmp_path, str(tmp_path / "data"))


def test_replay_episode_moves_what_the_callbacks_move_at_the_recorded_rate():
    actions, position = np.float32([[1, 0], [0, 2], [3, 0]]), np.zeros(2)

    def act(action: np.ndarray) -> bool:
        position[:] += action
        return position[0] >= 4

    began = time.perf_counter()
    replayed = replay_episode(actions, act, lambda: position, hz=50)
    assert time.perf_counter() - began >= 3 / 50
    np.testing.assert_array_equal(replayed.state, [[0, 0], [1, 0], [1, 2]])
    assert replayed.success is True
    assert replay_episode(actions, lambda action: None, lambda: position).success is None


def test_describe_difference_says_step_name_unit_and_both_values():
    metadata = DatasetMetadata(state_names=("x", "y"), state_units=("m", ""))
    recorded, replayed = np.float32([[0, 0], [0, 0], [1, 1]]), np.float32([[0, 0], [0.05, 0], [1, 3]])
    found = describe_difference(recorded, replayed, np.array([0.1, 0.5]), metadata)
    deviation = {"step": 2, "dimension": "y", "unit": "", "recorded": 1.0, "replayed": 3.0, "tolerance": 0.5}
    assert found == {"deviation": deviation, "largest_difference": {"x": pytest.approx(0.05), "y": 2.0}}


def test_fit_slopes_finds_the_dynamics_that_made_the_states():
    rng = np.random.default_rng(0)
    moves, state = np.array([[0.5, 0.0], [0.0, -2.0], [0.0, 0.0]]), [np.zeros(2)]
    actions = rng.normal(size=(50, 3))
    actions[:, 2] = 1.0  # always the same: says nothing
    for action in actions[:-1]:
        state.append(0.9 * state[-1] + action @ moves + rng.normal(size=2) * 1e-4)
    found = fit_slopes([(actions, np.stack(state))])
    np.testing.assert_allclose(found.value, moves, atol=1e-3)
    assert found.clear.tolist() == [[True, False], [False, True], [False, False]]


def test_the_example_for_robots_plays_an_episode(tmp_path, monkeypatch):
    metadata = DatasetMetadata(state_names=("a.pos", "b.pos"), action_names=("a.pos", "b.pos"), control_hz=30.0)
    path = np.linspace((0.2, 0.5), (1, 0), 20, dtype=np.float32)
    picture = b"\xff\xd8\xff"
    with EpisodeWriter(tmp_path / "data", metadata) as writer:
        writer.write(Episode([[picture] * 20], path, path, "wave"))

    class Arm:
        observation_features = action_features = dict.fromkeys(metadata.action_names, float)

        def __init__(self):
            self.sent = [{"a.pos": -1.0, "b.pos": 0.0}]

        def get_observation(self):
            return self.sent[-1]

        def send_action(self, action):
            self.sent.append(action)

    folder = Path(__file__).parents[2] / "examples" / "robots"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    spec = importlib.util.spec_from_file_location("replay_arm", folder / "replay_arm.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    arm = Arm()
    found = example.run(arm, str(tmp_path / "data"), 0)
    assert [tuple(action.values()) for action in arm.sent[-20:]] == [tuple(row) for row in path.tolist()]
    jumps = np.diff([tuple(action.values()) for action in arm.sent], axis=0)
    assert np.abs(jumps).max() < 0.06, "it approaches the start slowly"
    assert found["largest_difference"]["a.pos"] == pytest.approx(0.8 / 19, abs=1e-5), "an arm that is one step late"
    Arm.action_features = {"elbow.pos": float}
    with pytest.raises(SystemExit, match=r"robot: got joints \['elbow.pos'\]"):
        example.run(arm, str(tmp_path / "data"), 0)


def test_read_recorded_gives_the_numbers_of_every_episode(slow, tmp_path):
    index = EpisodeIndex.build(write(tmp_path / "data", slow))
    for got, expected in zip(read_recorded(index), slow[1], strict=True):
        np.testing.assert_array_equal(got.state, expected.state)
        np.testing.assert_array_equal(got.action, expected.action)
        np.testing.assert_array_equal(got.executed, np.stack(expected.extra[schema.EXECUTED]))
        assert (got.prompt, got.success, got.start.task) == (expected.prompt, True, TASK)
