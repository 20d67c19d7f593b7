"""LiteLLM, as it talks to any server of OpenAI's kind."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import litellm
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
    check_usage,
    check_vectors,
    expect,
    scenarios_of,
    serve,
)

litellm.suppress_debug_info = True


def _at(target: Target, model: str | None = None) -> dict[str, Any]:
    name = f"openai/{model or target.model}"
    return {"model": name, "api_base": target.v1, "api_key": target.key, "max_retries": 0, "timeout": 240}


def list_models(target: Target) -> None:
    found = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_base=target.url, api_key=target.key
    )
    assert any(name.endswith(target.model) for name in found), found


def complete_batch(target: Target) -> None:
    at = {**_at(target), "model": f"text-completion-openai/{target.model}"}
    answer = litellm.text_completion(prompt=[COUNT, "The capital of France is"], max_tokens=5, temperature=0, **at)
    assert answer.choices[0].text.startswith(" six") and answer.choices[1].text.startswith(" Paris")
    check_usage(answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)


def chat(target: Target) -> None:
    answer = litellm.completion(messages=CAPITAL, temperature=0, **_at(target))
    assert answer.choices[0].message.content == ANSWER and answer.choices[0].finish_reason == "stop"
    check_usage(answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)


def stream_with_usage(target: Target) -> None:
    asked = {"messages": CAPITAL, "temperature": 0, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(stream=True, **asked, **_at(target)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    whole = litellm.completion(messages=CAPITAL, temperature=0, **_at(target))
    usages = [usage for chunk in chunks if (usage := getattr(chunk, "usage", None))]
    assert usages and usages[-1].total_tokens == whole.usage.total_tokens


def tool_loop(target: Target) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    asked = {"tools": [WEATHER], "temperature": 0, "max_tokens": 60, "parallel_tool_calls": False, **_at(target)}
    first = litellm.completion(messages=messages, tool_choice="required", **asked).choices[0]
    (call,) = first.message.tool_calls
    check_call(call.function.name, call.function.arguments)
    assert first.finish_reason == "tool_calls"
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = litellm.completion(messages=messages, tool_choice="none", **{**asked, "max_tokens": 20}).choices[0]
    assert second.message.content
    chunks = list(litellm.completion(messages=messages[:1], tool_choice="required", stream=True, **asked))
    built = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0].function
    check_call(built.name, built.arguments)


def structured_output(target: Target) -> None:
    messages = [{"role": "user", "content": "Invent a person."}]
    answer = litellm.completion(messages=messages, response_format=Person, max_tokens=120, temperature=0, **_at(target))
    Person.model_validate_json(answer.choices[0].message.content)
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": Person.model_json_schema()}}
    same = litellm.completion(messages=messages, response_format=form, max_tokens=120, temperature=0, **_at(target))
    Person.model_validate(json.loads(same.choices[0].message.content))


def embeddings(target: Target) -> None:
    answer = litellm.embedding(input=["a cat", "the stock market"], encoding_format="float", **_at(target))
    check_vectors([item["embedding"] for item in answer.data])


def responses(target: Target) -> None:
    answer = litellm.responses(input=CAPITAL[0]["content"], temperature=0, **_at(target))
    assert answer.output_text == ANSWER
    check_usage(answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens)


def responses_stream(target: Target) -> None:
    events = list(litellm.responses(input=CAPITAL[0]["content"], temperature=0, stream=True, **_at(target)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].type == "response.completed"


def parallel(target: Target) -> None:
    def ask(_: int) -> str:
        return litellm.completion(messages=CAPITAL, temperature=0, **_at(target)).choices[0].message.content

    with ThreadPoolExecutor(PARALLEL) as pool:
        assert list(pool.map(ask, range(PARALLEL))) == [ANSWER] * PARALLEL


def cancel(target: Target) -> None:
    async def run() -> None:
        asked = {"messages": CAPITAL, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
        task = asyncio.create_task(litellm.acompletion(**asked, **_at(target)))
        await asyncio.sleep(1)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def bad_request(target: Target) -> None:
    error = expect(litellm.BadRequestError, 400, lambda: litellm.completion(messages=CAPITAL, temperature=9, **_at(target)))
    assert "temperature" in str(error)
    long = [{"role": "user", "content": "word " * 9000}]
    expect(litellm.ContextWindowExceededError, 400, lambda: litellm.completion(messages=long, **_at(target)))
    asked = {"messages": CAPITAL, "max_tokens": 9000}
    expect(litellm.ContextWindowExceededError, 400, lambda: litellm.completion(**asked, **_at(target)))


def not_found(target: Target) -> None:
    expect(litellm.NotFoundError, 404, lambda: litellm.completion(messages=CAPITAL, **_at(target, "nobody")))


def unauthorized(target: Target) -> None:
    expect(litellm.AuthenticationError, 401, lambda: litellm.completion(messages=CAPITAL, **_at(target)))


def rate_limited(target: Target) -> None:
    expect(litellm.RateLimitError, 429, lambda: litellm.completion(messages=CAPITAL, **_at(target)))


if __name__ == "__main__":
    serve(scenarios_of(globals()))
