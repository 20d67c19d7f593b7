"""What the engine process does on the CPU in every step, over a runner that answers at once: no model, no torch.

    .venv/bin/python scripts/bench_engine_loop.py --concurrency 1 256 --input-len 512 --output-len 256

Real messages over a real socket, real scheduler and pages; a closed loop of requests. Printed are medians over the steps that
hold decodes alone, one a request, split into what they do, and the cost of a request's arrival. On a GPU all of it happens
while the device runs another step, so it costs nothing as long as it is shorter than that step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import msgspec
import zmq

from engine.core import EngineCore
from engine.kv_cache_manager import KVCacheManager
from engine.messages import AddRequest, EngineMessage, FrontendMessage, Hello, RequestOutput, StepOutputs
from engine.process import EngineLoop, FrontendSocket
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.step import HostMasks, KVGroupSpec, ModelRunnerOutput, SchedulerOutput

VOCAB_SIZE = 128_256
BLOCK_SIZE = 16
PARTS = ("receive", "schedule", "update", "send")


class InstantOutput:
    """A step's result, ready."""

    def __init__(self, output: ModelRunnerOutput) -> None:
        self._output = output

    def done(self) -> bool:
        return True

    def wait(self) -> ModelRunnerOutput:
        return self._output


class InstantRunner:
    """Samples the same token for every row, in no time."""

    def __init__(self) -> None:
        self.last_step: SchedulerOutput | None = None

    def launch(self, step: SchedulerOutput) -> None:
        self.last_step = step

    def sample(self, masks: HostMasks | None) -> InstantOutput:
        assert self.last_step is not None
        count = len(self.last_step.sampled_rows)
        return InstantOutput(ModelRunnerOutput(self.last_step.step_id, [1234] * count, [None] * count, {}))

    def idle(self) -> bool:
        return False


