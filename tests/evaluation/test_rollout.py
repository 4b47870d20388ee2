"""Closed-loop evaluation with policies made for the test: intervals, conditions, controls, films, failures."""

from __future__ import annotations

import argparse
import io
import json
import os
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paligemma_vla.cli import rollout as command
from paligemma_vla.cli.main import main
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.errors import SimulatorError, WorkerError
from paligemma_vla.evaluation.compare import wilson_interval
from paligemma_vla.evaluation.envs import Start, make_environment
from paligemma_vla.evaluation.envs.metaworld import ABSOLUTE_METADATA, SPEC
from paligemma_vla.evaluation.episode import Condition, caption, check_compatible, play, split_limit, write_video
from paligemma_vla.evaluation.rollout import RolloutConfig, RolloutPool
from paligemma_vla.export.card import read_measurement
from paligemma_vla.schema import DatasetMetadata


def described(robot: DatasetMetadata) -> dict:
    """`Policy.metadata` of a policy for a robot."""
    return {**asdict(robot), "cameras": ["image_1"], "camera_names": robot.cameras, "state_dim": 4, "action_dim": 4}


METADATA = described(SPEC.metadata)


class Expert:
    """MetaWorld's expert behind a policy's face: one sure action, repeated; it notes how it was asked."""

    metadata = METADATA
    horizon = 4

    def __init__(self, env) -> None:
        self.env, self.calls = env, []

    def infer(self, observation, *, seed=None, num_steps=None, continuation=None, realtime=None):
        self.calls.append((observation, seed, num_steps))
        return {"actions": np.repeat(self.env.expert_action()[None], self.horizon, axis=0)}


class Absolute(Expert):
    metadata = described(ABSOLUTE_METADATA)


class Slow(Expert):
    metadata = METADATA | {"control_hz": 20.0}


class Mistaken(Expert):
    """At 20 Hz; it believes the handle to be elsewhere in every other episode, and fails there, as policies do."""

    metadata = METADATA | {"control_hz": 20.0}
    episodes = 0

    def infer(self, observation, *, seed=None, num_steps=None, continuation=None, realtime=None):
        seen = self.env._observed
        if self.env._task().simulator.curr_path_length == 0:
            self.episodes += 1
        self.env._observed = seen + np.where(np.isin(np.arange(len(seen)), (4, 5)), 0.15 * (self.episodes % 2), 0.0)
        try:
            return super().infer(observation, seed=seed, num_steps=num_steps)
        finally:
            self.env._observed = seen


class Contradictory(Expert):
    metadata = METADATA | {"action_representation": "absolute"}


class DifferentRate(Expert):
    metadata = METADATA | {"control_hz": 30.0}  # no whole part of the simulator's 80


def fails(env):
    """A factory that raises when it is first called in a process, and then ends that process."""
    if hasattr(fails, "called"):
        os._exit(9)
    fails.called = True
    raise RuntimeError("no such weights")


@pytest.fixture(scope="module")
def env():
    environment = make_environment("metaworld")
    yield environment
    environment.close()


def test_orientation_that_the_checkpoint_does_not_say_is_compatible_and_logged(caplog):
    check_compatible(METADATA, SPEC)
    assert not caplog.messages
    check_compatible(METADATA | {"image_orientation": ""}, SPEC)
    assert "here it is upright" in caplog.text


def test_check_compatible_names_every_difference():
    check_compatible(METADATA, SPEC)
    check_compatible(METADATA | {"control_hz": 0.0, "action_names": [], "camera_names": []}, SPEC)
    units = {"state_units": ["mm"] * 4, "action_units": ["m"] * 4, "action_representation": "absolute"}
    wrong = {"image_orientation": "upside-down", "camera_names": ["wrist"], "control_hz": 10.0, **units}
    with pytest.raises(SimulatorError) as caught:
        check_compatible(METADATA | wrong | {"action_dim": 7}, SPEC)
    fields = ["cameras" if name == "camera_names" else name for name in wrong]
    assert all(f"\n  {field}: got " in str(caught.value) for field in ("action", *fields))
    with pytest.raises(SimulatorError, match="cameras: got 2, expected 1"):
        check_compatible(METADATA | {"camera_names": [], "cameras": ["image_1", "image_2"]}, SPEC)


def test_video_goes_the_way_of_its_episode(env, tmp_path):
    outcome = play(env, Expert(env), "window-close", 3, Condition())
    end = env.observe()
    env.reset("drawer-open", 0)
    write_video(tmp_path / "videos" / "film.mp4", env, outcome, "demo")
    again = env.observe()
    assert outcome.success and all(np.array_equal(end[key], again[key]) for key in ("state", "image_1"))


