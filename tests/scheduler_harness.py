"""Scheduler and core over the fake runner, with the books checked after every step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.core import EngineCore
from engine.kv_cache_manager import KVCacheManager
from engine.messages import AddRequest, ErrorInfo, Pooling, RequestOutput
from engine.sampling_params import SamplingParams, choice_seed
from engine.scheduler import Scheduler
from tests.fake_runner import VOCAB_SIZE, FakeRunner, expected_tokens, group


@dataclass
class Harness:
    """A core over the fake runner, with what it said so far by (request, choice)."""

    num_blocks: int = 64
    block_size: int = 4
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 16
    max_num_mixed_tokens: int | None = None
    max_model_len: int = 200
    windows: tuple[int | None, ...] = (None,)
    depth: int = 0
    caching: bool = True
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    finished: dict[tuple[str, int], str] = field(default_factory=dict)
    errors: dict[str, ErrorInfo] = field(default_factory=dict)
    outputs: list[RequestOutput] = field(default_factory=list)
    num_choices: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = [group(window) for window in self.windows]
        self.kv = KVCacheManager(
            groups,
            [self.num_blocks] * len(groups),
            block_size=self.block_size,
            max_step_tokens=self.max_num_batched_tokens * (1 + self.depth),
            enable_prefix_caching=self.caching,
        )
        self.scheduler = Scheduler(
            self.kv,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_mixed_tokens=self.max_num_mixed_tokens,
            max_model_len=self.max_model_len,
        )
        self.runner = FakeRunner(groups, self.block_size)
        self.core = EngineCore(
            self.scheduler, self.runner, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({2}), pipeline_depth=self.depth
        )

    def add(
        self,
        request_id: str,
        prompt: list[int],
        *,
        priority: int = 0,
        pooling: Pooling | None = None,
        alone: bool = False,
        first_token_deadline_s: float | None = None,
        deadline_s: float | None = None,
        output: Sequence[list[int]] = (),
        **sampling: object,
    ) -> None:
        """output: what an earlier engine produced, by choice."""
        params = SamplingParams(**{"max_tokens": 0 if pooling else 8, **sampling})
        self.num_choices[request_id] = params.n
        self.core.add(
            AddRequest(
                request_id=request_id,
                prompt_token_ids=prompt,
                output_token_ids=list(output),
                sampling=params,
                priority=priority,
                pooling=pooling,
                alone=alone,
                first_token_deadline_s=first_token_deadline_s,
                deadline_s=deadline_s,
            )
        )
        for choice, tokens in enumerate(output):
            self.tokens[request_id, choice] = list(tokens)

    def step(self) -> list[RequestOutput]:
        outputs = self.core.step()
        self.core.check_integrity()
        for output in outputs:
            key = (output.request_id, output.choice_index)
            assert key not in self.finished, "output after the end"
            if output.error is not None:
                self._end_with_error(output)
                continue
            known = self.tokens.setdefault(key, [])
            assert output.first_token_index == len(known)
            known.extend(output.token_ids)
            if output.finish_reason:
                self.finished[key] = output.finish_reason
        self.outputs.extend(outputs)
        return outputs

    def _end_with_error(self, output: RequestOutput) -> None:
        """An error ends all choices of a request, as a frontend has it."""
        assert output.error is not None and output.finish_reason == "error"
        self.errors[output.request_id] = output.error
        for choice in range(self.num_choices[output.request_id]):
            self.finished.setdefault((output.request_id, choice), "error")

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.core.has_work:
                break
            self.step()
        assert not self.core.has_work, "the engine did not come to an end"
        assert self.kv.num_referenced_blocks == 0


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


def expect(prompt: list[int], count: int, *, seed: int = 0, choice: int = 0) -> list[int]:
    return expected_tokens(prompt, choice_seed(seed, choice), count)
