"""Limits on actions against loops over single numbers; what the configuration may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from conftest import ConfigFactory
from paligemma_vla.actions import ABSOLUTE, ActionTransform
from paligemma_vla.config import VLAConfig
from paligemma_vla.control import limits as module
from paligemma_vla.control.limits import ActionLimits, LimitLog, build_limits
from paligemma_vla.errors import ConfigError
from paligemma_vla.normalization import DatasetStatistics, Statistics
from paligemma_vla.schema import DatasetMetadata

NAMES = ("x", "y", "gripper")
Make = Callable[..., VLAConfig]
INF = np.full(3, np.inf, np.float32)
ARM = DatasetMetadata(action_names=("x", "qx", "qy", "qz", "qw", "gripper"), action_rotation="quaternion_xyzw")
HALF_TURN = np.array([0.0, 0.7, 0.0, 0.0, 0.7, 1.0])
QUATERNION = {"representation": "quaternion_xyzw", "dimensions": ["qx", "qy", "qz", "qw"]}


def statistics(low: list[float], high: list[float]) -> Statistics:
    ends = np.array([low, high])
    return Statistics(ends[0], ends[1], ends.mean(0), ends.std(0), ends[0], ends[1], 2)


def preprocessor(low: list[float], high: list[float], transform: ActionTransform = ABSOLUTE) -> Any:
    """What `build_limits` asks of one."""
    numbers = DatasetStatistics(state=statistics([0.0], [1.0]), action=statistics(low, high), actions=transform)
    return SimpleNamespace(statistics=numbers, actions=transform, action=SimpleNamespace(dimension=len(low)))


@pytest.fixture
def make(tiny_config: ConfigFactory) -> Make:
    """`make(A, action_low=...)`: a configuration for actions of A numbers, with a `control`."""

    def config(numbers: int, rotation: Any = None, **control: Any) -> VLAConfig:
        head = {"model.action_head_config.per_action_dim": numbers, "data.actions.rotation": rotation}
        return tiny_config({**head, **{f"control.{name}": value for name, value in control.items()}})

    return config


def limits(**changes: Any) -> ActionLimits:
    return replace(ActionLimits(NAMES, ABSOLUTE, -INF, INF, -INF, INF, INF), **changes)


def naive(actions: np.ndarray, low: np.ndarray, high: np.ndarray, rate: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """Range and rate, number by number."""
    sent: list[list[float]] = []
    for step, action in enumerate(actions.tolist()):
        row = []
        for i, predicted in enumerate(action):
            within = min(max(predicted, low[i]), high[i])
            last = sent[-1][i] if step else None if previous is None else min(max(previous[i], low[i]), high[i])
            if last is not None:
                within = min(max(within, last - rate[i]), last + rate[i])
            row.append(within)
        sent.append(row)
    return np.array(sent)


@pytest.mark.parametrize("known", [True, False])
def test_limits_equal_a_loop_over_numbers_and_keep_range_and_rate(known: bool) -> None:
    rng = np.random.default_rng(4)
    low, high, rate = np.float32([-1, -0.5, 0]), np.float32([1, 0.5, 1]), np.float32([0.3, np.inf, 0.1])
    actions = rng.normal(0, 1.5, (8, 3)).astype(np.float32)
    previous = rng.normal(0, 1.5, 3).astype(np.float32) if known else None
    sent, moved = limits(low=low, high=high, rate=rate).apply(actions, np.zeros(1, np.float32), previous)
    np.testing.assert_allclose(sent, naive(actions, low, high, rate, previous), atol=1e-6)
    assert (sent >= low).all() and (sent <= high).all()
    assert (np.abs(np.diff(sent, axis=0)) <= rate + 1e-6).all()
    np.testing.assert_allclose(moved, np.abs(sent - actions), atol=1e-6)


def test_actions_within_the_limits_are_the_same_bits() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)
    sent, moved = limits(low=-np.ones(3, np.float32), predicted_high=np.ones(3, np.float32)).apply(actions, np.zeros(1), None)
    np.testing.assert_array_equal(sent, actions)
    assert not moved.any()


@pytest.mark.parametrize("representation", ["delta", "chunk_relative"])
def test_range_of_the_data_is_of_movements_where_they_are_predicted(representation: Any, make: Make) -> None:
    transform = ActionTransform(representation, (0,), (1,), horizon=3)
    state, actions = np.float32([9, 100, 9]), np.float32([[100.1, 5, 1], [103.2, -5, 1], [103.3, 0, 1]])
    built = build_limits(preprocessor([-1, -2, 0], [1, 2, 1], transform), DatasetMetadata(), make(3))
    sent, moved = built.apply(actions, state, None)
    kept = {"delta": [100.1, 101.1, 101.2], "chunk_relative": [100.1, 101, 101]}[representation]
    np.testing.assert_allclose(sent, np.stack([kept, [2, -2, 0], [1, 1, 1]], axis=1), atol=1e-4)
    assert np.count_nonzero(moved, axis=0).tolist() == [1 if representation == "delta" else 2, 2, 0]


def test_own_range_is_of_the_actions_and_the_data_still_limits_movements(make: Make) -> None:
    transform = ActionTransform("delta", (0,), (0,), horizon=3)
    built = build_limits(preprocessor([-1], [1], transform), DatasetMetadata(), make(1, action_high=[7.5]))
    sent, _ = built.apply(np.float32([[9], [5], [9]]), np.float32([6]), None)
    np.testing.assert_array_equal(sent, np.float32([[7], [6], [7]]))
    sent, _ = built.apply(np.float32([[7], [8], [9]]), np.float32([6]), None)
    np.testing.assert_array_equal(sent, np.float32([[7], [7.5], [7.5]]))


def test_configuration_replaces_the_range_of_the_data_number_by_number(make: Make) -> None:
    config = make(3, action_low=[-5, None, None], action_high=[None, 0.5, None], action_rate=[None, 0.25, None])
    built = build_limits(preprocessor([-1, -1, 0], [1, 1, 1]), DatasetMetadata(action_names=NAMES), config)
    actions = np.float32([[-9, -9, -9], [9, 9, 9]])
    sent, _ = built.apply(actions, np.zeros(1, np.float32), None)
    np.testing.assert_array_equal(sent, np.float32([[-5, -1, 0], [1, -0.75, 1]]))


def test_quaternion_is_not_cut_and_euler_angles_are(make: Make) -> None:
    low, high = [-1, *[-0.1] * 4, 0], [1, *[0.1] * 4, 1]
    built = build_limits(preprocessor(low, high), ARM, make(6, QUATERNION, action_rate=[0.5, *[None] * 5]))
    sent, _ = built.apply(np.float32([[9, *HALF_TURN[1:5], 9]]), np.zeros(1, np.float32), np.zeros(6, np.float32))
    np.testing.assert_array_equal(sent[0], np.float32([0.5, *HALF_TURN[1:5], 1]))
    angles = {"representation": "euler_xyz", "dimensions": [0, 1, 2]}
    euler = build_limits(preprocessor([-1] * 3, [1] * 3), DatasetMetadata(), make(3, angles))
    assert (euler.apply(np.full((1, 3), 2, np.float32), np.zeros(1), None)[0] == 1).all()


@pytest.mark.parametrize("representation", ["delta", "chunk_relative"])
def test_turn_that_is_predicted_as_a_quaternion_stays_a_rotation(representation: Any, make: Make) -> None:
    turned = ActionTransform(representation, (0, 1, 2, 3, 4), (0, 1, 2, 3, 4), "quaternion_xyzw", (1, 2, 3, 4), 2)
    built = build_limits(preprocessor([-1, *[-0.1] * 4, 0], [1, *[0.1] * 4, 1], turned), ARM, make(6, QUATERNION))
    turns = Rotation.from_rotvec([[0, 0, 0.3], [0, 0, 0.9]]).as_quat()
    actions = np.concatenate([[[7.0], [8.0]], turns, [[0.0], [1.0]]], axis=1).astype(np.float32)
    sent, moved = built.apply(actions, np.float32([0, 0, 0, 0, 1, 0]), None)
    np.testing.assert_allclose(sent[:, 1:5], turns, atol=1e-6)
    assert sent[0, 0] == 1 and moved[:, 1:].max() == 0


@pytest.mark.parametrize(
    ("control", "rotation", "message"),
    [
        ({"action_rate": [*[None] * 4, 0.1, None]}, QUATERNION, r"control.action_rate.4: got 0.1 for qw, of a rotation"),
        ({"action_low": [None, 0, *[None] * 4]}, QUATERNION, "control.action_low.1: got 0 for qx, of a rotation"),
        ({}, None, "the actions hold a rotation as quaternion_xyzw, and nothing says in which numbers"),
    ],
)
def test_limits_that_would_cut_a_rotation_are_refused(make: Make, control: Any, rotation: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_limits(preprocessor([0] * 6, [1] * 6), ARM, make(6, rotation, **control))


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"action_low": [0.0]}, r"control.action_low: got 1 numbers, expected per_action_dim, 3"),
        ({"action_low": [0, 2, 0], "action_high": [1, 1, 1]}, r"control.action_low.1: got 2, expected at most"),
        ({"action_rate": [1, 0, 1]}, r"control.action_rate.1: got 0, expected: greater than 0"),
        ({"action_rate": 0.1}, r"control.action_rate: got 0.1"),
    ],
)
def test_control_that_means_nothing_is_refused(make: Make, control: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(3, **control)


def test_limits_are_logged_at_first_and_then_once_a_minute_for_each_name(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 30.0, 61.0, 61.0, 61.0, 61.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    found = LimitLog(NAMES)
    for amounts in ([[0.5, 0, 0], [0.25, 0, 0]], [[2, 0, 0], [0, 0, 0]], [[0, 0, 0], [0.125, 0, 3]]):
        found.add(np.float32(amounts))
    assert found.counts == {"x": 4, "y": 0, "gripper": 1} and found.largest == {"x": 2.0, "y": 0.0, "gripper": 3.0}
    assert [record.getMessage() for record in caplog.records] == [
        "action x: a limit changed 2 of its numbers (2 in all), this time by at most 0.5",
        "action x: a limit changed 2 of its numbers (4 in all), this time by at most 0.125",
        "action gripper: a limit changed 1 of its numbers (1 in all), this time by at most 3",
    ]
