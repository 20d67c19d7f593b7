"""The engine process: `python -m engine.process`, started by the supervisor, which writes one line of JSON to its stdin.

A ROUTER socket takes messages from frontends and gives each back what is its own. stdin stays open as the sign of life of the
parent: when it closes, the process ends at once, whatever it is doing. An error that nobody expected ends it as well: after a
CUDA error nothing on the device can be trusted, and the parent starts an engine that goes on with the open requests.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import zmq

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.crash_points import ArmedCrashPoint
from engine.errors import ModelLoadError, OctavoError
from engine.flight_recorder import FlightRecorder
from engine.jit_watch import watch_compiles
from engine.logs import log_strays, set_up_logging
from engine.messages import (
    Abort,
    Accepted,
    AddRequest,
    EngineFailed,
    EngineMessage,
    EngineReady,
    EngineStats,
    ErrorInfo,
    FrontendMessage,
    Hello,
    Launch,
    LoadProgress,
    Refused,
    RequestOutput,
    ResetPrefixCache,
    SetLogLevel,
    Shutdown,
    StepOutputs,
)
from engine.usage_meter import UsageMeter

logger = logging.getLogger(__name__)

Report = Callable[[str, str, float | None], None]
BuildEngine = Callable[[EngineConfig, Report], tuple[EngineCore, EngineReady]]

IDLE_POLL_MS = 1000
# A client that sends its next request as soon as it has an answer does not find the engine at other work.
COMPILING_POLL_MS = 2  # without other work: a request waits for its grammar
SPARE_POLL_MS = 1  # while the device is busy: after this it is looked at again, for it may be done early
QUIET_MS = 10
STATS_INTERVAL_S = 0.25
EXIT_BY_ERROR = 70
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class FrontendSocket:
    """The ROUTER socket. A frontend's identity is the part of its request ids before the first colon."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(FrontendMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self.frontends: set[bytes] = set()

    def receive(self, timeout_ms: int) -> list[FrontendMessage]:
        """All messages that are there, after waiting up to timeout_ms for the first."""
        messages: list[FrontendMessage] = []
        if not self._socket.poll(timeout_ms):
            return messages
        while True:
            try:
                identity, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            message = self._decoder.decode(payload)
            if isinstance(message, Hello):
                self.frontends.add(identity)
            messages.append(message)

    def send(self, identity: bytes, message: EngineMessage) -> None:
        self._socket.send_multipart([identity, self._encoder.encode(message)])

    def broadcast(self, message: EngineMessage) -> None:
        for identity in self.frontends:
            self.send(identity, message)

    def close(self) -> None:
        self._socket.close()


def frontend_of(request_id: str) -> bytes:
    """The identity of the frontend that a request came from."""
    return request_id.partition(":")[0].encode()


class EngineLoop:
    """Messages in, steps, outputs out, until a Shutdown. recorder: told what goes on; crash_point: for tests; meter: what
    it sees goes into the statistics."""

    def __init__(
        self,
        core: EngineCore,
        socket: FrontendSocket,
        epoch: int,
        *,
        recorder: FlightRecorder | None = None,
        meter: UsageMeter | None = None,
        crash_point: ArmedCrashPoint | None = None,
    ) -> None:
        self._core = core
        self._socket = socket
        self._epoch = epoch
        self._recorder = recorder
        self._meter = meter
        self._crash_point = crash_point
        self._stopping = False
        self._idle_poll_ms = 0
        self._stats_sent_s = 0.0

    def run(self) -> None:
        while not self._stopping:
            self.turn()

    def turn(self) -> None:
        """Take what has arrived, make a step if there is work, and send what became known. Without work the runner may use the
        time, a piece a turn, so that a request waits for one piece at most."""
        if self._recorder is not None:
            self._recorder.turn()
        was_busy = self._core.has_work
        spare_ms = min(SPARE_POLL_MS, int(1e3 * self._core.spare_s()))
        idle_ms = COMPILING_POLL_MS if self._core.is_compiling else self._idle_poll_ms
        for message in self._socket.receive(spare_ms if was_busy else idle_ms):
            self._handle(message)
        if self._core.is_compiling:
            for request_id, error in self._core.take_compiled():
                self._reply(request_id, error)
        if spare_ms:
            return  # there may be time for more
        outputs: list[RequestOutput] = []
        if self._core.has_work:
            outputs = self._core.step()
            self._idle_poll_ms = QUIET_MS
        else:
            self._idle_poll_ms = 0 if self._core.idle() else IDLE_POLL_MS
        now = time.monotonic()
        if outputs or was_busy != self._core.has_work or now - self._stats_sent_s >= STATS_INTERVAL_S:
            self._send(outputs, with_stats=now - self._stats_sent_s >= STATS_INTERVAL_S or not self._core.has_work)
            if outputs and self._crash_point is not None:
                self._crash_point.reached("after_sending")

    def _handle(self, message: FrontendMessage) -> None:
        match message:
            case AddRequest():
                self._add(message)
            case Abort():
                self._core.abort(message.request_id, message.choice_index)
                self._stats_sent_s = 0.0  # what it held is free: say so with the next message
            case ResetPrefixCache():
                self._core.reset_prefix_cache()
            case SetLogLevel():
                _log_at(message)
            case Shutdown():
                self._stopping = True
            case Hello():
                pass

    def _add(self, message: AddRequest) -> None:
        if self._recorder is not None:
            self._recorder.handling(message.request_id)
        try:
            if self._core.add(message):
                self._reply(message.request_id, None)
        except OctavoError as error:
            self._reply(message.request_id, error)
        if self._recorder is not None:
            self._recorder.handling("")

    def _reply(self, request_id: str, error: OctavoError | None) -> None:
        reply = Accepted(request_id) if error is None else Refused(request_id, ErrorInfo.of(error))
        self._socket.send(frontend_of(request_id), reply)

    def _send(self, outputs: list[RequestOutput], with_stats: bool) -> None:
        stats = self._stats() if with_stats else None
        if with_stats:
            self._stats_sent_s = time.monotonic()
        by_frontend = self._by_frontend(outputs)
        for identity in self._socket.frontends if with_stats else by_frontend:
            message = StepOutputs(epoch=self._epoch, outputs=by_frontend.get(identity, []), stats=stats)
            self._socket.send(identity, message)

    def _stats(self) -> EngineStats:
        """The core's, with what the process takes of the machine."""
        if self._meter is None:
            return self._core.stats()
        return msgspec.structs.replace(
            self._core.stats(),
            resident_bytes=self._meter.resident_bytes,
            devices=self._meter.devices,
            cpu_seconds=time.process_time(),
        )

    def _by_frontend(self, outputs: list[RequestOutput]) -> dict[bytes, list[RequestOutput]]:
        if len(self._socket.frontends) == 1:  # the usual case, without a look at every request id
            return dict.fromkeys(self._socket.frontends, outputs)
        by_frontend: dict[bytes, list[RequestOutput]] = defaultdict(list)
        for output in outputs:
            by_frontend[frontend_of(output.request_id)].append(output)
        return by_frontend


