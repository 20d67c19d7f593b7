"""What lm-eval's `local-completions` sends, and how it reads the answers, without it: it brings some 700 MB of other packages.

https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/models/openai_completions.py and api_models.py of 0.4.13.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.test_server_with_demo_model import Server

MODEL = "SmolLM2-135M-Instruct"
CONTEXT = "The capital of France is"


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}{path}", json={"model": MODEL, **body}, timeout=100)
    assert answer.status_code == 200, answer.text
    assert "X-Octavo-Ignored-Fields" not in answer.headers
    return answer.json()


def encode(server: Server, text: str) -> list[int]:
    return post(server, "/tokenize", prompt=text, add_special_tokens=False)["tokens"]


def loglikelihoods(server: Server, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """(log probability of the continuation, whether it is the greedy one) of every (context, continuation)."""
    contexts = [encode(server, context) for context, _ in pairs]
    whole = [encode(server, context + continuation) for context, continuation in pairs]
    options = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = post(server, "/v1/completions", prompt=whole, **options)
    found = []
    for choice, context in zip(sorted(answer["choices"], key=lambda choice: choice["index"]), contexts, strict=True):
        # What is generated comes last; the first token's logprob is null, and lm-eval always has a context.
        scored = slice(len(context), -1)
        logprobs, top = choice["logprobs"]["token_logprobs"][scored], choice["logprobs"]["top_logprobs"][scored]
        greedy = all(logprob == max(best.values()) for logprob, best in zip(logprobs, top, strict=True))
        found.append((sum(logprobs), greedy))
    return found


def test_loglikelihood(demo_server: Server) -> None:
    endings = [" Paris", " Rome", " a", " Paris."]
    found = loglikelihoods(demo_server, [(CONTEXT, ending) for ending in endings])
    best = max(found)
    assert found[0] == best and best[0] == pytest.approx(-0.258, abs=0.01)
    assert [greedy for _, greedy in found] == [True, False, False, True]
    one_by_one = [loglikelihoods(demo_server, [(CONTEXT, ending)])[0] for ending in endings]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in one_by_one], abs=1e-3)


def test_loglikelihood_is_that_of_generating(demo_server: Server) -> None:
    options = {"prompt": encode(demo_server, CONTEXT), "max_tokens": 8, "temperature": 0, "logprobs": 1}
    choice = post(demo_server, "/v1/completions", **options)["choices"][0]
    ((value, greedy),) = loglikelihoods(demo_server, [(CONTEXT, choice["text"])])
    assert greedy and value == pytest.approx(sum(choice["logprobs"]["token_logprobs"]), abs=1e-2)


def test_rolling_loglikelihood(demo_server: Server) -> None:
    """A text whose context is one token of the tokenizer's own, as for perplexities."""
    ids = [1, *encode(demo_server, "The sky is blue and the grass is green.")]
    options = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    logprobs = post(demo_server, "/v1/completions", prompt=[ids], **options)["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(ids) + 1 and logprobs["token_logprobs"][0] is None
    assert -60 < sum(logprobs["token_logprobs"][1:-1]) < -20


def test_generate_until(demo_server: Server) -> None:
    prompts = ["One, two, three,", "Q: 1+1?\nA:"]
    answer = post(demo_server, "/v1/completions", prompt=prompts, max_tokens=20, temperature=0, stop=["seven", "\n"], seed=1234)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[0] == " four, five, six, " and "\n" not in texts[1]
