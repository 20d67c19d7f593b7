"""The parts of a step that makes one token, each with its time and the bytes that it moves; `ideas_layer.py` shows them.

On a CPU a step's layers are one call of the compiled kernels, whose threads meet after every part: the kernels themselves note
the time there (`Stopwatch` in engine/kernels/cpu/decoder.h). What is around that call is timed from Python. Steps with clocks
and steps without take turns, so that both meet the same machine.

On a GPU a step is one CUDA graph, and a clock between two kernels would take longer than they do. There each part's calls of
all layers, on the engine's own objects and pages, become a graph of their own, and replays of it are timed on the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ideas_engine
import numpy as np
import torch
from ideas_engine import Load, random_prompt

from engine.attention.base import RaggedBatch
from engine.core import EngineCore
from engine.fused_decoder import Activations, DenseMlp, FusedDecoder
from engine.host_cores import usable_cores
from engine.kernels.cpu_ops import DECODER_PARTS, AttentionStruct, PackedLinear
from engine.linear import Linear
from engine.model_runner import ModelRunner
from engine.native_decoder import NativeDecoder

if TYPE_CHECKING:
    from engine.build import LoadedEngine

CALLS_IN_GRAPH = 32
REPLAYS = 10

Part = dict[str, Any]
"""part: its key in `ideas_layer.LABELS`; shape: of what goes in and out; calls in a step; seconds and bytes of all of them."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """E hidden, H query heads, K key/value heads, D head size, F intermediate, V vocabulary."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    def shapes(self, context: int) -> dict[str, str]:
        """By part, for people: what is multiplied, or goes in and out."""
        hidden, attended = f"x [1, {self.hidden}]", self.heads * self.head_dim
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "inputs": "ids, positions, tables",
            "embedding": f"id → {hidden}",
            "input_norm": hidden,
            "qkv": f"{hidden} · [{self.hidden}, {qkv}]",
            "rotary": f"q [{self.heads}, {self.head_dim}], k and v [{self.kv_heads}, {self.head_dim}] → page",
            "attention": f"q [{self.heads}, {self.head_dim}] over k, v [{context}, {self.kv_heads}, {self.head_dim}]",
            "output": f"[1, {attended}] · [{attended}, {self.hidden}]",
            "mlp_norm": hidden,
            "gate_up": f"{hidden} · [{self.hidden}, 2 × {self.intermediate}] → [1, {self.intermediate}]",
            "down": f"[1, {self.intermediate}] · [{self.intermediate}, {self.hidden}]",
            "final_norm": hidden,
            "head": f"{hidden} · [{self.hidden}, {self.vocab}]",
            "sampling": f"[1, {self.vocab}] → id",
            "around": "plan, inputs, results in Python",
        }


class OneRequest:
    """A request that decodes by itself after a context of so many tokens, one token a step."""

    def __init__(self, core: EngineCore, prompt: list[int], num_tokens: int) -> None:
        self._core = core
        ideas_engine.add(core, "token:0", Load(prompt, num_tokens))
        while not self.step():
            pass

    def step(self) -> list[int]:
        """The tokens that became known."""
        return [token for output in self._core.step() for token in output.token_ids]

    def timed_step(self) -> float:
        """Seconds."""
        started = time.perf_counter()
        self.step()
        return time.perf_counter() - started

    def end(self) -> None:
        """And wait for the steps in flight."""
        self._core.abort("token:0")
        while self._core.has_work:
            self._core.step()


def measure_context(engine: LoadedEngine, core: EngineCore, context: int, num_steps: int, seed: int) -> dict[str, Any]:
    """Parts and the whole step after a context of so many tokens. undivided_s: of the step measured whole, on a GPU by the
    device's clock; step_s: by the host's. Raises ValueError where the model's layers are not fused."""
    request = OneRequest(core, random_prompt(np.random.default_rng(seed), context, engine.vocab_size), 2 * num_steps + 4)
    fused, kv = engine.runner._model.fused, kv_bytes(engine, context)
    try:
        with torch.inference_mode():
            if isinstance(fused, NativeDecoder):
                found = _on_cpu(engine.runner, request, kv, context, num_steps)
            elif isinstance(fused, FusedDecoder) and all(isinstance(layer.mlp, DenseMlp) for layer in fused.layers):
                found = _on_gpu(engine.runner, request, kv, context, num_steps)
            else:
                raise ValueError("only dense decoders in fused form have these parts, and this model does not run as one here")
    finally:
        request.end()
    return {"context": context, **found}


# -- on a CPU ---------------------------------------------------------------------------------------------------------


