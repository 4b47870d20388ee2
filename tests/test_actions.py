"""Action representations against loops over single numbers and single rotations; what `data.actions` may and may not say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from paligemma_vla.actions import ABSOLUTE, ActionTransform, resolve_actions
from paligemma_vla.config import VLAConfig, config_from_dict
from paligemma_vla.errors import ConfigError, DataError
from paligemma_vla.schema import ROTATIONS, DatasetMetadata

K = 5
KINDS = tuple(ROTATIONS)
RELATIVE = ("chunk_relative", "delta")


def numbers_of(rotation: Rotation, kind: str) -> np.ndarray:
    """One rotation as a person would write it, by definition."""
    if kind == "euler_xyz":
        return rotation.as_euler("xyz")
    if kind == "rotvec":
        return rotation.as_rotvec()
    if kind == "rotation_6d":
        return rotation.as_matrix()[:, :2].T.reshape(6)  # first column, then second
    x, y, z, w = rotation.as_quat()
    return np.array([x, y, z, w] if kind == "quaternion_xyzw" else [w, x, y, z])


def rotation_of(values: np.ndarray, kind: str) -> Rotation:
    values = np.asarray(values, np.float64)
    if kind == "euler_xyz":
        turns = [Rotation.from_rotvec(angle * axis) for angle, axis in zip(values, np.eye(3), strict=True)]
        return turns[2] * turns[1] * turns[0]  # about the fixed axes x, then y, then z
    if kind == "rotvec":
        return Rotation.from_rotvec(values)
    if kind == "rotation_6d":
        return Rotation.from_matrix(np.stack([values[:3], values[3:], np.cross(values[:3], values[3:])], axis=1))
    return Rotation.from_quat(values if kind == "quaternion_xyzw" else values[[1, 2, 3, 0]])


def angle_between(first: np.ndarray, second: np.ndarray, kind: str) -> float:
    return float((rotation_of(first, kind).inv() * rotation_of(second, kind)).magnitude())


def pose_transform(representation: str, kind: str) -> ActionTransform:
    """State: gripper, rotation, x, y, z. Action: x, y, z, gripper, rotation; all but the gripper are converted."""
    width = ROTATIONS[kind]
    turned = tuple(range(4, 4 + width))
    return ActionTransform(
        representation,
        dimensions=(0, 1, 2, *turned),
        state_dimensions=(1 + width, 2 + width, 3 + width, *range(1, 1 + width)),
        rotation=kind,
        rotation_dimensions=turned,
        horizon=K,
    )


def poses(kind: str, batch: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Actions (B, K, 4 + n) and states (B, 4 + n) as `pose_transform` expects them, anywhere and of any orientation."""
    rng = np.random.default_rng(seed)

    def turn() -> np.ndarray:
        return numbers_of(Rotation.random(random_state=rng), kind)

    actions = [[np.concatenate([rng.normal(size=4), turn()]) for _ in range(K)] for _ in range(batch)]
    states = [np.concatenate([rng.normal(size=1), turn(), rng.normal(size=3)]) for _ in range(batch)]
    return np.array(actions, np.float32), np.array(states, np.float32)


@pytest.mark.parametrize("representation", RELATIVE)
@pytest.mark.parametrize("kind", KINDS)
def test_encode_equals_a_loop_over_steps(representation: str, kind: str) -> None:
    transform, (actions, states) = pose_transform(representation, kind), poses(kind)
    encoded = transform.encode(actions, states)
    assert encoded.dtype == np.float32 and encoded.shape == actions.shape
    width = ROTATIONS[kind]
    for chunk, state, got in zip(actions, states, encoded, strict=True):
        position, turn = state[1 + width :].astype(np.float64), rotation_of(state[1 : 1 + width], kind)
        for action, row in zip(chunk, got, strict=True):
            np.testing.assert_allclose(row[:3], action[:3] - position, rtol=1e-6, atol=1e-6)
            assert row[3] == action[3]  # the gripper, to the last bit
            expected = turn.inv() * rotation_of(action[4:], kind)
            assert (rotation_of(row[4:], kind).inv() * expected).magnitude() < 1e-5
            if representation == "delta":
                position, turn = action[:3].astype(np.float64), rotation_of(action[4:], kind)


@pytest.mark.parametrize("representation", RELATIVE)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_inverts_encode_to_the_rounding_of_float32(representation: str, kind: str) -> None:
    transform, (actions, states) = pose_transform(representation, kind), poses(kind, batch=50)
    back = transform.decode(transform.encode(actions, states), states)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back[..., 3], actions[..., 3])
    np.testing.assert_allclose(back[..., :3], actions[..., :3], atol=K * 4e-7)
    pairs = zip(*(chunks[..., 4:].reshape(-1, ROTATIONS[kind]) for chunks in (back, actions)), strict=True)
    assert max(angle_between(first, second, kind) for first, second in pairs) < 3e-6
    np.testing.assert_allclose(back, transform.canonical(actions), atol=3e-5)  # and as numbers, when both are written alike


