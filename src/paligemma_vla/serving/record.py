"""`serve --record D`: what clients show and do, written as episodes where every step is known, and as a log elsewhere.

A view is one observation of a client. A view after which exactly one action was executed is a step of an episode; any other is
a line of the client's log, a file of JSON lines that is no data set: a robot that executes eight actions after each view shows
an eighth of its steps. What was executed the protocol knows (`Session.executes_all`), or the client says (`Executed`).

A thread encodes and writes, so that no answer waits for a disk. What does not fit its queue is left out and counted, and the
episode ends there. A disk that is full ends the recording, not the server.
"""

from __future__ import annotations

import base64
import json
import logging
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.images import encode_image
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import DataError, VLAError, closest, first_line
from paligemma_vla.observation import ParsedObservation
from paligemma_vla.policy import Policy
from paligemma_vla.schema import Episode
from paligemma_vla.serving.metrics import Metrics

log = logging.getLogger(__name__)
Actor = Literal["policy", "intervention"]
MOST_EXECUTED = 4096  # actions between two messages
JPEG_QUALITY = 95
QUEUED_VIEWS = 64  # three seconds of a robot at 20 Hz
OPEN_BYTES = 2**30  # of pictures in episodes that have not ended; the largest is ended then
LOG_SECONDS, CLOSE_SECONDS = 60.0, 60.0
COLUMNS = {schema.ACTOR: pa.string(), schema.TIME: pa.float64(), schema.SUCCESS: pa.bool_()}
LOG_TEXT = "a log of served chunks, one view for several actions: no episodes; each line holds what was seen, sent and executed"


@dataclass(frozen=True)
class Executed:
    """Actions (M, A), in real units, that a client executed after its message before; actor: who chose them."""

    actions: NDArray[np.float32]
    actor: Actor = "policy"


def parse_executed(told: Any, action_dim: int) -> Executed | None:
    """What a message says under `record`: {"executed": (A,) or (M, A), "actor"}. None without. Raises `DataError`."""
    if told is None:
        return None
    if not isinstance(told, Mapping) or told.keys() - {"executed", "actor", "success"}:
        got = sorted(map(str, told)) if isinstance(told, Mapping) else type(told).__name__
        raise DataError(f"record: got {got!s:.80}, expected a map of executed, actor and success")
    actor = told.get("actor", "policy")
    if actor not in get_args(Actor):
        raise DataError(f"record/actor: got {actor!r:.40}{closest(str(actor), get_args(Actor))}")
    if told.get("executed") is None:
        return None
    try:
        found = np.asarray(told["executed"])
    except (TypeError, ValueError, OverflowError):  # a ragged list
        found = np.empty(0, object)
    with np.errstate(over="ignore"):
        actions = found.astype(np.float32) if found.dtype.kind in "iuf" else np.empty(0, np.float32)
    rows = actions.reshape(-1, action_dim) if actions.ndim in (1, 2) and actions.shape[-1] == action_dim else actions[:0]
    if not 0 < len(rows) <= MOST_EXECUTED or not np.isfinite(rows).all():
        expected = f"finite numbers ({action_dim},), or (M, {action_dim}) with M from 1 to {MOST_EXECUTED}"
        raise DataError(f"record/executed: got {found.dtype} {found.shape}, expected {expected}")
    return Executed(rows, actor)


def parse_success(told: Any) -> bool | None:
    """What the message that ends an episode says under `record`: {"success": bool}. Raises `DataError`."""
    success = told.get("success") if isinstance(told, Mapping) else None
    if success is not None and not isinstance(success, (bool, np.bool_)):
        raise DataError(f"record/success: got {success!r:.40}, expected true or false")
    return None if success is None else bool(success)


@dataclass(frozen=True)
class Event:
    """Something that a client did. client: its number. count: how many events it had before. executed: since its view before.

    view: what it shows, and sent (N, A) what it was answered; None where its episode ends, with success if that is known, and
    gone if it has left.
    """

    client: int
    count: int
    protocol: str
    executed: Executed | None = None
    view: ParsedObservation | None = None
    sent: NDArray[np.float32] | None = None
    success: bool | None = None
    gone: bool = False
    when: float = field(default_factory=time.time)


@dataclass(frozen=True)
class _View:
    """A view with its pictures encoded."""

    images: list[bytes | None]
    state: NDArray[np.float32]
    prompt: str
    when: float
    sent: NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        return sum(len(image or b"") for image in self.images)


@dataclass(frozen=True)
class _Step:
    view: _View
    action: NDArray[np.float32]
    actor: Actor


@dataclass
class _Client:
    """events: how many there were. steps: of its episode, nbytes: of their pictures. pending: its last view, while what
    followed is not known. log: its file, once there is one. in_log: something of its episode is there."""

    protocol: str
    events: int = 0
    steps: list[_Step] = field(default_factory=list)
    nbytes: int = 0
    pending: _View | None = None
    log: IO[str] | None = None
    in_log: bool = False

    def write_line(self, entry: Mapping[str, Any]) -> None:
        assert self.log is not None
        self.log.write(json.dumps(entry) + "\n")
        self.log.flush()  # a kill loses no line

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


