"""The main job, end to end: `octavo serve` as a process with the demo model, used through the openai SDK and plain HTTP."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

START_TIMEOUT_S = 240
COUNT = "One, two, three, four, five,"


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(v) for v in re.findall(rf"^octavo_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(log: Path, *flags: str) -> Server:
    """With any time to wait: what a machine that runs tests can do in a second and a half is not what they test."""
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", "demo", "--port", str(port), "--max-wait-s", "0", *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}:\n{log.read_text()}"
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return server
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not ready in time:\n{log.read_text()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(
        tmp_path_factory.mktemp("server") / "log",
        "--dtype",
        "float32",
        "--max-model-len",
        "4096",
        "--max-waiting-requests",
        "256",
    )
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_greedy_output_is_sane(client: openai.OpenAI, model: str):
    completion = client.completions.create(model=model, prompt="The capital of France is", max_tokens=8, temperature=0)
    assert completion.choices[0].text.startswith(" Paris")
    assert completion.usage is not None and completion.usage.prompt_tokens == 5 and completion.usage.completion_tokens == 8
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0
    )
    assert chat.choices[0].message.content == "The capital of France is Paris."
    assert chat.choices[0].finish_reason == "stop"


def test_the_log_says_where_the_start_went(server: Server):
    (line,) = [line for line in server.log.read_text().splitlines() if "ready after" in line]
    total_s, parts = re.search(r"ready after ([\d.]+) s: (.*)", line).groups()
    phases = dict(part.removesuffix(" s").rsplit(" ", 1) for part in parts.split(", "))
    assert list(phases)[:4] == ["frontend", "python", "import torch", "import transformers"]
    assert {"resolve", "load", "warm up", "other"} <= phases.keys()
    assert sum(map(float, phases.values())) == pytest.approx(float(total_s), abs=0.05 * len(phases) + 0.05)


def test_a_stream_says_the_same_as_an_answer(client: openai.OpenAI, model: str):
    whole = client.completions.create(model=model, prompt=COUNT, max_tokens=40, temperature=0)
    chunks = list(
        client.completions.create(
            model=model, prompt=COUNT, max_tokens=40, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert (chunks[-1].usage is not None and chunks[-1].usage == whole.usage) or chunks[-1].usage.completion_tokens == 40
    messages = [{"role": "user", "content": "Name three colors."}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_completion_tokens=30)
    deltas = list(
        client.chat.completions.create(model=model, messages=messages, temperature=0, max_completion_tokens=30, stream=True)
    )
    assert deltas[0].choices[0].delta.role == "assistant"
    assert "".join(d.choices[0].delta.content or "" for d in deltas) == answer.choices[0].message.content


def test_prompts_in_four_forms_give_one_text(client: openai.OpenAI, model: str, server: Server):
    text = client.completions.create(model=model, prompt=COUNT, max_tokens=6, temperature=0).choices[0].text
    both = client.completions.create(model=model, prompt=[COUNT, "The sky is"], max_tokens=6, temperature=0, n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3] and both.choices[0].text == both.choices[1].text == text
    logprobs = client.completions.create(model=model, prompt=COUNT, max_tokens=0, temperature=0, echo=True, logprobs=1)
    tokens = logprobs.choices[0].logprobs.tokens
    assert "".join(tokens) == COUNT and logprobs.choices[0].logprobs.token_logprobs[0] is None
    echoed = client.completions.create(model=model, prompt=COUNT, max_tokens=6, temperature=0, echo=True)
    assert echoed.choices[0].text == COUNT + text


def test_seeds_give_the_same_tokens_alone_and_in_a_crowd(client: openai.OpenAI, model: str):
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(model=model, prompt="Once upon a time", max_tokens=12, seed=seed, n=4, temperature=1)
        return [c.text for c in answer.choices]

    alone = [ask(seed) for seed in range(3)]
    assert all(len(set(texts)) == 4 for texts in alone)
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        crowd = list(pool.map(ask, [0, 1, 2, *list(range(3, 32))]))
    assert crowd[:3] == alone


def test_stop_strings_and_logprobs(client: openai.OpenAI, model: str):
    stopped = client.completions.create(model=model, prompt=COUNT, max_tokens=40, temperature=0, stop=["eight"], logprobs=2)
    assert "eight" not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"
    assert len(stopped.choices[0].logprobs.token_logprobs) == stopped.usage.completion_tokens
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hi"}],
        max_completion_tokens=3,
        logprobs=True,
        top_logprobs=3,
        temperature=0,
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 3 and content[0].top_logprobs[0].token == content[0].token


def test_bad_requests_have_their_own_exception(client: openai.OpenAI, model: str):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=model, prompt="x", temperature=9)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="x " * 5000, max_tokens=16)
    assert caught.value.code == "context_length_exceeded" and "4096" in str(caught.value)


def test_a_client_that_goes_away_frees_its_blocks(server: Server, model: str):
    body = {"model": model, "prompt": "Count to a thousand:", "max_tokens": 3000, "stream": True, "n": 2, "ignore_eos": True}
    for stream in (True, False):
        try:
            with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": stream}, timeout=1.5) as answer:
                next(answer.iter_lines())
        except httpx.ReadTimeout:
            assert not stream
        deadline = time.monotonic() + 5
        while server.metric("num_requests_running") > 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.metric("num_requests_running") == 0


def test_a_repeated_prefix_is_served_from_the_cache(client: openai.OpenAI, model: str):
    messages = [{"role": "user", "content": "Tell me about this list: " + ", ".join(f"item {i}" for i in range(60))}]
    first, second = (
        client.chat.completions.create(model=model, messages=messages, max_completion_tokens=2, temperature=0) for _ in range(2)
    )
    assert first.choices[0].message.content == second.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens >= second.usage.prompt_tokens - 17


def test_what_is_there_to_paste_gets_a_sensible_answer(server: Server):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    pasted = [
        re.search(r"curl \S+/v1/chat/completions -H '[^']+' -d '([^']+)'", text) for text in (readme, server.log.read_text())
    ]
    for found in pasted:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=json.loads(found[1]), timeout=120).json()
        assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."


def test_two_processes_named_in_ps_and_a_clean_end(server: Server):
    frontend = psutil.Process(server.process.pid)
    names = [" ".join(p.cmdline()) for p in (frontend, *frontend.children())]
    assert "octavo: frontend" in names[0] and any("octavo: engine" in name for name in names[1:])
    assert "curl" in server.log.read_text()
    children = frontend.children()
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert not psutil.wait_procs(children, timeout=30)[1]
