"""The page that shows what a server does: `GET /` in a browser. It reads, and changes nothing.

`page.html` asks for `/state.json` twice a second, and for a client's pictures, `/image/CLIENT/CAMERA`, when they are new. What
a client sent is in these two alone, as JSON and as JPEG: the page itself is the same for everybody.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import json
import re
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from paligemma_vla.data.images import encode_image
from paligemma_vla.observation import ParsedObservation
from paligemma_vla.serving.service import Fault, PolicyService, Session

QUALITY = 85  # of JPEG
SHOWN = 120  # latencies
PER_SECONDS = 10.0  # answers per second are counted over these
DECIMALS = 6


class Page:
    """Answers requests for the page. Work is done in threads, and only when somebody looks."""

    def __init__(self, service: PolicyService) -> None:
        self._service = service
        self._policy = _describe(service)
        self._html = resources.files(__package__).joinpath("page.html").read_bytes()
        self.headers = _headers(self._html.decode())
        self._pictures: dict[int, tuple[ParsedObservation, asyncio.Task[list[bytes | None]]]] = {}

    async def get(self, path: str) -> tuple[bytes, str] | None:
        """Body and content type, or None where nothing is shown."""
        if path == "/":
            return self._html, "text/html; charset=utf-8"
        if path == "/state.json":
            sessions = [copy.copy(session) for session in self._service.sessions.values()]
            load, faults = self._load(), list(self._service.faults)
            return await asyncio.to_thread(self._state, sessions, load, faults), "application/json"
        if found := re.fullmatch(r"/image/(\d{1,9})/(\d{1,2})", path):
            picture = await self._picture(*map(int, found.groups()))
            return None if picture is None else (picture, "image/jpeg")
        return None

    async def _picture(self, number: int, camera: int) -> bytes | None:
        """What the policy saw last, as JPEG. All cameras are encoded together, once per observation."""
        sessions = self._service.sessions
        for gone in self._pictures.keys() - sessions.keys():
            del self._pictures[gone]
        observation = sessions[number].observation if number in sessions else None
        if observation is None or camera >= len(observation.images):
            return None
        seen, task = self._pictures.get(number, (None, None))
        if task is None or seen is not observation:
            task = asyncio.create_task(asyncio.to_thread(self._encode, observation))
            self._pictures[number] = observation, task
        return (await asyncio.shield(task))[camera]  # others may wait for it, too

    def _encode(self, observation: ParsedObservation) -> list[bytes | None]:
        spec = self._service.policy.preprocessor.image
        seen = [None if image is None else spec.apply(image).transpose(1, 2, 0) for image in observation.images]
        return [None if image is None else encode_image(image, "jpeg", QUALITY) for image in seen]

    def _load(self) -> dict[str, Any]:
        service, now = self._service, time.time()
        metrics, recent = service.metrics, list(service.recent)
        window = [when for when, _ in recent if now - when < PER_SECONDS]
        return {
            "recent": [seconds for _, seconds in recent],
            "per_second": len(window) / max(1.0, min(PER_SECONDS, now - window[0])) if window else 0.0,
            "queue": metrics.total("queue"),
            "answers": metrics.total("latency_seconds_count"),
            "errors": metrics.total("errors_total"),
            "dropped": metrics.total("dropped_total"),
            "limited": metrics.total("limited_total"),
            "recording": None if service.recorder is None else bool(metrics.total("recording")),
        }

    def _state(self, sessions: Sequence[Session], load: dict[str, Any], faults: Sequence[Fault]) -> bytes:
        now, seconds = time.time(), load["recent"]
        last, (p50, p99) = seconds[-1:] or [None], np.percentile(seconds, (50, 99)).tolist() if seconds else (None, None)
        state = {
            "started": self._service.started,
            "policy": self._policy,
            "load": {**load, "recent": seconds[-SHOWN:], "last": last[0], "p50": p50, "p99": p99, "counted": len(seconds)},
            "clients": [_client(session, now) for session in sessions],
            "faults": [{**vars(fault), "age": now - fault.when} for fault in reversed(faults)],
        }
        return json.dumps(state, allow_nan=False).encode()


def _describe(service: PolicyService) -> dict[str, Any]:
    """What does not change while the server runs."""
    policy, contract = service.policy, service.contract
    names = [*contract["action_names"]] or [f"action {number + 1}" for number in range(contract["action_dim"])]
    units = [*contract["action_units"]] or [""] * len(names)
    shown = ["checkpoint", "fingerprint", "robot", "cameras", "camera_names", "image_size", "image_orientation", "state_dim"]
    shown += ["state_names", "state_units", "action_convention", "horizon", "control_hz", "training", "weights", "keys"]
    return {
        **{name: contract[name] for name in shown},
        "name": policy.config.training.experiment_name,
        "actions": [
            {"name": name, "unit": unit, "low": low, "high": high}
            for name, unit, (low, high) in zip(names, units, _ranges(service), strict=True)
        ],
        "limited": service.limits is not None,
        "seconds": contract["horizon"] / contract["control_hz"] if contract["control_hz"] else None,
        "version": contract["server_versions"]["paligemma-vla"],
    }


def _ranges(service: PolicyService) -> list[tuple[float | None, float | None]]:
    """Low and high of each number of an action: of the limits, or of the data where these are off; None: there is none.

    The data's are of what the model predicts: those of a movement say nothing of an action that it leads to.
    """
    limits, preprocessor = service.limits, service.policy.preprocessor
    statistics, moves = preprocessor.statistics.action, list(preprocessor.actions.dimensions)
    low, high = (statistics.min, statistics.max) if limits is None else (limits.predicted_low, limits.predicted_high)
    low, high = np.array(low, np.float32), np.array(high, np.float32)
    low[moves], high[moves] = -np.inf, np.inf
    if limits is not None:
        low, high = np.maximum(low, limits.low), np.minimum(high, limits.high)
    return [(_number(least), _number(most)) for least, most in zip(low, high, strict=True)]


def _client(session: Session, now: float) -> dict[str, Any]:
    """One client and its last answer: actions (A, K), one list per dimension."""
    shown = {name: getattr(session, name) for name in ("number", "protocol", "peer", "answered", "seconds")}
    shown["connected"] = now - session.since
    if (observation := session.observation) is None:
        return {**shown, "prompt": None, "pictures": [], "actions": [], "seen": None, "idle": None}
    pictures = [None if image is None else (image.shape[1], image.shape[0]) for image in observation.images]
    actions = [] if session.actions is None else session.actions.T.astype(np.float64).round(DECIMALS).tolist()
    shown |= {"prompt": observation.prompt, "pictures": pictures, "actions": actions}
    return {**shown, "seen": session.seen_at, "idle": now - session.seen_at}


def _number(value: float) -> float | None:
    """Rounded as actions are, so that a page can compare them; None for no limit."""
    return round(float(value), DECIMALS) if np.isfinite(value) else None


def _headers(html: str) -> dict[str, str]:
    """A browser runs the page's own script and style, asks nobody else, and keeps nothing."""
    sources = {}
    for tag in ("script", "style"):
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
        sources[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
