"""The load generator against a small server of our own: what it counts, not how long it takes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from server.bench import main, parse_load
from server.bench_http import Connections
from server.bench_load import Load, arrival_times, has_text, make_payload, send_one, words
from server.bench_report import Sample, format_markdown_row, format_table, percentile, summarize
from server.bench_workers import CutShort, _Progress, gather
from tests.scripts.fake_sse_server import FakeServer

ROOT = Path(__file__).parent.parent.parent
COMMAND = (sys.executable, "-m", "server.cli", "bench")
SCRIPT = (sys.executable, str(ROOT / "scripts" / "bench_serving.py"))


def run_bench(server: FakeServer, *args: str, command: tuple[str, ...] = COMMAND) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command as a user runs it. Requests beyond `hang_after` are cut by Ctrl-C."""

    async def run() -> tuple[int, str, str]:
        async with server:
            process = await asyncio.create_subprocess_exec(
                *(*command, "--url", server.url, *args),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=ROOT,
                env={**os.environ, "OCTAVO_API_KEY": ""},
            )
            if server.hang_after is not None:
                while server.num_streams < server.hang_after + 1:
                    await asyncio.sleep(0.01)
                process.send_signal(signal.SIGINT)
            stdout, stderr = await process.communicate()
            assert process.returncode is not None
            return process.returncode, stdout.decode(), stderr.decode()

    return asyncio.run(run())


def bench(tmp_path: Path, *args: str, broken: frozenset[int] = frozenset()) -> tuple[FakeServer, dict[str, Any], int, str]:
    """The fake server that was under load, the figures, exit code and stdout."""
    server = FakeServer(broken)
    code, output, _ = run_bench(server, "--json", str(tmp_path / "out.json"), *args)
    return server, json.loads((tmp_path / "out.json").read_text())["figures"], code, output


def test_counts_come_from_usage(tmp_path: Path) -> None:
    server, figures, code, output = bench(
        tmp_path, "--num-requests", "12", "--concurrency", "3", "--input-len", "20", "--output-len", "5", "--warmup", "2"
    )
    assert code == 0
    assert (figures["num_ok"], figures["num_errors"]) == (12, 0)
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (240, 60)
    assert server.num_streams == 14
    assert server.most_open <= 3
    assert all(body["stream_options"] == {"include_usage": True} and body["ignore_eos"] for body in server.bodies)
    assert len({body["prompt"] for body in server.bodies}) == 14
    assert "12 answered, 0 errors" in output
    assert set(figures["ttft_ms"]) == {"mean", "p50", "p90", "p99"}


def test_processes_share_the_requests_and_errors_are_counted(tmp_path: Path) -> None:
    server, figures, code, output = bench(
        tmp_path,
        *(
            "--num-requests",
            "10",
            "--concurrency",
            "4",
            "--processes",
            "2",
            "--endpoint",
            "chat",
            "--output-len",
            "3",
            "--markdown",
        ),
        broken=frozenset({1, 6}),
    )
    assert code == 1
    assert server.num_streams == 10
    assert (figures["num_ok"], figures["num_errors"], figures["output_tokens"]) == (8, 2, 24)
    assert figures["errors"] == {'HTTP 500: {"error": {"message": "broken on purpose"}}': 2}
    assert output.splitlines()[-1].startswith("| 4 at once × 10, 128 / 3 |")
    assert len({body["messages"][0]["content"] for body in server.bodies}) == 10


def test_poisson_load_sends_every_request_once(tmp_path: Path) -> None:
    server, figures, code, _ = bench(tmp_path, "--rate", "500", "--num-requests", "9", "--processes", "2", "--output-len", "2")
    assert (code, figures["num_ok"], server.num_streams) == (0, 9, 9)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:8000", "http://127.0.0.1:port", "http://"])
def test_no_server_is_one_sentence(url: str) -> None:
    with pytest.raises(SystemExit, match="does not answer as an OpenAI-compatible server"):
        main(["--url", url])


def test_the_script_is_the_command_and_json_can_take_the_table_s_place() -> None:
    code, output, _ = run_bench(FakeServer(), "--num-requests", "2", "--output-len", "3", "--json", command=SCRIPT)
    record = json.loads(output)
    assert (code, record["figures"]["num_ok"], record["load"]["output_len"]) == (0, 2, 3)
    assert "api_key" not in record["load"]


@pytest.mark.parametrize("num_streams", [1, 4])
def test_ctrl_c_reports_what_was_measured(num_streams: int) -> None:
    server = FakeServer(hang_after=40)
    args = ("--num-requests", "500", "--output-len", "2", "--concurrency", str(num_streams), "--processes", str(num_streams))
    code, output, errors = run_bench(server, *args)
    assert code == 130
    # The last answers of the other streams may be on their way when the Ctrl-C comes.
    num_answered = int(output.split(" answered, 0 errors")[0].split()[-1])
    assert 40 - num_streams < num_answered <= 40
    assert f"{num_answered} of 500 requests were made: Ctrl-C" in errors and "Traceback" not in errors


def test_ctrl_c_ends_arrivals_too() -> None:
    code, _, errors = run_bench(FakeServer(hang_after=40), "--rate", "1000", "--num-requests", "500", "--processes", "2")
    assert code == 130
    assert "of 500 requests were made: Ctrl-C" in errors and "Traceback" not in errors


