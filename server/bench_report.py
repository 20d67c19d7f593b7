"""Figures of a load as its clients saw it: percentiles, a table to read and a row of markdown."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sample:
    """One request as the client saw it; times in seconds of the machine-wide monotonic clock."""

    start: float
    end: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the closest ranks of sorted or unsorted values."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def spread(values: list[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds, of values in seconds; empty for none."""
    if not values:
        return {}
    mean = {"mean": sum(values) / len(values)} | {f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)}
    return {name: round(value * 1000, 3) for name, value in mean.items()}


def summarize(samples: list[Sample]) -> dict[str, Any]:
    """Figures of the requests that were answered; the duration is from the first request sent to the last one's end."""
    good = [sample for sample in samples if not sample.error]
    duration_s = max(sample.end for sample in samples) - min(sample.start for sample in samples)
    prompt_tokens = sum(sample.prompt_tokens for sample in good)
    output_tokens = sum(sample.output_tokens for sample in good)
    timed = [sample for sample in good if sample.chunk_times]
    return {
        "num_ok": len(good),
        "num_errors": len(samples) - len(good),
        "errors": dict(Counter(sample.error for sample in samples if sample.error).most_common(5)),
        "duration_s": round(duration_s, 3),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(sample.cached_tokens for sample in good),
        "output_tokens": output_tokens,
        "requests_per_s": round(len(good) / duration_s, 3),
        "output_tokens_per_s": round(output_tokens / duration_s, 3),
        "total_tokens_per_s": round((prompt_tokens + output_tokens) / duration_s, 3),
        "ttft_ms": spread([sample.chunk_times[0] - sample.start for sample in timed]),
        "tpot_ms": spread(
            [(s.chunk_times[-1] - s.chunk_times[0]) / (s.output_tokens - 1) for s in timed if s.output_tokens > 1]
        ),
        "itl_ms": spread([b - a for s in timed for a, b in zip(s.chunk_times, s.chunk_times[1:], strict=False)]),
        "e2e_ms": spread([sample.end - sample.start for sample in good]),
    }


def format_table(title: str, figures: dict[str, Any]) -> str:
    num_ok = max(1, figures["num_ok"])
    lines = [
        title,
        f"requests    {figures['num_ok']} answered, {figures['num_errors']} errors, {figures['duration_s']:.2f} s",
        f"tokens      prompt {figures['prompt_tokens']} (mean {figures['prompt_tokens'] / num_ok:.1f}, "
        f"{figures['cached_tokens']} from the prefix cache), "
        f"output {figures['output_tokens']} (mean {figures['output_tokens'] / num_ok:.1f})",
        f"throughput  output {figures['output_tokens_per_s']:.1f} tok/s, total {figures['total_tokens_per_s']:.1f} tok/s, "
        f"{figures['requests_per_s']:.2f} requests/s",
        f"{'ms':<8}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}",
    ]
    for name in ("ttft", "tpot", "itl", "e2e"):
        values = figures[f"{name}_ms"]
        cells = "".join(f"{values[column]:>12.2f}" if values else f"{'-':>12}" for column in ("mean", "p50", "p90", "p99"))
        lines.append(f"{name.upper():<8}{cells}")
    lines += [f"error × {count}: {text}" for text, count in figures["errors"].items()]
    return "\n".join(lines)


MARKDOWN_HEAD = (
    "| workload | output tok/s | total tok/s | requests/s | TTFT p50 / p99 ms | TPOT p50 ms | ITL p99 ms | E2E p50 ms |\n"
    "|---|---|---|---|---|---|---|---|"
)


def format_markdown_row(title: str, figures: dict[str, Any]) -> str:
    def cell(name: str, column: str) -> str:
        return f"{figures[name][column]:.1f}" if figures[name] else "–"

    cells = [
        title,
        f"{figures['output_tokens_per_s']:.1f}",
        f"{figures['total_tokens_per_s']:.1f}",
        f"{figures['requests_per_s']:.2f}",
        f"{cell('ttft_ms', 'p50')} / {cell('ttft_ms', 'p99')}",
        cell("tpot_ms", "p50"),
        cell("itl_ms", "p99"),
        cell("e2e_ms", "p50"),
    ]
    return f"| {' | '.join(cells)} |"
