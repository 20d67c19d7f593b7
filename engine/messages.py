"""What crosses the border between frontend and engine process: msgpack structs over ZMQ, nothing else.

Frontend -> engine: Hello, AddRequest, Abort, ResetPrefixCache, SetLogLevel, Shutdown.  Engine -> frontend: LoadProgress,
EngineReady, EngineFailed, Accepted, Refused, StepOutputs.  The first message about a request is Accepted or Refused.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from engine.config import EngineConfig
from engine.errors import ERROR_CLASSES, OctavoError
from engine.histogram import HistogramCounts
from engine.logs import LogConfig
from engine.sampling_params import SamplingParams

Pooling = Literal["mean", "last"]


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as data. kind: the class's name in `engine.errors`."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: OctavoError) -> ErrorInfo:
        return cls(type(error).__name__, error.message, error.param, error.code, error.retry_after_s)

    def to_exception(self) -> OctavoError:
        kind = ERROR_CLASSES.get(self.kind, OctavoError)
        return kind(self.message, param=self.param, code=self.code, retry_after_s=self.retry_after_s)


CrashPlace = Literal["loading", "before_step", "after_sampling", "after_sending"]
CrashKind = Literal["kill", "segfault", "exit", "cuda_error", "memory_error", "hang", "spin"]


class CrashPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a test lets the engine die. place: where; at the `step`-th time (from 1) that the engine comes by. kind: how;
    "hang" sleeps for ever, "spin" keeps the interpreter to itself as well.

    epochs: in which lives of the engine; None in all. token_id: counts only steps that begin with a prompt that has this token.
    """

    place: CrashPlace
    kind: CrashKind
    step: int = 1
    epochs: tuple[int, ...] | None = (1,)
    token_id: int | None = None


class Launch(msgspec.Struct, frozen=True):
    """What the parent writes to the engine's stdin, one line of JSON. address: the ZMQ endpoint to bind; epoch: which life of
    the engine this is, counted by the supervisor; started_s: time.monotonic(), which all processes share, at its start.
    flight_path: the file of the flight recorder. stack_path: where the stacks go that the parent asks for with SIGUSR1.
    log: what goes to stderr, and how."""

    address: str
    epoch: int
    started_s: float
    config: EngineConfig
    flight_path: str
    stack_path: str
    log: LogConfig = LogConfig()
    crash_point: CrashPoint | None = None


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A frontend's first message: from now on the engine knows where to send."""