class Recorder:
    """Writes events into a folder until `close`. `add` never waits.

    Raises `DataError`, when it is made, for a folder whose episodes are others or are being written, `OSError` for one that
    cannot be written.
    """

    def __init__(self, folder: Path, policy: Policy, about: Mapping[str, str], metrics: Metrics) -> None:
        """about: the policy and the server, for the metadata of files."""
        cameras = policy.metadata["cameras"]
        self.folder, self.metrics, self._cameras = folder, metrics, cameras
        self.metadata = replace(policy.robot, cameras=policy.robot.cameras[: len(cameras)], extra=dict(about))
        self._writer = EpisodeWriter(folder, self.metadata, extra=COLUMNS)
        try:
            self._writer.expect(len(cameras), policy.metadata["state_dim"], policy.metadata["action_dim"])
        except BaseException:
            self._writer.close()
            raise
        self._queue: queue.Queue[Event | None] = queue.Queue()
        self._clients: dict[int, _Client] = {}
        self._failed, self._drop_logged = False, -np.inf
        metrics.recording.set(1)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def add(self, event: Event) -> None:
        """Take an event, or leave it out and count it where too many wait."""
        if self._failed:
            return
        if self._queue.qsize() < QUEUED_VIEWS * (1 if event.view is not None else 100):
            self._queue.put(event)
            return
        self.metrics.not_recorded.inc()
        if time.monotonic() - self._drop_logged >= LOG_SECONDS:
            self._drop_logged = time.monotonic()
            log.warning("--record %s: too slow; views are left out, and their episodes end there", self.folder)

    def close(self) -> None:
        """Write what waits, end all episodes, and finish the files."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.error("--record %s: the disk does not answer; what was not written yet is lost", self.folder)

    def _run(self) -> None:
        try:
            while (event := self._queue.get()) is not None:
                self._record(event)
            for client in self._clients.values():
                self._end(client)
        except Exception as error:  # of any kind: the robot goes on without a record
            self._fail(error)
            while event is not None:
                event = self._queue.get()
        try:
            for client in self._clients.values():
                client.close()
            self._writer.close()
        except (OSError, pa.ArrowException) as error:
            text = "--record %s: the last file is not finished (%s); its episodes are kept, and recovered by the next --record"
            log.error(text, self.folder, first_line(error))

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self.metrics.recording.set(0)
        text = "--record %s: recording ends after %d episodes: %s; serving goes on"
        expected = isinstance(error, (OSError, VLAError))
        log.error(text, self.folder, self._writer.episodes_written, first_line(error), exc_info=None if expected else error)

    def _record(self, event: Event) -> None:
        client = self._clients.setdefault(event.client, _Client(event.protocol))
        if event.count != client.events:  # some are missing: what was executed was so after one of them
            self._end(client)
        elif client.pending is not None and (event.view is not None or event.executed is not None):
            self._settle(client, client.pending, event.executed)
        client.events = event.count + 1
        if event.view is None:
            self._end(client, event.success)
            if event.gone:
                self._clients.pop(event.client).close()
            return
        if client.steps and client.steps[0].view.prompt != event.view.prompt:
            self._end(client)
        images = [None if image is None else encode_image(image, "jpeg", JPEG_QUALITY) for image in event.view.images]
        client.pending = _View(images, event.view.state, event.view.prompt, event.when, event.sent)

    def _settle(self, client: _Client, view: _View, executed: Executed | None) -> None:
        """A view is a step when one action followed it, and a line of the log when it was another number."""
        if executed is not None and len(executed.actions) == 1:
            client.pending = None
            client.steps.append(_Step(view, executed.actions[0], executed.actor))
            client.nbytes += view.nbytes
            if sum(each.nbytes for each in self._clients.values()) > OPEN_BYTES:
                self._write(max(self._clients.values(), key=lambda each: each.nbytes))
            return
        self._write(client)
        self._log(client, view, executed)
        client.pending = None

    def _end(self, client: _Client, success: bool | None = None) -> None:
        """End the client's episode. What followed its last view is not known then: of a client of episodes it is left out."""
        if client.pending is not None and not client.steps:
            self._log(client, client.pending, None)
        client.pending = None
        if client.in_log:
            client.write_line({"episode_ends": True, "success": success})
            client.in_log = False
        self._write(client, success)

    def _write(self, client: _Client, success: bool | None = None) -> None:
        steps, client.steps, client.nbytes = client.steps, [], 0
        if not steps:
            return
        images = [[step.view.images[n] for step in steps] for n in range(len(self._cameras))]
        extra: dict[str, list[Any]] = {
            schema.ACTOR: [step.actor for step in steps],
            schema.TIME: [step.view.when for step in steps],
            schema.SUCCESS: [success] * len(steps),
        }
        state, action = np.stack([step.view.state for step in steps]), np.stack([step.action for step in steps])
        self._writer.write(Episode(images, state, action, steps[0].view.prompt, bool(success), extra))

    def _log(self, client: _Client, view: _View, executed: Executed | None) -> None:
        if client.log is None:
            client.log = self._open_log()
            about = {"what": LOG_TEXT, "protocol": client.protocol, "metadata": json.loads(self.metadata.to_json())}
            client.write_line(about)
        images = {
            key: None if image is None else base64.b64encode(image).decode()
            for key, image in zip(self._cameras, view.images, strict=True)
        }
        done = None if executed is None else executed.actions.tolist()
        told = {"sent": None if view.sent is None else view.sent.tolist(), "executed": done}
        told |= {"actor": None if executed is None else executed.actor}
        seen = {schema.TIME: view.when, schema.PROMPT: view.prompt, schema.STATE: view.state.tolist()}
        client.write_line({**seen, **told, **images})
        client.in_log = True

    def _open_log(self) -> IO[str]:
        for number in count():
            try:
                return (self.folder / f"log-{number:05d}{schema.LOG_SUFFIX}").open("x", encoding="utf-8")
            except FileExistsError:
                pass
        raise AssertionError("count has no end")
