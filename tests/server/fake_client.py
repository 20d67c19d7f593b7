"""FakeEngineClient: an EngineClient without an engine. It says what its script says, a token a turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import cast

import httpx
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.client import Embedding, EngineClient
from engine.errors import OctavoError
from engine.messages import EngineReady, EngineStats, LoadProgress, Pooling, TokenLogprobs
from engine.request_stream import ChoiceDelta
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from server.app import create_app
from server.config import ServerConfig

CONTEXT = 64
HIDDEN_SIZE = 8
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """One token a byte, in the order of byte-level BPE's alphabet, and <eos>. ASCII only in tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    templates = {} if chat_template is None else {"default": chat_template}
    return Tokenizer(backend, special_tokens={"eos_token": "<eos>"}, eos_token_ids=frozenset({256}), chat_templates=templates)


class FakeStream:
    """The tokens of `script` for every choice, cut at max_tokens; waits for `gate` before each turn."""

    def __init__(self, client: FakeEngineClient, prompt: list[int], sampling: SamplingParams) -> None:
        self._client = client
        self._prompt = prompt
        self._sampling = sampling
        self.num_prompt_tokens = len(prompt)
        self.aborted = False
        self.events: list[tuple[str, float]] = []
        self._turns = self._run()

    def __aiter__(self) -> AsyncIterator[list[ChoiceDelta]]:
        return self._turns

    def abort(self) -> None:
        self.aborted = True

    async def _run(self) -> AsyncIterator[list[ChoiceDelta]]:
        sampling, tokenizer = self._sampling, self._client.tokenizer
        script = self._client.script[: sampling.max_tokens]
        reason = "length" if len(self._client.script) >= sampling.max_tokens else "stop"
        for index in range(max(len(script), 1)):
            await self._client.gate.wait()
            await asyncio.sleep(0)
            if self._client.fail_after == index:
                raise self._client.stream_error
            ids = script[index : index + 1]
            yield [
                ChoiceDelta(
                    choice_index=choice,
                    text=tokenizer.decode(ids),
                    token_ids=ids,
                    logprobs=[self._logprobs(token_id, sampling.logprobs) for token_id in ids] if self._wants else None,
                    finish_reason=reason if index >= len(script) - 1 else None,
                    prompt_logprobs=self._prompt_logprobs() if index == choice == 0 else None,
                    num_cached_tokens=self._client.num_cached_tokens if index == 0 else 0,
                    queue_s=0.25 if index == 0 else None,
                    prefill_s=0.5 if index == 0 else None,
                    num_preemptions=self._client.num_preemptions if index >= len(script) - 1 else 0,
                )
                for choice in range(sampling.n)
            ]

    @property
    def _wants(self) -> bool:
        return self._sampling.logprobs is not None

    def _logprobs(self, token_id: int, num_top: int | None) -> TokenLogprobs:
        ids = list(range(65, 65 + (num_top or 0)))
        return TokenLogprobs(-0.5, 1, ids, [float("-inf") if rank else -0.25 for rank in range(len(ids))])

    def _prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        if self._sampling.prompt_logprobs is None:
            return None
        return [None, *(self._logprobs(token_id, self._sampling.prompt_logprobs) for token_id in self._prompt[1:])]


class FakeEngineClient:
    """script: the tokens of every answer. gate, accepting: cleared, streams or `generate` wait. prompts, sampling, stops and
    options: of every `generate`; embedded: the prompts and options of every `embed`; deadlines: of both, first token and whole.

    refusal: raised by `generate` once there are `refuse_after` streams. fail_after: tokens before `stream_error` is raised.
    """

    def __init__(self, script: str = "Hello world") -> None:
        self.tokenizer = byte_tokenizer()
        self.script = self.tokenizer.encode(script)
        self.state = "ready"
        self.steps_complete = True
        self.num_restarts = 0
        self.progress: LoadProgress | None = None
        self.failure: OctavoError | None = None
        self.stats = EngineStats(num_blocks=10, num_referenced_blocks=5, prompt_tokens=7, generation_tokens=3)
        self.gate = asyncio.Event()
        self.gate.set()
        self.accepting = asyncio.Event()
        self.accepting.set()
        self.refusal: OctavoError | None = None
        self.refuse_after = 0
        self.fail_after: int | None = None
        self.stream_error: Exception = OctavoError("never raised")
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.streams: list[FakeStream] = []
        self.sampling: list[SamplingParams] = []
        self.prompts: list[list[int]] = []
        self.stops: list[list[str]] = []
        self.deadlines: list[tuple[float | None, float | None]] = []
        self.options: list[dict[str, object]] = []
        self.embedded: list[tuple[list[int], dict[str, object]]] = []
        self.log_levels: list[str] = []
        self.ready: EngineReady | None = EngineReady(
            model_dir="/nowhere",
            architecture="FakeForCausalLM",
            device="cpu",
            dtype="float32",
            attention_backend="fake",
            vocab_size=self.tokenizer.vocab_size,
            hidden_size=HIDDEN_SIZE,
            max_model_len=CONTEXT,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            block_size=16,
            num_blocks=[10],
            kv_cache_bytes=1024,
            kv_cache_tokens=160,
            eos_token_ids=[256],
            generation_defaults={},
            load_seconds={},
            notes=[],
        )

    def set_log_level(self, level: str) -> None:
        self.log_levels.append(level)

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = False,
        cache_salt: str = "",
        priority: int = 0,
        first_token_deadline_s: float | None = None,
        deadline_s: float | None = None,
    ) -> FakeStream:
        await self._admit(self.streams)
        self.options.append(
            {
                "include_stop_str_in_output": include_stop_str_in_output,
                "skip_special_tokens": skip_special_tokens,
                "spaces_between_special_tokens": spaces_between_special_tokens,
                "cache_salt": cache_salt,
                "priority": priority,
            }
        )
        self.deadlines.append((first_token_deadline_s, deadline_s))
        self.prompts.append(prompt_token_ids)
        self.sampling.append(sampling)
        self.stops.append(list(stop))
        stream = FakeStream(self, prompt_token_ids, sampling)
        self.streams.append(stream)
        return stream

    async def embed(
        self,
        prompt_token_ids: list[int],
        *,
        pooling: Pooling,
        cache_salt: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Embedding:
        """How often each id occurs in the prompt, modulo the vector's size; "last": of the last token alone."""
        await self._admit(self.embedded)
        self.deadlines.append((None, deadline_s))
        self.embedded.append((prompt_token_ids, {"pooling": pooling, "cache_salt": cache_salt, "priority": priority}))
        pooled = prompt_token_ids if pooling == "mean" else prompt_token_ids[-1:]
        vector = np.bincount(np.array(pooled) % HIDDEN_SIZE, minlength=HIDDEN_SIZE).astype("<f4")
        return Embedding(vector.tobytes(), len(prompt_token_ids), self.num_cached_tokens, 0.25, 0.5)

    async def can_step(self) -> bool:
        return self.state == "ready" and self.steps_complete

    async def _admit(self, admitted: Sequence[object]) -> None:
        await self.accepting.wait()
        await asyncio.sleep(0)
        if self.refusal is not None and len(admitted) >= self.refuse_after:
            raise self.refusal

    def http(self, config: ServerConfig | None = None) -> httpx.AsyncClient:
        """An HTTP client of an application around this engine client."""
        app = create_app(cast(EngineClient, self), config or ServerConfig(model="tiny"))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")