class Stopwatch:
    """Seconds by part since it was last read."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, part: str, started: float) -> None:
        self._seconds[part] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds


class TimedScheduler(Scheduler):
    watch: Stopwatch

    def schedule(self) -> SchedulerOutput | None:
        started = time.perf_counter()
        step = super().schedule()
        self.watch.add("schedule", started)
        return step

    def update(self, result: ModelRunnerOutput) -> list[RequestOutput]:
        started = time.perf_counter()
        outputs = super().update(result)
        self.watch.add("update", started)
        return outputs


class TimedSocket(FrontendSocket):
    watch: Stopwatch
    num_sent = 0

    def receive(self, timeout_ms: int) -> list[FrontendMessage]:
        started = time.perf_counter()
        messages = super().receive(timeout_ms)
        self.watch.add("receive", started)
        return messages

    def send(self, identity: bytes, message: EngineMessage) -> None:
        started = time.perf_counter()
        super().send(identity, message)
        self.watch.add("send", started)
        self.num_sent += 1


class Client:
    """A frontend in the same process; what it does happens between the turns and is not timed."""

    def __init__(self, address: str, input_len: int, output_len: int) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"bench")
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)
        self._random = random.Random(0)
        self._input_len, self._output_len = input_len, output_len
        self._num_sent = self._num_read = 0
        self.send(Hello())

    def send(self, message: FrontendMessage) -> None:
        self._socket.send(self._encoder.encode(message))

    def add_request(self) -> None:
        self._num_sent += 1
        prompt = [self._random.randrange(VOCAB_SIZE) for _ in range(self._input_len)]
        sampling = SamplingParams(max_tokens=self._output_len, temperature=0.0, ignore_eos=True)
        self.send(AddRequest(request_id=f"bench:{self._num_sent}", prompt_token_ids=prompt, sampling=sampling))

    def take(self, num_messages: int) -> tuple[int, int]:
        """Read until num_messages have come in all; returns the number of tokens, and of requests that finished."""
        num_tokens = num_finished = 0
        while self._num_read < num_messages:
            message = self._decoder.decode(self._socket.recv())
            self._num_read += 1
            for output in message.outputs if isinstance(message, StepOutputs) else ():
                num_tokens += len(output.token_ids)
                num_finished += output.finish_reason is not None
        return num_tokens, num_finished

    def close(self) -> None:
        self._socket.close()


class Bench:
    """One engine loop with its client."""

    def __init__(self, folder: str, concurrency: int, input_len: int, output_len: int, max_num_batched_tokens: int) -> None:
        self.watch = Stopwatch()
        group = KVGroupSpec(layer_indices=(0,), num_kv_heads=8, head_dim=128, window=None, bytes_per_block=1)
        blocks_per_request = -(-(input_len + output_len) // BLOCK_SIZE)
        self.kv_cache = KVCacheManager(
            [group],
            [2 * concurrency * blocks_per_request],
            block_size=BLOCK_SIZE,
            max_step_tokens=2 * max_num_batched_tokens,
        )
        scheduler = TimedScheduler(
            self.kv_cache,
            max_num_seqs=concurrency,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=input_len + output_len,
        )
        self.runner = InstantRunner()
        core = EngineCore(scheduler, self.runner, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({2}), pipeline_depth=1)
        address = f"ipc://{folder}/{time.monotonic_ns()}"
        self.socket = TimedSocket(address)
        scheduler.watch = self.socket.watch = self.watch
        self._loop = EngineLoop(core, self.socket, epoch=1)
        self.client = Client(address, input_len, output_len)
        while not self.socket.frontends:
            self.socket.receive(1000)

    def turn(self) -> dict[str, float]:
        """Seconds of one turn of the loop, by part."""
        self.watch.read()
        started = time.perf_counter()
        self._loop.turn()
        total = time.perf_counter() - started
        seconds = self.watch.read()
        return {**seconds, "other": total - sum(seconds.values()), "total": total}

    def close(self) -> None:
        self.client.close()
        self.socket.close()


def run_decodes(folder: str, concurrency: int, args: argparse.Namespace) -> dict[str, float]:
    """A closed loop of `concurrency` requests. Microseconds of the median step of decodes alone, all running, by part."""
    bench = Bench(folder, concurrency, args.input_len, args.output_len, args.max_num_batched_tokens)
    num_requests = max(4, args.rounds * concurrency)
    num_open = num_sent = num_tokens = 0
    turns, seconds = [], 0.0
    while True:
        while num_sent < num_requests and num_open < concurrency:
            bench.client.add_request()
            num_open, num_sent = num_open + 1, num_sent + 1
        if not num_open:
            break
        turn = bench.turn()
        seconds += turn["total"]
        step = bench.runner.last_step
        if step is not None and step.num_tokens == [1] * concurrency:
            turns.append(turn)
        new_tokens, num_finished = bench.client.take(bench.socket.num_sent)
        num_tokens, num_open = num_tokens + new_tokens, num_open - num_finished
    bench.close()
    medians = {part: 1e6 * statistics.median(turn.get(part, 0.0) for turn in turns) for part in (*PARTS, "other", "total")}
    medians["total p99"] = 1e6 * statistics.quantiles([turn["total"] for turn in turns], n=100)[98]
    return {**medians, "a sequence": medians["total"] / concurrency, "tokens/s": num_tokens / seconds}


def run_arrivals(folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Microseconds for one arriving request, from many that arrive in one turn and whose prompts fit in one step."""
    count = 64
    bench = Bench(folder, count, args.input_len, args.output_len, count * args.input_len)
    for _ in range(count):
        bench.client.add_request()
    time.sleep(0.2)  # until all have reached the engine's socket
    turn = bench.turn()
    step = bench.runner.last_step
    assert step is not None and len(step.slots) == count, "not all requests had arrived"
    bench.close()
    return {part: 1e6 * turn.get(part, 0.0) / count for part in ("receive", "other", "schedule", "send", "total")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--rounds", type=int, default=3, help="requests in all, as a multiple of the concurrency")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        record = {f"{n} decoding": run_decodes(folder, n, args) for n in args.concurrency}
        record["an arrival"] = run_arrivals(folder, args)
    for title, figures in record.items():
        print(f"{title}, µs: " + " · ".join(f"{name} {value:,.1f}" for name, value in figures.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
