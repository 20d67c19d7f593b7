"""The engine's own core in this process, for the scripts that measure one idea each.

A model is loaded once; each side of a comparison is a new core over it, with the one thing changed that is to be compared: a
subclass of the scheduler or of the KV cache manager, or one of their settings. Nothing here plans or runs a step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from dummy_model import SHAPES, write_model

from engine.build import LoadedEngine, load_engine
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.kv_cache_manager import KVCacheManager
from engine.messages import AddRequest, RequestOutput
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.step import HostMasks, ModelRunnerOutput, PendingOutput, Runner, SchedulerOutput


def load(
    model: str,
    device: str,
    *,
    cache: CacheConfig | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_model_len: int | None = None,
    attention_backend: str = "auto",
    dtype: str = "auto",
) -> LoadedEngine:
    """model: "demo", a folder, a Hub id, or a name of dummy_model.SHAPES, which gets random weights. Raises OctavoError."""
    with tempfile.TemporaryDirectory() as folder:
        is_shape = model in SHAPES
        return load_engine(
            EngineConfig(
                model=ModelConfig(
                    model=str(write_model(model, Path(folder) / model)) if is_shape else model,
                    load_format="dummy" if is_shape else "auto",
                    max_model_len=max_model_len,
                    dtype=dtype,
                ),
                cache=cache or CacheConfig(),
                scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
                device=device,
                attention_backend=attention_backend,
            ),
            lambda phase, detail, fraction: None,
        )


def make_core(
    engine: LoadedEngine,
    *,
    runner: Runner | None = None,
    kv_cache: KVCacheManager | None = None,
    scheduler_class: Callable[..., Scheduler] = Scheduler,
    enable_prefix_caching: bool = True,
    pipeline_depth: int | None = None,
    **scheduler_settings: Any,
) -> EngineCore:
    """A core over a loaded model, wired as the engine wires its own. Only one at a time may have requests.

    runner: in place of the model's, for instance a `TimedRunner` around it. kv_cache: a fresh one over all the engine's pages
    where none is given. scheduler_settings: see Scheduler; max_num_seqs may not exceed the engine's.
    """
    limits, ready = engine.limits, engine.ready
    depth = limits.pipeline_depth if pipeline_depth is None else pipeline_depth
    settings = {
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_num_mixed_tokens": limits.max_num_mixed_tokens,
        "max_model_len": ready.max_model_len,
        **scheduler_settings,
    }
    if kv_cache is None:
        kv_cache = KVCacheManager(
            engine.groups,
            ready.num_blocks,
            block_size=ready.block_size,
            max_step_tokens=settings["max_num_batched_tokens"] * (1 + depth),
            enable_prefix_caching=enable_prefix_caching,
        )
    return EngineCore(
        scheduler_class(kv_cache, **settings),
        runner or engine.runner,
        vocab_size=engine.vocab_size,
        eos_token_ids=frozenset(engine.eos_token_ids),
        pipeline_depth=depth,
    )


def make_bare_core(
    kv_cache: KVCacheManager,
    *,
    scheduler_class: Callable[..., Scheduler] = Scheduler,
    vocab_size: int = 32000,
    **scheduler_settings: Any,
) -> EngineCore:
    """A core without a model, whose steps take no time: for what depends on no clock. scheduler_settings: see Scheduler."""
    return EngineCore(
        scheduler_class(kv_cache, **scheduler_settings),
        InstantRunner(),
        vocab_size=vocab_size,
        eos_token_ids=frozenset(),
        pipeline_depth=0,
    )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as it was launched. slots and num_tokens: a row each; seconds: from its launch until its result was there."""

    started_s: float
    seconds: float
    slots: list[int]
    num_tokens: list[int]


