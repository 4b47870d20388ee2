"""GR00T's protocol (N1.5 to N1.7): ZeroMQ requests `{endpoint, data, api_token}` in msgpack, at `--zmq_port`.

`get_action` is answered by `[action, info]`, the action as `{name: (1, K, n)}`: one part `action`, or those of
`--keys groot:action=arm:6+gripper:1`. N1.5 sends the observation without a map around it, and is answered by the action
alone, as `{action.name: (K, n)}`. A fault is `{error}`. `kill` would let a client stop the server: refused. ZeroMQ has no TLS.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import ConfigError, DataError, closest, needs_extra
from paligemma_vla.schema import ACTION, PROMPT, STATE
from paligemma_vla.serving.connection import MAX_FRAME, decode, text_field
from paligemma_vla.serving.keys import KeyMap, Names
from paligemma_vla.serving.service import PolicyService, RefusalError, Session
from paligemma_vla_client.codec import pack

if TYPE_CHECKING:
    import zmq.asyncio

log = logging.getLogger(__name__)
NAMES = Names(
    "groot",
    {
        "image_1": ("video/image",),
        "image_2": ("video/wrist_image",),
        STATE: ("state/state",),
        PROMPT: tuple(
            f"language/{name}"
            for name in ("annotation.human.task_description", "annotation.human.action.task_description", "task")
        ),
    },
    "video/",
)
ENDPOINTS = ("ping", "get_action", "reset", "get_modality_config")
MODALITIES = ("video", "state", "language")
IDLE_SECONDS = 60  # a client that has asked nothing for so long has left: ZeroMQ does not say when one leaves
MOST_WAITING = 2  # messages of one client that ZeroMQ keeps
LINGER_MS = 1000  # for answers that are still to be sent at the end


def require_zmq() -> None:
    """Raises `ConfigError` where pyzmq is missing."""
    with needs_extra("--zmq_port", "zmq"):
        import zmq.asyncio  # noqa: F401


def action_parts(key_map: KeyMap, action_dim: int) -> list[tuple[str, int]]:
    """Names and sizes of what an action is split into. Raises `ConfigError`."""
    if len(key_map.action) < 2 and ":" not in "".join(key_map.action):
        return [(key_map.action[0] if key_map.action else ACTION, action_dim)]
    parts = [(name, int(size) if size.isdecimal() else 0) for name, _, size in (each.partition(":") for each in key_map.action)]
    if not all(name and size for name, size in parts) or sum(size for _, size in parts) != action_dim:
        raise ConfigError(
            f"--keys action={'+'.join(key_map.action)}: expected names and sizes that add up to the {action_dim} numbers of an "
            "action, as in groot:action=arm:6+gripper:1"
        )
    return parts


@asynccontextmanager
async def serve_groot(
    service: PolicyService, host: str, port: int, api_key: str | None, max_clients: int, execute: int | None
) -> AsyncIterator[int]:
    """Answer until the block is left; then what was asked is still answered. Yields the port: a free one for 0."""
    import zmq.asyncio

    address = (await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM))[0][4][0]
    context = zmq.asyncio.Context()
    router = context.socket(zmq.ROUTER)  # a REP socket would answer one client after the other
    try:
        router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        router.setsockopt(zmq.RCVHWM, MOST_WAITING)
        router.setsockopt(zmq.IPV6, ":" in str(address))
        router.bind(f"tcp://{f'[{address}]' if ':' in str(address) else address}:{port or '*'}")
        answering = Answering(service, router, api_key, max_clients, execute)
        task = asyncio.create_task(answering.run())
        try:
            yield int(router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        finally:
            task.cancel()
            await asyncio.gather(task, *answering.tasks, return_exceptions=True)
            answering.forget_all()
    except zmq.ZMQError as error:
        raise ConfigError(f"--zmq_port {port}: {error}; take another port, or 0 for a free one") from error
    finally:
        context.destroy(linger=LINGER_MS)


class Answering:
    """Reads requests and answers each in a task of its own, one at a time per client."""

    def __init__(
        self, service: PolicyService, router: zmq.asyncio.Socket, api_key: str | None, max_clients: int, execute: int | None
    ) -> None:
        self.service, self.router, self.api_key, self.max_clients = service, router, api_key, max_clients
        self.parts = action_parts(service.key_maps[NAMES.protocol], service.contract["action_dim"])
        self.execute = execute
        self.tasks: set[asyncio.Task[None]] = set()
        self._busy: set[bytes] = set()
        self._sessions: dict[bytes, tuple[Session, asyncio.TimerHandle]] = {}

    async def run(self) -> None:
        while True:
            frames = await self.router.recv_multipart(copy=False)
            envelope, body = [frame.bytes for frame in frames[:-1]], frames[-1].bytes  # a client's name, and an empty frame
            if len(envelope) > 2:  # of nobody who speaks this protocol
                continue
            if envelope[0] in self._busy:
                await self._send(envelope, {"error": "got a second request before the first was answered; wait for it"})
                continue
            self._busy.add(envelope[0])
            peer = frames[-1].get("Peer-Address")
            task = asyncio.create_task(self._answer(envelope, body, str(peer)))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def forget_all(self) -> None:
        for client in list(self._sessions):
            self._forget(client)

    async def _answer(self, envelope: list[bytes], body: bytes, peer: str) -> None:
        try:
            session, _ = self._sessions.get(envelope[0], (None, None))
            with self.service.refusals(NAMES.protocol, None if session is None else session.number):
                reply = await self._reply(envelope[0], await self.service.in_thread(decode, body), peer)
        except RefusalError as error:
            reply = {"error": str(error)}
        finally:
            self._busy.discard(envelope[0])
        await self._send(envelope, reply)

    async def _send(self, envelope: list[bytes], reply: Any) -> None:
        await self.router.send_multipart([*envelope, pack(reply, "groot")])

    async def _reply(self, client: bytes, request: Mapping[str, Any], peer: str) -> Any:
        token = text_field(request, "api_token", "")
        if self.api_key is not None and not hmac.compare_digest(token.encode(), self.api_key.encode()):
            raise DataError("api_token: missing or wrong")
        endpoint = text_field(request, "endpoint", "get_action")
        if endpoint == "kill":
            raise DataError("endpoint: kill is refused; stop the server where it runs")
        if endpoint not in ENDPOINTS:
            known = f"expected one of {', '.join(ENDPOINTS)}{closest(endpoint, ENDPOINTS)}"
            raise DataError(f"endpoint: got {endpoint!r:.40}, {known}")
        session = self._session(client, peer)
        if endpoint == "ping":
            return {"status": "ok", "message": "Server is running", "contract": self.service.contract}
        if endpoint == "get_modality_config":
            return modality_config(self.service.key_maps[NAMES.protocol], self.parts, self.service.contract["horizon"])
        if endpoint == "reset":
            self.service.end_episode(session)
            return {}
        data = request.get("data")
        if not isinstance(data, Mapping):
            raise DataError(f"data: got {type(data).__name__}, expected a map with an observation")
        wrapped = "observation" in data
        observation = to_observation(data["observation"] if wrapped else data)
        action = split(await self.service.answer(session, observation, execute=self.execute), self.parts)
        return [action, {}] if wrapped else {f"action.{name}": part[0] for name, part in action.items()}

    def _session(self, client: bytes, peer: str) -> Session:
        session, timer = self._sessions.pop(client, (None, None))
        if timer is not None:
            timer.cancel()
        if session is None:
            if len(self.service.sessions) >= self.max_clients:
                raise DataError(f"{self.max_clients} clients are connected; expected at most as many (--max_clients)")
            session = self.service.open_session(NAMES.protocol, peer)
        self._sessions[client] = session, asyncio.get_running_loop().call_later(IDLE_SECONDS, self._forget, client)
        return session

    def _forget(self, client: bytes) -> None:
        session, timer = self._sessions.pop(client)
        timer.cancel()
        self.service.close_session(session)


def to_observation(found: Any) -> dict[str, Any]:
    """An observation of one robot at one time, its names as `video/..`, `state/..` and `language/..`. Raises `DataError`.

    N1.5 writes `video.front` and `annotation.human.task`. Texts come as `[[text]]` (B, T); leading dimensions (B, T) of arrays
    are left to whoever reads them, who refuses what is not one.
    """
    if not isinstance(found, Mapping):
        raise DataError(f"observation: got {type(found).__name__}, expected a map of video, state and language")
    flat = {f"{outer}/{name}": value for outer in MODALITIES for name, value in _items(found.get(outer))}
    for name, value in ((str(name), value) for name, value in found.items()):
        modality, _, rest = name.partition(".")
        if modality in MODALITIES[:2] and rest:
            flat[f"{modality}/{rest}"] = value
        elif modality == "annotation":
            flat[f"language/{name}"] = value
        elif not (name in MODALITIES and isinstance(value, Mapping)):
            flat[name] = value
    return {name: _text(value) for name, value in flat.items()}


def _items(value: Any) -> Any:
    return value.items() if isinstance(value, Mapping) else ()


def _text(value: Any) -> Any:
    inner = value
    while isinstance(inner, list) and len(inner) == 1:
        inner = inner[0]
    return inner if isinstance(inner, str) else value


def split(actions: NDArray[np.float32], parts: list[tuple[str, int]]) -> dict[str, NDArray[np.float32]]:
    """Actions (K, A) by name, each (1, K, n)."""
    ends = np.cumsum([size for _, size in parts])
    return {name: actions[None, :, end - size : end] for (name, size), end in zip(parts, ends, strict=True)}


def modality_config(key_map: KeyMap, parts: list[tuple[str, int]], horizon: int) -> dict[str, Any]:
    """What GR00T's clients ask for: the names in each modality, and the steps that each is given for."""
    keys: dict[str, list[str]] = {modality: [] for modality in MODALITIES}
    for names in key_map.sources.values():
        for name in names[0]:
            modality, _, rest = name.partition("/")
            if modality in keys and rest:
                keys[modality].append(rest)
    described = {modality: (found, [0]) for modality, found in keys.items()}
    described[ACTION] = ([name for name, _ in parts], list(range(horizon)))
    return {
        modality: {"__ModalityConfig_class__": True, "as_json": {"delta_indices": steps, "modality_keys": found}}
        for modality, (found, steps) in described.items()
    }
