"""A chat server that says exactly what it is told to, byte by byte, for tests of clients; and a terminal to run a client in."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def chunk(text: str = "", *, reasoning: str = "", finish: str | None = None, usage: dict[str, Any] | None = None) -> bytes:
    """One event of a streamed chat."""
    delta = {name: value for name, value in (("content", text), ("reasoning_content", reasoning)) if value}
    body: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": usage}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def said(*texts: str) -> list[bytes]:
    """A whole answer."""
    return [*(chunk(text) for text in texts), chunk(finish="stop"), DONE]


HANG = b"HANG"
"""In the parts of an answer: from here on there is silence, until the client goes away."""


@dataclass
class Reply:
    """The answer to one POST. `parts` are sent one by one; with `cut` the connection ends without the last chunk."""

    parts: Sequence[bytes] = ()
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


class ScriptedServer:
    """replies: one for every POST, in order, the last one again and again. health: (status, body) for GET /health likewise."""

    def __init__(
        self, *replies: Reply | list[bytes], api_key: str = "", models: Sequence[str] = ("fake",), octavo: bool = False
    ):
        self.replies = [reply if isinstance(reply, Reply) else Reply(reply) for reply in replies] or [Reply(said("Hello."))]
        self.api_key = api_key
        self.models = {"data": [{"id": name, "owned_by": "octavo" if octavo else "x"} for name in models]}
        self.health: list[tuple[int, Any]] = [(200, {})]
        self.bodies: list[dict[str, Any]] = []
        self.gone = threading.Event()  # a client left in the middle

    def __enter__(self) -> ScriptedServer:
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                script.get(self)

            def do_POST(self) -> None:
                script.post(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/health":
            status, body = self.health.pop(0) if len(self.health) > 1 else self.health[0]
            return send_json(handler, status, body)
        if self.api_key and handler.headers.get("Authorization") != f"Bearer {self.api_key}":
            return send_json(handler, 401, {"error": {"message": "A wrong key."}})
        return send_json(handler, 200, self.models) if handler.path == "/v1/models" else send_json(handler, 404, {})

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        self.bodies.append(json.loads(handler.rfile.read(int(handler.headers["Content-Length"]))))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if reply.status != 200:
            return send_json(handler, reply.status, reply.body, reply.headers)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for part in reply.parts:
            if part == HANG:
                if handler.connection.recv(1) == b"":
                    self.gone.set()
                handler.close_connection = True
                return None
            handler.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            handler.wfile.flush()
        if reply.cut:
            handler.close_connection = True
        else:
            handler.wfile.write(b"0\r\n\r\n")
        return None


def send_json(handler: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    content = json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


# Ctrl-C reaches the program whose session the terminal belongs to.
_IN_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Screen:
    """A program in a terminal of its own: `type` and `expect`; `text` is all it wrote."""

    def __init__(self, *command: str, **environ: str) -> None:
        self._master, slave = pty.openpty()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_") and name != "NO_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IN_TERMINAL, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env={**kept, "TERM": "xterm", "LC_ALL": "C.UTF-8", **environ},
            start_new_session=True,
        )
        os.close(slave)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.raw = ""
        self._seen = 0

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    @property
    def text(self) -> str:
        return ANSI.sub("", self.raw)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str, timeout_s: float = 30) -> None:
        """Waits until the program has written this since the last thing expected."""
        deadline = time.monotonic() + timeout_s
        while text not in self.text[self._seen :]:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.text[self._seen :]!r}"
            assert self._read(), f"the program ended without {text!r}; it wrote {self.text!r}"
        self._seen = self.text.index(text, self._seen) + len(text)

    def end(self, timeout_s: float = 30) -> int:
        """Reads what is left; the exit code."""
        deadline = time.monotonic() + timeout_s
        while select.select([self._master], [], [], max(0, deadline - time.monotonic()))[0] and self._read():
            pass
        return self.process.wait(timeout=timeout_s)

    def _read(self) -> bool:
        """False once nobody holds the terminal's other end."""
        try:
            part = os.read(self._master, 2**16)
        except OSError:  # Linux's way to say it
            return False
        self.raw += self._decoder.decode(part)
        return bool(part)
