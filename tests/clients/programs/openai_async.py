"""OpenAI's Python client, asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
from harness import (
    ANSWER,
    CAPITAL,
    COUNT,
    PARALLEL,
    QUESTION,
    WEATHER,
    Person,
    Target,
    check_call,
    check_error,
    check_usage,
    check_vectors,
    scenarios_of,
    serve,
)


def _run(target: Target, talk: Callable[[openai.AsyncOpenAI], Awaitable[None]]) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=target.v1, api_key=target.key, max_retries=0, timeout=240) as client:
            await talk(client)

    asyncio.run(run())


async def _expect(error: type[Exception], status: int, request: Awaitable[object]) -> Any:
    try:
        await request
    except Exception as caught:
        return check_error(caught, error, status)
    raise AssertionError(f"no {error.__name__}")


def list_models(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        assert target.model in [model.id async for model in client.models.list()]

    _run(target, talk)


def complete_batch(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        asked = {"model": target.model, "prompt": [COUNT, COUNT, "The sky"], "max_tokens": 5, "temperature": 0}
        whole = await client.completions.create(**asked)
        texts = [""] * 3
        async for chunk in await client.completions.create(**asked, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [choice.text for choice in whole.choices] and texts[0] == texts[1]

    _run(target, talk)


def chat(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(model=target.model, messages=CAPITAL, temperature=0)
        assert answer.choices[0].message.content == ANSWER

    _run(target, talk)


def stream_with_usage(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        asked = {"model": target.model, "messages": CAPITAL, "temperature": 0, "stream_options": {"include_usage": True}}
        text, usage = "", None
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        assert text == ANSWER and usage is not None
        check_usage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)

    _run(target, talk)


def tool_loop(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        asked = {"model": target.model, "tools": [WEATHER], "temperature": 0, "max_completion_tokens": 60}
        named = {"type": "function", "function": {"name": "get_weather"}}
        first = await client.chat.completions.create(messages=messages, tool_choice=named, **asked)
        message = first.choices[0].message
        (call,) = message.tool_calls
        check_call(call.function.name, call.function.arguments)
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        second = await client.chat.completions.create(
            messages=messages, tool_choice="none", **{**asked, "max_completion_tokens": 20}
        )
        assert second.choices[0].message.content

    _run(target, talk)


def structured_output(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        messages = [{"role": "user", "content": "Invent a person."}]
        asked = {"model": target.model, "messages": messages, "max_completion_tokens": 120, "seed": 7}
        answer = await client.chat.completions.parse(response_format=Person, **asked)
        assert isinstance(answer.choices[0].message.parsed, Person)

    _run(target, talk)


def embeddings(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        answer = await client.embeddings.create(model=target.model, input=["a cat", "the stock market"])
        check_vectors([item.embedding for item in answer.data])

    _run(target, talk)


def responses(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        answer = await client.responses.create(model=target.model, input=CAPITAL, instructions="Be brief.", temperature=0)
        assert answer.output_text and answer.instructions == "Be brief."

    _run(target, talk)


def responses_stream(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        text = ""
        async for event in await client.responses.create(model=target.model, input=CAPITAL, temperature=0, stream=True):
            text += event.delta if event.type == "response.output_text.delta" else ""
        assert text == ANSWER

    _run(target, talk)


def parallel(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        asked = {"model": target.model, "messages": CAPITAL, "temperature": 0}
        answers = await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(PARALLEL)))
        assert [answer.choices[0].message.content for answer in answers] == [ANSWER] * PARALLEL

    _run(target, talk)


def cancel(target: Target) -> None:
    """A task that waits for a whole answer, and one that reads a stream, are cancelled."""

    async def talk(client: openai.AsyncOpenAI) -> None:
        async def ask(stream: bool) -> None:
            asked = {"model": target.model, "prompt": COUNT, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
            answer = await client.completions.create(**asked, stream=stream)
            async for _ in answer:
                pass

        tasks = [asyncio.create_task(ask(stream)) for stream in (False, True)]
        await asyncio.sleep(1)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    _run(target, talk)


def bad_request(target: Target) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        request = client.completions.create(model=target.model, prompt="x", max_tokens=-1)
        assert (await _expect(openai.BadRequestError, 400, request)).param == "max_tokens"

    _run(target, talk)


def not_found(target: Target) -> None:
    _run(target, lambda client: _expect(openai.NotFoundError, 404, client.embeddings.create(model="nobody", input="x")))


def unauthorized(target: Target) -> None:
    _run(target, lambda client: _expect(openai.AuthenticationError, 401, client.models.retrieve(target.model)))


def rate_limited(target: Target) -> None:
    request = {"model": target.model, "prompt": "x"}
    _run(target, lambda client: _expect(openai.RateLimitError, 429, client.completions.create(**request)))


if __name__ == "__main__":
    serve(scenarios_of(globals()))
