"""Who reaches the server: keys, other sites, TLS, addresses, and floods of connections."""

from __future__ import annotations

import base64
import re
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from observations import draw
from paligemma_vla.serving import server as server_module
from paligemma_vla.serving.access import address_for_clients
from paligemma_vla_client import pack, unpack
from running_server import RunningServer
from support import call

KEY = "schlüssel 7"


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def status(url: str, *authorization: str) -> int:
    """Of a page; headers in UTF-8, which `urllib` would not send."""
    host, port = url.removeprefix("ws://").split(":")
    lines = ["GET /metrics HTTP/1.1", f"Host: {host}:{port}", *(f"Authorization: {text}" for text in authorization), "", ""]
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode(errors="surrogateescape"))
        return int(connection.recv(100).split()[1])


def asks_and_is_answered(connection: ClientConnection, policy) -> None:
    connection.send(pack(draw(policy)))
    reply = connection.recv(20)
    assert isinstance(reply, bytes), reply
    assert np.isfinite(unpack(reply)["actions"]).all()


def test_key_is_taken_in_three_schemes_and_nothing_else_is(serve, policy):
    server = serve(api_key=KEY)
    for given in (f"Api-Key {KEY}", f"api-key {KEY}", f"Bearer {KEY}", basic(f"anybody:{KEY}"), basic(f":{KEY}")):
        assert status(server.url, given) == 200, given
    wrong = ["", KEY, "Api-Key", f"Api-Key {KEY}x", f"Api-Key {KEY[:-1]}", f"Digest {KEY}", basic(KEY), basic(f"{KEY}:anybody")]
    for given in (*wrong, f"Basic {KEY}", "Basic ä", "Basic a", "Api-Key \udcff"):
        assert status(server.url, given) == 401, given
    assert status(server.url) == 401
    assert status(server.url, f"Api-Key {KEY}", "Api-Key other") == 401, "two headers"
    with pytest.raises(InvalidStatus, match="401"), connect(server.url):
        pass
    with urllib.request.urlopen(server.url.replace("ws", "http") + "/healthz") as reply:
        assert reply.read() == b"OK\n", "whoever watches over it needs no key"


