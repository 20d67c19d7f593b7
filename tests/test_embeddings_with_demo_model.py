"""Embeddings and tokens of the demo model, by OpenAI's SDK and plain HTTP, against Hugging Face in this process."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoTokenizer

from engine.config import ModelConfig
from engine.model_loader import resolve_model
from tests.test_exactness import load_reference
from tests.test_server_with_demo_model import Server, start_server

TEXTS = [
    "A cat sleeps on the warm sofa.",
    "The kitten naps on a cosy couch.",
    "Interest rates rose again last quarter.",
    "Printing in octavo folds each sheet three times, which makes eight leaves and sixteen pages. " * 9,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("embeddings") / "log"
    server = start_server(log, "--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "64")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(ModelConfig(model="demo"), lambda phase, detail, fraction: None)


@pytest.fixture(scope="module")
def states(folder: Path) -> list[torch.Tensor]:
    """The last hidden states of every text, [tokens, hidden size]."""
    model, tokenizer = load_reference(folder).model, AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        outputs = [model(tokenizer(text, return_tensors="pt").input_ids, output_hidden_states=True) for text in TEXTS]
    return [output.hidden_states[-1][0] for output in outputs]


def embed(client: openai.OpenAI, input: Any, **fields: Any) -> np.ndarray:
    """[inputs, dimensions]."""
    pooling = {"extra_body": {"pooling": fields.pop("pooling")}} if "pooling" in fields else {}
    answer = client.embeddings.create(model="demo", input=input, **fields, **pooling)
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_hugging_face_s_hidden_states(client: openai.OpenAI, states: list[torch.Tensor], pooling: str):
    vectors = embed(client, TEXTS, pooling=pooling)
    for vector, hidden in zip(vectors, states, strict=True):
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        expected = (pooled / pooled.norm()).numpy()
        np.testing.assert_allclose(vector, expected, atol=2e-4)


def test_alone_in_a_crowd_as_ids_and_while_others_talk(client: openai.OpenAI, server: Server):
    together = embed(client, TEXTS)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        talk = [
            pool.submit(client.completions.create, model="demo", prompt=text, max_tokens=24, temperature=0)
            for text in TEXTS[:3]
        ]
        alone = list(pool.map(lambda text: embed(client, text)[0], TEXTS * 2))
        assert all(answer.result().usage.completion_tokens > 0 for answer in talk)
    np.testing.assert_allclose(alone, np.concatenate([together, together]), atol=1e-4)
    ids = [httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    np.testing.assert_allclose(embed(client, ids), together, atol=1e-4)
    np.testing.assert_allclose(embed(client, TEXTS, encoding_format="float"), together, atol=1e-6)


def test_meanings_are_near_and_far(client: openai.OpenAI):
    cat, kitten, rates, _ = embed(client, TEXTS)
    assert cat @ kitten > cat @ rates
    short = embed(client, TEXTS, dimensions=64)
    assert short.shape == (4, 64) and np.linalg.norm(short, axis=1) == pytest.approx(1, abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="between 1 and 576"):
        embed(client, "a", dimensions=577)


def test_tokens_are_what_the_model_gets(client: openai.OpenAI, server: Server, folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Octavo's pages: 16 tokens — naïve, 日本."
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer(text).input_ids and answer["max_model_len"] == 512
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    messages: Any = [{"role": "user", "content": "Hello!"}]
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": messages}).json()
    assert chat["tokens"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    completion = client.chat.completions.create(model="demo", messages=messages, max_completion_tokens=1)
    assert completion.usage is not None and completion.usage.prompt_tokens == chat["count"]
