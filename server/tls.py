"""TLS by a certificate of the user's own. HTTP/1.1 inside; versions and ciphers are those that Python's ssl holds for good."""

from __future__ import annotations

import asyncio
import fcntl
import ssl
import struct
import termios
from pathlib import Path
from typing import Any

from engine.errors import ConfigError


def check_tls(cert: str | None, key: str | None) -> None:
    """Raises ConfigError unless these make a server's identity; without a certificate there is nothing to check."""
    if cert is None:
        if key is not None:
            raise ConfigError("a private key alone makes no TLS: give the certificate too (--tls-cert)", param="tls_key")
        return
    tls_context(cert, key)


def tls_context(cert: str, key: str | None) -> ssl.SSLContext:
    """TLS 1.2 or later. key: None where the certificate's file holds it too. Raises ConfigError."""
    for param, name in (("tls_cert", cert), ("tls_key", key)):
        _check_readable(param, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    where = "tls_key" if key else "tls_cert"
    try:
        # An empty password, for there is nobody to ask: OpenSSL would wait at the terminal.
        context.load_cert_chain(Path(cert).expanduser(), Path(key).expanduser() if key else None, password="")
    except ssl.SSLError as error:
        reason = "the private key does not belong to the certificate" if error.reason == "KEY_VALUES_MISMATCH" else _reason(key)
        raise ConfigError(f"no TLS with {cert}{f' and {key}' if key else ''}: {reason}", param=where) from None
    return context


def has_sent_all(transport: asyncio.Transport) -> bool:
    """Whether the client's system has taken in all that was written. False where ours does not say."""
    connection: Any = transport.get_extra_info("socket")
    try:
        (left,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
    except (OSError, AttributeError):
        return False
    return left == 0 and transport.get_write_buffer_size() == 0


def _reason(key: str | None) -> str:
    rest = "a private key that is not encrypted"
    return f"they must be PEM files of a certificate and of {rest}" if key else f"it must hold a certificate and {rest}, as PEM"


def _check_readable(param: str, name: str | None) -> None:
    if name is None:
        return
    try:
        Path(name).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}", param=param) from None
