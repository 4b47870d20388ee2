"""Who reaches the server: the key, the origin of a page, TLS, the address."""

from __future__ import annotations

import base64
import errno
import hmac
import ipaddress
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from websockets.datastructures import Headers

from paligemma_vla.errors import ConfigError, first_line

log = logging.getLogger(__name__)


def is_authorized(headers: Headers, api_key: str | None) -> bool:
    """True if `Authorization` holds the key: `Api-Key K`, `Bearer K`, or `Basic` with K as password. None: none is asked."""
    if api_key is None:
        return True
    given = headers.get_all("Authorization")
    scheme, _, value = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    key = value.encode("latin-1", "surrogateescape")  # whatever the library made of the bytes of the header
    if scheme.lower() == "basic":
        try:
            key = base64.b64decode(key, validate=True).partition(b":")[2]
        except ValueError:
            return False
    elif scheme.lower() not in ("api-key", "bearer"):
        return False
    return hmac.compare_digest(key, api_key.encode(errors="surrogateescape"))


def is_same_origin(headers: Headers) -> bool:
    """False for a request that a browser makes for a page of another site. Programs send no origin."""
    return all(urlsplit(origin).netloc == (headers.get_all("Host") or [""])[0] for origin in headers.get_all("Origin"))


def tls_context(certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext | None:
    """What `--certfile` and `--keyfile` (PEM) say; None without them. Raises `ConfigError`."""
    if certfile is None:
        if keyfile is not None:
            raise ConfigError("--keyfile: got no --certfile with it, expected both")
        return None
    for flag, path in (("--certfile", certfile), ("--keyfile", keyfile)):
        if path is not None and not path.is_file():
            raise ConfigError(f"{flag} {path}: no such file")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certfile, keyfile, password="")  # a key with a password would ask for it at the terminal
    except (OSError, ValueError) as error:
        text = "expected a certificate and its key without a password, in PEM; a file with both needs no --keyfile"
        raise ConfigError(f"--certfile {certfile}: cannot be used ({first_line(error)}), {text}") from error
    return context


def check_address(host: str, port: int) -> None:
    """Bind and let go: a port in use is reported before a checkpoint is loaded for minutes. Raises `ConfigError`."""
    with address_errors(host, port):
        for family, kind, number, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, number) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does: not those that have just ended
                probe.bind((address[0], port, *address[2:]))  # getaddrinfo takes 70000 for 4464


@contextmanager
def address_errors(host: str, port: int) -> Iterator[None]:
    """Turn what the operating system says of an address in the block into a `ConfigError`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"--port {port}: in use at {host}; end the other program, or give another port (0 takes a free one)"
            raise ConfigError(text) from error
        text = "expected an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them"
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error.strerror}), {text}") from error
    except (OverflowError, UnicodeError) as error:
        raise ConfigError(f"--host {host} --port {port}: {first_line(error)}; expected a port up to 65535") from error


def address_for_clients(host: str) -> str:
    """What stands for `--host` in an address: this machine's name where it listens at all of its addresses."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def warn_of_exposure(host: str, has_key: bool, has_tls: bool) -> None:
    """Say once what is open to whom, where others than this machine reach it."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    lacks = [text for text, has in (("a key (--api_key_env)", has_key), ("TLS (--certfile, --keyfile)", has_tls)) if not has]
    if lacks and not local:
        log.warning("warning: --host %s: other machines reach this server, without %s", host, " and without ".join(lacks))
