"""langchain-openai: chat models, plain language models and embeddings. It lists no models."""

from __future__ import annotations

import asyncio

import openai
from harness import (
    ANSWER,
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
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

CAPITAL = "What is the capital of France?"


def _chat(target: Target, **options: object) -> ChatOpenAI:
    common = {"base_url": target.v1, "api_key": target.key, "model": target.model, "max_retries": 0, "timeout": 240}
    return ChatOpenAI(**{**common, "temperature": 0, **options})


def complete_batch(target: Target) -> None:
    model = OpenAI(base_url=target.v1, api_key=target.key, model=target.model, temperature=0, max_tokens=5, max_retries=0)
    answer = model.generate([COUNT, "The capital of France is"])
    assert answer.generations[0][0].text.startswith(" six") and answer.generations[1][0].text.startswith(" Paris")
    usage = answer.llm_output["token_usage"]
    check_usage(usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])


def chat(target: Target) -> None:
    answer = _chat(target).invoke(CAPITAL)
    assert answer.content == ANSWER and answer.response_metadata["finish_reason"] == "stop"
    usage = answer.usage_metadata
    check_usage(usage["input_tokens"], usage["output_tokens"], usage["total_tokens"])


def stream_with_usage(target: Target) -> None:
    model = _chat(target, stream_usage=True)
    whole: AIMessageChunk | None = None
    for chunk in model.stream(CAPITAL):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == ANSWER
    assert whole.usage_metadata["total_tokens"] == model.invoke(CAPITAL).usage_metadata["total_tokens"]


def tool_loop(target: Target) -> None:
    model = _chat(target, max_tokens=60)
    messages = [HumanMessage(QUESTION)]
    forced = model.bind_tools([WEATHER], tool_choice="required", parallel_tool_calls=False)
    first = forced.invoke(messages)
    (call,) = first.tool_calls
    check_call(call["name"], call["args"])
    streamed = None
    for chunk in forced.stream(messages):
        streamed = chunk if streamed is None else streamed + chunk
    assert [(each["name"], each["args"]) for each in streamed.tool_calls] == [(call["name"], call["args"])]
    messages += [first, ToolMessage("sunny", tool_call_id=call["id"])]
    second = _chat(target, max_tokens=20).bind_tools([WEATHER], tool_choice="none").invoke(messages)
    assert second.content and not second.tool_calls
    named = model.bind_tools([WEATHER], tool_choice="get_weather").invoke(messages[:1])
    check_call(named.tool_calls[0]["name"], named.tool_calls[0]["args"])


def structured_output(target: Target) -> None:
    for method in ("json_schema", "function_calling"):
        model = _chat(target, max_tokens=120).with_structured_output(Person, method=method)
        assert isinstance(model.invoke("Invent a person."), Person)


def embeddings(target: Target) -> None:
    """check_embedding_ctx_length=False: otherwise it sends token ids of OpenAI's vocabulary instead of texts."""
    model = OpenAIEmbeddings(base_url=target.v1, api_key=target.key, model=target.model, check_embedding_ctx_length=False)
    check_vectors(model.embed_documents(["a cat", "the stock market"]))
    assert model.embed_query("a cat") == model.embed_documents(["a cat"])[0]


def responses(target: Target) -> None:
    answer = _chat(target, use_responses_api=True).invoke(CAPITAL)
    assert answer.text == ANSWER
    usage = answer.usage_metadata
    check_usage(usage["input_tokens"], usage["output_tokens"], usage["total_tokens"])


def responses_stream(target: Target) -> None:
    chunks = list(_chat(target, use_responses_api=True).stream(CAPITAL))
    assert "".join(chunk.text for chunk in chunks) == ANSWER


def parallel(target: Target) -> None:
    answers = _chat(target).batch([CAPITAL] * PARALLEL, config={"max_concurrency": PARALLEL})
    assert [answer.content for answer in answers] == [ANSWER] * PARALLEL


def cancel(target: Target) -> None:
    async def run() -> None:
        model = _chat(target, max_tokens=3000, extra_body={"ignore_eos": True})
        task = asyncio.create_task(model.ainvoke(CAPITAL))
        await asyncio.sleep(1)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def bad_request(target: Target) -> None:
    error = expect(openai.BadRequestError, 400, lambda: _chat(target, top_p=7).invoke(CAPITAL))
    assert error.param == "top_p"
    expect(ContextOverflowError, 400, lambda: _chat(target).invoke("word " * 9000))


def not_found(target: Target) -> None:
    expect(openai.NotFoundError, 404, lambda: _chat(target, model="nobody").invoke(CAPITAL))


def unauthorized(target: Target) -> None:
    expect(openai.AuthenticationError, 401, lambda: _chat(target).invoke(CAPITAL))


def rate_limited(target: Target) -> None:
    expect(openai.RateLimitError, 429, lambda: _chat(target).invoke(CAPITAL))


if __name__ == "__main__":
    serve(scenarios_of(globals()))