def _on_cpu(runner: ModelRunner, request: OneRequest, kv: dict[str, int], context: int, num_steps: int) -> dict[str, Any]:
    decoder = runner._model.fused
    assert isinstance(decoder, NativeDecoder)
    whole, divided = [], []
    request.step()
    for _ in range(num_steps):
        whole.append(request.timed_step())
        with _clocks(runner, decoder) as seconds:
            total = request.timed_step()
        divided.append({**seconds, "around": total - sum(seconds.values())})
    num_bytes = _cpu_weights(runner, decoder) | kv
    sizes = _cpu_sizes(runner, decoder)
    shapes = sizes.shapes(context)
    parts = [
        {
            "part": name,
            "shape": shapes[name],
            "calls": sizes.layers if name in DECODER_PARTS[:-1] else 1,
            "seconds": statistics.median(step[name] for step in divided),
            "bytes": num_bytes.get(name, 0),
        }
        for name in ("embedding", *DECODER_PARTS, "head", "sampling", "around")
    ]
    return {"parts": parts, "undivided_s": statistics.median(whole), "step_s": statistics.median(whole)}


@contextmanager
def _clocks(runner: ModelRunner, decoder: NativeDecoder) -> Iterator[dict[str, float]]:
    """While they are set, a step's parts go to the dictionary."""
    seconds: dict[str, float] = {}
    in_layers = np.zeros(len(DECODER_PARTS))

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

        return call

    model = runner._model
    with ExitStack() as stack:
        for owner, attribute, value in (
            (decoder, "part_seconds", in_layers),
            (decoder, "_embed", timed("embedding", decoder._embed)),
            (model, "logits", timed("head", model.logits)),
            (runner, "_sample", timed("sampling", runner._sample)),
        ):
            stack.callback(setattr, owner, attribute, getattr(owner, attribute))
            setattr(owner, attribute, value)
        yield seconds
    seconds |= dict(zip(DECODER_PARTS, in_layers.tolist(), strict=True))


def _cpu_weights(runner: ModelRunner, decoder: NativeDecoder) -> dict[str, int]:
    """Bytes of weights that each part reads."""
    found: dict[str, int] = dict.fromkeys(("qkv", "output", "gate_up", "down"), 0)
    for layer in decoder._held:
        packed = [held for held in layer._held if isinstance(held, PackedLinear)]
        for name, linear in zip(found, packed, strict=True):
            found[name] += _packed_bytes(linear)
    head = _head(runner)
    norm = decoder._norm_weight
    assert norm is not None
    embed: Any = decoder._embed
    return {
        "embedding": embed.weight[0].nbytes,
        **found,
        "input_norm": norm.nbytes * len(decoder._held),
        "mlp_norm": norm.nbytes * len(decoder._held),
        "final_norm": norm.nbytes,
        "head": _packed_bytes(head._packed[1]) if head._packed else head.weight.nbytes,
        "sampling": 4 * runner._model._vocab_size,
    }


def _packed_bytes(packed: PackedLinear) -> int:
    return sum(tensor.nbytes for tensor in packed.held if tensor is not None)


def _cpu_sizes(runner: ModelRunner, decoder: NativeDecoder) -> Sizes:
    layer = decoder._layers[0]
    attention = AttentionStruct.from_address(layer.attention)
    return Sizes(
        layers=len(decoder._layers),
        hidden=layer.qkv.k,
        heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        intermediate=layer.down.k,
        vocab=runner._model._vocab_size,
    )


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def _on_gpu(runner: ModelRunner, request: OneRequest, kv: dict[str, int], context: int, num_steps: int) -> dict[str, Any]:
    for _ in range(3):  # until the slot's rows in the device's memory are those of a step of decodes
        request.step()
    steps = [request.timed_step() for _ in range(num_steps)]
    torch.cuda.synchronize()
    undivided_s = replayed_s(lambda: _whole_step(runner))
    parts = device_parts(runner, kv, context, replayed_s)
    return {"parts": parts, "undivided_s": undivided_s, "step_s": statistics.median(steps)}


def _whole_step(runner: ModelRunner) -> None:
    """As the engine's two graphs have it."""
    runner._decode(1)
    runner._draw(runner._logits[:1], 1, "greedy")


def replayed_s(work: Callable[[], object]) -> float:
    """Seconds on the device of all that `work` launches, as a CUDA graph."""
    for _ in range(2):  # what is compiled or set up at first use
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return _on_device_s(partial(_call_all, [graph.replay] * REPLAYS)) / REPLAYS


