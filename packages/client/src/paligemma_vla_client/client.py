"""Clients of a policy server: `AsyncPolicyClient`, and `PolicyClient`, which is the same for programs without asyncio.

They speak openpi's protocol: a websocket on which the server first sends a map that says what it serves, and then answers each
observation with a chunk of actions.

- One request at a time. A request that is given up, by its time limit or by a cancellation, takes its connection with it: a
  late answer has nowhere to arrive.
- A lost connection is opened again. A request that was lost with it is sent again, once; an answer depends on nothing but its
  observation, so computing it twice is harmless.
- Opening goes on in the background when a request gives up waiting for it, so short time limits do not prevent it.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import math
import random
import ssl
import threading
from collections.abc import Coroutine, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus, WebSocketException
from websockets.protocol import State

from paligemma_vla_client.codec import CodecError, pack, unpack
from paligemma_vla_client.errors import ContractError, PolicyConnectionError, PolicyServerError, PolicyTimeout

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_FRAME = 64 * 2**20  # bytes of one answer
ATTEMPT_SECONDS = 10.0  # one attempt to connect
CLOSE_SECONDS = 1.0
TOO_BIG = 1009  # why a server closes a connection, in the websocket protocol
BUSY_STATUS = (500, 502, 503, 504)  # of HTTP: the server or a proxy may have recovered a moment later
Observation = Mapping[str, Any]


class AsyncPolicyClient:
    """A policy server, for a program that uses asyncio.

    url: `ws://HOST:PORT`, or `wss://HOST:PORT` for TLS. api_key: what the server was given. timeout_s: limit of one request,
    `math.inf` for none. connect_timeout_s: how long to try to reach the server, at the start and after each lost connection.
    ssl_context: of TLS, such as `ssl.create_default_context(cafile=...)` for a certificate of your own.

    metadata: what the server says of its policy; empty until it is connected.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 10.0,
        connect_timeout_s: float = 60.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(f"url: got {url!r}, expected ws://HOST:PORT or wss://HOST:PORT")
        self.url, self.timeout_s, self.connect_timeout_s = url, timeout_s, connect_timeout_s
        self.metadata: dict[str, Any] = {}
        self._options: dict[str, Any] = {} if ssl_context is None else {"ssl": ssl_context}
        if api_key is not None:
            self._options["additional_headers"] = {"Authorization": f"Api-Key {api_key}"}
        self._contract: bytes | None = None  # the metadata as they came
        self._opening: asyncio.Task[ClientConnection] | None = None  # its result is the connection in use
        self._reason = ""  # why the server is not reached
        self._lock: asyncio.Lock | None = None
        self._closed = False

    async def connect(self) -> None:
        """Reach the server and read its metadata; requests do it too. It tries again with growing pauses, and logs what it
        waits for.

        Raises `PolicyConnectionError` after `connect_timeout_s`, `PolicyServerError` when the server refuses (a wrong key).
        """
        await self._connected()

    async def infer(
        self,
        observation: Observation,
        seed: int | None = None,
        timeout_s: float | None = None,
        record: Mapping[str, Any] | None = None,
        executed: int | None = None,
        delay: int | None = None,
        unused: bool = False,
    ) -> dict[str, Any]:
        """The policy's answer to an observation.

        observation: the keys that the server's `--keys` or `--preset` name; pictures (H, W, 3) uint8, `state` (P,), `prompt`.
        seed: of the noise, for an answer that can be repeated; not all servers know it. timeout_s: limit of this request,
        connecting anew included; None: the client's. record: what was executed since the observation before, for limits and
        `serve --record`: {"executed": (A,) or (M, A), "actor": "policy" or "intervention"}; not all servers know it.

        Of real-time chunking, for `paligemma-vla serve` (`ControlLoop` gives all three): executed: control steps from the
        observation of the last chunk to this one; the rest of that chunk is what the answer continues. delay: control steps
        until the answer will be used; so many of its first actions are those of the last chunk. unused: the last answer came
        too late and was not used; `executed` counts in the one before it.

        Returns {"actions": (K, A), "server_timing": {...}}, and what else the server sends.
        Raises `ContractError` for a key that the policy does not know, `CodecError` for a value that cannot be sent,
        `PolicyServerError` with the server's text, `PolicyTimeout`, `PolicyConnectionError`.
        """
        if self._contract is None:
            await self.connect()
        self._check_keys(observation)
        told = {"seed": seed, "record": record, "executed": executed, "delay": delay, "unused": unused or None}
        frame = _packed({**observation, **{name: value for name, value in told.items() if value is not None}})
        return _read_answer(await self._request(frame, timeout_s))

    async def show(self, observation: Observation, record: Mapping[str, Any] | None = None) -> None:
        """Show an observation for `serve --record` alone: of a step that needs no new actions. record: as in `infer`."""
        if self._contract is None:
            await self.connect()
        self._check_keys(observation)
        if "server_versions" in self.metadata:
            answer = await self._request(_packed({**observation, "endpoint": "record", "record": record}), None)
            if isinstance(answer, str):
                raise PolicyServerError(answer)

    async def reset(self, record: Mapping[str, Any] | None = None) -> None:
        """Begin a new episode. Only `paligemma-vla serve` is told; openpi's protocol has no word for it.

        record: as in `infer`, and "success": whether the episode that ends reached its goal.
        """
        if self._contract is None:
            await self.connect()
        if "server_versions" in self.metadata:
            answer = await self._request(pack({"endpoint": "reset", "record": record}), None)
            if answer != "reset successful":
                raise PolicyServerError(answer if isinstance(answer, str) else "reset: got an answer that is no text")

    def check(self, **expected: Any) -> None:
        """Compare the metadata with what the robot's program expects, before anything moves: `check(control_hz=20,
        action_names=[...])`. Raises `ContractError` that names each field that differs or that the server does not know."""
        faults = []
        for name, value in expected.items():
            got, wanted = self.metadata.get(name), list(value) if isinstance(value, tuple) else value
            if got != wanted:
                faults.append(f"{name}: expected {wanted!r}, got {got!r}" + ("" if got else ": the server does not know it"))
        if faults:
            raise ContractError("\n  ".join([f"{self.url}: the policy is another one:", *faults]))

    async def close(self) -> None:
        """Close the connection; a request that waits in another task raises `PolicyConnectionError`."""
        self._closed = True
        opening, self._opening = self._opening, None
        if opening is None:
            return
        opening.cancel()
        await asyncio.wait([opening])
        if not opening.cancelled() and opening.exception() is None:
            await opening.result().close()

    async def __aenter__(self) -> AsyncPolicyClient:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check_keys(self, observation: Observation) -> None:
        """Refuse a key that the server would ignore: most often it is a misspelt camera."""
        known = _known_keys(self.metadata)
        unknown = [key for key in _flat_keys(observation) if key not in known] if known else []
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ContractError(f"observation: got {', '.join(unknown)}, expected keys out of {', '.join(known)}{hint}")

    async def _request(self, frame: bytes, timeout_s: float | None) -> Any:
        """Send one frame and return the server's next one."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        try:
            return await asyncio.wait_for(self._exchange(frame), _or_none(limit))
        except asyncio.TimeoutError:
            why = f": {self._reason}" if self._reason else ""
            raise PolicyTimeout(f"{self.url}: no answer within {limit:g} s{why}") from None

    async def _exchange(self, frame: bytes) -> Any:
        if self._lock is None:  # not in the constructor: Python 3.9 would bind it to the event loop of that moment
            self._lock = asyncio.Lock()
        async with self._lock:
            for attempt in (1, 2):
                connection = await self._connected()
                try:
                    await connection.send(frame)
                    return await connection.recv()
                except ConnectionClosed as error:
                    self._drop(connection)
                    self._raise_if_closed()
                    if error.rcvd is not None and error.rcvd.code == TOO_BIG:  # it would be so again
                        text = f"observation: {len(frame)} bytes are more than the server takes ({error.rcvd.reason})"
                        raise PolicyServerError(f"{text}; send smaller pictures") from error
                    if attempt == 2:
                        text = f"{self.url}: the connection was lost again when the request was repeated ({error})"
                        raise PolicyConnectionError(text) from error
                    log.warning("%s: connection lost (%s); connecting anew", self.url, error)
                except BaseException:  # cancelled, most often
                    self._drop(connection)
                    raise

    def _drop(self, connection: ClientConnection) -> None:
        """Forget a connection without waiting for the other side, which may not be there."""
        _abort(connection)
        self._opening = None

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise PolicyConnectionError(f"{self.url}: the client is closed") from None

    async def _connected(self) -> ClientConnection:
        self._raise_if_closed()
        failed = self._opening is not None and self._opening.done() and self._opening.exception() is not None
        if self._opening is None or failed:
            self._opening = asyncio.ensure_future(self._open())
        try:
            return await asyncio.shield(self._opening)
        except asyncio.CancelledError:
            self._raise_if_closed()
            raise

    async def _open(self) -> ClientConnection:
        try:
            return await asyncio.wait_for(self._keep_trying(), _or_none(self.connect_timeout_s))
        except asyncio.TimeoutError:
            reason = self._reason or "no answer"
            raise PolicyConnectionError(f"{self.url}: not reached within {self.connect_timeout_s:g} s: {reason}") from None

    async def _keep_trying(self) -> ClientConnection:
        self._reason = ""
        for pause in backoff():
            try:
                connection = await self._open_once()
                self._reason = ""
                return connection
            except (OSError, WebSocketException, asyncio.TimeoutError) as error:
                self._reason = _described(error)
                if not _may_pass(error):
                    refused = PolicyServerError if isinstance(error, InvalidStatus) else PolicyConnectionError
                    raise refused(f"{self.url}: {self._reason}") from error
            log.warning("%s: %s; next attempt in %.1f s", self.url, self._reason, pause)
            await asyncio.sleep(pause)
        raise AssertionError("the pauses do not end")

    async def _open_once(self) -> ClientConnection:
        connection = await connect(
            self.url,
            compression=None,
            max_size=MAX_FRAME,
            open_timeout=ATTEMPT_SECONDS,
            ping_interval=None,  # openpi's server cannot answer while it infers; the time limit of a request does the same
            close_timeout=CLOSE_SECONDS,
            **self._options,
        )
        try:
            self._learn(await asyncio.wait_for(connection.recv(), ATTEMPT_SECONDS))
        except BaseException:
            _abort(connection)
            raise
        return connection

    def _learn(self, frame: Any) -> None:
        """Read the metadata, the first frame of a connection. They may not change: the robot's program has checked them."""
        if isinstance(frame, str):
            raise PolicyServerError(frame)
        try:
            metadata = unpack(frame)
        except CodecError as error:
            raise PolicyServerError(f"{self.url}: the first message is not that of a policy server: {error}") from error
        if not isinstance(metadata, dict):
            raise PolicyServerError(f"{self.url}: the first message is a {type(metadata).__name__}, expected a map")
        if self._contract not in (None, frame):
            before, after = ({name: pack(value) for name, value in each.items()} for each in (self.metadata, metadata))
            names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
            raise ContractError(f"{self.url}: the server has another policy now, in {', '.join(names)}; make a new client")
        self._contract, self.metadata = frame, metadata


