"""TLS by a certificate of the user's own. HTTP/1.1 inside; versions and ciphers are those that Python's ssl holds for good."""

from __future__ import annotations

import asyncio
import fcntl
import ssl
import struct
import termios
import weakref
from collections.abc import Callable
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


class _Session(ssl.SSLObject):
    def do_handshake(self) -> None:
        is_over = True
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            is_over = False
            raise
        finally:
            if is_over and isinstance(self.context, _BoundedContext):
                self.context.handshakes.discard(self)


class _BoundedContext(ssl.SSLContext):
    """may_begin: whether one more connection may begin its handshake, beside so many that have not done theirs. The event loop
    tells nobody of a connection before its handshake is done, but it asks its context for each.

    handshakes: that are not done; one whose client has gone, or took too long, goes with the loop's own record of it. uvloop
    drops that at once; asyncio's loop leaves it to a garbage collection.
    """

    sslobject_class = _Session
    may_begin: Callable[[int], bool]
    handshakes: weakref.WeakSet[ssl.SSLObject]

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        if not self.may_begin(len(self.handshakes)):
            raise ssl.SSLError("too many connections")
        session = super().wrap_bio(*args, **options)
        self.handshakes.add(session)
        return session


def tls_context(cert: str, key: str | None, may_begin: Callable[[int], bool] = lambda num_begun: True) -> ssl.SSLContext:
    """TLS 1.2 or later. key: None where the certificate's file holds it too. may_begin: whether a handshake may begin while so
    many are not done; a connection that may not is closed. Raises ConfigError."""
    for param, name in (("tls_cert", cert), ("tls_key", key)):
        _check_readable(param, name)
    context = _BoundedContext(ssl.PROTOCOL_TLS_SERVER)
    context.may_begin, context.handshakes = may_begin, weakref.WeakSet()
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
