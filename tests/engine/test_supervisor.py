"""The supervisor and real processes: stopped and stuck engines, what they tell before they are killed, and ends of parents."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.config import EngineConfig
from engine.messages import CrashPoint
from engine.sampling_params import SamplingParams, choice_seed
from engine.supervisor import Supervisor
from tests.crashes import Crowd, Reader, kill, make_model, pid_of, running, until
from tests.fake_runner import expected_tokens

END_TIMEOUT_S = 2.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def test_a_death_is_noticed_at_once(model: Path) -> None:
    async def scenario() -> None:
        async with running(model) as client:
            seconds = await kill(client)
            print(f"noticed {seconds * 1e3:.0f} ms after the kill")
            assert seconds < 1

    asyncio.run(scenario())


def test_a_stopped_engine_is_not_ready_tells_its_stack_and_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(tmp_path / "model", step_s=0.005)

    async def scenario() -> None:
        async with running(model) as client:
            crowd = Crowd(max_tokens=100)
            work = asyncio.create_task(crowd.run(client))
            await until(lambda: crowd.num_tokens > 100)
            stopped = pid_of(client)
            os.kill(stopped, signal.SIGSTOP)
            started_s = time.monotonic()
            while await client.can_step():
                assert time.monotonic() - started_s < 5, "ready, five seconds after it was stopped"
                await asyncio.sleep(0.1)
            await work
            crowd.check()
            assert client.num_restarts == 1 and not psutil.pid_exists(stopped)

    asyncio.run(scenario())
    assert "is stopped (no heartbeat for 5 s)" in caplog.text
    assert "where the engine's threads were" in caplog.text and "process.py" in caplog.text


def test_a_stuck_step_tells_its_stack_and_counts_against_its_request(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        stuck = CrashPoint(place="before_step", kind="hang", token_id=95)
        async with running(model, crash_point=stuck, step_timeout_s=2.0) as client:
            first = Reader()
            await first.read(await client.generate([5], SamplingParams(max_tokens=20)))
            reader = Reader()
            await reader.read(await client.generate([5, 95], SamplingParams(max_tokens=5)))
            assert reader.tokens[0] == expected_tokens([5, 95], choice_seed(0, 0), 5)
            assert client.num_restarts == 1

    asyncio.run(scenario())
    assert "step 21 has been stuck for 2 s (allowed are 2 s)" in caplog.text
    assert "in die" in caplog.text and "crash_points.py" in caplog.text, "the stack shows where"


def test_an_engine_that_keeps_the_interpreter_to_itself_is_killed_without_a_heartbeat(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with running(model, crash_point=CrashPoint(place="before_step", kind="spin", step=3)) as client:
            reader = Reader()
            await reader.read(await client.generate([5], SamplingParams(max_tokens=20)))
            assert reader.tokens[0] == expected_tokens([5], choice_seed(0, 0), 20)

    asyncio.run(scenario())
    assert "shows no sign of life" in caplog.text


def test_what_a_fenced_engine_still_says_is_not_heard(tmp_path: Path) -> None:
    """A stopped engine goes on when its stack is asked for, and sends what it has: the streams must not see it."""
    model = make_model(tmp_path / "model", step_s=0.002)

    async def scenario() -> None:
        async with running(model) as client:
            reader = Reader()
            work = asyncio.create_task(reader.read(await client.generate([5], SamplingParams(max_tokens=300))))
            await until(lambda: reader.num_tokens > 20)
            os.kill(pid_of(client), signal.SIGSTOP)
            await until(lambda: client.state == "recovering")
            before = reader.num_tokens
            await until(lambda: client.num_restarts == 1)
            assert reader.num_tokens == before
            await work
            assert reader.tokens[0] == expected_tokens([5], choice_seed(0, 0), 300)

    asyncio.run(scenario())


PARENT = """
import asyncio, sys
from pathlib import Path
from tests.crashes import COMMAND
from engine.client import EngineClient
from engine.config import EngineConfig, ModelConfig
from engine.supervisor import Supervisor

async def main():
    client = EngineClient(Supervisor(EngineConfig(model=ModelConfig(model=sys.argv[1])), command=COMMAND))
    await client.start()
    if sys.argv[2] == "serving":
        await client.wait_until_ready()
    else:
        while client.progress is None:
            await asyncio.sleep(0.01)
    print(client._supervisor.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("phase", ["serving", "loading"])
def test_the_engine_ends_soon_after_its_frontend_was_killed(tmp_path: Path, phase: str) -> None:
    model = make_model(tmp_path / "model", load_s=0 if phase == "serving" else 300)
    command = [sys.executable, "-c", PARENT, str(model), phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        started_s = time.monotonic()
        while is_alive(engine):
            assert time.monotonic() - started_s < END_TIMEOUT_S
            time.sleep(0.01)
        print(f"ended {(time.monotonic() - started_s) * 1e3:.0f} ms after its frontend")


def test_an_engine_that_ends_just_when_it_is_to_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As uvloop has it: the process is gone, nobody has been told yet, and a signal to it raises."""
    monkeypatch.setattr("engine.supervisor.STOP_TIMEOUT_S", 0.01)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    class Gone:
        pid, returncode = ended.pid, None
        num_waits = 0

        async def wait(self) -> int:
            self.num_waits += 1
            if self.num_waits == 1:
                await asyncio.sleep(600)
            return 0

        def kill(self) -> None:
            raise ProcessLookupError

    async def scenario() -> None:
        supervisor = Supervisor(EngineConfig())
        supervisor._process = process = Gone()  # type: ignore[assignment]
        supervisor.kill()
        await supervisor.stop()
        assert process.num_waits == 2

    asyncio.run(scenario())


def is_alive(process: psutil.Process) -> bool:
    """One that has ended, and that nobody has waited for yet, is not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
