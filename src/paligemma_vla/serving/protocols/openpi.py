"""openpi's websocket protocol, and RoboArena's, which is the same with an `endpoint` in each message.

The server begins with what it serves (`--preset roboarena`: with RoboArena's configuration). An observation is answered by
`{"actions": (K, A), "server_timing": {...}}`, and one with `endpoint: infer` by the bare actions, all of which its client
executes. A fault is a text frame; openpi's own server then hangs up, ours goes on, since its clients raise at the text and
may send the next observation.
"""

from __future__ import annotations

import re
import time
from typing import Any

from websockets.asyncio.server import ServerConnection

from paligemma_vla.control import realtime
from paligemma_vla.errors import ConfigError, DataError, closest
from paligemma_vla.observation import whole_number
from paligemma_vla.schema import PROMPT, STATE
from paligemma_vla.serving.connection import decode, text_field, while_connected
from paligemma_vla.serving.keys import KeyMap, Names
from paligemma_vla.serving.record import parse_executed, parse_success
from paligemma_vla.serving.service import PolicyService, RefusalError, Said, Session
from paligemma_vla_client.codec import pack

NAMES = Names(
    "openpi",
    {
        "image_1": ("observation/image",),
        "image_2": ("observation/wrist_image",),
        STATE: ("observation/state",),
        PROMPT: (PROMPT,),
    },
    "observation/",
)
ROBOARENA = "roboarena"
EXTERNAL = re.compile(r"observation/exterior_image_(\d+)_")
ACTION_SPACES = ("joint_position", "joint_velocity", "cartesian_position", "cartesian_velocity")
# Of a message, beside the observation. Our own client's are `seed`, those of real-time chunking, and `record`:
# {"executed": (A,) or (M, A), what it did since its message before, "actor", and at a reset "success": true or false}.
OWN_FIELDS = ("endpoint", "session_id", "seed", "record", *realtime.FIELDS)
ENDPOINTS = ("infer", "reset", "record")  # record: the observation is for the record alone


async def serve_openpi(connection: ServerConnection, service: PolicyService, session: Session, execute: int | None) -> None:
    """Answer one connection until it closes. execute: actions of a chunk that are sent; None: all, or half to RoboArena."""
    await connection.send(pack(service.greeting))
    previous = 0.0
    async for frame in connection:
        began = time.monotonic()
        try:
            reply = await while_connected(connection, _reply(service, session, frame, execute))
        except RefusalError as error:
            await connection.send(str(error))
            continue
        if isinstance(reply, dict):
            milliseconds = 1000 * (time.monotonic() - began)
            reply["server_timing"] = {"infer_ms": milliseconds} | ({"prev_total_ms": previous} if previous else {})
        await connection.send(reply if isinstance(reply, str) else pack(reply))
        previous = 1000 * (time.monotonic() - began)


async def _reply(service: PolicyService, session: Session, frame: str | bytes, execute: int | None) -> Any:
    with service.refusals(session.protocol, session.number):
        message = await service.in_thread(decode, frame)
        endpoint, told = text_field(message, "endpoint", ""), message.get("record")
        if endpoint not in ("", *ENDPOINTS):
            raise DataError(f"endpoint: got {endpoint!r:.40}{closest(endpoint, ENDPOINTS)}")
        executed, success = parse_executed(told, service.policy.metadata["action_dim"]), parse_success(told)
        seed = None if message.get("seed") is None else whole_number("seed", message["seed"], 0)
        said = Said(seed, executed, realtime.parse_progress(message, service.policy.metadata["horizon"]))
    if endpoint == "reset":
        service.end_episode(session, executed, success)
        return "reset successful"
    observation = {key: value for key, value in message.items() if key not in OWN_FIELDS}
    session.executes_all = endpoint == "infer"  # as RoboArena's clients do
    if endpoint == "record":
        await service.observe(session, observation, executed)
        return {"recorded": service.recorder is not None}
    if endpoint == "infer" and execute is None:
        execute = max(1, service.policy.metadata["horizon"] // 2)
    actions = await service.answer(session, observation, said, execute)
    return actions if endpoint else {"actions": actions}


def roboarena_configuration(key_map: KeyMap, convention: str) -> dict[str, Any]:
    """What RoboArena's clients build their `PolicyServerConfig` of: these six fields and no other.

    Pictures come in the camera's size (`image_resolution` None), because the policy resizes as in training, where the client
    would pad. convention: what an action means, in the data's words. Raises `ConfigError` where neither it nor
    `--keys action=...` names the action space, by which the client moves a robot.
    """
    named = [space for space in ACTION_SPACES if space in convention.lower().replace(" ", "_")]
    spaces = list(key_map.action) or named
    if len(spaces) != 1 or spaces[0] not in ACTION_SPACES:
        got = f"got {' '.join(spaces)}" if spaces else "the checkpoint does not say what an action is"
        raise ConfigError(f"--preset {ROBOARENA}: {got}; add --keys openpi:action=NAME, NAME one of {', '.join(ACTION_SPACES)}")
    images = [name for key, names in key_map.sources.items() if key not in (STATE, PROMPT) for name in names[0]]
    external = [int(found[1]) for name in images if (found := EXTERNAL.match(name))]
    return {
        "image_resolution": None,
        "needs_wrist_camera": any("/wrist_image_" in name for name in images),
        "n_external_cameras": max(external, default=-1) + 1,
        "needs_stereo_camera": any(name.endswith("_right") for name in images),
        "needs_session_id": False,
        "action_space": spaces[0],
    }