def test_ctrl_c_loses_no_sample_that_waits_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent is so slow a reader that most samples are still in the queue when the Ctrl-C comes."""
    server = FakeServer(hang_after=20)

    async def serve() -> None:
        async with server:
            started.set()
            while server.num_streams <= 20:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    started = threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    monkeypatch.setattr(_Progress, "show", lambda self, num_done: time.sleep(0.1))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(CutShort) as cut:
        gather(Load(server.url, model="fake", num_requests=50, output_len=1), num_processes=1)
    thread.join()
    assert len(cut.value.samples) == 20
    assert signal.getsignal(signal.SIGINT) is before


def test_a_request_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    async def run() -> Sample:
        async with FakeServer(hang_after=0) as server:
            return await send_one(Connections(server.url), Load(server.url, timeout_s=0.05), 0)

    assert asyncio.run(run()).error == "no end within 0.05 s"


@pytest.mark.parametrize("pace", [["--concurrency", "2"], ["--rate", "20"]])
def test_after_the_time_limit_no_request_is_sent(pace: list[str]) -> None:
    server = FakeServer(delay_s=0.05)
    code, output, errors = run_bench(server, *pace, "--num-requests", "10000", "--max-time", "0.3", "--output-len", "2")
    assert code == 0 and 0 < server.num_streams < 100
    assert f"{server.num_streams} answered, 0 errors" in output
    assert f"{server.num_streams} of 10000 requests were made: --max-time 0.3" in errors


def test_a_server_that_does_not_know_ignore_eos() -> None:
    server = FakeServer(unknown_field="ignore_eos")
    code, _, errors = run_bench(server, "--num-requests", "1")
    assert code == 1 and "add --no-ignore-eos" in errors
    assert run_bench(FakeServer(unknown_field="ignore_eos"), "--num-requests", "1", "--no-ignore-eos")[0] == 0


def test_reasoning_counts_as_text() -> None:
    assert has_text({"choices": [{"delta": {"reasoning_content": "hm"}}]})
    assert not has_text({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    assert not has_text({"choices": []})


def test_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "one, two")
    assert parse_load([])[0].api_key == "one"
    assert parse_load(["--api-key", "mine"])[0].api_key == "mine"


class ClosingServer(FakeServer):
    """Closes every connection after its answer and does not say so, as llama.cpp's server does after a stream."""

    async def answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await super().answer(path, body, writer)
        writer.close()


def test_a_kept_connection_that_the_server_closed_is_opened_anew() -> None:
    async def run() -> list[Sample]:
        async with ClosingServer(frozenset()) as server:
            connections = Connections(server.url)
            return [await send_one(connections, Load(server.url, output_len=2), index) for index in range(3)]

    assert [sample.error for sample in asyncio.run(run())] == ["", "", ""]


def test_arrivals_are_seeded_and_poisson() -> None:
    load = Load("http://x", rate=50.0, num_requests=4000, seed=7)
    times = arrival_times(load)
    assert times == arrival_times(load)
    assert times != arrival_times(Load("http://x", rate=50.0, num_requests=4000, seed=8))
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert min(gaps) >= 0
    assert mean == pytest.approx(1 / 50, rel=0.1)
    assert deviation == pytest.approx(mean, rel=0.1)  # of an exponential distribution


def test_prompts_are_seeded_and_share_their_prefix() -> None:
    load = Load("http://x", input_len=30, shared_prefix_len=40, tokens_per_word=2.0, template_tokens=10.0, seed=3)
    first, second = (str(make_payload(load, index)["prompt"]).split() for index in (0, 1))
    assert len(first) == 20 + 10
    assert first[:20] == second[:20]
    assert first[20:] != second[20:]
    assert words(5, 1, "a") == words(5, 1, "a") != words(5, 2, "a")


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([3.0], 99, 3.0), ([1.0, 2.0], 50, 1.5), ([4.0, 1.0, 3.0, 2.0, 5.0], 90, 4.6), ([1.0, 2.0, 3.0], 100, 3.0)],
)
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_figures_of_known_samples() -> None:
    samples = [
        Sample(start=10.0, end=14.0, chunk_times=[11.0, 12.0, 14.0], prompt_tokens=100, cached_tokens=16, output_tokens=4),
        Sample(start=12.0, end=15.0, chunk_times=[14.0], prompt_tokens=50, output_tokens=1),
        Sample(start=12.0, end=20.0, error="HTTP 500"),
    ]
    figures = summarize(samples)
    assert figures["duration_s"] == 10.0
    assert (figures["output_tokens_per_s"], figures["total_tokens_per_s"], figures["requests_per_s"]) == (0.5, 15.5, 0.2)
    assert (figures["num_ok"], figures["num_errors"], figures["cached_tokens"]) == (2, 1, 16)
    assert figures["ttft_ms"]["mean"] == 1500
    assert figures["tpot_ms"]["mean"] == 1000  # of the first alone: one token has no time per further token
    assert figures["itl_ms"]["p50"] == 1500
    assert figures["e2e_ms"]["p50"] == 3500
    assert "error × 1: HTTP 500" in format_table("title", figures)


def test_figures_when_everything_failed() -> None:
    figures = summarize([Sample(start=0.0, end=1.0, error="gone")])
    assert figures["num_ok"] == 0
    assert "–" in format_markdown_row("title", figures)
    assert "0 answered, 1 errors" in format_table("title", figures)


@pytest.mark.parametrize(
    "args",
    [
        ["--concurrency", "0"],
        ["--warmup", "-1"],
        ["--rate", "1", "--concurrency", "2"],
        ["--extra-body", "[1]"],
        ["--max-time", "nan"],
        ["--conc", "2"],
    ],
)
def test_bad_options_are_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_load(args)
    assert "--" in capsys.readouterr().err
