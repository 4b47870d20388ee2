"""Collecting demonstrations: what is stored, and that it depends on the seed alone."""

from __future__ import annotations

import argparse
import io
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paligemma_vla import schema
from paligemma_vla.cli import collect as command
from paligemma_vla.errors import DataError, SimulatorError
from paligemma_vla.evaluation.collect import CollectConfig, collect, correlated_noise, demonstrate
from paligemma_vla.evaluation.envs import Start
from paligemma_vla.evaluation.envs.metaworld import ABSOLUTE_METADATA, METADATA, MetaWorldEnvironment
from paligemma_vla.evaluation.envs.metaworld_tasks import prompts


class Blind(MetaWorldEnvironment):
    """Draws nothing, which is what takes the time."""

    def render(self, size):
        return np.zeros((size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def simulator():
    environment = Blind()
    yield environment
    environment.close()


@pytest.fixture
def env(simulator):
    simulator.use_control("delta")
    return simulator


@pytest.fixture
def config(tmp_path: Path) -> CollectConfig:
    return CollectConfig("metaworld", ("drawer-close-v3", "faucet-open"), episodes=2, output_dir=tmp_path, seed=4, workers=0)


class Spy:
    """Records the expert's and the executed actions and the hand's target before each step; can make every expert fail."""

    def __init__(self, env, fail: int = 0) -> None:
        self._env, self._fail = env, fail
        self.clean, self.executed, self.targets, self.resets = [], [], [], []

    def __getattr__(self, name):
        return getattr(self._env, name)

    def max_steps(self, task):
        return 90 if self._fail else self._env.max_steps(task)

    def reset(self, task, seed, resets="demo", **options):
        self.clean, self.executed, self.targets = [], [], []
        self.resets.append(options | {"seed": seed})
        return self._env.reset(task, seed, resets, **options)

    def expert_action(self):
        self.clean.append(self._env.expert_action())
        return self.clean[-1]

    def step(self, action):
        self.executed.append(np.array(action))
        self.targets.append(self._env._target().copy())
        result = self._env.step(action)
        return replace(result, success=False) if len(self.resets) <= self._fail else result


def table(folder: Path, task: str):
    return pq.read_table(folder / f"{task}-00000.parquet")


def described(written) -> schema.DatasetMetadata:
    """The metadata of a table, without the settings of its collection."""
    return replace(schema.DatasetMetadata.from_json(written.schema.metadata[schema.METADATA_KEY]), extra={})


def test_demonstrate_executes_noise_and_stores_the_clean_action(env, config):
    for share in (1.0, 0.0):
        spy = Spy(env)
        episode = demonstrate(spy, replace(config, noise_share=share), "faucet-open", 0)[0]
        clean, executed = np.stack(spy.clean), np.stack(spy.executed)
        np.testing.assert_array_equal(episode.action, clean)
        np.testing.assert_array_equal(np.stack(episode.extra[schema.EXECUTED]), executed)
        assert np.abs(clean).max() <= 1 and np.abs(executed).max() <= 1
        disturbance = np.abs(executed - clean)
        assert disturbance[:, :3].mean() > 0.05 if share else disturbance.max() == 0
        assert disturbance[:, 3].max() == 0, "the gripper is not disturbed"


def test_slip_lets_the_gripper_do_the_opposite_for_a_moment_and_stores_what_was_meant(env, config):
    slipped = []
    for index in range(4):
        spy = Spy(env)
        episode = demonstrate(spy, replace(config, noise_share=0.0, slip_share=1.0), "faucet-open", index)[0]
        clean, executed = np.stack(spy.clean)[-episode.length :], np.stack(spy.executed)[-episode.length :]
        np.testing.assert_array_equal(episode.action, clean)
        np.testing.assert_array_equal(executed[:, :3], clean[:, :3])
        steps = np.flatnonzero(executed[:, 3] != clean[:, 3])
        np.testing.assert_array_equal(executed[steps, 3], -clean[steps, 3])
        assert len(steps) <= 12 and np.array_equal(steps, np.arange(len(steps)) + (steps[0] if len(steps) else 0))
        slipped.append(len(steps))
    assert max(slipped) >= 4, "a slip after the end of an episode is none"


def test_demonstrate_in_absolute_control_is_the_same_demonstration(env, config):
    """The robot moves alike; the recorded targets are where the recorded deltas would have led it."""
    delta = demonstrate(env, replace(config, noise_share=1.0), "drawer-open", 1)[0]
    env.use_control("absolute")
    spy = Spy(env)
    absolute = demonstrate(spy, replace(config, noise_share=1.0, control="absolute"), "drawer-open", 1)[0]
    np.testing.assert_allclose(absolute.state, delta.state, atol=1e-4)
    assert absolute.prompt == delta.prompt
    np.testing.assert_array_equal(absolute.action[:, 3], delta.action[:, 3])
    metaworld = env._task().simulator  # which keeps the target in the task's workspace
    expected = np.clip(np.stack(spy.targets) + delta.action[:, :3] / 100, metaworld.mocap_low, metaworld.mocap_high)
    np.testing.assert_allclose(absolute.action[:, :3], expected, atol=2e-5)
    disturbed = np.abs(np.stack(spy.executed) - absolute.action)
    assert 5e-4 < disturbed[:, :3].mean() < 5e-3, "the noise is that of deltas: some millimetres"
    assert disturbed[:, 3].max() == 0


@pytest.mark.parametrize("control", ["delta", "absolute"])
def test_demonstrate_with_repeated_actions_takes_as_long_in_fewer_rows(env, config, control):
    """Rows, noise, and what is added at the end are those of the same time."""
    config = replace(config, noise_share=0.0, control=control)
    for index in (0, 10):  # the second starts done
        env.use_control(control)
        every = demonstrate(env, config, "drawer-close", index)[0]
        env.use_control(control, 4)
        fourth = demonstrate(env, replace(config, action_repeat=4), "drawer-close", index)[0]
        assert every.length / 4 - 2 <= fourth.length <= every.length / 4 + 3
        np.testing.assert_array_equal(fourth.state[0], every.state[0])
        np.testing.assert_allclose(fourth.state[-1], every.state[-1], atol=0.03)
    noises = correlated_noise(np.random.default_rng(0), replace(config, noise_share=1.0, action_repeat=4), 3)
    values = np.stack([next(noises) for _ in range(6000)])
    assert np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1] == pytest.approx(0.9**4, abs=0.05)


def test_replaying_recorded_targets_reproduces_the_episode_exactly(env, config):
    env.use_control("absolute")
    spy = Spy(env)
    episode = demonstrate(spy, replace(config, noise_share=0.0, control="absolute"), "drawer-open", 1)[0]
    options = dict(spy.resets[-1])
    seen = [env.reset("drawer-open", options.pop("seed"), **options)["state"]]
    success = False
    for action in episode.action:
        success |= env.step(action).success
        seen.append(env.observe()["state"])
    assert success
    np.testing.assert_array_equal(np.stack(seen[: episode.length]), episode.state)


def test_collect_says_what_its_control_is_and_refuses_a_folder_with_other_settings(config, tmp_path):
    config = replace(config, tasks=("drawer-close",), episodes=1, control="absolute")
    collect(config)
    written = table(tmp_path, "drawer-close")
    assert described(written) == ABSOLUTE_METADATA
    state, action = (np.array(written[name].to_pylist()) for name in ("state", "action"))
    assert np.abs(action[:, :3] - state[:, :3]).max() < 0.15, "targets lie some centimetres ahead of the hand"
    for other in ({"control": "delta"}, {"seed": 5}, {"action_repeat": 2}):
        with pytest.raises(SimulatorError, match=r"(?s)other settings.*'seed': 4.*'control': 'absolute'.*expected"):
            collect(replace(config, **other))


def test_settings_of_delta_control_are_those_of_before_there_was_a_choice(config):
    """So that a folder of then can be gone on with."""
    assert config.settings() == (
        "{'env': 'metaworld', 'seed': 4, 'image_size': 64, 'noise_share': 0.5, 'noise_scale': (0.1, 0.3), 'noise_memory': 0.9, "
        "'steps_after_success': 8, 'done_every': 6, 'done_steps': 80, 'revision': 2}"
    )


def test_collect_stores_how_each_episode_started(config, tmp_path):
    collect(replace(config, tasks=("drawer-close",), done_every=2))
    written = table(tmp_path, "drawer-close")
    starts = [Start.from_json(text, "column reset") for text in dict.fromkeys(written[schema.RESET].to_pylist())]
    assert [(start.task, start.start_away, start.start_done) for start in starts] == [
        ("drawer-close", False, False),
        ("drawer-close", True, False),
    ]
    first = np.flatnonzero(written[schema.IS_FIRST].to_numpy())
    with closing(Blind()) as env:
        for start, row in zip(starts, first.tolist(), strict=True):
            np.testing.assert_array_equal(start.reset(env)["state"], written[schema.STATE][row].as_py())


def test_collect_goes_on_in_a_folder_without_the_further_columns(config, tmp_path, caplog):
    """One that an earlier version collected: the episodes are the same, so the folder stays one data set."""
    config = replace(config, tasks=("faucet-open",))
    collect(replace(config, output_dir=tmp_path / "new"))
    collect(replace(config, episodes=1))
    path = tmp_path / "faucet-open-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns([schema.EXECUTED, schema.RESET]), path)
    assert collect(config).episodes == 1
    assert "has no column executed_action, reset" in caplog.text
    both = pa.concat_tables([pq.read_table(file) for file in sorted(tmp_path.glob("*.parquet"))])
    assert both.equals(table(tmp_path / "new", "faucet-open").select(both.column_names))


def test_start_refuses_what_is_no_start():
    start = Start("drawer-open", 3, "stock", start_away=True)
    assert Start.from_json(start.to_json(), "x") == start
    for text, fault in (("{}", "task: got"), (start.to_json().replace("3", "true"), "seed: got True"), ("[", "file: row 4")):
        with pytest.raises(DataError, match=fault):
            Start.from_json(text, "file: row 4")


def test_correlated_noise_has_the_memory_and_scale_it_was_given(config):
    config = replace(config, noise_share=1.0, noise_scale=(0.3, 0.3))
    noises = correlated_noise(np.random.default_rng(0), config, 3)
    values = np.stack([next(noises) for _ in range(6000)])
    assert values.std() == pytest.approx(0.3, rel=0.1)
    assert np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1] == pytest.approx(config.noise_memory, abs=0.03)