def test_websocket_of_another_sites_page_is_refused(serve):
    server = serve()
    with pytest.raises(InvalidStatus, match="403"), connect(server.url, origin="https://example.org"):
        pass
    with connect(server.url, origin=server.url.replace("ws", "http")) as connection:
        connection.recv(10)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Certificate and key, made by the command that the documentation gives."""
    folder = tmp_path_factory.mktemp("certificate")
    documented = re.search(r"openssl .*?IP:[\d.]+", server_module.ServeSettings.__doc__ or "", re.DOTALL)
    command = documented[0].replace("\\\n", " ").replace("192.168.0.10", "127.0.0.1").split()
    with suppress(FileNotFoundError):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        yield folder / "cert.pem", folder / "key.pem"
        return
    pytest.skip("no openssl here")


def test_tls_as_documented(serve, policy, certificate, monkeypatch):
    monkeypatch.setattr(server_module, "OPEN_SECONDS", 2)
    certfile, keyfile = certificate
    server = serve(certfile=certfile, keyfile=keyfile)
    trusting = ssl.create_default_context(cafile=certfile)
    with connect(server.url.replace("ws:", "wss:"), ssl=trusting) as connection:
        connection.recv(10)
        asks_and_is_answered(connection, policy)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent:
            with pytest.raises(ssl.SSLError), connect(server.url.replace("ws:", "wss:")):
                pass
            with pytest.raises((InvalidHandshake, ConnectionError, EOFError)), connect(server.url):
                pass
            assert silent.recv(1) == b"", "a handshake that does not begin is given up"
        asks_and_is_answered(connection, policy)


def test_address_or_certificate_that_cannot_be_used_is_one_message(checkpoint, capfd, tmp_path, certificate):
    certfile, keyfile = certificate
    no_pem, locked = tmp_path / "no.pem", tmp_path / "locked.pem"
    no_pem.write_text("nothing")
    subprocess.run(
        ["openssl", "rsa", "-aes128", "-passout", "pass:secret", "-in", keyfile, "-out", locked],
        check=True,
        capture_output=True,
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            ("--port", port): f"--port {port}: in use at 127.0.0.1; end the other program, or give another port",
            ("--host", "192.0.2.1"): "--host 192.0.2.1 --port 8000: cannot listen there",
            ("--host", "no.such.host.invalid"): "--host no.such.host.invalid --port 8000: cannot listen there",
            ("--port", 70000): "expected a port up to 65535",
            ("--certfile", tmp_path / "none.pem"): "none.pem: no such file",
            ("--certfile", certfile, "--keyfile", tmp_path / "none.pem"): "none.pem: no such file",
            ("--certfile", no_pem): "no.pem: cannot be used",
            ("--certfile", certfile): "cert.pem: cannot be used",
            ("--certfile", certfile, "--keyfile", locked): "expected a certificate and its key without a password",
            ("--keyfile", keyfile): "--keyfile: got no --certfile with it",
        }
        for flags, said in cases.items():
            code, _, printed = call(capfd, "serve", "--checkpoint_path", checkpoint, *flags)
            assert code == 2, flags
            assert said in printed and "warmed up" not in printed, printed
            assert "Traceback" not in printed and len(printed.strip().splitlines()) == 1, printed


def test_server_that_others_reach_says_what_it_lacks(serve, caplog, certificate):
    certfile, keyfile = certificate
    for settings, said in (
        ({"host": "127.0.0.1"}, None),
        ({"host": "0.0.0.0"}, "without a key (--api_key_env) and without TLS (--certfile, --keyfile)"),
        ({"host": "0.0.0.0", "api_key": KEY}, "without TLS (--certfile, --keyfile)"),
        ({"host": "0.0.0.0", "api_key": KEY, "certfile": certfile, "keyfile": keyfile}, None),
    ):
        caplog.clear()
        serve(**settings)
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        expected = [f"warning: --host 0.0.0.0: other machines reach this server, {said}"] if said else []
        assert warnings == expected


@pytest.mark.parametrize("host, shown", [("0.0.0.0", None), ("::", None), ("::1", "[::1]"), ("gpu", "gpu")])
def test_address_shown_is_one_that_a_client_can_take(host, shown):
    assert address_for_clients(host) == (shown or socket.gethostname())


def open_sockets(server: RunningServer) -> int:
    return len(server.server.door.open)


def test_silent_connections_are_bounded_and_keep_no_client_out(serve, policy, monkeypatch):
    monkeypatch.setattr(server_module, "OPEN_SECONDS", 2)
    server = serve(max_clients=4)
    most = 4 + server_module.SPARE_SOCKETS
    with ExitStack() as stack, connect(server.url) as early:
        early.recv(10)
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(3 * most)]
        for number, each in enumerate(silent):
            with suppress(OSError):
                each.sendall((b"", b"GET / HTTP/1.1\r\nHost: ", b"\x16\x03\x01")[number % 3])
        for _ in range(3):
            with connect(server.url) as late:
                late.recv(10)
                asks_and_is_answered(late, policy)
            assert open_sockets(server) <= most
        asks_and_is_answered(early, policy)
        deadline = time.monotonic() + 10
        while open_sockets(server) > 1:
            assert time.monotonic() < deadline, "those that never said anything are still there"
            time.sleep(0.05)
        asks_and_is_answered(early, policy)


def test_clients_beyond_the_limit_are_refused_and_their_places_are_free_again(serve, policy):
    server = serve(max_clients=2)
    for _ in range(2):
        with ExitStack() as stack:
            inside = [stack.enter_context(connect(server.url)) for _ in range(2)]
            for _ in range(5):
                with pytest.raises(InvalidStatus, match="503"), connect(server.url):
                    pass
            for connection in inside:
                connection.recv(10)
                asks_and_is_answered(connection, policy)
        deadline = time.monotonic() + 10
        while server.service.sessions:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_frame_beyond_the_limit_ends_the_connection_that_sent_it_alone(serve, policy):
    server = serve()
    with connect(server.url) as good, connect(server.url) as bad:
        good.recv(10), bad.recv(10)
        bad.socket.sendall(b"\x82\xff" + (2**40).to_bytes(8, "big") + bytes(4))
        with pytest.raises(server_module.ConnectionClosed, match="1009"):
            bad.recv(10)
        asks_and_is_answered(good, policy)
