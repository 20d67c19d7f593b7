"""The server side of bench_frontend.py: a model folder without a model, an engine that computes nothing, and `octavo serve`.

bench_frontend_engine.py serve FOLDER STEP_RATE    the frontend; it starts the engine
bench_frontend_engine.py engine STEP_RATE          the engine, started as engine.supervisor starts the real one
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType

import msgspec
from bench_serving import WORDS, words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.messages import (
    Abort,
    Accepted,
    AddRequest,
    EngineReady,
    EngineStats,
    Launch,
    RequestOutput,
    Shutdown,
    StepOutputs,
)
from engine.process import FrontendSocket, end_with_parent, frontend_of
from engine.supervisor import Supervisor

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
CONTEXT = 32768
STATS_INTERVAL_S = 0.25
SAMPLE_INTERVAL_S = 0.001


def build_model_folder(folder: Path) -> Path:
    """A byte-level BPE in which every word of bench_serving.WORDS is one token, and the files beside it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|eos|>"]
    )
    tokenizer.train_from_iterator([" ".join(WORDS), *(words(500, seed) for seed in range(4))], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|eos|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    word_ids = sorted({token_id for word in WORDS for token_id in tokenizer.encode(f" {word}").ids})
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "word_ids": word_ids}
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return folder


def word_ids_of(folder: Path) -> tuple[list[int], int]:
    """The tokens that are words, and the size of the vocabulary."""
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return sizes["word_ids"], sizes["vocab_size"]


def make_ready(folder: str, vocab_size: int) -> EngineReady:
    return EngineReady(
        model_dir=folder,
        architecture="Nothing",
        device="none",
        dtype="none",
        attention_backend="none",
        vocab_size=vocab_size,
        hidden_size=1,
        max_model_len=CONTEXT,
        max_num_seqs=4096,
        max_num_batched_tokens=CONTEXT,
        block_size=16,
        num_blocks=[CONTEXT],
        kv_cache_bytes=0,
        kv_cache_tokens=16 * CONTEXT,
        eos_token_ids=[0],
        generation_defaults={},
        load_seconds={},
        notes=[],
    )


class FakeEngine:
    """Gives every choice of every open request one token a step."""

    def __init__(self, word_ids: list[int]) -> None:
        self._word_ids = word_ids
        self._draw = random.Random(0)
        self._open: dict[tuple[str, int], tuple[int, int]] = {}  # (request, choice) -> tokens given, tokens asked for
        self._num_given = 0

    @property
    def is_idle(self) -> bool:
        return not self._open

    def add(self, request: AddRequest) -> None:
        for choice in range(request.sampling.n):
            self._open[request.request_id, choice] = (0, max(request.sampling.max_tokens, 1))

    def abort(self, message: Abort) -> None:
        for key in [key for key in self._open if key[0] == message.request_id and message.choice_index in (None, key[1])]:
            del self._open[key]

    def step(self) -> list[RequestOutput]:
        outputs = []
        for (request_id, choice), (given, asked) in list(self._open.items()):
            is_last = given + 1 == asked
            outputs.append(
                RequestOutput(
                    request_id=request_id,
                    choice_index=choice,
                    first_token_index=given,
                    token_ids=[self._draw.choice(self._word_ids)],
                    finish_reason="length" if is_last else None,
                )
            )
            if is_last:
                del self._open[request_id, choice]
            else:
                self._open[request_id, choice] = (given + 1, asked)
        self._num_given += len(outputs)
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._open), generation_tokens=self._num_given)


def run_engine(step_rate: float) -> None:
    """Steps at fixed times while requests are open; one that is late does not move the others."""
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    end_with_parent(sys.stdin.fileno())
    folder = launch.config.model.model
    word_ids, vocab_size = word_ids_of(Path(folder))
    engine = FakeEngine(word_ids)
    socket = FrontendSocket(launch.address)
    while not socket.frontends:
        socket.receive(1000)
    socket.broadcast(make_ready(folder, vocab_size))
    next_step = next_stats = 0.0
    while True:
        wait_s = max(next_step - time.monotonic(), 0)
        for message in socket.receive(1000 if engine.is_idle else int(1e3 * wait_s)):
            if isinstance(message, AddRequest):
                engine.add(message)
                socket.send(frontend_of(message.request_id), Accepted(message.request_id))
            elif isinstance(message, Abort):
                engine.abort(message)
            elif isinstance(message, Shutdown):
                socket.close()
                return
        if engine.is_idle:
            next_step = 0.0
            continue
        time.sleep(max(next_step - time.monotonic(), 0))
        now = time.monotonic()
        next_step = (next_step or now) + 1 / step_rate
        stats = engine.stats() if now > next_stats else None
        next_stats = now + STATS_INTERVAL_S if stats else next_stats
        outputs = engine.step()
        by_frontend = collections.defaultdict(list)
        for output in outputs:
            by_frontend[frontend_of(output.request_id)].append(output)
        for identity, own in by_frontend.items():
            socket.send(identity, StepOutputs(epoch=launch.epoch, outputs=own, stats=stats))


class Sampler:
    """Counts, every few milliseconds of processor time, the line that runs and the function around it.

    Time in C code counts for the line that called it, the event loop's own for the callback after it.
    """

    def __init__(self) -> None:
        self.lines: collections.Counter[str] = collections.Counter()
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_INTERVAL_S, SAMPLE_INTERVAL_S)

    def _sample(self, _number: int, frame: FrameType | None) -> None:
        if frame is not None:
            code = frame.f_code
            place = "/".join(Path(code.co_filename).parts[-2:])
            self.lines[f"{place}:{frame.f_lineno} {code.co_qualname}"] += 1

    def write(self, path: Path) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        total = sum(self.lines.values())
        lines = [f"{count / total:7.2%} {line}" for line, count in self.lines.most_common()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def serve(folder: str, step_rate: str) -> int:
    """`octavo serve FOLDER` on a free port, with this script as the engine. BENCH_PROFILE: the file for a Sampler's lines."""
    from server import cli
    from server import serve as command_of_serve

    command = (sys.executable, str(Path(__file__).resolve()), "engine", step_rate)
    setattr(command_of_serve, "Supervisor", partial(Supervisor, command=command))  # noqa: B010 (a class in its place, for a type checker)
    profile = os.environ.get("BENCH_PROFILE")
    sampler = Sampler() if profile else None
    code = cli.run(["serve", folder, "--port", "0", "--device", "cpu"])
    if sampler is not None and profile:
        sampler.write(Path(profile))
    return code


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.exit(serve(*sys.argv[2:]))
    run_engine(float(sys.argv[2]))
