"""Play a recorded episode with a LeRobot arm, open loop: does the data mean what you think?

    python replay_arm.py --data lerobot:data/my_arm --episode 0 --port /dev/ttyACM0 --id my_arm

It runs where the arm is plugged in, with `lerobot[feetech]` (0.6) and `paligemma-vla`. Put the objects where they were, and
keep a hand on the emergency stop: nothing looks at the cameras. Joints are found by their names in the data, so it works with
any robot of LeRobot: for another than an SO-101 change `make_arm` in lerobot_arm.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from typing import Any

import numpy as np
from lerobot_arm import make_arm

from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.evaluation.recorded import read_recorded
from paligemma_vla.evaluation.replay import describe_difference, replay_episode

APPROACH_S = 3.0  # from where the arm is to where the recording begins
TOLERANCE = 0.05  # share of a joint's range in the episode; a real arm lags


def run(robot: Any, data: str, number: int) -> dict[str, Any]:
    """Play episode `number` of the data, from its first state; returns where the arm left the recorded states."""
    index = EpisodeIndex.build(data, "--data")
    if number >= len(index):
        raise SystemExit(f"--episode: got {number}, expected less than {len(index)}, the episodes in {data}")
    metadata, episode = index.layout.metadata, next(islice(read_recorded(index), number, None))
    if metadata.action_representation == "delta":
        raise SystemExit(f"{data}: got actions that are deltas, expected positions, as LeRobot records them")
    joints = list(robot.action_features)
    for column, names in (("action", metadata.action_names), ("state", metadata.state_names)):
        if list(names) != joints:
            raise SystemExit(f"robot: got joints {joints}, expected {list(names)} as in the {column} of the data")

    def act(action: np.ndarray) -> None:
        robot.send_action({name: float(value) for name, value in zip(metadata.action_names, action, strict=True)})

    def state() -> np.ndarray:
        seen = robot.get_observation()
        return np.array([seen[name] for name in metadata.state_names], np.float32)

    here = state()
    for share in np.linspace(0, 1, int(APPROACH_S * metadata.control_hz)):  # slowly: the first action may be far away
        act(here + share * (episode.executed[0] - here))
        time.sleep(1 / metadata.control_hz)
    replayed = replay_episode(episode.executed, act, state, metadata.control_hz)
    tolerance = np.maximum(TOLERANCE * np.ptp(episode.state, axis=0), 1e-3)
    return describe_difference(episode.state, replayed.state, tolerance, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="episode files, or lerobot:FOLDER")
    parser.add_argument("--episode", type=int, default=0, help="its number in the data")
    parser.add_argument("--port", required=True, help="of the arm")
    parser.add_argument("--id", required=True, help="of its calibration")
    args = parser.parse_args()
    robot = make_arm(args.port, args.id, {})
    robot.connect()
    try:
        sys.stdout.write(f"{run(robot, args.data, args.episode)}\n")
    finally:
        robot.disconnect()


if __name__ == "__main__":
    main()