def test_caption_is_as_many_lines_as_it_needs():
    picture, strip = np.full((256, 256, 3), 120, np.uint8), 256 // 12
    for text, lines in (
        ("open the drawer", 1),
        ("pick up the black bowl between the plate and the ramekin and place it on the plate", 3),
    ):
        drawn = caption(picture, text, success=True)
        changed = (drawn != picture).any(axis=(1, 2))
        assert changed.sum() == pytest.approx(lines * strip, abs=1) and changed[-1]
        white = np.flatnonzero((drawn > 200).all(-1).any(0))
        assert 0 < white.min() < white.max() < 255, "nothing is cut"


def test_play_asks_once_per_executed_chunk(env):
    policy, every = Expert(env), Expert(env)
    outcome = play(env, policy, "faucet-open", 0, Condition(num_steps=3))
    assert outcome.success and outcome.steps < 90
    assert len(policy.calls) == -(-outcome.steps // 2), "half of the horizon of 4 is executed"
    assert {num_steps for _, _, num_steps in policy.calls} == {3}
    assert len({seed for _, seed, _ in policy.calls}) == len(policy.calls), "each chunk starts from other noise"
    assert set(policy.calls[0][0]) == {"image_1", "state", "prompt"}
    assert play(env, every, "faucet-open", 0, Condition(execute=1)).steps == len(every.calls)
    with pytest.raises(SimulatorError, match="--execute: got 5, expected 1 to 4"):
        play(env, Expert(env), "faucet-open", 0, Condition(execute=5))


def test_play_start_depends_on_seed_task_and_number_only(env):
    """Not on the instruction, nor on what hides the scene."""

    def first(task, index, **condition):
        policy = Expert(env)
        outcome = play(env, policy, task, index, Condition(**condition))
        return outcome.seed, policy.calls

    seed, calls = first("drawer-close", 1)
    for kind, said in {"opposite": env.prompts("drawer-open", "own"), "unseen": env.prompts("drawer-close", "unseen")}.items():
        other_seed, other = first("drawer-close", 1, prompts=kind)
        assert other_seed == seed and other[0][0]["prompt"] in said
        np.testing.assert_array_equal(calls[0][0]["image_1"], other[0][0]["image_1"])
    assert calls[0][0]["prompt"] in env.prompts("drawer-close", "own")
    grey_seed, grey = first("drawer-close", 1, image="grey")
    assert grey_seed == seed and all((observation["image_1"] == 127).all() for observation, _, _ in grey)
    assert len({tuple(observation["state"]) for observation, _, _ in grey}) > 5
    others = first("drawer-close", 1, seed=1), first("drawer-open", 1), first("drawer-close", 2)
    assert len({seed, *(other for other, _ in others)}) == 4


def test_rollout_pool_is_independent_of_workers_and_serves_several_conditions(tmp_path):
    config = RolloutConfig(tasks=("drawer-close-v3",), episodes=2, max_videos=1, output_dir=tmp_path)
    random = RolloutConfig(tasks=("drawer-open",), episodes=1, policy="random")
    with RolloutPool("metaworld", policy_factory=Expert, workers=2) as pool:
        result, randomly = pool.run(config), pool.run(random)
        stock = pool.run(replace(config, resets="stock", episodes=1, output_dir=None))
    with RolloutPool("metaworld", policy_factory=Expert, workers=0) as pool:
        assert pool.run(replace(config, output_dir=None))["episodes"] == result["episodes"]
    with RolloutPool("metaworld", workers=0) as pool:
        assert pool.run(random)["episodes"] == randomly["episodes"], "random actions need no policy"
    assert result["episodes"][0]["seed"] == stock["episodes"][0]["seed"] and stock["settings"]["resets"] == "stock"
    assert result["mean_success"] == stock["mean_success"] == 1.0 and randomly["mean_success"] == 0.0
    check_written(tmp_path)


def test_rollout_plays_a_policy_in_the_control_its_metadata_names():
    config = RolloutConfig(tasks=("faucet-close",), episodes=1, execute=1)
    played, jerks = [], []
    for factory in (Expert, Absolute):
        with RolloutPool("metaworld", policy_factory=factory, workers=0) as pool:
            random = pool.run(replace(config, policy="random"))  # before the policy is asked for anything
            (episode,) = pool.run(config)["episodes"]
            jerks.append(episode.pop("jerk"))
            played.append((episode, random["mean_success"]))
    assert played[0] == played[1], "the expert's targets lead where its deltas lead"
    assert jerks[0] == pytest.approx(jerks[1], rel=1e-4)


def test_rollout_plays_a_policy_at_its_own_rate():
    config = RolloutConfig(tasks=("faucet-close",), episodes=2, execute=1)
    steps = {}
    for factory in (Expert, Slow):
        with RolloutPool("metaworld", policy_factory=factory, workers=0) as pool:
            result = pool.run(config)
            assert result["mean_success"] == 1
            steps[factory] = result["tasks"]["faucet-close"]["mean_steps_to_success"]
    assert steps[Slow] == pytest.approx(steps[Expert] / 4, abs=2)


def check_written(folder: Path) -> None:
    written = json.loads((folder / "rollout.json").read_text())
    assert set(written) == {"settings", "tasks", "mean_success", "episodes", "videos", "wall_s"}
    entry = written["tasks"]["drawer-close"]
    assert (entry["successes"], entry["episodes"], entry["rate"]) == (2, 2, 1.0)
    assert entry["ci95"] == pytest.approx(wilson_interval(2, 2))
    steps = [episode["steps"] for episode in written["episodes"] if episode["task"] == "drawer-close"]
    assert entry["mean_steps_to_success"] == np.mean(steps)
    assert written["settings"]["versions"]["metaworld"] == "3.1.1"
    (video,) = written["videos"]
    assert (video["task"], video["success"]) == ("drawer-close", True)
    assert video["prompt"] in {episode["prompt"] for episode in written["episodes"]}
    with av.open(str(folder / video["path"])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 256, 256)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) > 20
    assert np.abs(frames[0][:230].astype(int) - frames[-1][:230]).mean() > 2, "nothing moved"
    assert Image.open(folder / video["poster"]).size == (256, 256)