def test_demonstrate_records_eight_steps_after_success(env, config):
    counts = []
    for after in (0, 8):
        episode = demonstrate(env, replace(config, noise_share=0.0, steps_after_success=after), "faucet-close", 0)[0]
        assert episode.length == len(episode.images[0]) == len(episode.state)
        assert episode.is_terminal
        counts.append(episode.length)
    assert counts[1] == counts[0] + 8


def test_demonstrate_retries_a_failed_attempt_with_another_start(env, config, monkeypatch):
    spy = Spy(env, fail=1)
    _, attempts = demonstrate(spy, config, "drawer-close", 0)
    assert attempts == 2
    assert spy.resets[0]["seed"] != spy.resets[1]["seed"]
    monkeypatch.setattr("paligemma_vla.evaluation.collect.MAX_ATTEMPTS", 1)
    with pytest.raises(SimulatorError, match="'drawer-close': its expert failed 1 times"):
        demonstrate(Spy(env, fail=100), config, "drawer-close", 0)


def test_demonstrate_starts_half_away_and_some_done(env, config):
    spy = Spy(env)
    lengths = [demonstrate(spy, config, "drawer-close", index)[0].length for index in (0, 1, 9, 10, 11)]
    assert [r["start_away"] for r in spy.resets] == [False, True, True, False, True]
    assert [r["start_done"] for r in spy.resets] == [False, False, False, True, True]
    assert min(lengths[3:]) >= config.done_steps


