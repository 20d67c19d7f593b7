"""10,000 random requests, most of them wrong, to a real server of two processes: no 5xx, no death, no leak.

A failure names seed and index of its request: `python -m tests.fuzz_wire SEED INDEX` prints it.
"""

from __future__ import annotations

import asyncio
import collections
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_process import Server, free_port, running
from server_watch import ServerWatch, Vitals

from tests.fuzz_bodies import CONTEXT
from tests.fuzz_wire import READ_TIMEOUT_S, ShotMaker, fire
from tests.tiny_config import make_folder

SEED = 6
NUM_SHOTS, NUM_IN_SHORT = 10_000, 600
WARM_UP_SHARE = 4
"""What a process takes for its first requests it keeps: memory is compared with that after this part of them."""
CONCURRENCY = 16
START_LIMIT_S = 240.0
REST_LIMIT_S = 60.0
MAX_GROWTH_BYTES = 96 * 2**20
SPARE_FDS = 8  # a pool's threads and a template worker's pipes may have come

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}"
    "</tool_call>{% endfor %}\n{% endfor %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FLAGS = (
    "--load-format", "dummy", "--dtype", "float32", "--max-model-len", str(CONTEXT), "--num-kv-blocks", "256",
    "--num-threads", "1", "--max-waiting-requests", "0", "--max-waiting-tokens", "0", "--read-timeout-s", str(READ_TIMEOUT_S),
    "--tool-parser", "hermes", "--reasoning-parser", "none", "--response-store-size", "64", "--served-model-name", "tiny",
    "--chat-template", CHAT_TEMPLATE,
)  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = make_folder(tmp_path / "model")
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", str(folder), "--port", str(port), *FLAGS]
    with running(command, {"HF_HUB_OFFLINE": "1"}, port, tmp_path / "log") as server:
        server.wait_ready(START_LIMIT_S)
        yield server


async def fire_all(port: int, indices: range) -> tuple[collections.Counter[int], list[str]]:
    """Statuses, and what was wrong."""
    left = iter(indices)
    statuses: collections.Counter[int] = collections.Counter()
    problems: list[str] = []

    async def one_by_one() -> None:
        for index in left:
            shot = ShotMaker(SEED, index).make()
            try:
                got, problem = await fire(port, shot)
            except OSError as error:
                got, problem = [], repr(error)
            statuses.update(got)
            if problem is not None:
                problems.append(f"{SEED} {index} ({shot.kind}): {problem}")

    await asyncio.gather(*(one_by_one() for _ in range(CONCURRENCY)))
    return statuses, problems


def count_5xx(watch: ServerWatch) -> float:
    """Of all responses, also of those whose clients had gone; without 504."""
    lines = re.findall(r'^octavo_http_responses_total\{.*status="5(?!04).*\} (\S+)$', watch.get("/metrics")[1], re.MULTILINE)
    return sum(map(float, lines))


def check_unharmed(before: Vitals, after: Vitals) -> None:
    assert (after.frontend_pid, after.engine_pid) == (before.frontend_pid, before.engine_pid)
    assert after.at_rest(), after.metrics
    assert after.frontend_fds <= before.frontend_fds + SPARE_FDS and after.engine_fds <= before.engine_fds + SPARE_FDS
    assert after.frontend_rss_bytes < before.frontend_rss_bytes + MAX_GROWTH_BYTES
    assert after.engine_rss_bytes < before.engine_rss_bytes + MAX_GROWTH_BYTES


@pytest.mark.timeout(3600)
def test_no_request_harms_the_server(server: Server, tmp_path: Path, run_all: bool) -> None:
    port = int(server.base_url.rpartition(":")[2])
    watch = ServerWatch(server.process.pid, server.base_url)
    num_shots = NUM_SHOTS if run_all else NUM_IN_SHORT
    before = count_5xx(watch)  # while it was starting
    statuses, problems = asyncio.run(fire_all(port, range(num_shots // WARM_UP_SHARE)))
    warm = watch.wait_at_rest(REST_LIMIT_S)
    more, more_problems = asyncio.run(fire_all(port, range(num_shots // WARM_UP_SHARE, num_shots)))
    statuses, problems = statuses + more, problems + more_problems
    log = (tmp_path / "log").read_text()
    assert not problems, f"{len(problems)} of {num_shots}: " + "\n".join(problems[:20])
    bug = re.search(r'Traceback|Exception in|^.{0,40} File "', log, re.MULTILINE)
    assert bug is None, log[bug.start() :][:5000]
    assert count_5xx(watch) == before, "a client that had gone would have got a 5xx"
    assert statuses[200] > num_shots / 10 and statuses[400] > num_shots / 5, statuses
    check_unharmed(warm, watch.wait_at_rest(REST_LIMIT_S))
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(REST_LIMIT_S) == 0
    assert not re.search(r"Stopping when \d+ open requests", (tmp_path / "log").read_text())