def test_decode_loses_nothing_far_from_the_origin() -> None:
    """The sums run in float64: in float32 each of the steps would be rounded to a thirtieth of a millimetre."""
    transform = ActionTransform("delta", (0,), (0,), horizon=200)
    state = np.array([1000.0], np.float32)
    actions = (1000 + np.cumsum(np.full(200, 1e-3))).astype(np.float32)[:, None]
    back = transform.decode(transform.encode(actions, state), state)
    np.testing.assert_array_equal(back, actions)


def test_absolute_hands_through_the_same_numbers() -> None:
    actions, state = poses("rotvec")
    assert ABSOLUTE.encode(actions, state) is actions
    assert ABSOLUTE.decode(actions, state) is actions
    assert ActionTransform() == ABSOLUTE and not ABSOLUTE.converts


@pytest.mark.parametrize("kind", ["quaternion_xyzw", "quaternion_wxyz"])
@pytest.mark.parametrize("representation", RELATIVE)
def test_quaternion_and_its_negative_are_one_rotation(representation: str, kind: str) -> None:
    transform, (actions, states) = pose_transform(representation, kind), poses(kind)
    other, other_states = actions.copy(), states.copy()
    other[:, ::2, 4:] *= -1
    other_states[:, 1:5] *= -1
    encoded = transform.encode(actions, states)
    np.testing.assert_allclose(transform.encode(other, other_states), encoded, atol=1e-6)
    real = 7 if kind == "quaternion_xyzw" else 4
    assert (encoded[..., real] >= 0).all()
    assert (transform.decode(encoded, states)[..., real] >= 0).all()


def test_euler_angles_in_gimbal_lock_come_back_as_the_same_rotation(recwarn: pytest.WarningsRecorder) -> None:
    transform = ActionTransform("chunk_relative", (0, 1, 2), (0, 1, 2), "euler_xyz", (0, 1, 2), 1)
    state = np.array([0.3, np.pi / 2, -0.2], np.float32)
    for action in ([0.1, np.pi / 2, 0.4], [1.0, -np.pi / 2, 2.0], [0.3, np.pi / 2, -0.2]):
        wanted = np.array([action], np.float32)
        back = transform.decode(transform.encode(wanted, state), state)
        assert angle_between(back[0], wanted[0], "euler_xyz") < 1e-6
    assert not recwarn.list


def test_predicted_6d_rotation_is_made_one_by_gram_schmidt() -> None:
    transform = ActionTransform("chunk_relative", tuple(range(6)), tuple(range(6)), "rotation_6d", tuple(range(6)), 1)
    state = numbers_of(Rotation.identity(), "rotation_6d").astype(np.float32)
    predicted = np.array([[2.0, 0.0, 0.0, 1.0, 3.0, 0.0]], np.float32)  # neither of length 1, nor at right angles
    np.testing.assert_allclose(transform.decode(predicted, state)[0], [1, 0, 0, 0, 1, 0], atol=1e-6)
    quaternions = ActionTransform("delta", (0, 1, 2, 3), (0, 1, 2, 3), "quaternion_wxyz", (0, 1, 2, 3), 1)
    answer = quaternions.decode(np.array([[3.0, 0.3, 0, 0]], np.float32), np.array([1, 0, 0, 0], np.float32))
    assert np.linalg.norm(answer) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["quaternion_xyzw", "rotation_6d"])
@pytest.mark.parametrize("representation", RELATIVE)
def test_numbers_that_are_no_rotation_are_nan_and_nothing_else_is(representation: str, kind: str) -> None:
    transform, (actions, states) = pose_transform(representation, kind), poses(kind)
    assert all(transform.starts_from(state) for state in states)
    sound = transform.encode(actions, states)
    actions[0, 2, 4:] = 0
    encoded = transform.encode(actions, states)
    bad = [2] if representation == "chunk_relative" else [2, 3]  # the next starts from it
    assert np.isnan(encoded[0, bad, 4:]).all()
    encoded[0, bad, 4:] = sound[0, bad, 4:]
    np.testing.assert_array_equal(encoded, sound)
    states[1, 1:-3] = 0
    assert [transform.starts_from(state) for state in states] == [True, False, True, True]
    assert np.isnan(transform.decode(sound, states)[1, :, 4:]).all()
    sound[2, 1, 4:] = np.nan
    lost = np.isnan(transform.decode(sound, states)[2, :, 4:]).all(-1).tolist()
    assert lost == [False, True, *[representation == "delta"] * 3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("horizon", 0),
        ("dimensions", (0, 1)),
        ("dimensions", (0, 1, 2, 4, 5, 60)),
        ("state_dimensions", (4, 5, 6, 1, 2, -1)),
        ("rotation", "euler"),
        ("rotation_dimensions", (4, 5, 3)),
    ],
)
def test_transform_that_does_not_fit_the_data_is_refused(field: str, value: Any) -> None:
    transform = pose_transform("delta", "rotvec")
    transform.check("stats.json: actions", 7, 7)
    with pytest.raises(DataError, match=r"^stats\.json: actions: got .*compute the statistics again"):
        replace(transform, **{field: value}).check("stats.json: actions", 7, 7)


