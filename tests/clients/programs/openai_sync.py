"""OpenAI's Python client, synchronous."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
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
    check_usage,
    check_vectors,
    expect,
    scenarios_of,
    serve,
)


def _client(target: Target) -> openai.OpenAI:
    return openai.OpenAI(base_url=target.v1, api_key=target.key, max_retries=0, timeout=240)


def _ask(target: Target, **options: Any) -> Any:
    asked = {"model": target.model, "messages": CAPITAL, "temperature": 0, **options}
    return _client(target).chat.completions.create(**asked)


def list_models(target: Target) -> None:
    client = _client(target)
    names = [model.id for model in client.models.list()]
    assert target.model in names
    assert client.models.retrieve(target.model).id == target.model


def complete_batch(target: Target) -> None:
    prompts = [COUNT, "The capital of France is"]
    answer = _client(target).completions.create(model=target.model, prompt=prompts, max_tokens=5, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith(" six") and answer.choices[1].text.startswith(" Paris")
    assert answer.usage is not None and answer.usage.completion_tokens == 10
    check_usage(answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)


def chat(target: Target) -> None:
    answer = _ask(target, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert choice.message.content == ANSWER and choice.finish_reason == "stop"
    assert choice.logprobs.content and all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    check_usage(answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)


def stream_with_usage(target: Target) -> None:
    client = _client(target)
    asked = {"model": target.model, "messages": CAPITAL, "temperature": 0}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    usage = client.chat.completions.create(**asked).usage
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == usage.total_tokens
    with client.chat.completions.stream(**asked) as stream:  # the client puts the chunks together
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def tool_loop(target: Target) -> None:
    client = _client(target)
    messages = [{"role": "user", "content": QUESTION}]
    asked = {
        "model": target.model,
        "tools": [WEATHER],
        "temperature": 0,
        "max_completion_tokens": 60,
        "parallel_tool_calls": False,
    }
    first = client.chat.completions.create(messages=messages, tool_choice="required", **asked).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.tool_calls
    call = first.message.tool_calls[0]
    check_call(call.function.name, call.function.arguments)
    named = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(messages=messages, tool_choice=named, **asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    (only,) = streamed.message.tool_calls
    check_call(only.function.name, only.function.arguments)
    assert only.id and streamed.finish_reason == "stop"
    results = [{"role": "tool", "tool_call_id": call.id, "content": '{"sky": "sunny"}'} for call in first.message.tool_calls]
    messages += [first.message, *results]
    asked |= {"tool_choice": "none", "max_completion_tokens": 20}
    second = client.chat.completions.create(messages=messages, **asked).choices[0].message
    assert second.content and not second.tool_calls


def structured_output(target: Target) -> None:
    client = _client(target)
    asked = {"model": target.model, "messages": [{"role": "user", "content": "Invent a person."}], "temperature": 0}
    parsed = client.chat.completions.parse(response_format=Person, max_completion_tokens=120, **asked).choices[0].message.parsed
    assert isinstance(parsed, Person)
    with client.chat.completions.stream(response_format=Person, max_completion_tokens=120, **asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    answer = client.chat.completions.create(response_format={"type": "json_object"}, max_completion_tokens=40, **asked)
    text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text.startswith("{") and (reason == "length" or isinstance(json.loads(text), dict))


def embeddings(target: Target) -> None:
    client = _client(target)
    answer = client.embeddings.create(model=target.model, input=["a cat", "the stock market"])
    check_vectors([item.embedding for item in answer.data])
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    plain = client.embeddings.create(model=target.model, input="a cat", encoding_format="float", dimensions=16)
    assert len(plain.data[0].embedding) == 16


def responses(target: Target) -> None:
    client = _client(target)
    asked: dict[str, Any] = {"model": target.model, "temperature": 0, "max_output_tokens": 40}
    first = client.responses.create(input=CAPITAL[0]["content"], **asked)
    assert first.status == "completed" and first.output_text == ANSWER
    check_usage(first.usage.input_tokens, first.usage.output_tokens, first.usage.total_tokens)
    second = client.responses.create(input="And of Italy?", previous_response_id=first.id, **asked)
    assert second.output_text and second.usage.input_tokens > first.usage.total_tokens
    assert client.responses.retrieve(first.id).output_text == ANSWER
    client.responses.delete(first.id)
    expect(openai.NotFoundError, 404, lambda: client.responses.retrieve(first.id))
    assert isinstance(client.responses.parse(input="Invent a person.", text_format=Person, **asked).output_parsed, Person)
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    one_call = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    called = client.responses.create(input=QUESTION, **one_call, **asked)
    (call,) = [item for item in called.output if item.type == "function_call"]
    check_call(call.name, call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"sky": "sunny"}'}
    asked["max_output_tokens"] = 20
    assert client.responses.create(input=[result], previous_response_id=called.id, **asked).output_text


def responses_stream(target: Target) -> None:
    events = list(_client(target).responses.create(model=target.model, input=CAPITAL[0]["content"], temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].response.output_text == ANSWER
    with _client(target).responses.stream(model=target.model, input=CAPITAL[0]["content"], temperature=0) as stream:
        assert stream.get_final_response().output_text == ANSWER


def parallel(target: Target) -> None:
    client = _client(target)

    def ask(index: int) -> str:
        if index % 2:
            return client.completions.create(model=target.model, prompt=COUNT, max_tokens=6, temperature=0).choices[0].text
        chunks = client.completions.create(model=target.model, prompt=COUNT, max_tokens=6, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(PARALLEL) as pool:
        texts = set(pool.map(ask, range(PARALLEL)))
    assert len(texts) == 1 and texts.pop().startswith(" six")


def cancel(target: Target) -> None:
    asked = {"model": target.model, "prompt": COUNT, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    stream = _client(target).completions.create(stream=True, **asked)
    assert next(iter(stream)).choices[0].text
    stream.close()


def bad_request(target: Target) -> None:
    error = expect(openai.BadRequestError, 400, lambda: _ask(target, temperature=9))
    assert error.param == "temperature" and error.type == "invalid_request_error"
    long = [{"role": "user", "content": "word " * 9000}]
    error = expect(openai.BadRequestError, 400, lambda: _ask(target, messages=long))
    assert error.code == "context_length_exceeded"


def not_found(target: Target) -> None:
    error = expect(openai.NotFoundError, 404, lambda: _ask(target, model="nobody"))
    assert error.code == "model_not_found"
    expect(openai.NotFoundError, 404, lambda: _client(target).models.retrieve("nobody"))


def unauthorized(target: Target) -> None:
    error = expect(openai.AuthenticationError, 401, lambda: _ask(target))
    assert error.code == "invalid_api_key"


def rate_limited(target: Target) -> None:
    error = expect(openai.RateLimitError, 429, lambda: _ask(target))
    assert error.code == "rate_limit_exceeded" and int(error.response.headers["Retry-After"]) > 0


if __name__ == "__main__":
    serve(scenarios_of(globals()))
