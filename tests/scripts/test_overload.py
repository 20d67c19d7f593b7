"""The overload at its smallest, on an engine without a model: how requests end and what is left, not how long it takes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import overload
import pytest

from tests.crashes import make_model

SLOTS = 16  # of the fake engine


def test_neither_a_load_s_begin_nor_its_end_is_in_what_it_answers() -> None:
    phase = overload.Phase("one slot", 1.0, from_s=100.0, to_s=160.0)
    # An answer takes ten seconds. The slot is filled after four, for want of prompts, and the last answer comes after the load.
    phase.spans = [(begin_s, begin_s + 10.0, 1.0) for begin_s in range(104, 164, 10)]
    assert phase.answered() == pytest.approx(0.1)
    phase.spans = [(100.0, 120.0, 1.0), (120.0, 140.0, 0.5), (140.0, 180.0, 1.0), (161.0, 171.0, 1.0)]
    assert phase.answered() == pytest.approx((0.5 + 0.5) / 40.0)


@pytest.mark.timeout(300)
def test_every_request_ends_well_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model", step_s=0.02)
    command = [sys.executable, "-m", "tests.serve_fake_engine", str(folder), "--served-model-name", "fake", "--device", "cpu"]
    flags = f"--seconds 6 --slots {SLOTS} --input-len 20 --output-len 10 --first-token-timeout-s 0.3 --timed-share 0.3"
    code = overload.main([*flags.split(), "--no-timing"], command)
    told = capsys.readouterr()
    assert code == 0, told
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.out.splitlines() if line.startswith("|")]
    table = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}
    assert list(table) == ["closed", "capacity", "4 times"]
    assert int(table["4 times"]["200"]) > 0 and int(table["4 times"]["429"]) > 0
    assert float(table["4 times"]["requests/s"]) == pytest.approx(4 * float(table["capacity"]["requests/s"]), rel=0.01)
    assert float(table["capacity"]["requests/s"]) == pytest.approx(float(table["closed"]["answers/s"]), rel=0.01)
    assert float(table["4 times"]["most waiting"]) <= SLOTS + 3 * float(table["4 times"]["answers/s"])  # a second's work
    assert re.search(r"TTFT p99 of those let in: [\d.]+ times", told.out)