def test_rollout_pool_surfaces_what_goes_wrong():
    config = RolloutConfig(tasks=("faucet-close",), episodes=1, policy="random")
    with RolloutPool("metaworld", workers=0) as pool:
        for change, message in [
            ({"policy": "checkpoint"}, "got no checkpoint"),
            ({"tasks": ("drawer-opem",)}, "did you mean 'drawer-open'"),
            ({"prompts": "unseen", "tasks": ("push",)}, "--prompts unseen: task 'push' has none"),
        ]:
            with pytest.raises(SimulatorError, match=message):
                pool.run(replace(config, **change))


@pytest.mark.timeout(180)
def test_rollout_pool_reports_a_policy_that_cannot_play():
    """Also a worker that is lost, instead of waiting for it."""
    config = RolloutConfig(tasks=("faucet-close",), episodes=1)
    for factory, message in ((DifferentRate, "control_hz: got 30.0, expected 80.0"), (Contradictory, "action_names: got ")):
        with RolloutPool("metaworld", policy_factory=factory, workers=0) as pool, pytest.raises(SimulatorError, match=message):
            pool.run(config)
    with RolloutPool("metaworld", policy_factory=fails, workers=1) as pool:
        with pytest.raises(RuntimeError, match="no such weights"):
            pool.run(config)
        with pytest.raises(WorkerError, match="worker process died"):
            pool.run(config)


def test_recorded_episodes_are_those_that_were_played(tmp_path):
    folder = tmp_path / "D"
    config = RolloutConfig(tasks=("drawer-close",), episodes=2, record=folder)
    plain = replace(config, record=None)
    with RolloutPool("metaworld", policy_factory=Expert, workers=0) as pool:
        result = pool.run(config)
        failed = pool.run(replace(plain, tasks=("drawer-open",), policy="random", record=tmp_path / "failed", episodes=1))
        with pytest.raises(SimulatorError, match=r"drawer-close-00000.parquet is there already; give another folder"):
            pool.run(config)
        assert pool.run(plain)["episodes"] == result["episodes"], "to record changes nothing"
    index = EpisodeIndex.build(str(folder))
    assert index.layout.metadata.action_names == SPEC.metadata.action_names
    assert index.length.tolist() == [episode["steps"] for episode in result["episodes"]]
    assert main(["data", "check", str(folder), "--exclusion_list", str(tmp_path / "none.json")]) == 0
    found = pq.read_table(folder / "drawer-close-00000.parquet").to_pylist()
    assert all(row["is_terminal"] == row["is_last"] and row["success"] for row in found)
    rows = pq.read_table(next((tmp_path / "failed").glob("*.parquet"))).to_pylist()
    assert not any(row["success"] or row["is_terminal"] for row in rows) and len(rows) == failed["episodes"][0]["steps"]
    with closing(make_environment("metaworld")) as env:
        view = Start.from_json(found[0]["reset"], "row 0").reset(env)
        for row in found[:20]:  # what is recorded leads where it led
            np.testing.assert_allclose(row["state"], view["state"], atol=1e-6)
            seen = np.asarray(Image.open(io.BytesIO(row["image_1_bytes"])), np.int16)
            assert np.abs(seen - view["image_1"]).mean() < 4
            env.step(np.array(row["action"], np.float32))
            view = env.observe()