def _log_at(message: SetLogLevel) -> None:
    logging.getLogger().setLevel(message.level.upper())


def end_with_parent(stdin: int) -> None:
    """End this process as soon as the parent's end of stdin (a descriptor) closes, also in the middle of a load.

    On Linux the kernel is asked to see to it as well, which no library that keeps the interpreter to itself can hold up.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        # Not through sys.stdin: a thread that holds its lock makes the interpreter abort at exit.
        while os.read(stdin, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def name_process(title: str) -> None:
    """Show the process under its role in ps."""
    import setproctitle

    setproctitle.setproctitle(title)


def run(build_engine: BuildEngine) -> int:
    """The child's life: read the launch line, load, serve. Returns the exit code."""
    # Ctrl-C and a supervisor's SIGTERM reach the whole process group; the parent drains first and then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    name_process("octavo: engine")
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    python_s = time.monotonic() - launch.started_s
    set_up_logging(launch.log, "engine")
    log_strays()
    end_with_parent(sys.stdin.fileno())
    recorder = FlightRecorder(Path(launch.flight_path))
    recorder.start_beating()
    tell_stacks(launch.stack_path)
    crash_point = None if launch.crash_point is None else ArmedCrashPoint(launch.crash_point, launch.epoch)
    socket = FrontendSocket(launch.address)
    while not socket.frontends:
        for message in socket.receive(IDLE_POLL_MS):
            if isinstance(message, SetLogLevel):  # what else may come so early, Shutdown, comes with a kill
                _log_at(message)

    def report(phase: str, detail: str, fraction: float | None) -> None:
        socket.broadcast(LoadProgress(phase, detail, fraction))

    try:
        if crash_point is not None:
            crash_point.reached("loading")
        core, ready = build_engine(launch.config, report)
    except OctavoError as error:
        socket.broadcast(EngineFailed(ErrorInfo.of(error)))
        socket.close()
        return 1
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        sentence = f"the model could not be loaded: {type(error).__name__}: {error}"
        socket.broadcast(EngineFailed(ErrorInfo.of(ModelLoadError(sentence))))
        socket.close()
        die_of(error)
    # What is loaded stays, and is not to be looked at in the middle of somebody's tokens.
    gc.collect()
    gc.freeze()
    gc.enable()
    meter = UsageMeter(ready.device)
    meter.start()
    core.watch(recorder, crash_point)
    watch_compiles(recorder.compiling, recorder.turn)
    recorder.serving()
    socket.broadcast(_with_phases(ready, {"python": python_s}))
    try:
        loop = EngineLoop(core, socket, launch.epoch, recorder=recorder, meter=meter, crash_point=crash_point)
        loop.run()
    except BaseException as error:
        die_of(error)
    core.close()
    socket.close()
    return 0


def tell_stacks(path: str) -> None:
    """Write the stacks of all threads to a file when SIGUSR1 asks for them, and to stderr when this process dies of a fault."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, os.open(path, os.O_WRONLY | os.O_CREAT), all_threads=True)


def die_of(error: BaseException) -> NoReturn:
    """Log an error that nobody expected and end at once: what is in order otherwise, destructors and threads, may hang now."""
    logger.critical("the engine ends by an error: %s", type(error).__name__, exc_info=error)
    logging.shutdown()
    os._exit(EXIT_BY_ERROR)


def build_engine(config: EngineConfig, report: Report) -> tuple[EngineCore, EngineReady]:
    """engine.build's, with what it imports: late, so that the process already listens and watches its parent."""
    report("import", "torch and transformers", None)
    started_s = time.monotonic()
    import torch  # noqa: F401 (to know its share)

    torch_s = time.monotonic() - started_s
    from engine.transformers_import import import_transformers

    import_transformers()
    from engine.build import build_engine as build

    # 360,000 objects that stay: a collection that looks at them all takes a quarter of a second.
    gc.freeze()
    phases = {"import torch": torch_s, "import transformers": time.monotonic() - started_s - torch_s}
    core, ready = build(config, report)
    return core, _with_phases(ready, phases)


def _with_phases(ready: EngineReady, earlier: dict[str, float]) -> EngineReady:
    seconds = {name: round(value, 3) for name, value in earlier.items()}
    return msgspec.structs.replace(ready, load_seconds={**seconds, **ready.load_seconds})


if __name__ == "__main__":
    gc.disable()  # until everything is loaded: importing makes several hundred thousand objects that stay
    sys.exit(run(build_engine))
