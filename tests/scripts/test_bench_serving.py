"""The load generator against a small server of our own: what it counts, not how long it takes."""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import bench_serving
import pytest
from bench_report import Sample, format_markdown_row, format_table, percentile, summarize
from bench_serving import Connections, Load, arrival_times, make_payload, parse_load, send_one, words

from tests.scripts.fake_sse_server import FakeServer

SCRIPT = Path(bench_serving.__file__)


def bench(tmp_path: Path, *args: str, broken: frozenset[int] = frozenset()) -> tuple[FakeServer, dict[str, Any], int, str]:
    """Runs the script as a user does, against a fake server; returns that server, the figures, exit code and output."""

    async def run() -> tuple[FakeServer, int, str]:
        async with FakeServer(broken) as server:
            command = [str(SCRIPT), "--base-url", server.url, "--json", str(tmp_path / "out.json"), *args]
            process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
            stdout, _ = await process.communicate()
            assert process.returncode is not None
            return server, process.returncode, stdout.decode()

    server, code, output = asyncio.run(run())
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


def test_no_server_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="does not answer as an OpenAI-compatible server"):
        bench_serving.main(["--base-url", "http://127.0.0.1:9"])


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


@pytest.mark.parametrize("args", [["--concurrency", "0"], ["--warmup", "-1"], ["--rate", "1", "--concurrency", "2"]])
def test_bad_options_are_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_load(args)
    assert "--" in capsys.readouterr().err
