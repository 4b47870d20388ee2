"""An object store for tests: moto's S3 server, which can be slow, refuse, cut connections and answer short.

`with Store("bucket") as store:` sets the AWS_ variables of this process; it does no harm until `store.faults` is set.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
REFUSALS = {"unavailable": (503, "SlowDown"), "denied": (403, "InvalidAccessKeyId")}
OWN = "own-requests"  # in the user agent of the test's client, whose requests meet no fault and are not counted


@dataclass(frozen=True)
class Faults:
    """What happens to requests. latency: seconds before each answer. unavailable, denied, cut, short: shares of requests that
    get a 503, a 403, a connection that closes in mid-body, and half of the bytes as if they were all."""

    latency: float = 0.0
    unavailable: float = 0.0
    denied: float = 0.0
    cut: float = 0.0
    short: float = 0.0


class Store:
    """bucket: made at the start. requests, sent: number of requests, and bytes of answers, by method, since `reset`."""

    def __init__(self, bucket: str) -> None:
        self.bucket, self.faults = bucket, Faults()
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._random, self._lock = random.Random(0), threading.Lock()

    def __enter__(self) -> Store:
        import boto3
        from botocore.config import Config
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, True, request_handler=MotoRequestHandler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._patch = pytest.MonkeyPatch()
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{self.address}"}.items():
            self._patch.setenv(name, value)
        self.client: Any = boto3.client("s3", config=Config(user_agent_extra=OWN))
        self.client.create_bucket(Bucket=self.bucket)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._patch.undo()
        self._server.shutdown()
        self._server.server_close()

    def url(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def complete_url(self, key: str) -> str:
        """A URL that needs no AWS_ variables, for commands in processes of their own."""
        credentials = f"{CREDENTIALS['AWS_ACCESS_KEY_ID']}:{CREDENTIALS['AWS_SECRET_ACCESS_KEY']}"
        return f"s3://{credentials}@{self.bucket}/{key}?endpoint_override={self.address}&scheme=http&region=us-east-1"

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def upload(self, folder: Path, key: str) -> str:
        """Copy the files of a folder there; returns its URL."""
        for path in sorted(folder.rglob("*.parquet")):
            self.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return self.url(key)

    @contextmanager
    def failing(self, faults: Faults) -> Iterator[None]:
        self.faults = faults
        try:
            yield
        finally:
            self.faults = Faults()

    def reset(self) -> None:
        """Count from nothing again."""
        with self._lock:
            self.requests.clear()
            self.sent.clear()

    def _draw(self, method: str) -> str | None:
        """Which fault the next request meets."""
        with self._lock:
            self.requests[method] += 1
            drawn, faults = self._random.random(), self.faults
        for name in ("unavailable", "denied", *(("cut", "short") if method == "GET" else ())):
            share: float = getattr(faults, name)
            if drawn < share:
                return name
            drawn -= share
        return None

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """A WSGI application: moto's, with faults."""
        from werkzeug.wrappers import Response

        if OWN in environ.get("HTTP_USER_AGENT", ""):
            return self._moto(environ, start_response)
        method = environ["REQUEST_METHOD"]
        fault = self._draw(method)
        time.sleep(self.faults.latency)
        if fault in REFUSALS:
            status, code = REFUSALS[fault]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test asked</Message></Error>"
            return Response(body, status, content_type="application/xml")(environ, start_response)
        response = Response.from_app(self._moto, environ, buffered=True)
        content = response.get_data()
        with self._lock:
            self.sent[method] += len(content)
        if fault is not None:
            response.set_data(content[: len(content) // 2])  # with its length
        if fault == "cut":
            response.content_length = len(content)
        return response(environ, start_response)
