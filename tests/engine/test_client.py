"""EngineClient and Supervisor against a real engine process with a fake model: streams, stop strings, aborts, deaths."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine import engine_connection
from engine.client import EngineClient
from engine.config import EngineConfig, ModelConfig, RecoveryConfig
from engine.errors import ContextLengthExceeded, EngineUnavailable, InvalidRequest, ModelLoadError
from engine.logs import LogConfig
from engine.messages import (
    Accepted,
    AddRequest,
    ErrorInfo,
    FrontendMessage,
    Refused,
    RequestOutput,
    TokenLogprobs,
)
from engine.request_stream import Choice, RequestStream
from engine.sampling_params import SamplingParams, choice_seed
from engine.supervisor import Supervisor
from engine.tokenizer import Tokenizer
from tests.crashes import until
from tests.fake_runner import VOCAB_SIZE, expected_tokens

COMMAND = (sys.executable, "-m", "tests.fake_engine")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    backend = Backend(models.WordLevel({f"t{i}. ": i for i in range(VOCAB_SIZE)}, unk_token="t0. "))
    backend.decoder = decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    return folder


@asynccontextmanager
async def running(model: str, **recovery: Any) -> AsyncIterator[EngineClient]:
    config = EngineConfig(model=ModelConfig(model=model))
    client = EngineClient(Supervisor(config, command=COMMAND, recovery=RecoveryConfig(**recovery)))
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def collect(stream: RequestStream) -> dict[int, tuple[str, list[int], str | None, str | int | None]]:
    result: dict[int, tuple[str, list[int], str | None, str | int | None]] = {}
    async with stream:
        async for deltas in stream:
            for d in deltas:
                text, tokens, _, _ = result.get(d.choice_index, ("", [], None, None))
                result[d.choice_index] = (text + d.text, tokens + d.token_ids, d.finish_reason, d.stop_reason)
    return result


def text_of(tokens: list[int]) -> str:
    return "".join(f"t{t}. " for t in tokens)


def test_streams_stops_and_refusals(model_dir: Path):
    async def scenario() -> None:
        async with running(str(model_dir)) as client:
            assert client.state == "starting"
            with pytest.raises(EngineUnavailable, match="starting"):
                await client.generate([3], SamplingParams())
            ready = await client.wait_until_ready()
            assert ready.max_model_len == 400 and client.progress is not None
            assert 0 < ready.load_seconds["python"] < 60

            prompts = [[3 + i, 50, 60] for i in range(20)]
            streams = [await client.generate(p, SamplingParams(max_tokens=12, n=2)) for p in prompts]
            for prompt, result in zip(prompts, await asyncio.gather(*map(collect, streams)), strict=True):
                for choice in range(2):
                    tokens = expected_tokens(prompt, choice_seed(0, choice), 12)
                    assert result[choice] == (text_of(tokens), tokens, "length", None)

            tokens = expected_tokens([7, 8], choice_seed(0, 0), 9)
            stop_string = f"t{tokens[4]}. t"
            result = await collect(await client.generate([7, 8], SamplingParams(max_tokens=50), stop=[stop_string]))
            assert result[0] == (text_of(tokens[:4]), tokens[:6], "stop", stop_string)
            result = await collect(await client.generate([7, 8], SamplingParams(max_tokens=50, stop_token_ids=(tokens[3],))))
            assert result[0] == (text_of(tokens[:3]), tokens[:4], "stop", tokens[3])

            with pytest.raises(ContextLengthExceeded, match="400 tokens"):
                await client.generate([3] * 390, SamplingParams(max_tokens=11))
            with pytest.raises(InvalidRequest, match="token id 97"):
                await client.generate([97], SamplingParams())
            await until(lambda: client.stats.num_referenced_blocks == 0)
            assert client.num_open_streams == 0

    asyncio.run(scenario())


def make_stream(model_dir: Path, num_choices: int, stop: list[str]) -> RequestStream:
    tokenizer = Tokenizer.load(model_dir)
    choices = [Choice(tokenizer.detokenizer([3], stop=stop)) for _ in range(num_choices)]
    message = AddRequest(request_id="me:1", prompt_token_ids=[3], sampling=SamplingParams(n=num_choices))
    return RequestStream(message, choices, frozenset({2}), lambda request_id: None)


def output(choice: int, first: int, token_ids: list[int], **more: Any) -> RequestOutput:
    logprobs = [TokenLogprobs(-float(token_id), 1, [], []) for token_id in token_ids]
    return RequestOutput(
        request_id="me:1", choice_index=choice, first_token_index=first, token_ids=token_ids, logprobs=logprobs, **more
    )


def test_what_came_in_unread_is_one_delta_a_choice(model_dir: Path):
    async def scenario() -> None:
        stream = make_stream(model_dir, 2, [])
        stream.take(output(1, 0, [5], num_cached_tokens=1, queue_s=0.5, prompt_logprobs=[None]))
        stream.take(output(0, 0, [6]))
        stream.take(output(1, 1, [7, 8]))
        stream.take(output(1, 1, [7, 8, 9], finish_reason="length"))  # repeated in part, as by a second engine
        one, zero = await anext(stream)
        assert (one.choice_index, one.text, one.token_ids) == (1, text_of([5, 7, 8, 9]), [5, 7, 8, 9])
        assert [entry.logprob for entry in one.logprobs or []] == [-5, -7, -8, -9]
        assert (one.finish_reason, one.num_cached_tokens, one.queue_s, one.prompt_logprobs) == ("length", 1, 0.5, [None])
        assert (zero.choice_index, zero.token_ids, zero.finish_reason) == (0, [6], None)
        stream.take(output(0, 1, [6]))
        assert [delta.token_ids for delta in await anext(stream)] == [[6]]
        stream.take(output(0, 2, [2], finish_reason="stop", stop_token_id=2))
        (end,) = await anext(stream)
        assert (end.text, end.token_ids, end.finish_reason, end.stop_reason) == ("", [2], "stop", None)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(scenario())


def test_tokens_on_their_way_when_a_stop_string_ended_a_choice_are_dropped(model_dir: Path):
    async def scenario() -> None:
        stream = make_stream(model_dir, 2, [text_of([5])])
        assert stream.take(output(0, 0, [5])) == 0
        for first in range(1, 4):
            assert stream.take(output(0, first, [6])) is None
        stream.take(output(1, 0, [7], finish_reason="length"))
        assert [(d.choice_index, d.text, d.stop_reason) for d in await anext(stream)] == [
            (0, "", text_of([5])),
            (1, text_of([7]), None),
        ]
        assert stream.finished

    asyncio.run(scenario())


def test_leaving_a_stream_frees_its_pages(model_dir: Path):
    async def scenario() -> None:
        async with running(str(model_dir)) as client:
            await client.wait_until_ready()
            for _ in range(5):
                async with await client.generate([5] * 30, SamplingParams(max_tokens=370, n=3)) as stream:
                    await anext(stream)
            await until(lambda: client.stats.num_running == 0 and client.stats.num_referenced_blocks == 0)
            assert client.stats.generation_tokens < 5 * 3 * 370

    asyncio.run(scenario())


def test_a_model_that_does_not_load_says_why(model_dir: Path):
    async def scenario() -> None:
        async with running("broken") as client:
            with pytest.raises(ModelLoadError, match="broken on purpose"):
                await client.wait_until_ready()
            assert client.state == "failed"

    asyncio.run(scenario())


def test_a_request_that_a_killed_engine_had_not_answered_is_taken_by_the_next(model_dir: Path):
    async def scenario() -> None:
        async with running(str(model_dir)) as client:
            await client.wait_until_ready()
            supervisor = client._supervisor
            assert supervisor.pid is not None
            os.kill(supervisor.pid, signal.SIGSTOP)
            waiting = asyncio.ensure_future(client.generate([5], SamplingParams(max_tokens=3)))
            await asyncio.sleep(0)
            os.kill(supervisor.pid, signal.SIGKILL)
            tokens = expected_tokens([5], choice_seed(0, 0), 3)
            assert (await collect(await waiting))[0] == (text_of(tokens), tokens, "length", None)
            assert client.state == "ready" and client.num_restarts == 1 and supervisor.epoch == 2

    asyncio.run(scenario())


def test_the_engine_ends_with_its_parent(model_dir: Path):
    async def scenario() -> None:
        async with running(str(model_dir)) as client:
            await client.wait_until_ready()
            process = client._supervisor._process
            assert process is not None and process.stdin is not None
            process.stdin.close()  # what the kernel does when the parent dies
            assert await asyncio.wait_for(process.wait(), 10) == 1

    asyncio.run(scenario())


def test_an_engine_that_has_too_much_to_take_over_is_asked_again(model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.client.ASK_AGAIN_S", 0.01)

    async def scenario() -> None:
        supervisor = Supervisor(EngineConfig(), command=COMMAND)
        client = EngineClient(supervisor)
        client.state = "ready"
        client._recovery.lives.restart()
        sent: list[FrontendMessage] = []
        monkeypatch.setattr(client, "_send", sent.append)
        stream = make_stream(model_dir, 1, [])
        client._open.open(stream)
        client._dispatch(Accepted("me:1"))
        client._dispatch(Refused("me:1", ErrorInfo("EngineUnavailable", "too many grammars")))
        await until(lambda: bool(sent))
        assert isinstance(sent[0], AddRequest) and sent[0].request_id == "me:1"
        client._dispatch(Refused("me:1", ErrorInfo("InvalidRequest", "never")))
        with pytest.raises(InvalidRequest, match="never"):
            await anext(stream)
        await supervisor.stop()

    asyncio.run(scenario())


def test_the_log_level_reaches_the_engine_and_those_after_it(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tests.fake_engine")

    def is_said() -> bool:
        return any(record.name == "tests.fake_engine" for record in caplog.records)

    async def check_what_it_says(client: EngineClient, *, of_steps: bool) -> None:
        await asyncio.sleep(0.3)  # what was said before comes through a pipe
        caplog.clear()
        await collect(await client.generate([7, 8], SamplingParams(max_tokens=3)))
        if of_steps:
            await until(is_said)
        else:
            await asyncio.sleep(0.3)
            assert not is_said()

    async def scenario() -> None:
        supervisor = Supervisor(
            EngineConfig(model=ModelConfig(model=str(model_dir))), command=COMMAND, log=LogConfig("info", "json")
        )
        client = EngineClient(supervisor)
        await client.start()
        try:
            await client.wait_until_ready()
            await check_what_it_says(client, of_steps=False)
            client.set_log_level("debug")
            await check_what_it_says(client, of_steps=True)
            for level, says in (("debug", True), ("info", False)):
                assert supervisor.pid is not None
                os.kill(supervisor.pid, signal.SIGKILL)
                await until(lambda: client.state == "recovering")
                client.set_log_level(level)  # there is no engine that could be told
                await client.wait_until_ready()
                await check_what_it_says(client, of_steps=says)
        finally:
            await client.stop()
        client.set_log_level("info")  # when all is over: nothing to do

    asyncio.run(scenario())


def test_a_want_of_files_or_memory_passes_while_an_engine_is_to_be_started_again(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with running(str(model_dir)) as client:
            await client.wait_until_ready()
            supervisor = client._supervisor
            start, connect = supervisor.start, engine_connection.EngineConnection.__init__
            refusals = iter([errno.EMFILE, errno.ENOMEM, None])
            no_sockets = iter([True, False])

            async def start_in_need(*arguments: Any) -> None:
                if (number := next(refusals, None)) is not None:
                    raise OSError(number, os.strerror(number))
                await start(*arguments)

            def connect_in_need(*arguments: Any) -> None:
                if next(no_sockets, False):
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                connect(*arguments)

            monkeypatch.setattr(supervisor, "start", start_in_need)
            monkeypatch.setattr(engine_connection.EngineConnection, "__init__", connect_in_need)
            stream = await client.generate([7, 8], SamplingParams(max_tokens=300))
            await anext(aiter(stream))
            assert supervisor.pid is not None
            os.kill(supervisor.pid, signal.SIGKILL)
            result = await collect(stream)
            assert result[0][2] == "length" and client.state == "ready"
            assert next(no_sockets, None) is None

    asyncio.run(scenario())
    assert "it cannot be connected to: Too many open files" in caplog.text


def test_an_engine_that_cannot_be_started_again_for_long_ends_the_server(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with running(str(model_dir), restart_wait_s=0.1) as client:
            await client.wait_until_ready()
            supervisor = client._supervisor

            async def refuse(*_: Any) -> None:
                raise OSError(errno.ENOENT, "there is no Python any more")

            monkeypatch.setattr(supervisor, "start", refuse)
            assert supervisor.pid is not None
            os.kill(supervisor.pid, signal.SIGKILL)
            await until(lambda: client.state == "failed")
            assert client.failure is not None and "there is no Python any more" in client.failure.message

    asyncio.run(scenario())
