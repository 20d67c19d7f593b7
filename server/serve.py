"""`octavo serve`: where engine client, application and socket are put together, from start to exit code."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import setproctitle
import uvloop

from engine.client import EngineClient
from engine.errors import ConfigError, EngineUnavailable, OctavoError
from engine.logs import log_strays
from engine.messages import EngineReady
from engine.model_cache import check_name
from engine.supervisor import Supervisor
from server.config import ServerConfig, load_config
from server.drain import Drain
from server.file_limit import OWN_FILES, possible_connections, raise_file_limit, wanted_connections
from server.load_log import LoadLog
from server.logs import set_up_logging

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger("octavo.server")

BACKLOG = 2048
STATE_POLL_S = 0.2
CLOSE_TIMEOUT_S = 3.0
INSTALL_S = 10.0  # less before the command is a slow disk or a busy machine


def run_serve(argv: Sequence[str], environ: Mapping[str, str], *, begun_s: float) -> int:
    """Returns the exit code: 0 after an orderly end, 1 with a sentence on stderr when serving failed. Raises ConfigError.

    begun_s: time.monotonic() when the command began.
    """
    config = load_config(argv, environ)
    chat_template = config.read_chat_template()
    raise_file_limit(wanted_connections(config.max_connections, config.max_open_requests) + OWN_FILES)
    possible_connections(config.max_connections, config.max_open_requests)
    set_up_logging(config.log_level, log_format=config.log_format, log_prompts=config.log_prompts)
    log_strays()
    try:
        with listen(config.host, config.port) as sock:
            setproctitle.setproctitle("octavo: frontend")
            return uvloop.run(_Service(config, sock, chat_template, begun_s).run())
    except OctavoError as error:
        if config.log_format == "json":
            logger.critical("%s", error.message)
        else:
            print(f"octavo: {error.message}", file=sys.stderr)
        return 1


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: bound before anything is loaded, so that a taken port is known at once. Raises ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except socket.gaierror:
        raise ConfigError(f"there is no address {host} to listen on: give one of this machine's with --host") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} on {host} is taken: stop what listens there, or choose another with --port {port + 1}"
        elif error.errno == errno.EACCES:
            message = f"port {port} may not be opened by this user: choose one above 1023 with --port"
        else:
            message = f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}"
        raise ConfigError(message) from None


class _Service:
    """One run of `octavo serve`: socket, engine and HTTP server, from start to exit code."""

    def __init__(self, config: ServerConfig, sock: socket.socket, chat_template: str | None, begun_s: float) -> None:
        self._config = config
        self._begun_s = begun_s
        self._sock = sock
        supervisor = Supervisor(config.engine_config(), recovery=config.recovery_config(), log=config.log_config())
        self._client = EngineClient(supervisor, chat_template=chat_template)
        self._load_log = LoadLog.of_stderr(config.log_format)
        self._client.on_progress = self._load_log
        self._base_url = _base_url(sock, "https" if config.tls_cert else "http")
        self._drain = Drain()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._deadline_s = 0.0  # of time.monotonic(), for open work in an orderly end

    async def run(self) -> int:
        """Serves until a signal or the engine's end. Raises what kept the engine from starting, or ended it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        before_s = _age_s()
        logger.info("start the engine process: %s", self._config.model)
        await self._client.start()
        try:
            self._check_model_name()
            # The engine is seconds from ready, so it goes first: what HTTP needs is imported beside its own imports.
            from server.app import create_server

            server = create_server(self._client, self._config, drain=self._drain, on_drain=self._begin_drain)
        except BaseException:
            await self._client.stop()
            raise
        serving = asyncio.create_task(server.serve(sockets=[self._sock]))
        engine = asyncio.create_task(self._watch_engine(before_s))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({serving, engine, stop}, return_when=asyncio.FIRST_COMPLETED)
            if engine.done():
                engine.result()
            await self._finish_open_work(engine)
            if engine.done():
                engine.result()
        finally:
            self._load_log.clear()
            engine.cancel()
            await self._end(server, serving)
            stop.cancel()
            await asyncio.gather(serving, engine, stop, return_exceptions=True)
        return 0

    def _check_model_name(self) -> None:
        """A wrong path is told at once: the engine would tell it too, once it has imported what models are loaded with."""
        with contextlib.suppress(OSError):  # a path that cannot be looked at; the engine knows the remedies
            check_name(self._config.engine_config().model)

    async def _finish_open_work(self, engine: asyncio.Task[None]) -> None:
        """Takes new work for a while yet, then none, and waits for what is open; not for ever, and not with a second signal."""
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({hurry, engine}, timeout=self._config.drain_delay_s, return_when=asyncio.FIRST_COMPLETED)
        self._drain.close()
        self._deadline_s = time.monotonic() + self._config.shutdown_timeout_s
        idle = asyncio.create_task(self._drain.wait_until_idle())
        timeout_s = self._config.shutdown_timeout_s
        await asyncio.wait({idle, hurry, engine}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        idle.cancel()

    async def _end(self, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        """Ends what is still open with an error (in a stream an event), so that its client knows; then engine and server."""
        self._drain.close()
        await self._client.stop()
        idle = asyncio.create_task(self._drain.wait_until_idle())
        await asyncio.wait({idle}, timeout=CLOSE_TIMEOUT_S)
        idle.cancel()
        server.should_exit = True
        # What is left is to be read by clients: that of a slow one goes on for as long as its answer might have.
        hurry = asyncio.create_task(self._hurry.wait())
        left_s = self._deadline_s - time.monotonic()
        await asyncio.wait({serving, hurry}, timeout=max(CLOSE_TIMEOUT_S, left_s), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({serving}, timeout=CLOSE_TIMEOUT_S)
        hurry.cancel()
        serving.cancel()

    def _on_signal(self) -> None:
        """The first signal lets open streams finish, the second ends them."""
        if self._stop.is_set():
            self._hurry.set()
        self._begin_drain()

    def _begin_drain(self) -> None:
        """Let open streams finish and end. May be called again."""
        if self._stop.is_set():
            return
        self._drain.begin()
        num_open = self._client.num_open_streams
        logger.info("Stopping%s.", f" when {num_open} open requests are done (again: at once)" if num_open else "")
        self._stop.set()

    async def _watch_engine(self, before_s: float) -> None:
        """Never returns; raises what ended the engine, or kept it from starting. before_s: from the command to its start."""
        ready = await self._client.wait_until_ready()
        self._log_phases(ready, before_s)
        # What is loaded stays, and tokens leave little behind: a full collection would hold up every stream for nothing.
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        self._print_ready(ready)
        while self._client.state != "failed":
            await asyncio.sleep(STATE_POLL_S)
        raise self._client.failure or EngineUnavailable("the engine ended unexpectedly")

    def _log_phases(self, ready: EngineReady, before_s: float) -> None:
        """Where the time went, from the command on (a shell that became this process counts)."""
        total_s = _age_s()
        phases = phases_of_start(total_s, before_s, total_s - (time.monotonic() - self._begun_s), ready.load_seconds)
        logger.info("ready after %.1f s: %s", total_s, ", ".join(f"{name} {value:.1f} s" for name, value in phases.items()))

    def _print_ready(self, ready: EngineReady) -> None:
        from server.api.health import curl_command
        from server.chat_client import DEFAULT_URL

        for note in ready.notes:
            logger.info("%s", note)
        curl = curl_command(self._client, self._config, self._base_url)
        scope = " (this machine only; --host 0.0.0.0 lets others in)" if self._config.host == "127.0.0.1" else ""
        where = "" if self._base_url == DEFAULT_URL else f" --url {self._base_url}"
        command = "octavo" if shutil.which("octavo") else sys.argv[0]  # a checkout's is not on everybody's PATH
        chat = f"{command} chat{where}, or: " if self._client.tokenizer.has_chat_template else ""
        line = f"Octavo serves {self._config.model_names[0]} at {self._base_url}{scope}. Try: {chat}{curl}"
        if self._config.log_format == "json":
            logger.info("%s", line)
        else:
            print(line, file=sys.stderr, flush=True)


def phases_of_start(total_s: float, before_s: float, shell_s: float, load_seconds: Mapping[str, float]) -> dict[str, float]:
    """shell_s: until the command itself began, which is part of before_s, and told by itself where it is an install."""
    phases = {"shell": shell_s} if shell_s >= INSTALL_S else {}
    phases |= {"frontend": before_s - sum(phases.values()), **load_seconds}
    return phases | {"other": max(0.0, total_s - sum(phases.values()))}


def _age_s() -> float:
    """Since this process was started."""
    try:  # Linux's clock of processes; psutil would add the time of the boot, which is known to the second only
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time() - psutil.Process().create_time()


def _base_url(sock: socket.socket, scheme: str) -> str:
    """Where a client on this machine finds the socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
