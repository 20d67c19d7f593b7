"""Time limits through the real client, socket, process and scheduler, over an engine without a model."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from engine.client import EngineClient
from engine.deadlines import FIRST_TOKEN, WHOLE
from engine.errors import DeadlineExceeded
from engine.sampling_params import SamplingParams, choice_seed
from tests.crashes import make_model, running, until
from tests.fake_engine import MAX_NUM_SEQS
from tests.fake_runner import expected_tokens

PROMPT = [5, 6, 7]
LONG = SamplingParams(max_tokens=300, seed=1)
SHORT_S = 0.5


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_waiting_and_running_requests_end_in_time(tmp_path: Path, pipeline_depth: int) -> None:
    async def scenario() -> None:
        async with running(make_model(tmp_path / "m", step_s=0.02, pipeline_depth=pipeline_depth)) as client:
            crowd = [await client.generate(PROMPT, LONG) for _ in range(MAX_NUM_SEQS - 1)]
            await late_in_the_middle(client)
            crowd.append(await client.generate(PROMPT, LONG))
            await late_in_the_queue(client)
            for stream in crowd:
                stream.abort()
            await until(lambda: client.stats.num_running == client.stats.num_waiting == 0)
            await until(lambda: client.stats.num_referenced_blocks == 0)

    asyncio.run(scenario())


async def late_in_the_middle(client: EngineClient) -> None:
    """Its first token is in time, and what it has said by its end is right."""
    now = time.monotonic()
    stream = await client.generate(PROMPT, LONG, first_token_deadline_s=now + 60, deadline_s=now + SHORT_S)
    tokens: list[int] = []
    with pytest.raises(DeadlineExceeded) as late:
        async for deltas in stream:
            tokens += [token_id for delta in deltas for token_id in delta.token_ids]
    assert time.monotonic() >= now + SHORT_S and late.value.param == WHOLE
    assert tokens == expected_tokens(PROMPT, choice_seed(LONG.seed, 0), len(tokens)) and len(tokens) < LONG.max_tokens


async def late_in_the_queue(client: EngineClient) -> None:
    """All slots are taken."""
    await until(lambda: client.stats.num_running == MAX_NUM_SEQS)
    now = time.monotonic()
    stream = await client.generate(PROMPT, LONG, first_token_deadline_s=now + SHORT_S)
    with pytest.raises(DeadlineExceeded) as late:
        await anext(stream)
    assert late.value.param == FIRST_TOKEN and "0 tokens" in late.value.message
