"""Supervisor: starts the engine process, knows its epoch, notices its end and ends it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.messages import Launch

ENGINE_COMMAND = (sys.executable, "-P", "-m", "engine.process")
STOP_TIMEOUT_S = 5.0
# OpenMP reads this once, when torch loads. By default its threads spin for milliseconds at every barrier, which takes the cores
# from the frontend and, on a machine that does anything else, from each other: a decode step of 8 sequences then took 150 to
# 5,000 ms on two cores instead of 35. Spinning briefly keeps those 35 ms; sleeping at once (PASSIVE) makes it 65.
OPENMP_DEFAULTS = {"GOMP_SPINCOUNT": "5000"}


class Supervisor:
    """One engine process. `on_exit(returncode)` is called when it ends without having been asked to.

    address: the ZMQ endpoint that the engine binds. epoch: counts the engine's lives, from 1.
    """

    def __init__(self, config: EngineConfig, *, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._config = config
        self._command = command
        # A short path: the kernel allows a socket's name about a hundred characters.
        self._folder = tempfile.mkdtemp(prefix="octavo-")
        self.address = f"ipc://{self._folder}/engine"
        self.epoch = 0
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The engine's process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self, on_exit: Callable[[int], None]) -> None:
        """Start the engine. It inherits stderr, and reads its configuration from stdin, which stays open while we live."""
        self.epoch += 1
        root = str(Path(__file__).parent.parent)
        started_s = time.monotonic()
        python_path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            env={**OPENMP_DEFAULTS, **os.environ, "PYTHONPATH": python_path},
        )
        self._process = process
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(Launch(self.address, self.epoch, started_s, self._config)) + b"\n")
        await process.stdin.drain()
        self._watch = asyncio.create_task(self._wait(process, on_exit))

    async def _wait(self, process: asyncio.subprocess.Process, on_exit: Callable[[int], None]) -> None:
        returncode = await process.wait()
        if not self._stopping:
            on_exit(returncode)

    def kill(self) -> None:
        """End the engine without asking, as for one that is loading and reads no messages."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """End the engine: it has been told to shut down, gets STOP_TIMEOUT_S for it, and is killed after that."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._watch is not None:
            await self._watch
        shutil.rmtree(self._folder, ignore_errors=True)