def test_collect_output_does_not_depend_on_workers_or_interruption(config, tmp_path):
    complete, parallel, resumed = (replace(config, output_dir=tmp_path / name) for name in "abc")
    summary = collect(complete)
    collect(replace(parallel, workers=2))
    collect(replace(resumed, episodes=1))
    assert (summary.episodes, collect(resumed).episodes) == (4, 2)
    assert set(summary.expert_success) == {"drawer-close", "faucet-open"}
    tables = {task: table(complete.output_dir, task) for task in summary.expert_success}
    assert summary.frames == sum(map(len, tables.values()))
    for task, expected in tables.items():
        assert expected.equals(table(parallel.output_dir, task))
        parts = [pq.read_table(path) for path in sorted(resumed.output_dir.glob(f"{task}-*.parquet"))]
        assert len(parts) == 2
        assert pa.concat_tables(parts).equals(expected)
        assert sum(expected[schema.IS_FIRST].to_pylist()) == 2
        assert described(expected) == METADATA
        assert set(expected[schema.PROMPT].to_pylist()) <= set(prompts(task, "own"))


def test_command_line_collects(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = ["--tasks", "faucet-open", "--episodes", "1", "--output_dir", str(tmp_path), "--workers", "0"]
    assert command.main(parser.parse_args([*arguments, "--env", "metaworld", "--seed", "3", "--image_size", "48"])) == 0
    assert "1 episodes" in capsys.readouterr().out
    written = table(tmp_path, "faucet-open")
    assert Image.open(io.BytesIO(written["image_1_bytes"][0].as_py())).size == (48, 48)
    assert described(written).control_hz == 80
    slow = [*arguments[:-3], str(tmp_path / "slow"), "--workers", "0", "--action_repeat", "4"]
    assert command.main(parser.parse_args(slow)) == 0
    assert described(table(tmp_path / "slow", "faucet-open")).control_hz == 20
