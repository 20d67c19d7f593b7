#!/usr/bin/env python3
"""Flash attention against standard attention: the same numbers in less time, with memory that grows with the length alone.

    .venv/bin/python scripts/ideas_flash_attention.py   # 512 to 32,768 tokens; three minutes on two cores
    .venv/bin/python scripts/ideas_flash_attention.py --shapes 4x64 32x128 --lengths 1024 8192

Standard attention (https://arxiv.org/abs/1706.03762) writes down a score for every pair of query and key. Flash attention
(https://arxiv.org/abs/2205.14135) keeps a tile of them and corrects what it has summed when a larger score comes by. Measured
are

  standard     the definition in torch, all scores in memory (`standard_attention` in engine/kernels/tiled_attention.py)
  tiled        the online softmax over tiles in plain torch, to be read (`tiled_attention`, the kernels' reference)
  torch        torch's scaled_dot_product_attention, behind the engine's backend `sdpa`
  engine       what the engine serves with: its backend's kernel over pages, compiled C++ on a CPU, Triton on a GPU; a decoder
               needs causal attention only

over one sequence with as many key heads as query heads; errors against float64 on rows spread over the sequence, as
||result - exact|| / ||exact||; time the fastest of up to three calls; memory what a call allocates at its worst moment, its
result included: measured, see scripts/ideas_memory.py. A length for which an implementation finds no memory (on a CPU: half of
what is free) is marked. Last a prompt goes through the engine's own core, whole, with nothing but the attention changed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ideas import Idea, Plot, Results, positive, run
from ideas_flash_report import KINDS, draw, summary, tables
from tqdm import tqdm

if TYPE_CHECKING:
    import torch

BLOCK_SIZE = 16
CHECKED_ROWS = 48
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
# The first shape goes through all lengths, the others up to OTHERS_MAX.
SHAPES = {"cpu": ["2x64", "8x64", "4x128", "16x64"], "cuda": ["32x128", "32x64", "8x128", "8x256"]}
OTHERS_MAX = {"cpu": 4096, "cuda": 16384}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
CORE_MODELS = {"cpu": ("llama-tiny", [1024, 2048, 4096]), "cuda": ("llama-3.2-1b", [2048, 8192, 16384])}


# -- one attention ----------------------------------------------------------------------------------------------------


def make_call(
    kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool
) -> Callable[[], torch.Tensor] | None:
    """q, k, v [T, H, D]; the call returns [T, H, D]. None where the engine has no such attention."""
    from torch.nn import functional as F

    from engine.kernels.tiled_attention import standard_attention, tiled_attention

    scaling = q.shape[2] ** -0.5
    if kind == "standard":
        return lambda: standard_attention(q, k, v, scaling=scaling, is_causal=is_causal)
    if kind == "tiled":
        return lambda: tiled_attention(q, k, v, scaling=scaling, is_causal=is_causal)
    if kind == "torch":
        q_1HTD, k_1HTD, v_1HTD = (x.transpose(0, 1)[None] for x in (q, k, v))
        return lambda: F.scaled_dot_product_attention(q_1HTD, k_1HTD, v_1HTD, is_causal=is_causal, scale=scaling)[0].transpose(
            0, 1
        )
    return engine_call(q, k, v, scaling) if is_causal else None


def engine_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> Callable[[], torch.Tensor]:
    """The backend that `--attention-backend auto` takes, with the sequence as one chunk of a prompt. Its pages are there before
    the call, as they are in the engine."""
    import torch

    from engine.attention.base import AttentionNeeds, DeviceRows, LayerSpec, RaggedBatch, group_layers
    from engine.attention.choose import choose_backend

    (length, heads, dim), device = q.shape, q.device
    layers = [LayerSpec(0, heads, heads, dim, scaling, None, None, False)]
    groups = group_layers(layers, BLOCK_SIZE, q.dtype.itemsize)
    backend_class, _ = choose_backend("auto", AttentionNeeds(layers, groups, BLOCK_SIZE, q.dtype, device, q.dtype))
    backend = backend_class(layers, groups, BLOCK_SIZE, q.dtype, device)
    num_blocks = -(-length // BLOCK_SIZE)
    backend.allocate([num_blocks])
    table = list(range(1, num_blocks + 1))
    rows = None
    if device.type == "cuda":

        def ints(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        rows = DeviceRows(
            block_tables=(ints(table)[None],),
            row_slots=ints([0]),
            seq_lens=ints([length]),
            context_lens=ints([0]),
            query_starts=ints([0, length]),
            positions=torch.arange(length, dtype=torch.int32, device=device),
            token_slots=torch.zeros(length, dtype=torch.int32, device=device),
            num_decodes=0,
        )
    metadata = backend.prepare(RaggedBatch([length], [0], ([table],), rows))
    return lambda: backend.forward(0, q, k, v, metadata)


def exact_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [R] spread over the sequence, the first and the last among them, and their attention in float64 [R, H, D]."""
    import torch

    from engine.kernels.tiled_attention import standard_attention

    length = len(q)
    rows = torch.linspace(0, length - 1, min(CHECKED_ROWS, length), device=q.device).round().long().unique()
    exact = [
        standard_attention(
            q[row : row + 1].double(),
            k[: row + 1 if is_causal else length].double(),
            v[: row + 1 if is_causal else length].double(),
            scaling=q.shape[2] ** -0.5,
            is_causal=False,
        )
        for row in rows.tolist()
    ]
    return rows, torch.cat(exact)


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    difference = out.double() - exact
    return float(difference.norm() / exact.norm())


