"""What tests of dying engines share: a client of the fake engine, and thirty-two streams that look at every token."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.client import EngineClient
from engine.config import EngineConfig, ModelConfig, RecoveryConfig
from engine.messages import CrashPoint
from engine.request_stream import RequestStream
from engine.sampling_params import SamplingParams, choice_seed
from engine.supervisor import Supervisor
from tests.fake_runner import VOCAB_SIZE, expected_tokens

COMMAND = (sys.executable, "-m", "tests.fake_engine")


def make_model(folder: Path, **options: Any) -> Path:
    """A folder that the fake engine loads; options: see there. Token i reads "t<i>. "."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Backend(models.WordLevel({f"t{i}. ": i for i in range(VOCAB_SIZE)}, unk_token="t0. "))
    backend.decoder = decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def text_of(tokens: list[int]) -> str:
    return "".join(f"t{t}. " for t in tokens)


@asynccontextmanager
async def running(folder: Path, *, crash_point: CrashPoint | None = None, **recovery: Any) -> AsyncIterator[EngineClient]:
    """A client whose fake engine is ready, to begin with."""
    supervisor = Supervisor(
        EngineConfig(model=ModelConfig(model=str(folder))),
        command=COMMAND,
        recovery=RecoveryConfig(**recovery),
        crash_point=crash_point,
    )
    client = EngineClient(supervisor)
    await client.start()
    try:
        await client.wait_until_ready()
        yield client
    finally:
        await client.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        await asyncio.sleep(0.005)


def pid_of(client: EngineClient) -> int:
    pid = client._supervisor.pid
    assert pid is not None
    return pid


async def kill(client: EngineClient, number: signal.Signals = signal.SIGKILL) -> float:
    """Ends the engine; returns the seconds until the client knew."""
    started_s, restarts = time.monotonic(), client.num_restarts
    os.kill(pid_of(client), number)
    await until(lambda: client.num_restarts > restarts or client.state == "failed")
    return time.monotonic() - started_s


@dataclass
class Reader:
    """Takes in one stream: by choice its text, tokens and end."""

    text: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, tuple[str | None, str | int | None]] = field(default_factory=dict)
    queue_times: int = 0
    num_prompt_logprobs: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))

    async def read(self, stream: RequestStream) -> None:
        async with stream:
            async for deltas in stream:
                for delta in deltas:
                    index = delta.choice_index
                    self.text[index] = self.text.get(index, "") + delta.text
                    self.tokens.setdefault(index, []).extend(delta.token_ids)
                    self.queue_times += delta.queue_s is not None
                    self.num_prompt_logprobs += delta.prompt_logprobs is not None
                    if delta.finish_reason is not None:
                        assert index not in self.ends
                        self.ends[index] = delta.finish_reason, delta.stop_reason


@dataclass
class Crowd:
    """Streams of one or two choices, some of which end at a stop string; checked against what the fake model must say."""

    size: int = 32
    max_tokens: int = 60
    readers: list[Reader] = field(default_factory=list)

    def _prompt(self, i: int) -> list[int]:
        return [3 + i, 50, *range(4, 4 + i % 7)]

    def _sampling(self, i: int) -> SamplingParams:
        prompt_logprobs = 0 if i % 5 == 0 else None
        return SamplingParams(seed=i, n=1 + i % 2, max_tokens=self.max_tokens, prompt_logprobs=prompt_logprobs)

    def _stop(self, i: int) -> list[str]:
        return [f"t{self._expected(i, 0)[self.max_tokens // 2]}. "] if i % 4 == 3 else []

    def _expected(self, i: int, choice: int) -> list[int]:
        return expected_tokens(self._prompt(i), choice_seed(i, choice), self.max_tokens)

    async def run(self, client: EngineClient) -> None:
        self.readers = [Reader() for _ in range(self.size)]
        await asyncio.gather(*(self._run_one(client, i) for i in range(self.size)))

    async def _run_one(self, client: EngineClient, i: int) -> None:
        stream = await client.generate(self._prompt(i), self._sampling(i), stop=self._stop(i))
        await self.readers[i].read(stream)

    @property
    def num_tokens(self) -> int:
        return sum(reader.num_tokens for reader in self.readers)

    def check(self) -> None:
        """No token lost, none twice, every text as without a crash."""
        for i, reader in enumerate(self.readers):
            stop = self._stop(i)
            for choice in range(self._sampling(i).n):
                tokens, text = self._expected(i, choice), ""
                if stop and stop[0] in text_of(tokens):
                    text = text_of(tokens).split(stop[0])[0]
                    tokens = tokens[: text.count("t") + 1]
                    assert reader.ends[choice] == ("stop", stop[0])
                else:
                    text = text_of(tokens)
                    assert reader.ends[choice] == ("length", None)
                assert reader.tokens[choice] == tokens, f"tokens of stream {i}, choice {choice}"
                assert reader.text[choice] == text
            assert reader.queue_times == self._sampling(i).n
            assert reader.num_prompt_logprobs == (i % 5 == 0)
