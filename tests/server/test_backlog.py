"""What waits for the engine is bounded, in requests and in tokens, and who is refused learns when there will be room."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pytest

from engine.errors import InvalidRequest, Overloaded
from engine.messages import EngineStats
from engine.sampling_params import SamplingParams
from server.backlog import MAX_WAIT_S, Backlog, Ticket, Work
from server.config import ServerConfig
from tests.server.fake_client import FakeEngineClient
from tests.server.test_bad_input import error_of
from tests.server.test_lifetime import until

SLOTS = 8  # of the fake engine, with pages for 160 tokens


class Bench:
    """A backlog, an engine whose counters a test turns, and time that passes when it says so."""

    def __init__(self, *, requests: int = 2, tokens: int | None = None) -> None:
        self.now, self.generated = 1000.0, 0
        self.life: int | None = 0
        self.shed: list[str] = []
        ready = FakeEngineClient().ready
        assert ready is not None
        self.ready = msgspec.structs.replace(ready, max_num_seqs=2, kv_cache_tokens=1_000_000)
        self.backlog = Backlog(
            lambda: EngineStats(generation_tokens=self.generated),
            max_wait_s=0,
            max_waiting_requests=requests,
            max_waiting_tokens=tokens,
            observe_shed=self.shed.append,
            read_life=lambda: self.life,
            clock=lambda: self.now,
        )

    def enter(self, num_tokens: int = 100, num_choices: int = 1) -> Ticket:
        return self.backlog.enter([Work(num_choices, num_tokens, num_tokens)], self.ready)[0]

    def work(self, seconds: float, tokens_a_second: float) -> None:
        """Let the engine get through so much, with requests coming and going meanwhile."""
        for _ in range(int(seconds)):
            self.now += 1.0
            self.generated += int(tokens_a_second)
            for ticket in self.backlog.enter([], self.ready):
                ticket.close()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_no_more_wait_than_may(bench: Bench) -> None:
    tickets = [bench.enter() for _ in range(4)]
    with pytest.raises(Overloaded, match="2 requests are waiting, and with 1 more it would be more than 2"):
        bench.enter()
    assert bench.shed == ["waiting_requests"]
    tickets[0].start()
    with pytest.raises(Overloaded):
        bench.enter()  # it runs, and holds its slot
    tickets[0].close()
    tickets[0].close()  # counted once
    bench.enter()
    with pytest.raises(Overloaded):
        bench.enter()


@pytest.mark.parametrize(("limit", "allowed"), [(1, 3), (5, 7), (0, 50)])
def test_a_bound_of_its_own(limit: int, allowed: int) -> None:
    bench = Bench(requests=limit)
    num_entered = 0
    for _ in range(50):
        try:
            bench.enter()
            num_entered += 1
        except Overloaded:
            pass
    assert num_entered == allowed


def test_choices_count(bench: Bench) -> None:
    bench.enter(num_choices=2)
    bench.enter(num_choices=2)
    with pytest.raises(Overloaded):
        bench.enter()


def test_who_finds_nobody_waiting_is_let_in_whatever_its_size() -> None:
    bench = Bench(tokens=50)
    large = bench.backlog.enter([Work(1, 100)] * 40, bench.ready)
    with pytest.raises(Overloaded):
        bench.enter()
    for ticket in large:
        ticket.close()
    assert bench.backlog.tokens_ahead() == 0
    bench.enter(num_choices=40)


def test_all_or_none(bench: Bench) -> None:
    for _ in range(3):
        bench.enter()
    with pytest.raises(Overloaded):
        bench.backlog.enter([Work(1, 10)] * 2, bench.ready)
    bench.enter()  # nothing of the refused two was kept


def test_tokens() -> None:
    bench = Bench(requests=0, tokens=1000)
    for _ in range(2):
        bench.enter(5000).start()  # they run: nothing of them waits
    bench.enter(900)
    with pytest.raises(Overloaded, match="about 900 tokens are waiting, and with 200 more it would be more than 1000"):
        bench.enter(200)
    assert bench.shed == ["waiting_tokens"]
    bench.enter(100)


def test_pages_are_the_limit_where_there_are_more_slots() -> None:
    bench = Bench(requests=0, tokens=1000)
    bench.ready = msgspec.structs.replace(bench.ready, max_num_seqs=100, kv_cache_tokens=4000)
    for _ in range(4):
        bench.enter(1000)
    assert bench.backlog.tokens_ahead() == 0
    bench.enter(1000)
    assert bench.backlog.tokens_ahead() == 1000
    with pytest.raises(Overloaded):
        bench.enter(1)


def test_retry_after_is_the_work_ahead_at_the_present_pace() -> None:
    bench = Bench(tokens=0)
    tickets = [bench.enter(1000) for _ in range(4)]
    assert bench.backlog.wait_s() == 0.0  # nothing is known yet
    with pytest.raises(Overloaded) as refused:
        bench.enter()
    assert refused.value.retry_after_s == 1
    for ticket in tickets[:2]:
        ticket.start()
    bench.work(10, tokens_a_second=200)
    with pytest.raises(Overloaded, match="try again in 10 s") as refused:
        bench.enter()
    assert refused.value.retry_after_s == 10
    bench.work(120, tokens_a_second=1)
    with pytest.raises(Overloaded) as refused:
        bench.enter()
    assert refused.value.retry_after_s == MAX_WAIT_S


def test_the_pace_is_that_of_a_full_engine(bench: Bench) -> None:
    """One request alone is slow a token, and says nothing of what the engine could do."""
    alone = bench.enter(1000)
    alone.start()
    bench.work(60, tokens_a_second=3)
    for _ in range(3):
        bench.enter(1000)
    bench.work(10, tokens_a_second=500)
    assert bench.backlog.wait_s() == pytest.approx(2000 / 500, rel=0.05)


def test_another_engine_counts_from_zero(bench: Bench) -> None:
    for _ in range(4):
        bench.enter(1000)
    bench.work(10, tokens_a_second=500)
    bench.generated = 0
    bench.work(10, tokens_a_second=500)
    assert bench.backlog.wait_s() == pytest.approx(bench.backlog.tokens_ahead() / 500, rel=0.15)


@pytest.mark.parametrize("comes_meanwhile", [True, False])
def test_the_time_without_an_engine_is_not_its_pace(bench: Bench, comes_meanwhile: bool) -> None:
    """Of five engines that died one after the other the pace was so small that the next request was too much for a minute."""
    for _ in range(4):
        bench.enter(1000)
    bench.work(10, tokens_a_second=500)
    for life in range(1, 6):
        bench.life = None
        if comes_meanwhile:
            bench.work(20, tokens_a_second=0)
        else:
            bench.now += 20.0
        bench.life = life
        bench.work(4, tokens_a_second=500)
    assert bench.backlog.wait_s() == pytest.approx(bench.backlog.tokens_ahead() / 500, rel=0.1)


def test_by_default_a_minute_of_work_may_wait() -> None:
    bench = Bench(requests=0)
    for _ in range(2):
        bench.enter(1000).start()
    bench.enter(1000)
    bench.work(10, tokens_a_second=100)
    bench.enter(4900)
    with pytest.raises(Overloaded, match="60 s of work"):
        bench.enter(200)


def test_what_is_expected(bench: Bench) -> None:
    expect = bench.backlog.expect
    assert expect(10, SamplingParams(max_tokens=7)) == Work(1, 17, 7)
    assert expect(10, SamplingParams(max_tokens=100_000)) == Work(1, 10 + 256, 256)
    assert expect(10, SamplingParams(max_tokens=100_000, min_tokens=500)) == Work(1, 510, 500)
    assert expect(10, SamplingParams(max_tokens=1000, ignore_eos=True, n=3)) == Work(3, 3010, 3000)
    for _ in range(500):
        bench.backlog.learn(SamplingParams(max_tokens=100_000), 40)
        bench.backlog.learn(SamplingParams(max_tokens=9000, ignore_eos=True), 9000)
    assert expect(10, SamplingParams(max_tokens=100_000)).num_tokens == pytest.approx(50, abs=1)


# -- over HTTP ---------------------------------------------------------------------------------------------------------

ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
    "/v1/responses": {"input": "a", "max_output_tokens": 4},
    "/v1/embeddings": {"input": "a"},
}


def metric(text: str, name: str, **labels: str) -> float:
    for line in text.splitlines():
        if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


@pytest.mark.parametrize("path", ENDPOINTS)
def test_of_a_burst_no_more_pass_than_may_wait(path: str) -> None:
    async def run() -> None:
        client = FakeEngineClient()
        client.gate.clear()
        client.accepting.clear()
        async with client.http(ServerConfig(model="tiny", max_waiting_requests=3)) as http:
            burst = [asyncio.create_task(http.post(path, json=ENDPOINTS[path])) for _ in range(30)]
            await until(lambda: sum(task.done() for task in burst) == 30 - SLOTS - 3)
            for task in burst:
                if task.done():
                    error = error_of(task.result(), 429)
                    assert error["type"] == "rate_limit_error" and "--max-waiting-requests" in error["message"]
                    assert 1 <= int(task.result().headers["Retry-After"]) <= MAX_WAIT_S
            client.accepting.set()
            client.gate.set()
            assert [(await task).status_code for task in burst].count(200) == SLOTS + 3
            assert (await http.post(path, json=ENDPOINTS[path])).status_code == 200
            text = (await http.get("/metrics")).text
            assert metric(text, "octavo_requests_shed_total", reason="waiting_requests") == 30 - SLOTS - 3
            assert metric(text, "octavo_backlog_tokens") == 0

    asyncio.run(run())


def test_a_wrong_request_is_wrong_under_load_too() -> None:
    async def run() -> None:
        client = FakeEngineClient()
        client.gate.clear()
        async with client.http(ServerConfig(model="tiny", max_waiting_requests=1)) as http:
            crowd = [asyncio.create_task(http.post("/v1/completions", json={"prompt": "a"})) for _ in range(SLOTS + 1)]
            await until(lambda: len(client.streams) == SLOTS + 1)
            assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 429
            assert (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 10_000})).status_code == 400
            client.gate.set()
            assert {(await task).status_code for task in crowd} == {200}

    asyncio.run(run())


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_end_makes_room(path: str) -> None:
    async def run() -> None:
        client = FakeEngineClient()
        body = ENDPOINTS[path]
        async with client.http(ServerConfig(model="tiny", max_waiting_requests=1)) as http:
            for _ in range(SLOTS + 2):
                client.refusal = InvalidRequest("no")
                assert (await http.post(path, json=body)).status_code == 400
                client.refusal = RuntimeError("a bug")  # type: ignore[assignment]
                assert (await http.post(path, json=body)).status_code == 500
                client.refusal = None
                if path != "/v1/embeddings":
                    client.fail_after = 1
                    assert (await http.post(path, json={**body, "stream": True})).status_code == 200
                    client.fail_after = None
                await _leave(client, http, path, body)
            text = (await http.get("/metrics")).text
            assert metric(text, "octavo_backlog_tokens") == 0
            client.accepting.clear()
            crowd = [asyncio.create_task(http.post(path, json=body)) for _ in range(SLOTS + 2)]
            await until(lambda: sum(task.done() for task in crowd) == 1)  # all places are there, and not one more
            client.accepting.set()
            assert sorted([(await task).status_code for task in crowd]) == [200] * (SLOTS + 1) + [429]

    asyncio.run(run())


async def _leave(client: FakeEngineClient, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    """A request whose client goes away before it was accepted."""
    client.accepting.clear()
    gone = asyncio.create_task(http.post(path, json=body))
    await asyncio.sleep(0.005)
    gone.cancel()
    await asyncio.wait({gone})
    client.accepting.set()
    await asyncio.sleep(0)


def test_restarts_of_the_engine_are_counted() -> None:
    async def run() -> None:
        client = FakeEngineClient()
        async with client.http() as http:
            assert metric((await http.get("/metrics")).text, "octavo_engine_restarts_total") == 0
            client.num_restarts = 2
            assert metric((await http.get("/metrics")).text, "octavo_engine_restarts_total") == 2

    asyncio.run(run())
