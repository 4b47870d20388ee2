"""vla-eval's protocol (0.8): benchmarks in simulators ask a policy over a websocket at `/vla-eval`.

A message is `{type, payload, seq, timestamp}`. `hello` is answered by what the policy gives and needs. Each `observation` is
answered by one action (A,), because that is what the benchmarks execute: the server plays the first `--execute` actions of a
chunk, one an observation (or `--action_repeat` observations), and then asks the policy again. `episode_start` begins with a new
chunk. Actions are sent as the policy's data has them; the benchmark turns and binarises its gripper itself.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.server import ServerConnection

from paligemma_vla.errors import DataError, closest
from paligemma_vla.observation import whole_number
from paligemma_vla.schema import PROMPT, ROTATIONS, STATE
from paligemma_vla.serving.connection import decode, text_field, while_connected
from paligemma_vla.serving.keys import KeyMap, Names
from paligemma_vla.serving.service import PolicyService, RefusalError, Session
from paligemma_vla_client.codec import pack

NAMES = Names(
    "vla-eval",
    {
        "image_1": ("images/agentview",),
        "image_2": ("images/wrist",),
        STATE: ("states", "state"),
        PROMPT: ("task_description",),
    },
    "images/",
)
HARNESS_VERSION, PROTOCOL_VERSION = "0.8.0", 1  # of the protocol that is spoken here
TYPES = ("hello", "observation", "episode_start", "episode_end", "error")  # of what a client sends
THEIR_ROTATIONS = {"euler_xyz": "euler_xyz", "rotvec": "axis_angle", "quaternion_xyzw": "quaternion_xyzw"}


async def serve_vla_eval(connection: ServerConnection, service: PolicyService, session: Session, execute: int | None) -> None:
    """Answer one connection until it closes. execute: actions of a chunk that are played; None: half of them."""
    chunk: deque[NDArray[np.float32]] = deque()
    session.executes_all = True
    async for frame in connection:
        seq = 0
        try:
            with service.refusals(session.protocol, session.number):
                message = await service.in_thread(decode, frame)
                seq = whole_number("seq", message.get("seq"), 0)
            reply = await while_connected(connection, _reply(service, session, message, chunk, execute))
        except RefusalError as error:
            reply = {"type": "error", "payload": {"error": str(error)}}
        if reply is not None:
            await connection.send(pack({**reply, "seq": seq, "timestamp": time.time()}, "vla-eval"))


async def _reply(
    service: PolicyService,
    session: Session,
    message: Mapping[str, Any],
    chunk: deque[NDArray[np.float32]],
    execute: int | None,
) -> dict[str, Any] | None:
    with service.refusals(session.protocol, session.number):
        kind, payload = text_field(message, "type", ""), message.get("payload")
        if kind not in TYPES:
            raise DataError(f"type: got {kind!r:.40}, expected one of {', '.join(TYPES)}{closest(kind, TYPES)}")
        if not isinstance(payload, Mapping):
            raise DataError(f"payload: got {type(payload).__name__}, expected a map")
    if kind == "hello":
        return {"type": "hello", "payload": hello(service)}
    if kind != "observation":
        chunk.clear()
        service.end_episode(session, success=success_of(payload) if kind == "episode_end" else None)
        return None
    if chunk:
        await service.observe(session, payload)
    else:
        actions = await service.answer(session, payload, execute=execute or max(1, service.policy.metadata["horizon"] // 2))
        chunk.extend(np.repeat(actions, session.action_repeat, axis=0))
    action = chunk.popleft()
    session.sent = action[None]  # of which all is executed before the next observation
    return {"type": "action", "payload": {"actions": action}}


def success_of(result: Mapping[str, Any]) -> bool | None:
    """What a benchmark says of an episode in `metrics`, where it says it."""
    metrics = result.get("metrics")
    success = metrics.get("success") if isinstance(metrics, Mapping) else None
    return bool(success) if isinstance(success, (bool, int, float)) else None


def hello(service: PolicyService) -> dict[str, Any]:
    """What a benchmark is told. `observation_params` are arguments that it is built with, where it has them."""
    key_map, contract = service.key_maps[NAMES.protocol], service.contract
    params = {"send_state": True} | ({"send_wrist_image": True} if "image_2" in key_map.sources else {})
    return {
        "harness_version": HARNESS_VERSION,
        "protocol_version": PROTOCOL_VERSION,
        "model_server": "paligemma-vla",
        "capabilities": {},
        "observation_params": params,
        "observation_spec": observation_spec(key_map, contract),
        "action_spec": action_spec(contract),
        "contract": contract,
    }


def observation_spec(key_map: KeyMap, contract: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of an observation, in vla-eval's words. What the numbers of a state mean has no name there: `raw`."""
    spec = {STATE: _part(STATE, contract["state_dim"], "raw", contract["state_names"], contract["state_units"])}
    for key, names in key_map.sources.items():
        if key not in (STATE, PROMPT):
            usual = [parts for parts in names if parts[0] in NAMES.usual.get(key, ())]
            name = (usual or names)[0][0].rpartition("/")[2]
            spec[name] = _part("image", 0, "rgb_hwc_uint8")
    return {**spec, "language": _part("language", 0, "language")}


def action_spec(contract: Mapping[str, Any]) -> dict[str, Any]:
    """The whole action, and how it writes a rotation where the data says it: vla-eval compares that with the benchmark's."""
    actions = _part("actions", contract["action_dim"], "raw", contract["action_names"], contract["action_units"])
    convention = contract["action_convention"]
    if convention:
        actions["description"] = "; ".join(filter(None, [actions.get("description"), convention]))
    written = (contract["rotation"] or {}).get("representation")
    if written not in THEIR_ROTATIONS:
        return {"actions": actions}
    return {"actions": actions, "rotation": _part("rotation", ROTATIONS[written], THEIR_ROTATIONS[written])}


def _part(name: str, dims: int, form: str, names: Any = (), units: Any = ()) -> dict[str, Any]:
    words = [f"{each} ({unit})" if unit else each for each, unit in zip(names, units or [""] * len(names), strict=True)]
    return {"name": name, "dims": dims, "format": form} | ({"description": ", ".join(words)} if words else {})


def config_page(query: str, max_batch: int, wait_s: float) -> tuple[HTTPStatus, bytes]:
    """`GET /config`, by which vla-eval's tools read how a server batches. They may also ask to change it: refused."""
    current = {"max_batch_size": max_batch, "max_wait_time": wait_s}
    if asked := [f"{name}: set by a flag of `paligemma-vla serve`" for name, _ in parse_qsl(query, keep_blank_values=True)]:
        return HTTPStatus.UNPROCESSABLE_ENTITY, json.dumps({"errors": asked, "config": current}).encode()
    return HTTPStatus.OK, json.dumps({"applied": {}, "config": current}).encode()
