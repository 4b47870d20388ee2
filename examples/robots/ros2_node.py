"""A ROS 2 node that moves an arm by a policy which `paligemma-vla serve` serves.

    python3 ros2_node.py --ros-args -p server:=ws://gpu:8000 -p task:="open the drawer" -p "joints:=[joint_1, joint_2]" \
        -p "cameras:=[/front/image_raw, /wrist/image_raw]"

It takes the last picture of each camera (`sensor_msgs/Image`, rgb8 or bgr8) and the last `sensor_msgs/JointState`. It publishes
one `std_msgs/Float64MultiArray` of positions per control step to `/forward_position_controller/commands`, as ros2_control's
controllers take it, also while the policy thinks. Joints and cameras are in the order of the policy. Nothing is published until
every topic has been heard, and nothing when one has been silent for longer than `stale_s`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from paligemma_vla_client import ControlLoop, PolicyClient, PolicyError


def to_picture(message: Any) -> np.ndarray:
    """A `sensor_msgs/Image` as (H, W, 3) uint8 RGB. Its rows may be longer than its pixels (`step`)."""
    if message.encoding not in ("rgb8", "bgr8"):
        raise ValueError(f"camera: got encoding {message.encoding}, expected rgb8 or bgr8")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    pixels = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
    return np.ascontiguousarray(pixels if message.encoding == "rgb8" else pixels[..., ::-1])


def to_state(message: Any, joints: list[str]) -> np.ndarray:
    """The positions (P,) of a `sensor_msgs/JointState`, in the policy's order: a driver may send them in any."""
    found = dict(zip(message.name, message.position, strict=True))
    return np.array([found[joint] for joint in joints], np.float32)


class Latest:
    """The last message of each topic, and when it came (seconds of `time.monotonic`)."""

    def __init__(self, topics: list[str]) -> None:
        self.messages: dict[str, Any] = {}
        self.times = dict.fromkeys(topics, float("-inf"))

    def put(self, topic: str, message: Any) -> None:
        self.messages[topic], self.times[topic] = message, time.monotonic()

    def stale(self, seconds: float) -> list[str]:
        """Topics that have not been heard for longer, or never."""
        return [topic for topic, heard in self.times.items() if time.monotonic() - heard > seconds]


def observation(latest: Latest, cameras: list[str], joints: list[str], task: str) -> dict[str, Any]:
    """What the policy takes: `image_1 ...`, `state`, `prompt`."""
    images = {f"image_{number}": to_picture(latest.messages[topic]) for number, topic in enumerate(cameras, start=1)}
    return {**images, "state": to_state(latest.messages["/joint_states"], joints), "prompt": task}


def main() -> None:
    import rclpy
    from rclpy.node import Node
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image, JointState
    from std_msgs.msg import Float64MultiArray

    rclpy.init()
    node = Node("paligemma_vla")
    server = node.declare_parameter("server", "ws://127.0.0.1:8000").value
    task = node.declare_parameter("task", "").value
    joints = list(node.declare_parameter("joints", [""]).value)
    cameras = list(node.declare_parameter("cameras", [""]).value)
    stale_s = node.declare_parameter("stale_s", 0.5).value
    client = PolicyClient(server, timeout_s=1.0)
    loop = ControlLoop(client, when_late="hold", representation="absolute")
    latest = Latest([*cameras, "/joint_states"])
    for topic in cameras:
        node.create_subscription(Image, topic, lambda message, topic=topic: latest.put(topic, message), qos_profile_sensor_data)
    node.create_subscription(JointState, "/joint_states", lambda message: latest.put("/joint_states", message), 10)
    commands = node.create_publisher(Float64MultiArray, "/forward_position_controller/commands", 10)

    def observe() -> dict[str, Any]:
        return observation(latest, cameras, joints, task)

    def act(action: np.ndarray) -> None:
        commands.publish(Float64MultiArray(data=[float(value) for value in action]))

    def may_not_move() -> bool:
        return bool(latest.stale(stale_s)) or not rclpy.ok()

    threading.Thread(target=rclpy.spin, args=[node], daemon=True).start()  # topics are heard while the loop runs
    try:
        while rclpy.ok():
            try:
                loop.run(observe, act, until=may_not_move)
            except PolicyError as error:
                node.get_logger().error(f"no action: {error}", throttle_duration_sec=2.0)
            if silent := latest.stale(stale_s):
                node.get_logger().warning(f"waiting for {', '.join(silent)}", throttle_duration_sec=2.0)
            time.sleep(0.1)
    finally:
        client.close()
        node.destroy_node()


if __name__ == "__main__":
    main()
