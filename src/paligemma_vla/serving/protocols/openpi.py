"""openpi's websocket protocol, and RoboArena's, which is the same with an `endpoint` in each message.

The server begins with what it serves. An observation is answered by `{"actions": (K, A), "server_timing": {...}}`, and one with
`endpoint: infer` by the bare actions, all of which its client executes. A fault is a text frame; openpi's own server then hangs
up, ours goes on, since its clients raise at the text and may send the next observation.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from websockets.asyncio.server import ServerConnection

from paligemma_vla.errors import DataError, VLAError, closest
from paligemma_vla.observation import whole_number
from paligemma_vla.schema import PROMPT, STATE
from paligemma_vla.serving.connection import decode, while_connected
from paligemma_vla.serving.service import PolicyService, Session
from paligemma_vla_client.codec import CodecError, pack

NAME = "openpi"
KEYS = {
    "image_1": ("observation/image",),
    "image_2": ("observation/wrist_image",),
    STATE: ("observation/state",),
    PROMPT: (PROMPT,),
}
OWN_FIELDS = ("endpoint", "session_id", "seed")  # of a message, beside the observation


async def serve_openpi(connection: ServerConnection, service: PolicyService, session: Session, execute: int | None) -> None:
    """Answer one connection until it closes. execute: actions of a chunk that are sent; None: all, or half to RoboArena."""
    await connection.send(pack(service.contract))
    previous = 0.0
    async for frame in connection:
        began = time.monotonic()
        try:
            message = decode(frame)
            reply = await while_connected(connection, _reply(service, session, message, execute))
        except (CodecError, VLAError) as error:
            await connection.send(str(error))
            continue
        if isinstance(reply, dict):
            milliseconds = 1000 * (time.monotonic() - began)
            reply["server_timing"] = {"infer_ms": milliseconds} | ({"prev_total_ms": previous} if previous else {})
        await connection.send(reply if isinstance(reply, str) else pack(reply))
        previous = 1000 * (time.monotonic() - began)


async def _reply(service: PolicyService, session: Session, message: Mapping[str, Any], execute: int | None) -> Any:
    endpoint = message.get("endpoint")
    if endpoint == "reset":
        session.executed = None
        return "reset successful"
    if endpoint not in (None, "infer"):
        raise DataError(f"endpoint: got {endpoint!r:.40}{closest(str(endpoint), ('infer', 'reset'))}")
    seed = None if message.get("seed") is None else whole_number("seed", message["seed"], 0)
    observation = {key: value for key, value in message.items() if key not in OWN_FIELDS}
    actions = await service.answer(session, observation, seed)
    if endpoint is None:
        return {"actions": actions[:execute]}
    return actions[: execute or max(1, len(actions) // 2)]
