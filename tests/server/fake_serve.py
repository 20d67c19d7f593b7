"""`octavo serve` with a FakeEngineClient in the engine's place, for tests of the process: `python -m tests.server.fake_serve`.

OCTAVO_ settings and flags are those of `octavo serve`. The model named "broken" fails to load, "mortal" dies after it is ready.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from engine.errors import EngineUnavailable, ModelLoadError
from engine.messages import EngineReady, LoadProgress
from engine.supervisor import Supervisor
from server import cli, serve
from tests.server.fake_client import FakeEngineClient, FakeStream


class ServedFake(FakeEngineClient):
    """Adds what the command needs of a client. Its streams go on until `stop`."""

    def __init__(self, supervisor: Supervisor, *, chat_template: str | None = None) -> None:
        super().__init__("x" * 40)
        self.on_progress: Callable[[LoadProgress], None] = lambda progress: None
        self._supervisor = supervisor
        self._model = supervisor._config.model.model
        self.state = "starting"
        self._is_stopped = False

    @property
    def num_open_streams(self) -> int:
        return len(self.streams)

    async def start(self) -> None:
        self.on_progress(LoadProgress("weights", "tiny", 0.5))

    async def wait_until_ready(self) -> EngineReady:
        if self._model == "broken":
            raise ModelLoadError("the weights are gone: fetch them again")
        self.state = "ready"
        if self._model == "mortal":
            self.state, self.failure = "failed", EngineUnavailable("the engine process died")
        assert self.ready is not None
        return self.ready

    async def stop(self) -> None:
        self.fail_after, self.stream_error = 1, EngineUnavailable("the server is shutting down")
        self._is_stopped = True
        self.gate.set()
        await self._supervisor.stop()  # it made a folder for its socket

    async def generate(self, *args: object, **options: object) -> FakeStream:
        stream = await super().generate(*args, **options)  # type: ignore[arg-type]
        asyncio.get_running_loop().call_later(0.05, self._hold_or_go_on)
        return stream

    def _hold_or_go_on(self) -> None:
        if self._model == "slow" and not self._is_stopped:  # a stop may come before its stream is held
            self.gate.clear()
        else:
            self.gate.set()


if __name__ == "__main__":
    serve.EngineClient = ServedFake  # type: ignore[misc, assignment]
    sys.exit(cli.run(["serve", *sys.argv[1:]]))