class TimedRunner:
    """A runner that notes every step of the one that it hands them to."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._launched_s = 0.0
        self._step: SchedulerOutput | None = None
        self.steps: list[StepRecord] = []

    def launch(self, step: SchedulerOutput) -> None:
        self._step, self._launched_s = step, time.perf_counter()
        self._runner.launch(step)

    def sample(self, masks: HostMasks | None) -> PendingOutput:
        assert self._step is not None
        return _TimedOutput(self._runner.sample(masks), self.steps, self._step, self._launched_s)

    def idle(self) -> bool:
        return self._runner.idle()


@dataclass(slots=True)
class _TimedOutput:
    pending: PendingOutput
    steps: list[StepRecord]
    step: SchedulerOutput
    launched_s: float

    def done(self) -> bool:
        return self.pending.done()

    def wait(self) -> ModelRunnerOutput:
        result = self.pending.wait()
        seconds = time.perf_counter() - self.launched_s
        self.steps.append(StepRecord(self.launched_s, seconds, list(self.step.slots), list(self.step.num_tokens)))
        return result


class InstantRunner:
    """No model: every row samples the same token, in no time. For what depends on no clock: steps, tokens and pages."""

    def __init__(self) -> None:
        self._step: SchedulerOutput | None = None

    def launch(self, step: SchedulerOutput) -> None:
        self._step = step

    def sample(self, masks: HostMasks | None) -> InstantOutput:
        assert self._step is not None
        count = len(self._step.sampled_rows) + len(self._step.forks)
        return InstantOutput(ModelRunnerOutput(self._step.step_id, [7] * count, [None] * count, {}))

    def idle(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class InstantOutput:
    """A step's result, ready."""

    output: ModelRunnerOutput

    def done(self) -> bool:
        return True

    def wait(self) -> ModelRunnerOutput:
        return self.output


# -- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """A request to come: its prompt, how many tokens it wants in each of n choices, and when it arrives, in seconds from the
    start."""

    prompt: list[int]
    max_tokens: int
    arrival_s: float = 0.0
    n: int = 1


@dataclass(slots=True)
class Answer:
    """What came of a request: its choices' tokens, and when each of them was there, in seconds from the start."""

    load: Load
    tokens: list[list[int]] = field(default_factory=list)
    times_s: list[list[float]] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    def take(self, output: RequestOutput, now_s: float) -> None:
        self.tokens[output.choice_index] += output.token_ids
        self.times_s[output.choice_index] += [now_s] * len(output.token_ids)
        self.num_preemptions = max(self.num_preemptions, output.num_preemptions)
        if output.error is not None:
            raise RuntimeError(f"a request failed: {output.error.message}")

    @property
    def first_token_s(self) -> float:
        """From its arrival."""
        return min(times[0] for times in self.times_s) - self.load.arrival_s

    @property
    def end_s(self) -> float:
        """From its arrival."""
        return max(times[-1] for times in self.times_s) - self.load.arrival_s


def random_prompt(generator: np.random.Generator, length: int, vocab_size: int) -> list[int]:
    """Token ids that no other prompt begins with, but by chance."""
    return [int(token) for token in generator.integers(3, vocab_size - 3, length)]


def add(core: EngineCore, request_id: str, load: Load, **sampling: Any) -> None:
    """Queue a greedy request of exactly max_tokens tokens a choice."""
    settings = {"temperature": 0.0, "ignore_eos": True, "max_tokens": load.max_tokens, "n": load.n, **sampling}
    core.add(AddRequest(request_id=request_id, prompt_token_ids=load.prompt, sampling=SamplingParams(**settings)))


def serve(
    core: EngineCore,
    loads: Sequence[Load],
    *,
    after_step: Callable[[], None] | None = None,
    on_finish: Callable[[], None] | None = None,
    **sampling: Any,
) -> list[Answer]:
    """Give the core each request when it is due, and step until all have ended. after_step is called between steps, on_finish
    for every choice that ends. Waits only where nothing runs and the next request is not there yet."""
    order = sorted(range(len(loads)), key=lambda index: loads[index].arrival_s)
    answers = [Answer(load, [[] for _ in range(load.n)], [[] for _ in range(load.n)]) for load in loads]
    due = iter(order)
    next_index = next(due, None)
    started = time.perf_counter()
    while next_index is not None or core.has_work:
        now = time.perf_counter() - started
        while next_index is not None and loads[next_index].arrival_s <= now:
            add(core, f"load:{next_index}", loads[next_index], **sampling)
            next_index = next(due, None)
        if not core.has_work:
            assert next_index is not None
            time.sleep(max(0.0, loads[next_index].arrival_s - now))
            continue
        outputs = core.step()
        now = time.perf_counter() - started
        for output in outputs:
            answers[int(output.request_id.split(":")[1])].take(output, now)
            if output.finish_reason is not None and on_finish is not None:
                on_finish()
        if after_step is not None:
            after_step()
    return answers


def output_tokens(answers: Iterable[Answer]) -> int:
    return sum(len(tokens) for answer in answers for tokens in answer.tokens)


def gaps_s(answers: Iterable[Answer]) -> Iterator[float]:
    """Inter-token latencies of all choices."""
    for answer in answers:
        for times in answer.times_s:
            yield from (after - before for before, after in pairwise(times))
