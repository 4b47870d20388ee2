"""An object store for tests: moto's S3 server, and before it a proxy that is slow, refuses, cuts connections and answers short.

`with Store("bucket") as store:` sets the AWS_ variables of this process; the proxy does no harm until `store.faults` is set.
"""

from __future__ import annotations

import http.client
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
REFUSALS = {"unavailable": (503, "SlowDown"), "denied": (403, "InvalidAccessKeyId")}
PIECE = 16384
HOP_BY_HOP = {"connection", "content-length", "date", "expect", "server", "transfer-encoding"}


@dataclass(frozen=True)
class Faults:
    """What happens to requests. latency: seconds before each answer. unavailable, denied, cut, short: shares of requests that
    get a 503, a 403, a connection that closes in mid-body, and half of the bytes as if they were all. bytes_per_second: of
    each answer."""

    latency: float = 0.0
    unavailable: float = 0.0
    denied: float = 0.0
    cut: float = 0.0
    short: float = 0.0
    bytes_per_second: float | None = None


class Store:
    """bucket: made at the start. requests, sent: number of requests, and bytes of answers, by method, since `reset`."""

    def __init__(self, bucket: str) -> None:
        self.bucket, self.faults = bucket, Faults()
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._random, self._lock = random.Random(0), threading.Lock()

    def __enter__(self) -> Store:
        import boto3
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self.upstream: tuple[str, int] = self._moto.get_host_and_port()
        self._proxy = _Server(("127.0.0.1", 0), self)
        threading.Thread(target=self._proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.address = f"127.0.0.1:{self._proxy.server_address[1]}"
        self._patch = pytest.MonkeyPatch()
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{self.address}"}.items():
            self._patch.setenv(name, value)
        host, port = self.upstream
        self.client: Any = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        self.client.create_bucket(Bucket=self.bucket)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._patch.undo()
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

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

    def draw(self, method: str) -> str | None:
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

    def count(self, method: str, size: int) -> None:
        with self._lock:
            self.sent[method] += size


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], store: Store) -> None:
        super().__init__(address, _Handler)
        self.store = store


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _relay(self) -> None:
        store, method = self.server.store, self.command
        body = self._body()
        fault = store.draw(method)
        time.sleep(store.faults.latency)
        if fault in REFUSALS:
            status, code = REFUSALS[fault]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test asked</Message></Error>"
            self._answer(status, {"Content-Type": "application/xml"}, body.encode())
            return
        upstream = http.client.HTTPConnection(*store.upstream)
        passed_on = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        upstream.request(method, self.path, body, passed_on)
        response = upstream.getresponse()
        content = response.read()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
        length = response.getheader("Content-Length", "0")
        upstream.close()
        if method == "HEAD":
            self._answer(response.status, headers, b"", int(length))
        elif fault == "cut":
            self._answer(response.status, headers, content[: len(content) // 2], len(content))
            self.close_connection = True
        else:
            self._answer(response.status, headers, content[: len(content) // 2] if fault == "short" else content)
        store.count(method, len(content))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        rate = self.server.store.faults.bytes_per_second
        if self.command == "HEAD":
            return
        for first in range(0, len(content), PIECE):
            piece = content[first : first + PIECE]
            self.wfile.write(piece)
            if rate is not None:
                time.sleep(len(piece) / rate)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay

    def log_message(self, format: str, *args: object) -> None:
        pass
