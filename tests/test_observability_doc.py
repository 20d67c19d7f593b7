"""docs/observability.md lists what log lines and spans hold: all of it, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.sampling_params import SamplingParams
from server.config import ServerConfig
from server.metrics import _SHED_REASONS
from server.request_log import QUIET_PATHS
from server.request_record import MAX_PHASES, Event, Phases, RequestRecord
from server.tracing import CLOSE_TIMEOUT_S, _http_attributes, _operation_attributes, _usage_attributes

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
LOGS, TRACES = TEXT.partition("\n## Logs\n")[2].partition("\n## Traces\n")[::2]
OF_EVERY_LINE = {"time", "level", "logger", "process", "message", "request_id", "trace_id", "traceback"}


def rows(section: str, heading: str) -> set[str]:
    """What stands in the first column of the tables with such a first heading."""
    tables = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", section, re.MULTILINE)
    assert tables
    return {name for table in tables for row in table.splitlines() for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}


@pytest.fixture
def record() -> RequestRecord:
    """One of which there is something to say everywhere."""
    return RequestRecord(
        request_id="r",
        method="POST",
        path="/v1/completions",
        trace_id="t",
        key_id="k",
        status=200,
        error="e",
        model="m",
        response_id="i",
        stream=True,
        sampling=SamplingParams(n=2, top_k=5),
        num_prompts=2,
        prompt_tokens=1,
        reasoning_tokens=1,
        queue_s=0.1,
        prefill_s=0.1,
        ttft_s=0.2,
        finish_reasons=["stop", "length"],
        preemptions=1,
        phases=[Phases(0.1, 0.1, 1.0, 2.0)],
        events=[Event("engine_died", 1.0), Event("replay", 2.0)],
    )


def test_every_reason_of_a_refusal_is_named() -> None:
    answer = TEXT.partition("**Why is it refusing?**")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", answer)) == set(_SHED_REASONS)


def test_the_fields_of_the_log(record: RequestRecord) -> None:
    assert rows(LOGS, "field") == OF_EVERY_LINE | set(record.fields())


def test_the_attributes_of_spans(record: RequestRecord) -> None:
    found = _http_attributes(record, "/x") | _operation_attributes(record) | _usage_attributes(record)
    assert rows(TRACES, "attribute") == {*found, "octavo.prompt.index"}


def test_spans_and_events() -> None:
    source = (ROOT / "server" / "tracing.py").read_text(encoding="utf-8")
    stream = (ROOT / "engine" / "request_stream.py").read_text(encoding="utf-8")
    assert rows(TRACES, "span") == set(re.findall(r'\.child\(parent, "(\w+)"', source))
    events = set(re.findall(r'\bEvent\("(\w+)"', source)) | set(re.findall(r'events\.append\(\("(\w+)"', stream))
    assert rows(TRACES, "event") == events


def test_settings_and_numbers() -> None:
    named = set(re.findall(r"(?<![-\w])--([a-z][a-z-]+)", LOGS + TRACES)) - {"rm"}
    assert {"log-format", "log-level", "log-prompts", "otlp-endpoint"} == named
    assert named <= {name.replace("_", "-") for name in ServerConfig.model_fields}
    assert f"first {MAX_PHASES} prompts" in TRACES and f"waits {CLOSE_TIMEOUT_S:g} s" in TRACES
    assert {path.split("/")[1] for path in QUIET_PATHS} == {"health", "metrics"}


def test_the_files_exist() -> None:
    named = re.findall(r"`(tests/[\w./]+)`", LOGS + TRACES)
    assert named and all((ROOT / name).exists() for name in named)
