"""Every sample from a fake runner that samples its token ids, through scheduler, detokenizer and parser, to a client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
import pytest

from engine.core import EngineCore
from engine.errors import OctavoError
from engine.kv_cache_manager import KVCacheManager
from engine.messages import AddRequest
from engine.request_stream import Choice, RequestStream
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from server.config import ServerConfig
from server.parsers.registry import TOOL_FORMATS
from tests.fake_runner import FakeRunner, group
from tests.server.conftest import events
from tests.server.fake_client import FakeEngineClient
from tests.server.parsers.formats import EOS_ID, byte_tokenizer
from tests.server.parsers.samples import SAMPLES, TOOLS, Sample

BLOCK_SIZE, NUM_BLOCKS, CONTEXT = 16, 100, 1000
TEMPLATE = "{% if tools %}{{ tools | length }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"


class ScriptedRunner(FakeRunner):
    """Samples the tokens of a script, then <eos>."""

    script: Sequence[int] = ()

    def _next(self, slot: Any, length: int, allowed: Sequence[int]) -> int:
        index = length - slot.row.num_prompt_tokens
        return self.script[index] if index < len(self.script) else EOS_ID


class ScriptedClient(FakeEngineClient):
    """Has an engine after all, in its own process: one for every request."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        assert self.ready is not None
        self.ready = msgspec.structs.replace(self.ready, max_model_len=CONTEXT, vocab_size=tokenizer.vocab_size)
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(  # type: ignore[override]
        self, prompt_token_ids: list[int], sampling: SamplingParams, *, skip_special_tokens: bool = True, **_: Any
    ) -> RequestStream:
        detokenizer = self.tokenizer.detokenizer(prompt_token_ids, skip_special_tokens=skip_special_tokens)
        message = AddRequest(request_id="r", prompt_token_ids=prompt_token_ids, sampling=sampling)
        stream = RequestStream(message, [Choice(detokenizer)], frozenset({EOS_ID}), lambda _: None)
        core = self._core()
        core.add(message)
        task = asyncio.create_task(self._run(core, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def _core(self) -> EngineCore:
        kv = KVCacheManager([group()], [NUM_BLOCKS], block_size=BLOCK_SIZE, max_step_tokens=64)
        scheduler = Scheduler(kv, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=CONTEXT)
        runner = ScriptedRunner([group()], BLOCK_SIZE)
        runner.script = self.script
        vocab_size = self.tokenizer.vocab_size
        return EngineCore(scheduler, runner, vocab_size=vocab_size, eos_token_ids=frozenset({EOS_ID}), pipeline_depth=0)

    @staticmethod
    async def _run(core: EngineCore, stream: RequestStream) -> None:
        while not stream.finished:
            try:
                for output in core.step():
                    stream.take(output)
            except Exception as error:
                stream.fail(OctavoError(repr(error)))
            stream.deliver()
            await asyncio.sleep(0)


def body_of(sample: Sample) -> dict[str, Any]:
    functions = [{"name": tool.name, "parameters": tool.parameters} for tool in TOOLS]
    tools = [{"type": "function", "function": function} for function in functions]
    return {"messages": [{"role": "user", "content": "?"}], "tools": tools}


def joined(response: httpx.Response) -> tuple[dict[str, Any], list[str]]:
    """A stream's deltas as one message, and its finish reasons."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    choices = [choice for event in events(response) for choice in event["choices"]]
    for delta in (choice["delta"] for choice in choices):
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):
                message["tool_calls"].append(
                    {"id": call["id"], "function": {"name": call["function"]["name"], "arguments": ""}}
                )
            message["tool_calls"][-1]["function"]["arguments"] += call["function"].get("arguments", "")
    return message, [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def check(message: dict[str, Any], finish_reasons: list[str], sample: Sample) -> None:
    assert (message["content"] or "") == sample.content
    assert (message.get("reasoning_content") or "") == sample.reasoning
    calls = message.get("tool_calls") or []
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == sample.calls
    assert len({call["id"] for call in calls}) == len(calls)
    assert finish_reasons == ["tool_calls" if calls else "stop"]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_streamed_and_whole_answers(name: str) -> None:
    tokenizer = byte_tokenizer(name, chat_template=TEMPLATE)
    client = ScriptedClient(tokenizer)

    async def run() -> None:
        async with client.http(ServerConfig(model="tiny", tool_parser=name, reasoning_parser="none")) as http:
            for sample in (sample for sample in SAMPLES.values() if sample.format == name):
                client.script = tokenizer.encode(sample.text)
                whole = await http.post("/v1/chat/completions", json=body_of(sample))
                assert whole.status_code == 200, whole.text
                choice = whole.json()["choices"][0]
                check(choice["message"], [choice["finish_reason"]], sample)
                check(*joined(await http.post("/v1/chat/completions", json=body_of(sample) | {"stream": True})), sample)

    asyncio.run(run())
