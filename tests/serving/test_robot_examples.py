"""The clients for robots in examples/robots, as far as they can run without a robot: against a served policy."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from paligemma_vla_client import PolicyClient

FOLDER = Path(__file__).parents[2] / "examples" / "robots"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Arm:
    """What LeRobot's `Robot` is to a program: features, observations by name, actions by name."""

    def __init__(self, metadata: dict) -> None:
        self.observation_features = dict.fromkeys([*metadata["state_names"], *metadata["camera_names"]])
        self.action_features = dict.fromkeys(metadata["action_names"], float)
        self._metadata, self.sent = metadata, []
        self._state = {name: 0.1 * number for number, name in enumerate(metadata["state_names"])}

    def get_observation(self) -> dict:
        rng = np.random.default_rng(len(self.sent))
        images = {name: rng.integers(0, 255, (48, 64, 3), np.uint8) for name in self._metadata["camera_names"]}
        return {**images, **self._state}

    def send_action(self, action: dict) -> dict:
        self.sent.append(action)
        return action


def test_lerobot_arm_gets_the_actions_of_its_observations_by_name(serve, policy):
    server = serve(seed=3, limited=False)
    example = load("lerobot_arm")
    with PolicyClient(server.url) as client:
        arm = Arm(client.metadata)
        report = example.run(arm, client, "open the drawer", seconds=0.4, execute=2)
        assert report.steps == len(arm.sent) == int(0.4 * policy.metadata["control_hz"])
        first = example.read_observation(Arm(client.metadata), client.metadata, "open the drawer")
        expected = policy.infer(first, seed=3)["actions"]
        got = [[action[name] for name in policy.metadata["action_names"]] for action in arm.sent[:2]]
        np.testing.assert_array_equal(np.float32(got), expected[:2])
        arm.action_features = {"elbow.pos": float}
        with pytest.raises(SystemExit, match=r"robot: got joints \['elbow.pos'\]"):
            example.run(arm, client, "open the drawer", seconds=1)


def test_ros_node_reads_padded_rows_colours_joints_by_name_and_stale_topics():
    node = load("ros2_node")
    pixels = np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8)
    padded = np.concatenate([pixels.reshape(4, 15), np.zeros((4, 3), np.uint8)], 1)
    image = SimpleNamespace(encoding="rgb8", height=4, width=5, step=18, data=padded.tobytes())
    np.testing.assert_array_equal(node.to_picture(image), pixels)
    image.encoding = "bgr8"
    np.testing.assert_array_equal(node.to_picture(image), pixels[..., ::-1])
    image.encoding = "mono8"
    with pytest.raises(ValueError, match="got encoding mono8"):
        node.to_picture(image)
    latest = node.Latest(["/front", "/joint_states"])
    assert latest.stale(60) == ["/front", "/joint_states"]
    image.encoding = "rgb8"
    latest.put("/front", image)
    latest.put("/joint_states", SimpleNamespace(name=["b", "a"], position=[2.0, 1.0]))
    assert latest.stale(60) == []
    seen = node.observation(latest, ["/front"], ["a", "b"], "wave")
    assert set(seen) == {"image_1", "state", "prompt"} and seen["state"].tolist() == [1.0, 2.0]
    time.sleep(0.02)
    assert latest.stale(0.01) == ["/front", "/joint_states"]
