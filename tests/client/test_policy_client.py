"""The clients, against a real server, and against scripted ones for what goes wrong."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from websockets.server import ServerProtocol

from paligemma_vla_client import (
    AsyncPolicyClient,
    CodecError,
    ContractError,
    PolicyClient,
    PolicyConnectionError,
    PolicyServerError,
    PolicyTimeout,
    pack,
)
from running_server import RunningServer
from scripted_server import ScriptedServer, answering, echo


def observation(policy, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    images = {key: rng.integers(0, 255, (40, 50, 3), np.uint8) for key in policy.metadata["cameras"]}
    return {**images, "state": rng.normal(0, 0.01, policy.metadata["state_dim"]), "prompt": "open the drawer"}


def state(value: float) -> dict:
    """An observation for `echo`."""
    return {"state": np.array([value])}


def test_client_gets_the_local_action_to_the_last_bit(server, policy):
    asked = observation(policy)
    with PolicyClient(server.url) as client:
        answer = client.infer(asked, seed=5)
        np.testing.assert_array_equal(answer["actions"], policy.infer(asked, seed=5)["actions"])
        assert answer["server_timing"]["infer_ms"] > 0
        assert client.metadata["horizon"] == policy.metadata["horizon"]


def test_async_client_gets_the_local_action_to_the_last_bit(server, policy):
    async def ask(asked: list[dict]) -> list[np.ndarray]:
        async with AsyncPolicyClient(server.url) as client:
            assert client.metadata["action_dim"] == policy.metadata["action_dim"]
            answers = await asyncio.gather(*(client.infer(one, seed=5) for one in asked))
            return [answer["actions"] for answer in answers]

    asked = [observation(policy, seed) for seed in range(3)]
    for one, actions in zip(asked, asyncio.run(ask(asked)), strict=True):
        np.testing.assert_array_equal(actions, policy.infer(one, seed=5)["actions"])


def test_reset_reaches_the_server(server):
    with PolicyClient(server.url) as client:
        session = max(server.service.sessions.items())[1]
        session.sent = np.zeros((1, 3), np.float32)
        client.reset()
        assert session.sent is None


def test_reset_is_not_sent_to_a_server_that_has_no_such_word():
    got = []

    def reply(_: object, message: dict) -> bytes:
        got.append(message)
        return echo(message)

    with ScriptedServer(answering(reply)) as server, PolicyClient(server.url) as client:
        client.reset()
        client.infer(state(1))
    assert [list(message) for message in got] == [["state"]]


def test_check_names_each_field_that_differs(server, policy):
    with PolicyClient(server.url) as client:
        client.check(horizon=policy.metadata["horizon"], cameras=tuple(policy.metadata["cameras"]))
        with pytest.raises(ContractError) as caught:
            client.check(horizon=1000, cameras=("image_1",), payload_kg=3)
    text = str(caught.value)
    assert f"horizon: expected 1000, got {policy.metadata['horizon']}" in text
    assert "cameras: expected ['image_1'], got ['image_1', 'image_2']" in text
    assert "payload_kg: expected 3, got None: the server does not know it" in text


def test_misspelt_key_is_refused_before_it_is_sent(server, policy):
    wrong = observation(policy)
    wrong["imag_2"] = wrong.pop("image_2")
    with PolicyClient(server.url) as client:
        answered = max(server.service.sessions.items())[1]
        with pytest.raises(ContractError, match=r"got imag_2, expected keys out of .*; did you mean 'image_2'"):
            client.infer(wrong)
        with pytest.raises(ContractError, match="got observation/imag,"):
            client.infer({"observation": {"imag": 1, "state": 2}})
        assert answered.answered == 0 and answered.observation is None


def test_refusal_of_the_server_is_an_error_with_its_text_and_the_client_goes_on(server, policy):
    with PolicyClient(server.url) as client:
        with pytest.raises(PolicyServerError, match=r"state: got float64 \(1,\), expected"):
            client.infer(observation(policy) | {"state": np.zeros(1)})
        with pytest.raises(CodecError, match="observation: state: got object, expected NumPy arrays"):
            client.infer(observation(policy) | {"state": object()})
        assert client.infer(observation(policy))["actions"].ndim == 2


def test_pictures_beyond_what_the_server_takes_are_refused_once_and_the_client_goes_on(server, policy):
    large = np.zeros((4000, 4000, 3), np.uint8)
    with PolicyClient(server.url) as client:
        with pytest.raises(PolicyServerError, match=r"observation: 4\d{7} bytes are more than the server takes.*smaller"):
            client.infer(observation(policy) | {"image_1": large})
        assert client.infer(observation(policy))["actions"].ndim == 2


def test_server_that_hangs_up_after_an_error_as_openpis_does_is_connected_to_again():
    def reply(connection, message: dict) -> bytes | None:
        if message["state"][0] < 0:
            connection.send("Traceback: negative")
            connection.close(1011, "Internal server error. Traceback included in previous frame.")
            return None
        return echo(message)

    with ScriptedServer(answering(reply)) as server, PolicyClient(server.url) as client:
        with pytest.raises(PolicyServerError, match="Traceback: negative"):
            client.infer(state(-1))
        assert client.infer(state(2))["actions"] == 2


def late_once(seconds: float):
    """A server that answers its very first observation after `seconds`, and the others at once."""
    first = threading.Event()

    def reply(_: object, message: dict) -> bytes:
        if not first.is_set():
            first.set()
            time.sleep(seconds)
        return echo(message)

    return ScriptedServer(answering(reply))


def test_late_answer_is_never_taken_for_that_of_the_next_observation():
    with late_once(0.3) as server, PolicyClient(server.url) as client:
        with pytest.raises(PolicyTimeout, match=r"no answer within 0.1 s"):
            client.infer(state(1), timeout_s=0.1)
        for value in (2, 3):
            assert client.infer(state(value))["actions"] == value
            time.sleep(0.15)  # the late one is there by now


def test_late_answer_to_a_cancelled_request_is_not_taken_either():
    async def ask(url: str) -> None:
        async with AsyncPolicyClient(url) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.infer(state(1)), 0.1)
            for value in (2, 3):
                assert (await client.infer(state(value)))["actions"] == value
                await asyncio.sleep(0.15)

    with late_once(0.3) as server:
        asyncio.run(ask(server.url))


def test_late_answer_to_an_interrupted_request_is_not_taken_either():
    def interrupt(*_: object) -> None:
        raise InterruptedError("Ctrl-C")

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        with late_once(1.0) as server, PolicyClient(server.url) as client:
            began = time.monotonic()
            timer.start()
            with pytest.raises(InterruptedError):
                client.infer(state(1))
            assert client.infer(state(2))["actions"] == 2
            assert time.monotonic() - began < 0.8, "it waited for the answer that nobody wants"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_timeout_is_one_that_programs_already_catch():
    assert issubclass(PolicyTimeout, TimeoutError) and issubclass(PolicyConnectionError, ConnectionError)


@pytest.mark.parametrize("deaths, sent", [(1, 2), (5, 2)])
def test_request_whose_connection_dies_is_sent_again_once(deaths, sent):
    got = []

    def reply(connection, message: dict) -> bytes | None:
        got.append(message["state"][0])
        if len(got) <= deaths:
            connection.socket.shutdown(socket.SHUT_RDWR)
            return None
        return echo(message)

    with ScriptedServer(answering(reply)) as server, PolicyClient(server.url) as client:
        if deaths == 1:
            assert client.infer(state(7))["actions"] == 7
        else:
            with pytest.raises(PolicyConnectionError, match="lost again when the request was repeated"):
                client.infer(state(7))
        assert got == [7] * sent


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_client_waits_for_a_server_that_is_not_up_yet_and_says_so(caplog):
    port = free_port()
    started = []

    def start() -> None:
        started.append(ScriptedServer(answering(lambda _, message: echo(message)), port))

    timer = threading.Timer(0.4, start)
    timer.start()
    with caplog.at_level(logging.WARNING), PolicyClient(f"ws://127.0.0.1:{port}", connect_timeout_s=20) as client:
        assert client.infer(state(1))["actions"] == 1
    timer.join()
    started[0].__exit__()
    waits = [record.getMessage() for record in caplog.records if "next attempt in" in record.getMessage()]
    assert 2 <= len(waits) < 10 and all(f"127.0.0.1:{port}: ConnectionRefusedError" in wait for wait in waits)


def test_server_that_never_comes_is_given_up_in_time_with_the_reason():
    began = time.monotonic()
    with pytest.raises(PolicyConnectionError, match=r"not reached within 0.3 s: ConnectionRefusedError"):
        PolicyClient(f"ws://127.0.0.1:{free_port()}", connect_timeout_s=0.3)
    assert time.monotonic() - began < 3


def test_lost_server_costs_no_more_than_the_time_limit_of_the_request():
    server = ScriptedServer(answering(lambda _, message: echo(message)))
    with PolicyClient(server.url) as client:
        client.infer(state(1))
        server.__exit__()
        began = time.monotonic()
        with pytest.raises(PolicyTimeout, match=r"no answer within 0.3 s: ConnectionRefusedError"):
            client.infer(state(2), timeout_s=0.3)
        assert time.monotonic() - began < 2
        with ScriptedServer(answering(lambda _, message: echo(message)), server.port):  # it is back
            assert client.infer(state(3))["actions"] == 3


def test_short_time_limits_do_not_keep_a_slow_connection_from_opening():
    def slow(connection) -> None:
        time.sleep(0.4 if len(server.connections) > 1 else 0)
        answering(lambda _, message: echo(message))(connection)

    with ScriptedServer(slow) as server, PolicyClient(server.url) as client:
        server.connections[0].close_socket()
        late = 0
        while True:
            try:
                assert client.infer(state(1), timeout_s=0.1)["actions"] == 1
                break
            except PolicyTimeout:
                late += 1
        assert 1 <= late < 20 and len(server.connections) == 2


def test_wrong_key_is_refused_at_once_and_the_right_one_is_taken(checkpoint: Path):
    server = RunningServer(str(checkpoint), api_key="right")
    try:
        for key in (None, "wrong"):
            with pytest.raises(PolicyServerError, match="HTTP 401: API key missing or wrong") as caught:
                PolicyClient(server.url, api_key=key)
            assert "right" not in str(caught.value)
        PolicyClient(server.url, api_key="right").close()
    finally:
        server.close()


def test_full_server_is_waited_for():
    asked = []

    def full_at_first(connection, request):
        asked.append(request)
        return connection.respond(503, "full") if len(asked) < 3 else None

    handle = answering(lambda _, message: echo(message))
    with ScriptedServer(handle, process_request=full_at_first) as server, PolicyClient(server.url) as client:
        assert client.infer(state(1))["actions"] == 1
    assert len(asked) == 3


def test_client_that_is_connected_anew_to_another_policy_refuses_it():
    connections = []

    def handle(connection) -> None:
        connections.append(connection)
        answering(lambda _, message: echo(message), {"horizon": 8, "fingerprint": f"{len(connections)}"})(connection)

    with ScriptedServer(handle) as server, PolicyClient(server.url) as client:
        client.infer(state(1))
        server.connections[0].close_socket()
        with pytest.raises(ContractError, match="another policy now, in fingerprint; make a new client"):
            client.infer(state(2))


@pytest.mark.parametrize(
    "answer, said",
    [
        (pack({"actions": np.zeros(3, np.float32)}), r"got actions \(3,\), expected actions \(K, A\)"),
        (pack({"actions": np.zeros((0, 3), np.float32)}), r"got actions \(0, 3\)"),
        (pack({"actions": np.array([[0, np.nan]])}), "actions that are not finite"),
        (pack(np.zeros((2, 3))), "got a ndarray without actions"),
        (b"\xc1", "not a msgpack message"),
    ],
)
def test_answer_that_is_no_chunk_of_actions_is_refused(answer, said):
    server = ScriptedServer(answering(lambda *_: answer))
    with server, PolicyClient(server.url) as client, pytest.raises(PolicyServerError, match=said):
        client.infer(state(1))


@pytest.mark.parametrize(
    "first, said", [("go away", "go away"), (b"\xc1", "not that of a policy server"), (b"\x01", "is a int")]
)
def test_server_of_another_kind_is_refused(first, said):
    server = ScriptedServer(lambda connection: connection.send(first))
    with server, pytest.raises(PolicyServerError, match=said):
        PolicyClient(server.url)


def test_pings_are_answered_while_the_client_waits_and_while_it_does_nothing():
    def reply(_: object, message: dict) -> bytes:
        time.sleep(0.5)
        return echo(message)

    with ScriptedServer(answering(reply), ping_interval=0.05, ping_timeout=0.1) as server:
        with PolicyClient(server.url) as client:
            time.sleep(0.3)
            assert client.infer(state(1))["actions"] == 1
        assert len(server.connections) == 1


def test_threads_that_share_a_client_get_their_own_answers():
    answers = {}
    with ScriptedServer(answering(lambda _, message: echo(message))) as server, PolicyClient(server.url) as client:

        def ask(value: int) -> None:
            answers[value] = [client.infer(state(value))["actions"].item() for _ in range(20)]

        threads = [threading.Thread(target=ask, args=(value,)) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert answers == {value: [value] * 20 for value in range(4)}


def test_sending_to_a_server_that_does_not_read_ends_in_time():
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        peer, _ = listener.accept()
        peers.append(peer)
        protocol = ServerProtocol()
        while not (events := protocol.events_received()):
            protocol.receive_data(peer.recv(65536))
        protocol.send_response(protocol.accept(events[0]))
        protocol.send_binary(pack({}))
        peer.sendall(b"".join(protocol.data_to_send()))

    peers: list[socket.socket] = []
    thread = threading.Thread(target=serve)
    thread.start()
    with listener, PolicyClient(f"ws://127.0.0.1:{listener.getsockname()[1]}") as client:
        thread.join(10)
        began = time.monotonic()
        with pytest.raises(PolicyTimeout):
            client.infer({"image": np.zeros((4000, 4000, 3), np.uint8)}, timeout_s=0.3)
        assert time.monotonic() - began < 3
    peers[0].close()


def test_close_ends_a_request_that_waits_in_another_thread():
    reasons = []
    with ScriptedServer(answering(lambda *_: None)) as server:
        client = PolicyClient(server.url, timeout_s=math.inf)

        def ask() -> None:
            try:
                client.infer(state(1))
            except PolicyConnectionError as error:
                reasons.append(str(error))

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(10)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        client.close()
        for thread in threads:
            thread.join(10)
    assert reasons == [f"{server.url}: the client is closed"] * 10
    with pytest.raises(PolicyConnectionError, match="the client is closed"):
        client.infer(state(1))
    client.close()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://127.0.0.1:8000", "ws://", "tcp://robot:5555"])
def test_address_that_is_none_is_refused_with_the_form_expected(url):
    with pytest.raises(ValueError, match="expected ws://HOST:PORT or wss://HOST:PORT"):
        PolicyClient(url)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of this machine, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(hours=1))
    signed = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(signed.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(secret)
    return folder / "cert.pem", folder / "key.pem"


def test_tls_with_a_certificate_that_is_trusted_and_with_one_that_is_not(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with ScriptedServer(answering(lambda _, message: echo(message)), ssl=context) as server:
        url = f"wss://localhost:{server.port}"
        with PolicyClient(url, ssl_context=ssl.create_default_context(cafile=certificate[0])) as client:
            assert client.infer(state(1))["actions"] == 1
        with pytest.raises(PolicyConnectionError, match="certificate verify failed"):
            PolicyClient(url)
