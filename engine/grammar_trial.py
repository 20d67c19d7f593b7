"""The process that tries a grammar before the engine compiles it: `python -m engine.grammar_trial`, started by the compiler.

The library bounds most of what a grammar may cost, but a chain of a thousand references overflows the stack of whoever follows
it, and some constructions take minutes. Here either harms nobody: the process is killed, or dies, and another one is started.
What passes here, on a smaller stack and with less memory, passes in the engine.

One grammar at a time: a StructuredSpec on stdin, its error ("" for none) on stdout, each a frame of 4 bytes of length and
msgpack. The first frame is the GrammarSetup, and is answered when the tokenizer is loaded. The process ends with its stdin.
"""

from __future__ import annotations

import os
import queue
import resource
import sys
import threading
from typing import IO

import msgspec

from engine.errors import InvalidRequest
from engine.framed_process import read_frame, write_frame
from engine.grammar import GrammarTokenizer
from engine.grammar_compiler import GrammarSetup
from engine.sampling_params import StructuredSpec

STACK_BYTES = 4 * 2**20
_MAX_ADDRESS_BYTES = 4 * 2**30


def _try(tokenizer: GrammarTokenizer, spec: StructuredSpec) -> str:
    try:
        tokenizer.compile(spec).try_out()
    except InvalidRequest as error:
        return error.message
    return ""


def _work(jobs: queue.SimpleQueue[bytes], out: IO[bytes]) -> None:
    try:
        tokenizer = msgspec.msgpack.decode(jobs.get(), type=GrammarSetup).load()
        write_frame(out, msgspec.msgpack.encode(""))
        while True:
            write_frame(out, msgspec.msgpack.encode(_try(tokenizer, msgspec.msgpack.decode(jobs.get(), type=StructuredSpec))))
    finally:
        os._exit(1)  # also where the library panics


def main() -> None:
    """Serve until stdin ends: the main thread waits for that, so that it is noticed in the middle of a trial."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_BYTES, _MAX_ADDRESS_BYTES))
    os.nice(5)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=_work, args=(jobs, sys.stdout.buffer), daemon=True).start()
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        jobs.put(frame)
    os._exit(0)


if __name__ == "__main__":
    main()
