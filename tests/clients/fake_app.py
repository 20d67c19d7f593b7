"""The application around a FakeEngineClient with a long context, behind a real server: `python -m tests.clients.fake_app`.

It listens on a port of 127.0.0.1 that the system chooses, says its URL, and ends with standard input.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import cast

import msgspec

from engine.client import EngineClient
from server.app import create_server
from server.config import ServerConfig
from tests.server.fake_client import FakeEngineClient

CONTEXT = 4096


async def main() -> None:
    client = FakeEngineClient()
    assert client.ready is not None
    client.ready = msgspec.structs.replace(client.ready, max_model_len=CONTEXT)
    server = create_server(cast(EngineClient, client), ServerConfig(model="tiny"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await serving


if __name__ == "__main__":
    asyncio.run(main())
