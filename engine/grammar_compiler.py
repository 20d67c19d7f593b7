"""GrammarCompiler: compiles grammars beside the engine loop, with bounded time, memory and number, and keeps the latest."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine.errors import EngineUnavailable, InvalidRequest, ModelLoadError
from engine.framed_process import exchange
from engine.sampling_params import StructuredSpec

if TYPE_CHECKING:
    from engine.grammar import Grammar, GrammarTokenizer

LIMIT_S = 10.0
START_LIMIT_S = 60.0
NUM_THREADS = 2
MAX_WAITING = 64
MAX_CACHED = 128
MAX_CACHED_CHARS = 16 * 2**20
# Deeper than the trial's: what it followed to the end on its own stack never overflows here.
_STACK_BYTES = 64 * 2**20

_COMMAND = (sys.executable, "-P", "-m", "engine.grammar_trial")


class GrammarSetup(msgspec.Struct, frozen=True):
    """What a GrammarTokenizer is made of; see there. folder: of the model."""

    folder: str
    vocab_size: int
    eos_token_ids: list[int]

    def load(self) -> GrammarTokenizer:
        """Raises ModelLoadError."""
        from engine.grammar import GrammarTokenizer  # late, with the library: most engines never need it

        return GrammarTokenizer.load(Path(self.folder), vocab_size=self.vocab_size, eos_token_ids=self.eos_token_ids)


class GrammarCompiler:
    """One an engine; `compile` is called by one thread. Threads, processes and the tokenizer come with the first grammar.

    limit_s: for one grammar. Grammars are kept, least recently used out first, also those that were refused.
    """

    def __init__(self, setup: GrammarSetup, *, limit_s: float = LIMIT_S) -> None:
        self._setup = setup
        self._limit_s = limit_s
        self._threads = ThreadPoolExecutor(NUM_THREADS, "grammars")
        self._cache: OrderedDict[StructuredSpec, Future[Grammar]] = OrderedDict()
        self._own = threading.local()
        self._trials: list[_Trial] = []
        self._loading = threading.Lock()
        self._tokenizer: GrammarTokenizer | None = None

    def compile(self, spec: StructuredSpec) -> Future[Grammar]:
        """Fails with InvalidRequest for a grammar that is wrong, too large or takes too long. Raises EngineUnavailable where
        too many are waiting already."""
        future = self._cache.get(spec)
        if future is not None and not _is_worth_another_try(future):
            self._cache.move_to_end(spec)
            return future
        if sum(not waiting.done() for waiting in self._cache.values()) >= MAX_WAITING:
            raise EngineUnavailable(f"{MAX_WAITING} grammars are waiting to be compiled already; try again soon")
        size = threading.stack_size(_STACK_BYTES)  # of the thread that the next line may start
        future = self._threads.submit(self._compile, spec)
        threading.stack_size(size)
        self._cache[spec] = future
        self._cache.move_to_end(spec)
        self._shrink()
        return future

    def _shrink(self) -> None:
        num_chars = sum(len(spec.text) for spec in self._cache)
        for spec, future in list(self._cache.items())[:-1]:
            if len(self._cache) <= MAX_CACHED and num_chars <= MAX_CACHED_CHARS:
                break
            if future.done():
                num_chars -= len(spec.text)
                del self._cache[spec]

    def _compile(self, spec: StructuredSpec) -> Grammar:
        """In a thread of the pool, each with a process to try grammars in."""
        if not hasattr(self._own, "trial"):
            self._own.trial = _Trial(self._setup, self._limit_s)
            self._trials.append(self._own.trial)
        trial: _Trial = self._own.trial
        try:
            trial.start()
        except OSError as error:
            raise EngineUnavailable(f"the process that tries grammars does not start: {error.strerror}") from None
        tokenizer = self._load_tokenizer()  # while the process loads its own
        trial.run(spec)
        return tokenizer.compile(spec)

    def _load_tokenizer(self) -> GrammarTokenizer:
        with self._loading:
            if self._tokenizer is None:
                try:
                    self._tokenizer = self._setup.load()
                except ModelLoadError:
                    raise InvalidRequest("this model's answers cannot be structured: it has no usable tokenizer.json") from None
            return self._tokenizer

    def close(self) -> None:
        """End threads and processes; what is being compiled fails."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for trial in self._trials:
            trial.stop()


def _is_worth_another_try(future: Future[Grammar]) -> bool:
    return future.done() and (future.cancelled() or isinstance(future.exception(), EngineUnavailable))


class _Trial:
    """The process of one thread."""

    def __init__(self, setup: GrammarSetup, limit_s: float) -> None:
        self._setup = setup
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def start(self) -> None:
        """Start the process unless it runs; it is ready when it has loaded the tokenizer."""
        if self._process is not None:
            return
        root = str(Path(__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._is_ready = False

    def run(self, spec: StructuredSpec) -> None:
        """Raises InvalidRequest for a grammar that is refused, that takes too long or on which the process dies."""
        if not self._is_ready:
            if self._exchange(self._setup, START_LIMIT_S)[0] is None:
                raise EngineUnavailable("the process that tries grammars does not start")
            self._is_ready = True
        answer, timed_out = self._exchange(spec, self._limit_s)
        if answer is None:
            what = f"takes more than {self._limit_s:g} seconds" if timed_out else "nests too deep or takes too much memory"
            raise InvalidRequest(f"the grammar cannot be compiled: it {what}")
        if answer:
            raise InvalidRequest(answer)

    def _exchange(self, message: GrammarSetup | StructuredSpec, limit_s: float) -> tuple[str | None, bool]:
        """The answer, None where the process ended instead; and whether it was killed for taking too long."""
        assert self._process is not None
        frame, timed_out = exchange(self._process, msgspec.msgpack.encode(message), limit_s)
        if frame is None:
            self.stop()
            return None, timed_out
        return msgspec.msgpack.decode(frame, type=str), False

    def stop(self) -> None:
        """End the process. Whoever waits for its answer is told that there is none."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
