"""A dying engine, on purpose and by the clock: every stream goes on, no token is lost and none comes twice."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest

from engine.errors import DeadlineExceeded, EngineUnavailable, RequestFailed
from engine.messages import CrashKind, CrashPlace, CrashPoint
from engine.sampling_params import SamplingParams, choice_seed
from tests.crashes import Crowd, Reader, kill, make_model, pid_of, running, text_of, until
from tests.fake_runner import expected_tokens

PLACES: tuple[CrashPlace, ...] = ("before_step", "after_sampling", "after_sending")
KINDS: tuple[CrashKind, ...] = ("kill", "segfault", "exit", "cuda_error", "memory_error")
STEPS = (1, 2, 9, 60)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def cases(run_all: bool) -> list[tuple[CrashPlace, CrashKind, int]]:
    every = list(itertools.product(PLACES, KINDS, STEPS))
    return every if run_all else random.Random(6).sample(every, 6)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("depth", [0, 1])
def test_every_way_to_die_at_every_place(tmp_path: Path, run_all: bool, depth: int) -> None:
    model = make_model(tmp_path / "model", pipeline_depth=depth)

    async def scenario(place: CrashPlace, kind: CrashKind, step: int) -> None:
        async with running(model, crash_point=CrashPoint(place=place, kind=kind, step=step)) as client:
            crowd = Crowd(max_tokens=40)
            await crowd.run(client)
            assert client.num_restarts == 1, (place, kind, step)
            crowd.check()
            await until(lambda: client.stats.num_referenced_blocks == 0)
            assert client.num_open_streams == 0 and client.stats.num_blocks == 400

    for case in cases(run_all):
        asyncio.run(scenario(*case))


@pytest.mark.timeout(600)
def test_kills_at_first_early_middle_and_late_tokens(tmp_path: Path, run_all: bool) -> None:
    model = make_model(tmp_path / "model", step_s=0.004)
    num_kills = 20 if run_all else 5

    async def scenario() -> None:
        async with running(model) as client:
            crowd = Crowd(max_tokens=200)
            work = asyncio.create_task(crowd.run(client))
            total = 32 * 200
            for i in range(num_kills):
                # From the first token on, spread over what the crowd has to say.
                await until(lambda goal=1 + i * total // num_kills: crowd.num_tokens >= goal or work.done())  # type: ignore[misc]
                notice_s = await kill(client)
                print(f"kill {i + 1} after {crowd.num_tokens} tokens: noticed after {notice_s * 1e3:.0f} ms")
                assert notice_s < 1
                await client.wait_until_ready()
            await work
            assert client.num_restarts == num_kills
            crowd.check()

    asyncio.run(scenario())


def test_a_request_that_brings_the_engine_down_fails_alone(model: Path) -> None:
    poison = CrashPoint(place="before_step", kind="segfault", token_id=95, epochs=None)

    async def scenario() -> None:
        async with running(model, crash_point=poison) as client:
            crowd = Crowd(max_tokens=120)
            others = asyncio.create_task(crowd.run(client))
            await until(lambda: crowd.num_tokens > 10)
            reader = Reader()
            with pytest.raises(RequestFailed, match="engine died 3 times while it was computing it") as failure:
                await reader.read(await client.generate([5, 95, 7], SamplingParams(max_tokens=5)))
            assert failure.value.code == "engine_died" and not reader.tokens
            assert client.num_restarts == 3
            await others
            crowd.check()
            assert client.state == "ready"

    asyncio.run(scenario())


def test_two_deaths_are_no_reason_to_fail(model: Path) -> None:
    async def scenario() -> None:
        async with running(
            model, crash_point=CrashPoint(place="before_step", kind="kill", token_id=95, epochs=(1, 2))
        ) as client:
            reader = Reader()
            await reader.read(await client.generate([5, 95, 7], SamplingParams(max_tokens=5)))
            assert reader.tokens[0] == expected_tokens([5, 95, 7], choice_seed(0, 0), 5)
            assert client.num_restarts == 2

    asyncio.run(scenario())


def test_an_engine_that_completes_no_step_ends_the_client(model: Path) -> None:
    async def scenario() -> None:
        always = CrashPoint(place="before_step", kind="exit", epochs=None)
        async with running(model, crash_point=always) as client:
            with pytest.raises(RequestFailed, match="lost"):
                await Reader().read(await client.generate([5], SamplingParams(max_tokens=5)))
            assert client.state == "failed"
            with pytest.raises(EngineUnavailable, match=r"died 3 times in a row without completing a step.*exit code 3"):
                await client.generate([5], SamplingParams())

    asyncio.run(scenario())


def test_a_model_that_loads_only_once_ends_the_client(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", fails_again=True)

    async def scenario() -> None:
        async with running(model) as client:
            await kill(client)
            await until(lambda: client.state == "failed")
            with pytest.raises(EngineUnavailable, match="this model loads only once"):
                client._check_open()

    asyncio.run(scenario())


def test_what_is_abandoned_meanwhile_is_not_replayed_and_what_comes_waits(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", load_s=0.5, step_s=0.004)

    async def scenario() -> None:
        async with running(model) as client:
            left = await client.generate([5], SamplingParams(max_tokens=300))
            kept, later = Reader(), Reader()
            reading = asyncio.create_task(kept.read(await client.generate([6], SamplingParams(max_tokens=100))))
            await until(lambda: kept.num_tokens > 5)
            await kill(client)
            left.abort()
            assert client.state == "recovering" and client.num_open_streams == 1
            new = asyncio.create_task(client.generate([7], SamplingParams(max_tokens=4)))
            await asyncio.sleep(0)
            assert client.state == "recovering" and not new.done()
            await later.read(await new)
            await reading
            assert later.tokens[0] == expected_tokens([7], choice_seed(0, 0), 4)
            assert kept.tokens[0] == expected_tokens([6], choice_seed(0, 0), 100)
            await until(lambda: client.stats.num_running == 0)
            assert client.stats.generation_tokens < 100 + 4 + 300, "the abandoned one was computed again"

    asyncio.run(scenario())


def test_new_requests_wait_only_so_long(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", load_s=2.0)

    async def scenario() -> None:
        async with running(model, restart_wait_s=0.2) as client:
            await kill(client)
            with pytest.raises(EngineUnavailable, match="being started again"):
                await client.generate([7], SamplingParams(max_tokens=4))
            assert client.state == "recovering" and client.num_open_streams == 0

    asyncio.run(scenario())


def test_time_limits_hold_while_there_is_no_engine(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", load_s=4.0, step_s=0.02)

    async def scenario() -> None:
        async with running(model) as client:
            reader, now_s = Reader(), time.monotonic()
            limits = {"first_token_deadline_s": now_s + 1.5, "deadline_s": now_s + 2.0}
            started = await client.generate([5], SamplingParams(max_tokens=300), **limits)
            work = asyncio.create_task(reader.read(started))
            await until(lambda: reader.num_tokens > 2)
            await kill(client)
            with pytest.raises(DeadlineExceeded, match="being started again"):
                await client.generate([6], SamplingParams(max_tokens=3), **limits)
            with pytest.raises(DeadlineExceeded) as failure:
                await work
            assert failure.value.param == "timeout" and client.state == "recovering"

    asyncio.run(scenario())


def test_embeddings_start_again(model: Path) -> None:
    async def scenario() -> None:
        # 300 tokens are five steps.
        async with running(model, crash_point=CrashPoint(place="before_step", kind="kill", step=8)) as client:
            undisturbed = await client.embed([5] * 300, pooling="mean")
            disturbed = await client.embed([5] * 300, pooling="mean")
            assert client.num_restarts == 1 and disturbed.vector == undisturbed.vector

    asyncio.run(scenario())


def test_counters_go_on_and_gauges_come_back(model: Path) -> None:
    async def scenario() -> None:
        async with running(model) as client:
            await Reader().read(await client.generate([5], SamplingParams(max_tokens=30)))
            await until(lambda: client.stats.generation_tokens == 30 and client.stats.num_running == 0)
            steps = client.stats.steps
            await kill(client)
            assert client.stats.generation_tokens == 30 and client.stats.num_waiting == 0
            await client.wait_until_ready()
            await Reader().read(await client.generate([5], SamplingParams(max_tokens=30)))
            # The new engine's own first step is counted as well: it shows that it can complete one.
            await until(lambda: client.stats.generation_tokens == 61 and client.stats.num_running == 0)
            assert client.stats.steps >= steps + 31

    asyncio.run(scenario())


def test_an_idle_engine_that_is_killed_comes_back(model: Path) -> None:
    async def scenario() -> None:
        async with running(model) as client:
            assert await client.can_step()
            first = pid_of(client)
            os.kill(first, signal.SIGSEGV)
            await until(lambda: client.num_restarts == 1)
            assert not await client.can_step()
            await client.wait_until_ready()
            assert pid_of(client) != first and await client.can_step()
            assert text_of(expected_tokens([5], choice_seed(0, 0), 3)) != ""
            reader = Reader()
            await reader.read(await client.generate([5], SamplingParams(max_tokens=3)))
            assert reader.tokens[0] == expected_tokens([5], choice_seed(0, 0), 3)

    asyncio.run(scenario())
