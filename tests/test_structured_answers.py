"""Structured answers of real models: random schemas by a tiny one, and the demo model behind a server, used by OpenAI's SDK."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from engine.build import build_engine
from engine.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from server.api.structured import json_schema_spec
from tests import tiny_models
from tests.random_schemas import Made, SchemaMaker
from tests.test_server_with_demo_model import Server, start_server

MAX_LONGEST = 150
NUM_SCHEMAS = 40


def small_schemas() -> list[Made]:
    """Bounded, with a longest answer that fits the tiny model's context."""
    made = (SchemaMaker(seed, bounded=True).make() for seed in range(10_000))
    return list(itertools.islice((m for m in made if m.longest is not None and m.longest <= MAX_LONGEST), NUM_SCHEMAS))


def check_random_schemas(folder: Path, device: str, depth: int) -> None:
    """A tiny model answers them all in a crowd; every answer finishes and validates."""
    config = EngineConfig(
        model=ModelConfig(model=str(folder), dtype="float32", max_model_len=200),
        cache=CacheConfig(num_kv_blocks=100),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64, pipeline_depth=depth),
        parallel=ParallelConfig(num_threads=1),
        device=device,
    )
    core, ready = build_engine(config, lambda phase, detail, fraction: None)
    tokenizer = Tokenizer.load(folder)
    schemas = small_schemas()
    rng = random.Random(1)
    for i, (schema, longest) in enumerate(schemas):
        assert longest is not None
        sampling = SamplingParams(seed=i, max_tokens=longest + 1, structured=json_schema_spec(schema, "schema"))
        prompt = [rng.randrange(4, ready.vocab_size) for _ in range(rng.randint(1, 30))]
        core.add(AddRequest(request_id=f"r{i}", prompt_token_ids=prompt, sampling=sampling))
    tokens: dict[str, list[int]] = {}
    reasons: dict[str, str | None] = {}
    while core.has_work or core.is_compiling:
        assert all(error is None for _, error in core.take_compiled())
        for output in core.step():
            assert output.error is None
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            reasons[output.request_id] = output.finish_reason
        core.check_integrity()
    core.close()
    assert set(reasons.values()) == {"stop"} and len(reasons) == NUM_SCHEMAS
    for i, (schema, _) in enumerate(schemas):
        answer = json.loads(tokenizer.decode(tokens[f"r{i}"]))
        jsonschema.Draft202012Validator(schema).validate(answer)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_tiny_model_answers_random_schemas_in_a_crowd(depth: int, tmp_path: Path) -> None:
    check_random_schemas(tiny_models.build("llama", tmp_path), "cpu", depth)


# -- the demo model ----------------------------------------------------------------------------------------------------


class Person(pydantic.BaseModel):
    """Bounded, so that it always finishes."""

    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=150)
    mood: Literal["good", "bad"] | None
    tags: list[Literal["a", "b"]] = pydantic.Field(max_length=3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("server") / "log", "--max-model-len", "1024")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


MESSAGES: list[Any] = [{"role": "user", "content": "Describe John in JSON."}]


def test_parsed_output_of_the_sdk_also_streamed_and_with_choices(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Person, max_tokens=400, n=3, seed=1)
    assert all(isinstance(choice.message.parsed, Person) and choice.finish_reason == "stop" for choice in parsed.choices)
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, response_format=Person, max_tokens=400, seed=1
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == parsed.choices[0].message.content


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": "[0-9]{3}-[a-z]{2}"}, "[0-9]{3}-[a-z]{2}"),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{1,5}/'}, "<[a-z]{1,5}>"),
        ({"grammar": 'root ::= "x" digit digit\ndigit ::= [0-9]'}, "x[0-9]{2}"),
    ],
)
def test_other_forms(client: openai.OpenAI, outputs: dict[str, Any], pattern: str) -> None:
    for temperature in (0, 1):
        body: dict[str, Any] = {"structured_outputs": outputs}
        options: dict[str, Any] = {"max_tokens": 30, "temperature": temperature, "extra_body": body}
        choice = client.completions.create(model="demo", prompt="Answer:", **options).choices[0]
        assert re.fullmatch(pattern, choice.text) and choice.finish_reason == "stop"
        chat = client.chat.completions.create(model="demo", messages=MESSAGES, **options).choices[0]
        assert re.fullmatch(pattern, chat.message.content or "") and chat.finish_reason == "stop"


def test_cut_by_max_tokens_it_is_a_beginning(client: openai.OpenAI) -> None:
    format: Any = {"type": "json_object"}
    choice = client.chat.completions.create(model="demo", messages=MESSAGES, response_format=format, max_tokens=5).choices[0]
    assert choice.finish_reason == "length" and (choice.message.content or "").startswith("{")


def test_a_bad_or_hopeless_form_is_a_400_and_others_go_on_meanwhile(client: openai.OpenAI) -> None:
    hopeless = {f"d{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(2000)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**hopeless, "d2000": {"type": "string"}}}
    chunks: list[Any] = []

    def stream() -> None:
        body = {"ignore_eos": True}
        chunks.extend(client.completions.create(model="demo", prompt="One,", max_tokens=60, stream=True, extra_body=body))

    other = threading.Thread(target=stream)
    other.start()
    for outputs in ({"json": schema}, {"regex": "(" * 3000}, {"regex": "a{1000000000}"}, {"regex": "(?=a)"}):
        with pytest.raises(openai.BadRequestError, match="cannot be"):
            client.completions.create(model="demo", prompt="x", extra_body={"structured_outputs": outputs})
    other.join()
    assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) > 20


def test_a_stop_string_and_logprobs_work_within_a_form(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"extra_body": {"structured_outputs": {"regex": "[a-c]{20}"}}, "max_tokens": 40}
    choice = client.completions.create(model="demo", prompt="x", logprobs=2, stop=["c"], seed=3, **options).choices[0]
    assert re.fullmatch("[ab]*", choice.text) and choice.finish_reason == "stop" and choice.logprobs is not None
