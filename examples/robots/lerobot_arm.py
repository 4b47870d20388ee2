"""Move a LeRobot arm by a policy that `paligemma-vla serve` serves on another machine.

    python lerobot_arm.py --server ws://gpu:8000 --port /dev/ttyACM0 --id my_arm --cameras front=0 wrist=2 --task "wipe it"

It runs where the arm is plugged in, with `lerobot[feetech]` (0.6) and `paligemma-vla-client`. Cameras and joints are found by
their names in the training data, which the server knows. So it works with any robot of LeRobot: for another than an SO-101
change `make_arm`.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import numpy as np

from paligemma_vla_client import ControlLoop, LoopReport, PolicyClient


def make_arm(port: str, name: str, cameras: dict[str, int]) -> Any:
    """An SO-101 follower with USB cameras. Its `id` is that of its calibration."""
    from lerobot.cameras.opencv import OpenCVCameraConfig
    from lerobot.robots import make_robot_from_config
    from lerobot.robots.so_follower import SO101FollowerConfig

    found = {key: OpenCVCameraConfig(index_or_path=index, fps=30, width=640, height=480) for key, index in cameras.items()}
    return make_robot_from_config(SO101FollowerConfig(port=port, id=name, cameras=found))


def read_observation(robot: Any, metadata: dict[str, Any], task: str) -> dict[str, Any]:
    """What the robot sees, under the policy's names: `image_1 ...` (H, W, 3) uint8 RGB, `state` (P,), `prompt`."""
    seen = robot.get_observation()
    names = [name.rpartition(".")[2] for name in metadata["camera_names"]]  # of `observation.images.front`
    images = {key: np.asarray(seen[name]) for key, name in zip(metadata["cameras"], names, strict=True)}
    state = np.array([seen[name] for name in metadata["state_names"]], np.float32)
    return {**images, "state": state, "prompt": task}


def run(robot: Any, client: PolicyClient, task: str, seconds: float, execute: int | None = None) -> LoopReport:
    """One action per control step of the training data, for so many seconds, also while the policy thinks. execute: control
    steps before it is asked again; None: half a chunk. Returns how it went."""
    metadata = client.metadata
    missing = [name for name in metadata["state_names"] if name not in robot.observation_features]
    if missing or list(metadata["action_names"]) != list(robot.action_features):
        raise SystemExit(
            f"robot: got joints {list(robot.action_features)}, expected {metadata['action_names']} as in the training data"
            f" (state {metadata['state_names']})"
        )

    def act(action: np.ndarray) -> None:
        robot.send_action({name: float(value) for name, value in zip(metadata["action_names"], action, strict=True)})

    positions = metadata["action_representation"] or "absolute"  # of joints, as LeRobot records them
    loop = ControlLoop(client, execute=execute, when_late="hold", representation=positions)
    loop.reset()
    return loop.run(lambda: read_observation(robot, metadata, task), act, steps=int(seconds * loop.hz))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--port", required=True, help="of the arm")
    parser.add_argument("--id", required=True, help="of its calibration")
    parser.add_argument("--cameras", nargs="+", required=True, metavar="NAME=INDEX", help="names as in the training data")
    parser.add_argument("--task", required=True, help="the instruction")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--execute", type=int)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    cameras = {name: int(index) for name, _, index in (entry.partition("=") for entry in args.cameras)}
    robot = make_arm(args.port, args.id, cameras)
    with PolicyClient(args.server, timeout_s=1.0) as client:
        robot.connect()
        try:
            logging.info("%s", run(robot, client, args.task, args.seconds, args.execute))
        finally:
            robot.disconnect()


if __name__ == "__main__":
    main()