def _on_device_s(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def device_parts(
    runner: ModelRunner, kv: dict[str, int], context: int, seconds_of: Callable[[Callable[[], object]], float]
) -> list[Part]:
    """Of a step of one decode whose rows lie in the runner's static memory. Writes the token's keys and values once more."""
    sizes = _gpu_sizes(runner)
    shapes, num_bytes = sizes.shapes(context), _gpu_weights(runner) | kv
    parts = []
    for name, calls in _device_calls(runner).items():
        # A single call would be timed with the launch of its graph.
        work = calls if len(calls) > 1 else calls * CALLS_IN_GRAPH
        seconds = seconds_of(partial(_call_all, work))
        parts.append(
            {
                "part": name,
                "shape": shapes[name],
                "calls": len(calls),
                "seconds": seconds * len(calls) / len(work),
                "bytes": num_bytes.get(name, 0),
            }
        )
    return parts


def _call_all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _device_calls(runner: ModelRunner) -> dict[str, list[Callable[[], object]]]:
    """By part, in the order of the path: its calls in one step."""
    model, feed, backend = runner._model, runner._batch.feed, runner._backend
    fused = model.fused
    assert isinstance(fused, FusedDecoder) and feed is not None
    to = Activations.zeros(1, fused.layers[0])
    logits = torch.empty_like(runner._logits[:1])
    rows = feed.decode_rows(1)
    metadata = backend.prepare(RaggedBatch([], [], (), rows))
    ids = feed.decode_ids(1)
    to.residual.copy_(fused._embed(ids))
    calls: dict[str, list[Callable[[], object]]] = {
        "inputs": [lambda: (backend.prepare(RaggedBatch([], [], (), feed.decode_rows(1))), feed.decode_ids(1))],
        "embedding": [lambda: to.residual.copy_(fused._embed(ids))],
    }

    def of_layers(name: str, call: Callable[[Any], object]) -> None:
        calls[name] = [lambda layer=layer: call(layer) for layer in fused.layers]  # type: ignore[misc]

    def attend(layer: Any) -> None:
        q, k, v = layer.split(to.qkv)
        backend.attend(layer.index, q, k, v, metadata, layer.sinks, out_THD=to.attended.view(q.shape))  # type: ignore[attr-defined]

    first: Any = fused.layers[0]
    between = first.mlp.expand(None, to.residual, first.mlp_norm, first.post_attention_norm)
    of_layers("qkv", lambda layer: layer.project(None, to.residual, None, to.qkv))
    of_layers("rotary", lambda layer: backend.rotate_and_write(layer, to.qkv, rows))  # type: ignore[attr-defined]
    of_layers("attention", attend)
    of_layers("output", lambda layer: layer.leave_attention(to.attended, to.residual))
    of_layers("gate_up", lambda layer: layer.mlp.expand(None, to.residual, layer.mlp_norm, layer.post_attention_norm))
    of_layers("down", lambda layer: layer.mlp.contract(between, to.residual, layer.post_mlp_norm))
    calls["final_norm"] = [lambda: to.hidden.copy_(fused._norm.apply(to.residual))]
    calls["head"] = [lambda: logits.copy_(model.logits(to.hidden))]
    calls["sampling"] = [lambda: runner._draw(runner._logits[:1], 1, "greedy")]
    return calls


def _gpu_weights(runner: ModelRunner) -> dict[str, int]:
    """Bytes of weights that each part reads; a norm's are read by the product that it belongs to."""
    fused: Any = runner._model.fused
    linears = {
        "qkv": [(layer.qkv, layer.input_norm) for layer in fused.layers],
        "output": [(layer.output, None) for layer in fused.layers],
        "gate_up": [(layer.mlp.gate_up, layer.mlp_norm) for layer in fused.layers],
        "down": [(layer.mlp.down, None) for layer in fused.layers],
    }
    found = {
        name: sum(_linear_bytes(linear) + (norm.weight.nbytes if norm else 0) for linear, norm in pairs)
        for name, pairs in linears.items()
    }
    return found | {
        "embedding": fused._embed.weight[0].nbytes,
        "final_norm": fused._norm.weight.nbytes,
        "head": _linear_bytes(_head(runner)),
        "sampling": runner._logits[0].nbytes,
    }


def _linear_bytes(linear: Any) -> int:
    tensors = (linear.weight, getattr(linear, "weight_scale", None), getattr(linear, "bias", None))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _gpu_sizes(runner: ModelRunner) -> Sizes:
    fused: Any = runner._model.fused
    first = fused.layers[0]
    return Sizes(
        layers=len(fused.layers),
        hidden=first.output.out_features,
        heads=first.spec.num_heads,
        kv_heads=first.spec.num_kv_heads,
        head_dim=first.spec.head_dim,
        intermediate=first.mlp.down.in_features,
        vocab=runner._model._vocab_size,
    )


# -- both -------------------------------------------------------------------------------------------------------------


def _head(runner: ModelRunner) -> Linear:
    head: Any = runner._model._head
    return head.lm_head  # type: ignore[no-any-return]


def kv_bytes(engine: LoadedEngine, context: int) -> dict[str, int]:
    """Of the keys and values that attention reads for a token after `context` others, and that the rotary part writes."""
    of_token = [(group.bytes_per_block // engine.ready.block_size, group.window) for group in engine.groups]
    return {
        "attention": sum(size * min(context + 1, window or context + 1) for size, window in of_token),
        "rotary": sum(size for size, _ in of_token),
    }


def bandwidth(device: str, num_bytes: int) -> dict[str, float]:
    """Bytes a second of this machine's memory, the best of some tries: copying (both ways counted), and reading alone."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    other = torch.empty_like(data)
    num_threads = torch.get_num_threads()  # one, where the engine's own kernels have the cores
    if device == "cpu":
        torch.set_num_threads(usable_cores())
    try:
        copy_s, read_s = (min(_once_s(work, device) for _ in range(8)) for work in (lambda: other.copy_(data), data.sum))
    finally:
        torch.set_num_threads(num_threads)
    return {"copy": 2 * data.nbytes / copy_s, "read": data.nbytes / read_s}


def _once_s(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        return _on_device_s(work)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
