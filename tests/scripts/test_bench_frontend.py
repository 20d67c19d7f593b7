"""The frontend's benchmark at its smallest: what it counts, not how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path

import bench_frontend
import pytest
from bench_frontend import Load, measure
from bench_frontend_engine import build_model_folder


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_every_token_of_every_stream_is_counted(tmp_path: Path, endpoint: str) -> None:
    load = Load(streams=3, rounds=2, input_len=4, output_len=7, rate=600, endpoint=endpoint, clients=2, poll_ms=1)
    figures = measure(build_model_folder(tmp_path), load)
    assert (figures.requests, figures.tokens, len(figures.ttft_s)) == (6, 42, 6)
    assert 6 <= figures.events <= 42
    assert figures.seconds >= 2 * 6 / load.step_rate  # a step's pause between two tokens
    assert figures.cpu_s > 0


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--streams 2 --rounds 1 --input-len 4 --output-len 5 --rates 400 --requests 4 --steps 2"
    code = bench_frontend.main(
        [*flags.split(), "--json", str(tmp_path / "out.json"), "--profile", str(tmp_path / "profile.txt")]
    )
    record = json.loads((tmp_path / "out.json").read_text())
    assert code == 0
    assert [row["offered_tokens_per_s"] for row in record["rates"]] == [400]
    assert [row["input_len"] for row in record["requests"]] == [4, 16]
    assert set(record["us_per_token"]) == {"msgpack decode", "detokenize", "JSON", "tasks, SSE, ASGI, HTTP", "socket"}
    assert "tokens/s/core" in capsys.readouterr().out
    assert "%" in (tmp_path / "profile.txt").read_text()
