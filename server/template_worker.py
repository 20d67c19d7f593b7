"""Chat templates that come with requests, rendered in a process of their own.

A template is a program of whoever sent it. Jinja's sandbox keeps it from our objects, but not from loops without end, or from
`"a" * 10**10`; and Python cannot be stopped from inside. So another process renders it, one at a time, with bounded memory and
nothing to write to, and is killed when it takes too long. Conversations of the server's own template do not come here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from engine.chat_template import ChatJob
from engine.errors import EngineUnavailable, InvalidRequest
from engine.framed_process import exchange, read_frame, write_frame

LIMIT_S = 2.0
START_LIMIT_S = 30.0
MAX_MEMORY_BYTES = 512 * 2**20
MAX_WAITING = 64
# Longer ones are no templates; a model's own has at most some 20,000.
MAX_TEMPLATE_CHARS = 256 * 1024
MAX_RENDERED_CHARS = 32 * 2**20

_COMMAND = (sys.executable, "-P", "-m", "server.template_worker")


class _Reply(msgspec.Struct, omit_defaults=True):
    """text, or what is wrong and with which field."""

    text: str = ""
    error: str | None = None
    param: str | None = None


_encoder = msgspec.msgpack.Encoder()
_job_decoder = msgspec.msgpack.Decoder(ChatJob)
_reply_decoder = msgspec.msgpack.Decoder(_Reply)


class TemplateWorker:
    """The frontend's side. The process is started when the first job comes, and again after one that had to be killed."""

    def __init__(self, *, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._thread = ThreadPoolExecutor(1, "chat-templates")
        self._process: subprocess.Popen[bytes] | None = None
        self._end_process: Callable[[], object] = lambda: None
        self._num_waiting = 0

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def render(self, job: ChatJob) -> str:
        """Waits for its turn. Raises InvalidRequest, also for a template that takes too long or too much memory, and
        EngineUnavailable where too many are waiting already."""
        if len(job.source) > MAX_TEMPLATE_CHARS:
            raise InvalidRequest(
                f"chat_template may have at most {MAX_TEMPLATE_CHARS:,} characters, got {len(job.source):,}.",
                param="chat_template",
            )
        if self._num_waiting >= MAX_WAITING:
            raise EngineUnavailable("Too many requests bring chat templates of their own; try again soon.")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._render, job)
        finally:
            self._num_waiting -= 1

    def _render(self, job: ChatJob) -> str:
        if self.pid is None:
            self._start_process()
        try:
            sent = _encoder.encode(job)
        except (ValueError, OverflowError, RecursionError) as error:
            raise InvalidRequest(
                f"The messages cannot be given to the chat template: {type(error).__name__}.", param="messages"
            ) from None
        assert self._process is not None
        frame, timed_out = exchange(self._process, sent, self._limit_s)
        if frame is None:
            self._end_process()
            what = f"longer than {self._limit_s:g} seconds" if timed_out else "more memory than it may"
            raise InvalidRequest(f"The chat template took {what}.", param="chat_template")
        reply = _reply_decoder.decode(frame)
        if reply.error is not None:
            raise InvalidRequest(reply.error, param=reply.param)
        return reply.text

    def _start_process(self) -> None:
        root = str(Path(__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            _COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env={"PYTHONPATH": path}, start_new_session=True
        )
        self._end_process = weakref.finalize(self, _end, self._process)
        frame, _ = exchange(self._process, None, START_LIMIT_S)
        if frame is None:
            self._end_process()
            raise EngineUnavailable("The process that renders chat templates of requests does not start.")


@functools.cache
def template_worker() -> TemplateWorker:
    """This frontend's one."""
    return TemplateWorker()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # what it had not read yet
        process.communicate()


def _answer(frame: bytes) -> _Reply:
    try:
        text = _job_decoder.decode(frame).render()
    except InvalidRequest as error:
        return _Reply(error=error.message, param=error.param)
    if len(text) > MAX_RENDERED_CHARS:
        return _Reply(error=f"The chat template made more than {MAX_RENDERED_CHARS:,} characters.", param="chat_template")
    if not _is_unicode(text):
        return _Reply(error="The chat template made text that is not valid Unicode.", param="messages")
    return _Reply(text=text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def main() -> None:
    """The process: jobs on stdin, answers on stdout, until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    write_frame(answers, b"")
    while (frame := read_frame(jobs)) is not None:
        # So that nothing runs on for ever where the frontend is gone before it could kill us.
        used_s = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = int(used_s.ru_utime + used_s.ru_stime + LIMIT_S) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.RLIM_INFINITY))
        write_frame(answers, _encoder.encode(_answer(frame)))


if __name__ == "__main__":
    main()