class PolicyClient:
    """A policy server, for a program without asyncio. It is connected when it is made.

    Arguments, methods and exceptions are those of `AsyncPolicyClient`, which it runs in a thread of its own: there the server's
    pings are answered, and a lost connection is opened, while the robot's program does something else.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 10.0,
        connect_timeout_s: float = 60.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._client = AsyncPolicyClient(
            url, api_key=api_key, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s, ssl_context=ssl_context
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="policy client", daemon=True)
        self._thread.start()
        try:
            self._run(self._client.connect())
        except BaseException:
            self.close()
            raise

    @property
    def metadata(self) -> dict[str, Any]:
        return self._client.metadata

    def infer(
        self,
        observation: Observation,
        seed: int | None = None,
        timeout_s: float | None = None,
        record: Mapping[str, Any] | None = None,
        executed: int | None = None,
        delay: int | None = None,
        unused: bool = False,
    ) -> dict[str, Any]:
        """As `AsyncPolicyClient.infer`."""
        return self._run(self._client.infer(observation, seed, timeout_s, record, executed, delay, unused))

    def show(self, observation: Observation, record: Mapping[str, Any] | None = None) -> None:
        """As `AsyncPolicyClient.show`."""
        self._run(self._client.show(observation, record))

    def reset(self, record: Mapping[str, Any] | None = None) -> None:
        """As `AsyncPolicyClient.reset`."""
        self._run(self._client.reset(record))

    def check(self, **expected: Any) -> None:
        """As `AsyncPolicyClient.check`."""
        self._client.check(**expected)

    def close(self) -> None:
        """Close the connection; a request that waits in another thread raises `PolicyConnectionError`."""
        if self._loop.is_closed():
            return
        try:
            self._run(self._end())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise PolicyConnectionError(f"{self._client.url}: the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: the request is given up, as by its time limit
            future.cancel()
            raise

    async def _end(self) -> None:
        await self._client.close()
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        if waiting:
            await asyncio.wait(waiting, timeout=CLOSE_SECONDS)


def backoff(first_s: float = 0.1, longest_s: float = 5.0) -> Iterator[float]:
    """Pauses between attempts: each about twice the one before. They are random, so that many robots do not come at once."""
    pause = first_s
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, longest_s)


def _abort(connection: ClientConnection) -> None:
    if connection.state is not State.CLOSED:  # asyncio's transports are of no use after their end, not even for this
        connection.transport.abort()


def _packed(message: Observation) -> bytes:
    """The message as a frame. Raises `CodecError` with the key that cannot be sent."""
    try:
        return pack(message)
    except CodecError:
        for key, value in message.items():
            try:
                pack(value)
            except CodecError as error:
                raise CodecError(f"observation: {key}: {error}") from None
        raise


def _may_pass(error: Exception) -> bool:
    """Whether the next attempt may succeed where this one failed."""
    if isinstance(error, InvalidStatus):
        return error.response.status_code in BUSY_STATUS
    if isinstance(error, ssl.SSLError):
        return False
    return isinstance(error, (OSError, asyncio.TimeoutError, ConnectionClosed, InvalidMessage))


def _described(error: Exception) -> str:
    if isinstance(error, InvalidStatus):
        body = (error.response.body or b"").decode("utf-8", "replace").strip()
        return f"HTTP {error.response.status_code}: {body[:300]}"
    if isinstance(error, asyncio.TimeoutError):
        return f"no answer within {ATTEMPT_SECONDS:g} s"
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ConnectionRefusedError):
        text += "; nothing listens there: is the server up, and its --host an address that this machine reaches?"
    return text


def _read_answer(frame: Any) -> dict[str, Any]:
    if isinstance(frame, str):
        raise PolicyServerError(frame)
    try:
        answer = unpack(frame)
    except CodecError as error:
        raise PolicyServerError(f"answer: {error}") from error
    actions = answer.get("actions") if isinstance(answer, dict) else None
    if not isinstance(actions, np.ndarray) or actions.ndim != 2 or not actions.size:
        got = f"actions {actions.shape}" if isinstance(actions, np.ndarray) else f"a {type(answer).__name__} without actions"
        raise PolicyServerError(f"answer: got {got}, expected actions (K, A)")
    if not np.isfinite(actions).all():
        raise PolicyServerError("answer: got actions that are not finite")
    return dict(answer)


def _known_keys(metadata: Mapping[str, Any]) -> list[str]:
    """Every key that an observation may have; empty where the server does not say."""
    named = metadata.get("keys")
    ours = named.get("openpi") if isinstance(named, dict) else None
    if not isinstance(ours, dict):
        return []
    return [part for names in ours.values() for name in names for part in name.split("+")]


def _flat_keys(observation: Observation, prefix: str = "") -> Iterator[str]:
    """Keys of maps within maps are joined with `/`."""
    for key, value in observation.items():
        if isinstance(value, Mapping):
            yield from _flat_keys(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}"


def _or_none(seconds: float) -> float | None:
    return None if math.isinf(seconds) else seconds