def as_projected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same as views of one tensor, as the engine's merged projection gives them on a GPU: its kernel on Hopper would copy
    others together first."""
    import torch

    return torch.cat([q, k, v], dim=1).chunk(3, dim=1)


def measure_case(
    kinds: Sequence[str], shape: str, length: int, is_causal: bool, dtype: str, device: str, seed: int
) -> list[dict[str, Any]]:
    """A record a kind."""
    import ideas_memory
    import torch

    heads, dim = map(int, shape.split("x"))
    generator = torch.Generator(device=device).manual_seed(seed + length)
    q, k, v = (torch.randn(length, heads, dim, generator=generator, device=device).to(getattr(torch, dtype)) for _ in range(3))
    if device == "cuda":
        q, k, v = as_projected(q, k, v)
    rows, exact = exact_rows(q, k, v, is_causal)
    records = []
    for kind in kinds:
        record: dict[str, Any] = {"kind": kind, "shape": shape, "length": length, "causal": is_causal, "dtype": dtype}
        call = make_call(kind, q, k, v, is_causal)
        if call is None:
            continue
        try:
            used, out = ideas_memory.usage(call, device)
            record |= asdict(used) | {"error": relative_error(out[rows], exact)}
        except ideas_memory.DoesNotFit:
            record["fits"] = False
        records.append(record)
    return records


# -- a prompt through the core ----------------------------------------------------------------------------------------


def core_backends() -> dict[str, str]:
    """Backends for `--attention-backend`'s table: the engine's `sdpa`, and two that differ from it in a row's attention."""
    return {kind: f"ideas_flash_backends:{kind.capitalize()}Backend" for kind in ("standard", "tiled")}