class AddRequest(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """One request of `sampling.n` choices.

    request_id: begins with the sending frontend's id. output_token_ids: per choice, what an earlier engine already
    produced (replay); empty for a new request. finished_choices: those that ended there and are not to run again.
    alone: runs in steps of its own until one of them has completed, then joins the others. first_token_deadline_s, deadline_s:
    time.monotonic(), which all processes of a machine share, after which it ends with DeadlineExceeded, waiting or running.
    cache_salt: mixed into the prefix hashes, so that salts share nothing.
    priority: lower ones leave the queue first. pooling: the prompt's embedding is wanted, the mean of its tokens' last hidden
    states or that of its last token; then `sampling.max_tokens` is 0.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output_token_ids: list[list[int]] = []
    finished_choices: list[int] = []
    alone: bool = False
    first_token_deadline_s: float | None = None
    deadline_s: float | None = None
    cache_salt: str = ""
    priority: int = 0
    pooling: Pooling | None = None


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Stop these and free what they hold; no further output follows. choice_index None means the whole request."""

    request_id: str
    choice_index: int | None = None


class ResetPrefixCache(msgspec.Struct, tag=True, frozen=True):
    """Forget what the pages hold: no later request finds its prefix until it is computed again. Pages in use stay in use."""


class SetLogLevel(msgspec.Struct, tag=True, frozen=True):
    """Log what is at least of this level, a name of logging's in small letters."""

    level: str


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Leave the loop and exit 0."""


class LoadProgress(msgspec.Struct, tag=True, frozen=True):
    """One line of start-up progress. fraction: 0..1 within the phase, None where unknown."""

    phase: str
    detail: str = ""
    fraction: float | None = None


class EngineReady(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What was decided at load. Sizes in tokens unless named otherwise.

    model_dir: local folder with config and tokenizer, read by the frontend. eos_token_ids: union of config and
    generation config. generation_defaults: the model's sampling defaults (empty with `--generation-config none`).
    num_blocks: pages by KV group. load_seconds: phase -> seconds. free_device_bytes: of a card, before anything was loaded; 0
    on a CPU.
    """

    model_dir: str
    architecture: str
    device: str
    dtype: str
    attention_backend: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: list[int]
    kv_cache_bytes: int
    kv_cache_tokens: int
    eos_token_ids: list[int]
    generation_defaults: dict[str, Any]
    load_seconds: dict[str, float]
    notes: list[str]
    free_device_bytes: int = 0


class EngineFailed(msgspec.Struct, tag=True, frozen=True):
    """The engine could not start or cannot go on; it exits after this message."""

    error: ErrorInfo


class Accepted(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class Refused(msgspec.Struct, tag=True, frozen=True):
    request_id: str
    error: ErrorInfo


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one position: the chosen (or given) token's logprob and rank (1 is best), and the best tokens, best first."""

    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """New tokens of one choice. As an array it is sent without the names of its fields.

    first_token_index: index of token_ids[0] among the choice's output, so that a repeated token is recognised.
    finish_reason: "stop" | "length" | "error" | None; stop_token_id: the token that ended it, included in token_ids.
    Set with the choice's first output only: num_cached_tokens, prompt tokens that the prefix cache served; prompt_logprobs, one
    entry a prompt token, the first None; queue_s and prefill_s; embedding: float32 [hidden size], little endian, not
    normalised. num_preemptions: so far.
    """

    request_id: str
    choice_index: int = 0
    first_token_index: int = 0
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    num_cached_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    embedding: bytes | None = None
    num_preemptions: int = 0


STEP_TIME_BOUNDS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10,
)  # fmt: skip
STEP_TOKENS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class DeviceUsage(msgspec.Struct, frozen=True):
    """What there is of a device, and what of it is in use. name: as torch names it. utilization: 0 to 1, None where the driver
    does not say."""

    name: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilization: float | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges of now, and counters since the engine process started.

    num_waiting: those that wait for something else than room in a step are in num_deferred too. num_cached_blocks: free, and
    to be found again. prefix_query_tokens: prompt tokens looked up in the prefix cache. computed_tokens: through the model.
    recomputed_tokens: of those, once more after a preemption or for an engine that died. step_time: seconds, by
    STEP_TIME_BOUNDS_S; step_tokens: by STEP_TOKENS_BOUNDS. resident_bytes, cpu_seconds: of the engine process.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_deferred: int = 0
    num_blocks: int = 0
    num_referenced_blocks: int = 0
    num_cached_blocks: int = 0
    resident_bytes: int = 0
    devices: list[DeviceUsage] = []
    steps: int = 0
    step_time: HistogramCounts = HistogramCounts()
    step_tokens: HistogramCounts = HistogramCounts()
    computed_tokens: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    prefix_query_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    cpu_seconds: float = 0.0

    def after(self, earlier: EngineStats) -> EngineStats:
        """With the counters of the engines before this one added."""
        sums = {name: getattr(earlier, name) + getattr(self, name) for name in _COUNTERS}
        return msgspec.structs.replace(self, **sums)

    def between_engines(self, num_waiting: int) -> EngineStats:
        """After the engine's death: its counters, and so many choices that wait for the next one."""
        counters = {name: getattr(self, name) for name in (*_COUNTERS, "num_blocks")}
        return EngineStats(num_waiting=num_waiting, num_deferred=num_waiting, **counters)


# From `steps` on.
_COUNTERS = EngineStats.__struct_fields__[EngineStats.__struct_fields__.index("steps") :]


class StepOutputs(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Everything one step has for one frontend. epoch: which life of the engine it came from."""

    epoch: int
    outputs: list[RequestOutput]
    stats: EngineStats | None = None


FrontendMessage = Hello | AddRequest | Abort | ResetPrefixCache | SetLogLevel | Shutdown
EngineMessage = LoadProgress | EngineReady | EngineFailed | Accepted | Refused | StepOutputs
