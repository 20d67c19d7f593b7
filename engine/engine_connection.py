"""EngineConnection: the socket to one life of the engine. Messages come in on the event loop, in turns."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
import zmq

from engine.messages import EngineMessage, FrontendMessage, Hello

logger = logging.getLogger(__name__)

CONNECT_AGAIN_MS = 10  # the engine binds its address a moment after it was started, and loads once it has heard of us

# Messages taken in before the streams get to write: as many steps go into one event of a frontend that is behind.
MAX_MESSAGES_A_TURN = 16


class EngineConnection:
    """on_message: called for each message; on_turn: after those that were there; on_error: with what either raised.

    Raises OSError where this process may open no more files.
    """

    def __init__(
        self,
        address: str,
        identity: str,
        on_message: Callable[[EngineMessage], None],
        on_turn: Callable[[], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._on_message = on_message
        self._on_turn = on_turn
        self._on_error = on_error
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)
        self._read_again: asyncio.Handle | None = None
        self._is_open = True
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._socket = self._context.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(error.errno, error.strerror) from None
        self._socket.setsockopt(zmq.IDENTITY, identity.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, CONNECT_AGAIN_MS)
        self._socket.connect(address)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._read)
        self.send(Hello())

    def send(self, message: FrontendMessage) -> None:
        # The socket has no high-water mark, so this never blocks.
        self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        # Sending may take in, and so silence, the signal of a message that has come.
        self._read_soon()

    def _read_soon(self) -> None:
        if self._read_again is None:
            self._read_again = self._loop.call_soon(self._read)

    def _read(self) -> None:
        """Take in what has come. The socket's descriptor signals once for all messages, so they are read until there is none.

        Streams hear of it at the end: all steps of a turn go into one event. A zmq.asyncio socket would need futures for every
        message, and never let go while messages come in.
        """
        if self._read_again is not None:
            self._read_again.cancel()
            self._read_again = None
        try:
            for _ in range(MAX_MESSAGES_A_TURN):
                self._on_message(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
                if not self._is_open:
                    break
            else:
                self._read_soon()
        except zmq.Again:
            pass
        except Exception as error:
            # The loop would only log it: without this, every stream would wait for ever.
            logger.exception("reading from the engine failed")
            self._on_error(error)
        self._on_turn()

    def read_rest(self) -> None:
        """Take in what has come from an engine that says no more."""
        self._read()
        while self._is_open and self._read_again is not None:
            self._read()

    def close(self) -> None:
        """Hear no more of this engine. May be called again."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._socket.fileno())
        if self._read_again is not None:
            self._read_again.cancel()
            self._read_again = None
        self._context.destroy(linger=0)