def measure_core(model: str, lengths: Sequence[int], device: str, seed: int, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """Whole prompts, each in one step of the engine's core."""
    from engine.attention import choose

    choose.BACKENDS.update(core_backends())
    try:
        return [
            record
            for kind in ("standard", "tiled", "sdpa")
            for record in measure_backend(kind, model, lengths, device, seed, bar)
        ]
    finally:
        for kind in core_backends():
            del choose.BACKENDS[kind]


def measure_backend(
    kind: str, model: str, lengths: Sequence[int], device: str, seed: int, bar: tqdm[Any]
) -> Iterator[dict[str, Any]]:
    import ideas_engine
    import ideas_memory
    import numpy as np

    from engine.config import CacheConfig

    engine = ideas_engine.load(
        model,
        device,
        cache=CacheConfig(num_kv_blocks=max(lengths) // BLOCK_SIZE + 1),
        max_num_seqs=4,
        max_num_batched_tokens=max(lengths),
        max_model_len=max(lengths) + 1,
        attention_backend=kind,
    )
    for length in lengths:
        bar.set_postfix_str(f"core, {kind}, {length:,} tokens")
        record: dict[str, Any] = {"kind": "torch" if kind == "sdpa" else kind, "length": length}
        timed = ideas_engine.TimedRunner(engine.runner)
        core = ideas_engine.make_core(engine, runner=timed, enable_prefix_caching=False, pipeline_depth=0)
        prompt = ideas_engine.random_prompt(np.random.default_rng(seed + length), length, engine.vocab_size)
        try:
            used, _ = ideas_memory.usage(functools.partial(prefill, core, prompt), device)
            record |= asdict(used)
            record["step_tokens"] = sorted({tuple(step.num_tokens) for step in timed.steps})
        except ideas_memory.DoesNotFit:
            record["fits"] = False
        core.close()
        yield record
        bar.update()


def prefill(core: Any, prompt: list[int]) -> None:
    import ideas_engine

    ideas_engine.serve(core, [ideas_engine.Load(prompt, 1)])


# -- all of it --------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> list[tuple[str, int, bool]]:
    """Shape, length, causal or not; ascending lengths."""
    lengths = args.lengths or ([512, 1024] if args.smallest else LENGTHS)
    shapes = args.shapes or (["2x16", "4x32"] if args.smallest else SHAPES[args.device])
    limit = max(lengths) if args.lengths else OTHERS_MAX[args.device]
    return [
        (shape, length, is_causal)
        for shape in shapes
        for is_causal in (True, False)
        for length in lengths
        if shape == shapes[0] or length in (limit // 4, limit) or args.smallest
    ]


def measure(args: argparse.Namespace) -> Results:
    import torch

    dtype = args.dtype or DTYPES[args.device]
    model, lengths = CORE_MODELS[args.device]
    core_lengths = [256, 512] if args.smallest else lengths
    todo = cases(args)
    precisions = [("float64", ("standard", "tiled")), ("float32", tuple(KINDS)), ("bfloat16", tuple(KINDS))]
    if args.device == "cuda":  # the engine's kernels there compute in 16 bits
        precisions[1] = ("float32", ("standard", "tiled", "torch"))
    records, exactness = [], []
    total = len(todo) + len(precisions) + 3 * len(core_lengths)
    with (
        torch.inference_mode(),
        tqdm(total=total, desc="flash attention", unit="case", file=sys.stderr, dynamic_ncols=True) as bar,
    ):
        measure_case(
            list(KINDS), todo[0][0], 64, True, dtype, args.device, args.seed
        )  # what is loaded or compiled at first use
        for shape, length, is_causal in todo:
            bar.set_postfix_str(f"{shape}, {length:,} tokens{'' if is_causal else ', not causal'}")
            records += measure_case(list(KINDS), shape, length, is_causal, dtype, args.device, args.seed)
            bar.update()
        shape, length = ("2x16", 512) if args.smallest else (todo[0][0], 2048)
        for name, kinds in precisions:
            exactness += measure_case(kinds, shape, length, True, name, args.device, args.seed)
            bar.update()
        core = measure_core(model, core_lengths, args.device, args.seed, bar)
    return {"dtype": dtype, "cases": records, "exactness": exactness, "core_model": model, "core": core}


# -- the idea -----------------------------------------------------------------------------------------------------------


def shape(text: str) -> str:
    """A flag's heads and head size."""
    heads, _, dim = text.partition("x")
    try:
        return f"{positive(heads)}x{positive(dim)}"
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be like 8x128, got {text!r}") from None


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=positive, nargs="+", help="tokens of the sequence")
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="HEADSxSIZE", help="heads and head size; the first goes through all lengths"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32 on a CPU, bfloat16 on a GPU")


IDEA = Idea(
    name="flash-attention",
    description=__doc__,
    measure=measure,
    tables=tables,
    summary=summary,
    plots={"": Plot(draw, "Memory and time of standard and flash attention against sequence length, both axes logarithmic")},
    arguments=arguments,
)


if __name__ == "__main__":
    sys.exit(run(IDEA))
