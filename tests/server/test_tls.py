"""TLS with a certificate made for the test, and settings that make none."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
import uvloop

from engine.errors import ConfigError
from server import connections, limits
from server.config import load_config
from server.tls import check_tls
from tests.metrics_text import metric
from tests.server.fake_client import FakeEngineClient
from tests.server.served import LIMIT_S, ask, served

GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


def make_certificate(folder: Path, name: str, *options: str) -> tuple[str, str]:
    cert, key = str(folder / f"{name}.crt"), str(folder / f"{name}.key")
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    words += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run([*words, *(options or ("-nodes",))], check=True, capture_output=True, timeout=60)
    return cert, key


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_certificate(tmp_path_factory.mktemp("tls"), "one")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("in_one_file", [False, True])
def test_https_and_its_metrics_port(identity: tuple[str, str], tmp_path: Path, in_one_file: bool) -> None:
    cert, key = identity
    settings: dict[str, str] = {"tls_cert": cert, "tls_key": key}
    if in_one_file:
        both = tmp_path / "both.pem"
        both.write_text(Path(cert).read_text() + Path(key).read_text())
        settings = {"tls_cert": str(both)}

    async def scenario() -> None:
        async with served(api_key=["k"], **settings) as (_, port):
            context = ssl.create_default_context(cafile=cert)
            assert (await ask(port, GET, tls=context)).status == 401
            answer = await ask(port, GET.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer k\r\n\r\n"), tls=context)
            assert answer.status == 200 and b'"tiny"' in answer.body
            with pytest.raises(ssl.SSLCertVerificationError):
                await ask(port, GET, tls=ssl.create_default_context())
            old = ssl.create_default_context(cafile=cert)
            old.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises((ssl.SSLError, OSError)):
                await ask(port, GET, tls=old)
            assert b"/v1" not in (await _plain(port))

    asyncio.run(scenario())


async def _plain(port: int) -> bytes:
    """What HTTP without TLS gets: nothing of the application."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET)
    try:
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_handshakes_that_are_not_done_are_few_and_go_away(identity: tuple[str, str]) -> None:
    """On the event loop that serves."""
    cert, key = identity
    tls = ssl.create_default_context(cafile=cert)
    most = 1 + connections.MOST_REFUSED

    async def scenario() -> None:
        async with served(tls_cert=cert, tls_key=key, max_connections=1) as (server, port):
            for _ in range(2):
                for _ in range(most):
                    await _plain(port)  # a handshake that fails
                silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(most + 5)]
                for reader, _ in silent[most:]:
                    await _end_of(reader)  # at once; the others are waited for
                assert not any(reader.at_eof() for reader, _ in silent[:most])
                with pytest.raises(OSError):
                    await ask(port, GET, tls=tls)
                for _, writer in silent:
                    writer.close()
                while server.config.ssl.handshakes:  # type: ignore[union-attr]
                    await asyncio.sleep(0.01)
                assert (await ask(port, GET, tls=tls)).status == 200
                while server.server_state.connections:
                    await asyncio.sleep(0.01)
            text = (await ask(port, GET.replace(b"/v1/models", b"/metrics"), tls=tls)).body.decode()
            assert metric(text, "octavo_connections_refused_total") >= 2 * 6

    uvloop.run(asyncio.wait_for(scenario(), LIMIT_S))


async def _end_of(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""


@pytest.mark.parametrize("ends_by", ["the server's end", "Connection: close"])
def test_a_client_that_says_no_farewell_is_not_waited_for(
    identity: tuple[str, str], ends_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio.constants, "SSL_SHUTDOWN_TIMEOUT", 3600.0)  # type: ignore[attr-defined]
    monkeypatch.setattr(limits, "FAREWELL_S", 0.05)
    cert, key = identity
    get = GET if "close" in ends_by else GET.replace(b"Connection: close\r\n", b"")

    def keep_a_connection(port: int) -> ssl.SSLSocket:
        """One that nobody reads from any more."""
        plain = socket.create_connection(("127.0.0.1", port), timeout=30)
        connection = ssl.create_default_context(cafile=cert).wrap_socket(plain, server_hostname="localhost")
        connection.sendall(get)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
        return connection

    async def scenario() -> None:
        async with served(tls_cert=cert, tls_key=key) as (server, port):
            connection = await asyncio.to_thread(keep_a_connection, port)
            while ends_by == "Connection: close" and server.server_state.connections:
                await asyncio.sleep(0.01)
        connection.close()

    asyncio.run(scenario())


def test_a_slow_reader_has_all_of_its_answer_before_the_servers_end(
    identity: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FAREWELL_S", 0.02)
    cert, key = identity
    client = FakeEngineClient()
    ids = ",".join(["65"] * 60)
    body = f'{{"prompt":[{",".join([f"[{ids}]"] * 1000)}],"max_tokens":1,"logprobs":5,"echo":true}}'.encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    def ask_and_wait(port: int) -> ssl.SSLSocket:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(60)
        plain.connect(("127.0.0.1", port))
        connection = ssl.create_default_context(cafile=cert).wrap_socket(plain, server_hostname="localhost")
        connection.sendall(head + body)
        return connection

    def read_all(connection: ssl.SSLSocket) -> bytes:
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)

    async def scenario() -> None:
        async with served(client, tls_cert=cert, tls_key=key) as (server, port):
            connection = await asyncio.to_thread(ask_and_wait, port)
            while not server.server_state.total_requests:
                await asyncio.sleep(0.01)
            server.should_exit = True
            await asyncio.sleep(0.5)  # many looks
            assert server.server_state.connections, "the answer was too small for this test"
            answer = await asyncio.to_thread(read_all, connection)
            head, _, rest = answer.partition(b"\r\n\r\n")
            assert b"200 OK" in head and f"content-length: {len(rest)}".encode() in head.lower()
            connection.close()

    asyncio.run(scenario())


def test_what_makes_no_tls_is_told_before_anything_starts(identity: tuple[str, str], tmp_path: Path) -> None:
    cert, key = identity
    other_cert, other_key = make_certificate(tmp_path, "other")
    _, locked = make_certificate(tmp_path, "locked", "-passout", "pass:secret")
    text = tmp_path / "text"
    text.write_text("no certificate")
    for given, reason, param in (
        ((None, key), "give the certificate too", "tls_key"),
        ((cert, None), "must hold a certificate and a private key", "tls_cert"),
        ((cert, other_key), "does not belong", "tls_key"),
        ((str(text), key), "PEM", "tls_key"),
        ((other_cert, locked), "not encrypted", "tls_key"),
        ((str(tmp_path / "none"), key), "No such file", "tls_cert"),
        ((cert, str(tmp_path / "none")), "No such file", "tls_key"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            check_tls(*given)
        assert caught.value.param == param
    check_tls(cert, key)
    with pytest.raises(ConfigError, match="--tls-key in the command line"):
        load_config(["--tls-cert", cert, "--tls-key", other_key], {})
