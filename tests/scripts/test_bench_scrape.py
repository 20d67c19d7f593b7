"""The scrape's benchmark at its smallest: that it pairs its runs and scrapes in one of each, not how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path

import bench_scrape
import pytest
from bench_frontend import Figures


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scrape, "NUM_RENDERS", 2)
    flags = "--pairs 2 --streams 16 --rounds 2 --input-len 4 --output-len 20 --rate 4000 --keys 3"
    assert bench_scrape.main([*flags.split(), "--json", str(tmp_path / "out.json")]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert len(record["lost_percent"]["throughput"]) == 2 and len(record["scrape_s"]) >= 2
    assert set(record["renders"]) == {"OpenMetrics", "text"} and record["tokens_per_s"] > 0
    assert "a scrape every second, 2 pairs" in capsys.readouterr().out


def test_what_is_lost_is_counted_within_a_pair() -> None:
    def run(tokens: int, seconds: float, cpu_s: float) -> Figures:
        return Figures(tokens, 1, 1, seconds, cpu_s, 0.0, [])

    lost = bench_scrape.losses([(run(100, 1.0, 1.0), run(100, 1.25, 1.5)), (run(100, 2.0, 2.0), run(100, 2.0, 2.0))])
    assert lost["throughput"] == pytest.approx([20, 0]) and lost["cpu_per_token"] == pytest.approx([50, 0])
