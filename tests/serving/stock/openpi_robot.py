"""Run with openpi's own client: asks a server what a robot's program would. `openpi_robot.py URL IN OUT`."""

import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

url, given, answers = sys.argv[1:]
with np.load(given) as file:
    observation = {**file, "prompt": str(file["prompt"])}
policy = WebsocketClientPolicy(url)
horizon = policy.get_server_metadata()["horizon"]
broker = ActionChunkBroker(policy, horizon)
np.savez(
    answers,
    metadata_cameras=policy.get_server_metadata()["cameras"],
    actions=policy.infer(observation)["actions"],
    played=[broker.infer(observation)["actions"] for _ in range(horizon)],
)
try:
    policy.infer({"prompt": "nothing to see"})
except RuntimeError as error:
    sys.stdout.write(str(error))
policy.infer(observation)  # the connection lives on