def test_expert_takes_over_where_the_policy_fails_and_is_counted_apart(tmp_path):
    folder = tmp_path / "D"
    alone = RolloutConfig(tasks=("window-close",), episodes=2, execute=4)
    config = replace(alone, take_over="expert", record=folder)
    with RolloutPool("metaworld", policy_factory=Mistaken, workers=0, image_size=16) as pool:
        result, plain = pool.run(config), pool.run(alone)
    for task, entry in result["tasks"].items():
        assert {name: entry[name] for name in plain["tasks"][task]} == plain["tasks"][task], "the policy's own success"
        assert (entry["successes"], entry["taken_over"], entry["solved_with_help"]) == (1, 1, 1)
    played = result["episodes"]
    assert [episode["taken_over_at"] for episode in played] == [None if episode["success"] else 37 for episode in played]
    index = EpisodeIndex.build(str(folder))
    assert index.length.tolist() == [episode["steps"] for episode in played]
    rows = [row for path in index.paths for row in pq.read_table(path, columns=["actor", "success"]).to_pylist()]
    for start, length, episode in zip(np.cumsum([0, *index.length[:-1]]), index.length, played, strict=True):
        own = length if episode["success"] else 37
        acted = [row["actor"] for row in rows[start : start + length]]
        assert acted == ["policy"] * own + ["intervention"] * (length - own)
        assert all(row["success"] for row in rows[start : start + length])
    assert main(["data", "check", str(folder), "--exclusion_list", str(tmp_path / "none.json")]) == 0


def test_expert_takes_over_after_as_many_actions_as_are_given(env, tmp_path):
    config = RolloutConfig(tasks=("faucet-open",), episodes=1, policy="random", take_over="expert", take_over_after=3)
    with RolloutPool("metaworld", workers=0) as pool:
        (episode,) = pool.run(config)["episodes"]
        assert (episode["taken_over_at"], episode["success"], episode["solved_with_help"]) == (3, False, True)
        with pytest.raises(SimulatorError, match="--take_over_after: got 500, expected less than 500, the longest episode"):
            pool.run(replace(config, take_over_after=500))
        with pytest.raises(SimulatorError, match="got a number without --take_over expert; give both"):
            pool.run(replace(config, take_over=None))
    assert split_limit(env, "push", Condition(take_over="expert")) == (250, 500), "half of what MetaWorld allows"


def test_only_what_failed_is_played_again(tmp_path):
    config = RolloutConfig(tasks=("window-close",), episodes=2, execute=4, output_dir=tmp_path)
    again = replace(config, failed_in=tmp_path / "rollout.json", output_dir=tmp_path / "again", take_over="expert")
    with RolloutPool("metaworld", policy_factory=Mistaken, workers=0, image_size=16) as pool:
        failed = [episode for episode in pool.run(config)["episodes"] if not episode["success"]]
        assert len(failed) == 1
        played = pool.run(replace(again, take_over_after=8))
        assert [episode["seed"] for episode in played["episodes"]] == [episode["seed"] for episode in failed]
        assert json.loads((tmp_path / "again" / "rollout.json").read_text())["settings"]["failed_in"] == str(again.failed_in)
        card = read_measurement(tmp_path / "again" / "rollout.json")
        assert card.rows[0][1] == "0/1" and "Only starts that failed" in card.note and "the policy's alone" in card.note
        with pytest.raises(SimulatorError, match="other starts: seed: got 1, expected 0 as there; give the same --seed"):
            pool.run(replace(again, seed=1))
        with pytest.raises(SimulatorError, match="the policy failed in none of 2 episodes of drawer-open; give others"):
            pool.run(replace(again, tasks=("drawer-open",)))


def test_command_line_writes_rollout_json(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = ["--env", "metaworld", "--tasks", "faucet-open", "--episodes", "1", "--output_dir", str(tmp_path)]
    options = ["--policy", "random", "--workers", "0", "--seed", "2", "--resets", "stock", "--max_videos", "0"]
    assert command.main(parser.parse_args([*arguments, *options])) == 0
    assert "faucet-open" in capsys.readouterr().out
    written = json.loads((tmp_path / "rollout.json").read_text())
    assert written["settings"]["resets"] == "stock" and written["settings"]["seed"] == 2
    on_the_card = read_measurement(tmp_path / "rollout.json")
    assert on_the_card.checkpoint is None and on_the_card.rows[0][0] == "faucet-open"
    with pytest.raises(SystemExit):
        parser.parse_args([*arguments, "--prompts", "wrong"])