# What data.actions means for a robot

ARM = DatasetMetadata(
    state_names=("gripper_width", "z", "y", "x", "roll", "pitch", "yaw"),
    action_names=("x", "y", "z", "roll", "pitch", "yaw", "Gripper_command"),
    state_units=("m", "m", "m", "m", "rad", "rad", "rad"),
    action_units=("m", "m", "m", "rad", "rad", "rad", ""),
)
EULER = {"representation": "euler_xyz", "dimensions": ["roll", "pitch", "yaw"]}


def settings(**actions: Any) -> VLAConfig:
    raw = {
        "data": {"train_parquet_files": "-", "actions": {"representation": "delta", **actions}},
        "model": {"vlm_config": {"model_name_or_path": "-"}, "action_head_config": {"horizon": K}},
    }
    return config_from_dict(raw)


NAMELESS, UNNAMED_STATE = DatasetMetadata(), replace(ARM, state_names=(), state_units=())


@pytest.mark.parametrize(
    ("actions", "metadata", "expected"),
    [
        # Everything but the gripper, by name; by number where no name is shared; as listed.
        ({"rotation": EULER}, ARM, ((0, 1, 2, 3, 4, 5), (3, 2, 1, 4, 5, 6), "euler_xyz", (3, 4, 5))),
        ({}, UNNAMED_STATE, ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), "", ())),
        ({"dimensions": [2, "x"], "state_dimensions": ["z", 3]}, ARM, ((2, 0), (1, 3), "", ())),
        # A named rotation that is not converted stays as recorded.
        ({"rotation": EULER, "dimensions": ["x", "y", "z"]}, ARM, ((0, 1, 2), (3, 2, 1), "", ())),
    ],
)
def test_resolve_finds_what_each_dimension_starts_from(
    actions: dict[str, Any], metadata: DatasetMetadata, expected: Any
) -> None:
    dimensions, starts, rotation, turned = expected
    transform = resolve_actions(settings(**actions), metadata, 7, 7)
    assert transform == ActionTransform("delta", dimensions, starts, rotation, turned, K)
    assert resolve_actions(settings(representation="absolute", rotation=EULER), metadata, 7, 7) == ABSOLUTE


def test_resolve_takes_two_rotations_one_after_the_other() -> None:
    both = {"representation": "rotvec", "dimensions": [3, 4, 5, 0, 1, 2]}
    transform = resolve_actions(settings(rotation=both, dimensions=[0, 1, 2, 3, 4, 5]), NAMELESS, 6, 7)
    assert [columns for columns, _ in transform._rotations()] == [[3, 4, 5], [0, 1, 2]]


DEGREES = replace(ARM, action_units=(*"mmm", "deg", "deg", "deg", ""), state_units=())
TURNED = replace(ARM, action_rotation="rotvec")


@pytest.mark.parametrize(
    ("actions", "metadata", "fault"),
    [
        ({}, NAMELESS, "dimensions: got null, but the data names no action dimensions"),
        ({}, replace(ARM, action_names=("gripper",) * 7), "dimensions: got null, but the data names no action dimensions"),
        ({}, replace(ARM, action_representation="delta"), "representation: got delta, but .* deltas already; take absolute"),
        ({}, replace(ARM, state_names=("x", *"abcdef")), "state_dimensions: .* for y, z, roll, pitch, yaw of an action"),
        ({"dimensions": [8]}, NAMELESS, "dimensions: got 8, expected one of the data's 8 action dimensions"),
        ({"dimensions": [7]}, NAMELESS, r"state_dimensions: got null, .* for \[7\] of an action; it has 7 numbers"),
        ({"dimensions": ["x", "grip"]}, ARM, "dimensions: got 'grip', expected one of .*known: Gripper_command, pitch, "),
        ({"dimensions": ["x"], "state_dimensions": ["Z"]}, ARM, "state_dimensions: got 'Z', .* 7 state dimensions"),
        ({"dimensions": ["x", 0]}, ARM, r"dimensions: got \['x', 0\], expected each dimension once"),
        ({"dimensions": ["x"]}, NAMELESS, "dimensions: got 'x', expected one of .*: its number"),
        ({"dimensions": ["roll"], "state_dimensions": ["x"]}, ARM, "state_dimensions: .*roll is in rad, state x in m"),
        ({"rotation": EULER, "dimensions": ["x", "roll", "yaw"]}, ARM, "rotation.dimensions: pitch"),
        ({}, TURNED, "rotation: got null, but .* hold a rotation as rotvec"),
        ({"rotation": EULER, "representation": "absolute"}, TURNED, "rotation.representation: got euler_xyz, expected rotvec"),
        ({"rotation": EULER}, DEGREES, "rotation: action roll is in deg"),
    ],
)
def test_resolve_names_key_and_remedy(actions: dict[str, Any], metadata: DatasetMetadata, fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.actions\.{fault}"):
        resolve_actions(settings(**actions), metadata, 7, 8 if metadata == NAMELESS else 7)
