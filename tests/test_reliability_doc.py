"""docs/reliability.md names files, settings and numbers: they exist, and are what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine import suspects, watchdog
from server import limits, sse, template_worker
from server.api import text_threads
from server.config import ServerConfig

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
OF_SCRIPTS = {"--kill-every", "--minutes", "--run-all"}


def test_the_files_exist() -> None:
    named = set(re.findall(r"`((?:tests|scripts)/[\w./]+)", TEXT))
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_settings_exist() -> None:
    named = set(re.findall(r"--[a-z][a-z-]+", TEXT)) - OF_SCRIPTS
    assert len(named) > 20
    assert [name for name in named if name[2:].replace("-", "_") not in ServerConfig.model_fields] == []


@pytest.mark.parametrize("name", re.findall(r"`(--[a-z-]+)` \(([\d,]+)\)", TEXT), ids=lambda found: found[0])
def test_the_defaults_are_those(name: tuple[str, str]) -> None:
    flag, number = name
    assert ServerConfig.model_fields[flag[2:].replace("-", "_")].default == int(number.replace(",", ""))


def test_the_numbers_are_those() -> None:
    assert (suspects.RUNS_ALONE_AT, suspects.FAILS_AT) == (2, 3)
    assert (watchdog.BEAT_TIMEOUT_S, watchdog.LOADING_BEAT_TIMEOUT_S) == (5, 120)
    assert (watchdog.STEP_FACTOR, watchdog.FIRST_STEP_FACTOR) == (10, 20)
    assert sse.PING_INTERVAL_S == 5
    assert (limits.MAX_URL_BYTES, limits.MAX_HEADER_BYTES, limits.MAX_HEADERS) == (8 * 1024, 64 * 1024, 100)
    assert (template_worker.LIMIT_S, template_worker.MAX_MEMORY_BYTES) == (2, 512 * 2**20)
    assert (text_threads.NUM_THREADS, text_threads.MAX_PENDING_CHARS) == (2, 128 * 2**20)
