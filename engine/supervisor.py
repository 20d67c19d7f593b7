"""Supervisor: starts the engine process, knows its epoch, notices its end, ends it, and kills it where it is stuck."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec
import psutil

from engine.config import EarlierLife, EngineConfig, RecoveryConfig
from engine.flight_recorder import BEAT_INTERVAL_S, Flight, FlightReader
from engine.log_relay import LogRelay
from engine.logs import LogConfig
from engine.messages import CrashPoint, Launch
from engine.watchdog import LOOK_INTERVAL_S, Watchdog

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-P", "-m", "engine.process")
API_KEY_VARIABLE = "OCTAVO_API_KEY"
STOP_TIMEOUT_S = 5.0
STACK_TIMEOUT_S = 1.0
LAST_WORDS_S = 1.0
READY_BEAT_S = 4.0  # silence after which an engine does not count as ready; it is killed a little later
READY_TURN_S = 2.0  # one without work makes a turn a second
KILL_TIMEOUT_S = 30.0  # a process in the middle of a driver's call ends when that does
# OpenMP reads this once, when torch loads. By default its threads spin for milliseconds at every barrier, which takes the cores
# from the frontend and, on a machine that does anything else, from each other: a decode step of 8 sequences then took 150 to
# 5,000 ms on two cores instead of 35. Spinning briefly keeps those 35 ms; sleeping at once (PASSIVE) makes it 65.
# huggingface_hub would ask the Hub for more than a model, and tell it what else runs here.
ENGINE_DEFAULTS = {"GOMP_SPINCOUNT": "5000", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Death(msgspec.Struct, frozen=True):
    """How one life of the engine ended. cause: in words. request_ids: of the steps that were running. num_completed: steps.

    is_final: the process could not be ended, so that none can take its place.
    """

    cause: str
    request_ids: list[str]
    num_completed: int
    is_final: bool = False


class Supervisor:
    """One engine process at a time, each with an address and files of its own.

    epoch: counts the engine's lives, from 1. log: how engines log; as JSON by way of this process. crash_point: for tests.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        recovery: RecoveryConfig | None = None,
        log: LogConfig | None = None,
        crash_point: CrashPoint | None = None,
    ) -> None:
        self._config = config
        self._command = command
        self.recovery = recovery or RecoveryConfig()
        self._log = log or LogConfig()
        self._relay: asyncio.Task[None] | None = None
        self._crash_point = crash_point
        # A short path: the kernel allows a socket's name about a hundred characters.
        self._folder = Path(tempfile.mkdtemp(prefix="octavo-"))
        self.epoch = 0
        self._process: asyncio.subprocess.Process | None = None
        self._flight: FlightReader | None = None
        self._watchdog = Watchdog(self.recovery.step_timeout_s)
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def address(self) -> str:
        """The ZMQ endpoint that the present engine binds."""
        return f"ipc://{self._folder}/engine-{self.epoch}"

    @property
    def pid(self) -> int | None:
        """The engine's process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(
        self, on_stuck: Callable[[], None], on_death: Callable[[Death], None], earlier: EarlierLife | None = None
    ) -> None:
        """Start an engine. It inherits stderr, and reads its configuration from stdin, which stays open while we live.

        on_stuck: called before a stuck engine is killed: nothing it may still say counts. on_death: called when it has ended
        without having been asked to. earlier: what it takes over from the one before.
        """
        self.epoch += 1
        self._remove_files(self.epoch - 1)
        self._flight = FlightReader(self._file("flight"))
        self._watchdog = Watchdog(self.recovery.step_timeout_s)
        root = str(Path(__file__).parent.parent)
        started_s = time.monotonic()
        python_path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with await self._log_to() as stderr:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                env={**ENGINE_DEFAULTS, **_without_secrets(os.environ), "PYTHONPATH": python_path},
            )
        self._process = process
        if self._stopping:  # meanwhile
            self.kill_this_life()
        launch = Launch(
            address=self.address,
            epoch=self.epoch,
            started_s=started_s,
            config=msgspec.structs.replace(self._config, earlier=earlier),
            flight_path=str(self._file("flight")),
            stack_path=str(self._file("stack")),
            log=self._log,
            crash_point=self._crash_point,
        )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has ended already, which will be noticed
            process.stdin.write(msgspec.json.encode(launch) + b"\n")
            await process.stdin.drain()
        self._watch = asyncio.create_task(self._watch_over(process, on_stuck, on_death))

    async def _log_to(self) -> contextlib.AbstractContextManager[IO[bytes] | None]:
        """The stderr of an engine, open until it has been started: ours, or for JSON a pipe whose lines we pass on."""
        if self._log.format != "json":
            return contextlib.nullcontext()
        # Not asyncio's own pipe: that keeps an ended process from counting as such while a child of it holds the other end.
        read_end, write_end = os.pipe()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(read_end, "rb", 0))
        self._relay = asyncio.create_task(LogRelay("engine").run(reader))
        return os.fdopen(write_end, "wb", 0)

    def log_at(self, level: str) -> None:
        """The level that engines started from now on log at."""
        self._log = msgspec.structs.replace(self._log, level=level)

    def flight(self) -> Flight | None:
        """What the engine's recorder says now; None before the first start."""
        return self._flight.read() if self._flight else None

    def is_well(self) -> bool:
        """Whether the process shows signs of life and its step is within half of what it may take."""
        flight = self.flight()
        if flight is None or self.pid is None:
            return False
        now = time.monotonic()
        turn_limit_s = max(READY_TURN_S, self._watchdog.step_limit_s(flight) / 2)
        return now - flight.beat_s < READY_BEAT_S and now - flight.turn_s < turn_limit_s

    async def _watch_over(
        self, process: asyncio.subprocess.Process, on_stuck: Callable[[], None], on_death: Callable[[Death], None]
    ) -> None:
        """Until the process ends; that is noticed at once, and whether it is stuck at intervals."""
        assert self._flight is not None
        flight, stuck, is_final = self._flight, None, False
        ended = asyncio.ensure_future(process.wait())
        while not ended.done():
            await asyncio.wait({ended}, timeout=LOOK_INTERVAL_S)
            if ended.done() or self._stopping:
                continue
            is_stopped = self._watchdog.beat_age_s > 2 * BEAT_INTERVAL_S and _is_stopped(process.pid)
            stuck = self._watchdog.look(flight.read(), time.monotonic(), is_stopped=is_stopped)
            if stuck is not None:
                logger.error("%s; it is killed", stuck)
                on_stuck()
                await self._ask_for_stack(process.pid)
                self._send_signal(process.pid, signal.SIGKILL)
                await asyncio.wait({ended}, timeout=KILL_TIMEOUT_S)
                is_final = not ended.done()
                break
        if self._stopping:
            await ended
            return
        cause = stuck or _how_it_ended(ended.result())
        if is_final:
            cause = f"{cause}, and cannot be ended: only a restart of the machine or its driver frees what it holds"
        on_death(Death(cause, flight.request_ids(), flight.read().num_completed, is_final))

    async def _ask_for_stack(self, pid: int) -> None:
        """Log where the engine's threads are. A stopped process is continued for it."""
        path = self._file("stack")
        self._send_signal(pid, signal.SIGCONT)
        self._send_signal(pid, signal.SIGUSR1)
        seen, deadline_s = "", time.monotonic() + STACK_TIMEOUT_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            if text and text == seen:
                break
            seen = text
        if seen:
            logger.error("where the engine's threads were:\n%s", seen.rstrip())
        else:
            logger.error("the engine did not tell its stack within %.0f s", STACK_TIMEOUT_S)

    def _send_signal(self, pid: int, number: signal.Signals) -> None:
        # Not Process.kill or send_signal: uvloop's raise where the process has ended and nobody has been told yet.
        if self.pid == pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End the engine without asking, as for one that is loading and reads no messages."""
        self._stopping = True
        self.kill_this_life()

    def kill_this_life(self) -> None:
        """End an engine that is of no use. It counts as a death."""
        if (pid := self.pid) is not None:
            self._send_signal(pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End the engine: it has been told to shut down, gets STOP_TIMEOUT_S for it, and is killed after that."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self.kill_this_life()
                await process.wait()
        if self._watch is not None:
            await self._watch
        if self._relay is not None:  # what it said last; a program that it has left running may keep the pipe open
            await asyncio.wait({self._relay}, timeout=LAST_WORDS_S)
            self._relay.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}-{self.epoch}"

    def _remove_files(self, epoch: int) -> None:
        for path in self._folder.glob(f"*-{epoch}"):
            path.unlink(missing_ok=True)


def _without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The engine may run code that comes with a model, which is nobody to give the API keys to."""
    return {name: value for name, value in environ.items() if name != API_KEY_VARIABLE}


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def _how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"the engine process ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = " (by the kernel for want of memory, if by nobody else)" if name == "SIGKILL" else ""
    return f"the engine process was ended by {name}{hint}"
