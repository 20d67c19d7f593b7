"""Plain transformers `generate` on the workloads of bench_serving.py: what a batch of the same size costs without a server.

    .venv/bin/python scripts/bench_generate.py --batch-sizes 1 8 16 --input-len 128 --output-len 64 --dtype bfloat16

Static batches, padded on the left; a batch starts when the one before it has ended. Greedy, always the full output length.
The first token's time counts from the start of its batch, and times are taken by a streamer, as each step ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_serving import MARKDOWN_HEAD, Sample, format_markdown_row, format_table, summarize, words
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from engine.config import ModelConfig
from engine.model_loader import resolve_model


class StepClock(BaseStreamer):
    """Notes when each step's tokens are there; generate() gives it the prompts first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.monotonic())

    def end(self) -> None:
        pass


def make_prompts(tokenizer: Any, num_prompts: int, input_len: int, seed: int) -> list[str]:
    """Random words, about `input_len` tokens each: the number of words is found as bench_serving.py finds it."""
    counts = [len(tokenizer(words(length, -1, length)).input_ids) for length in (64, 192)]
    tokens_per_word = (counts[1] - counts[0]) / 128
    num_words = max(1, round((input_len - (counts[0] - 64 * tokens_per_word)) / tokens_per_word))
    return [words(num_words, seed, index) for index in range(num_prompts)]


def run_batch(model: Any, tokenizer: Any, prompts: list[str], output_len: int) -> list[Sample]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    clock = StepClock()
    start = time.monotonic()
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, min_new_tokens=output_len, max_new_tokens=output_len, streamer=clock)
    end = time.monotonic()
    num_new = output.shape[1] - inputs.input_ids.shape[1]
    return [
        Sample(start=start, end=end, chunk_times=clock.times[1:], prompt_tokens=int(mask.sum()), output_tokens=num_new)
        for mask in inputs.attention_mask
    ]


def run_workload(model: Any, tokenizer: Any, batch_size: int, args: argparse.Namespace) -> list[Sample]:
    num_requests = args.num_requests or max(4, 2 * batch_size)
    prompts = make_prompts(tokenizer, num_requests, args.input_len, args.seed)
    run_batch(model, tokenizer, prompts[:batch_size], min(4, args.output_len))
    samples: list[Sample] = []
    for first in range(0, num_requests, batch_size):
        samples += run_batch(model, tokenizer, prompts[first : first + batch_size], args.output_len)
        print(f"generate, batches of {batch_size}: {len(samples)}/{num_requests} requests", file=sys.stderr)
    return samples


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, a Hub id, a GGUF file or demo")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--num-requests", type=int, help="default: two batches, at least 4")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--num-threads", type=int, help="default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, by batch size")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model_dir = resolve_model(ModelConfig(model=args.model), lambda phase, detail, fraction: None)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    record = {}
    if args.markdown:
        print(MARKDOWN_HEAD)
    for batch_size in args.batch_sizes:
        figures = summarize(run_workload(model, tokenizer, batch_size, args))
        title = f"generate, {args.dtype}: batches of {batch_size} × {figures['num_ok']}, {args.input_len} / {args.output_len}"
        print(format_markdown_row(title, figures) if args.markdown else format_table(title, figures), flush=True)
        record[str(batch_size)] = figures
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
