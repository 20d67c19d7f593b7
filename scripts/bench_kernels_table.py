"""The figures of bench_kernels.py: the attention cases with FlashAttention-3's times, goals, and the table's rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

ATTENTION_TOLERANCE = 6e-3  # the outputs' own rounding to bfloat16 is 2e-3
FA3 = "FA3"
SLOWER_THAN_FA3 = 1.03  # what no decode case may exceed


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """Rows of one token each. fa3_us on an H100, or where the lengths were others, the bandwidth it reached there.
    read_share: of the measured read bandwidth, the least to reach."""

    name: str
    lengths: tuple[int, ...]
    fa3_us: float | None = None
    fa3_tbps: float | None = None
    read_share: float | None = None


@dataclass(frozen=True, slots=True)
class PrefillCase:
    """Chunks on top of cached contexts. In TFLOP/s: fa3_tflops on an H100, and the least to reach there."""

    name: str
    chunks: tuple[int, ...]
    contexts: tuple[int, ...]
    fa3_tflops: float
    least_tflops: float | None = None


_RAGGED = tuple(random.Random(0).sample([64 + (4096 - 64) * i // 255 for i in range(256)], 256))
DECODES = (
    DecodeCase("decode 1 × 1,024", (1024,), 17.7),
    DecodeCase("decode 1 × 8,192", (8192,), 29.8),
    DecodeCase("decode 1 × 32,768", (32768,), 70.1, read_share=0.70),
    DecodeCase("decode 8 × 1,024", (1024,) * 8, 28.0),
    DecodeCase("decode 64 × 640", (640,) * 64, 82.9),
    DecodeCase("decode 64 × 1,536", (1536,) * 64, 158.5, read_share=0.85),
    DecodeCase("decode 256 × 640", (640,) * 256, 255.0),
    DecodeCase("decode 256 × 1,536", (1536,) * 256, 559.0, read_share=0.85),
    DecodeCase("decode 256 × 4,096", (4096,) * 256, 1423.0),
    DecodeCase("decode 256 × 64 … 4,096", _RAGGED, fa3_tbps=2.91),
)
PREFILLS = (
    PrefillCase("prefill 8,192", (8192,), (0,), 632.0, least_tflops=500.0),
    PrefillCase("prefill 16 × 512", (512,) * 16, (0,) * 16, 273.0),
    PrefillCase("prefill 2,048 on 14,336", (2048,), (14336,), 602.0),
)


@dataclass(frozen=True, slots=True)
class Goal:
    """At most so many microseconds, or at least so much of the row's unit."""

    value: float
    at_least: bool = False

    def text(self, unit: str) -> str:
        return f"≥ {number(self.value)} {unit}" if self.at_least else f"≤ {number(self.value)} µs"

    def reached(self, us: float, rate: float) -> bool:
        return rate >= self.value if self.at_least else us <= self.value


@dataclass(slots=True)
class Row:
    """One line of the table. work: bytes read or operations done in `us`; unit: of the rate, "" where there is none that means
    something. error: None where nothing is to be checked. peer: whose time stands beside ours. failure: what went wrong."""

    case: str
    work: float
    unit: str
    us: float | None = None
    error: float | None = None
    tolerance: float = 0.0
    peer: str = ""
    peer_us: float | None = None
    goals: tuple[Goal, ...] = ()
    failure: str = ""

    @property
    def rate(self) -> float | None:
        """In tera-units a second."""
        return None if self.us is None or not self.unit else self.work / self.us / 1e6

    @property
    def ratio(self) -> float | None:
        """Of our time to the peer's: below 1 we are the faster."""
        return None if self.us is None or self.peer_us is None else self.us / self.peer_us

    @property
    def right(self) -> bool:
        return not self.failure and (self.error is None or self.error <= self.tolerance)

    @property
    def reached(self) -> bool | None:
        """None without a goal. A wrong result reaches none."""
        if not self.goals:
            return None
        return self.right and self.us is not None and all(goal.reached(self.us, self.rate or 0.0) for goal in self.goals)

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        derived = {"rate": self.rate, "ratio": self.ratio, "right": self.right, "reached": self.reached}
        return {**asdict(self), "goals": [goal.text(self.unit) for goal in self.goals], **derived}


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def format_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    columns = ("case", "µs", "rate", "error", "beside, µs", "ratio", "goal", "reached")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        error = "–" if row.error is None else f"{row.error:.1e}" if row.error else "0"
        cells = [
            row.case,
            row.failure or (number(row.us) if row.us is None or row.us >= 100 else f"{row.us:.1f}"),
            "–" if row.rate is None else f"{row.rate:.2f} {row.unit}" if row.rate < 100 else f"{row.rate:.0f} {row.unit}",
            error if row.right else f"**{error}: wrong**" if row.error is not None else error,
            "–" if row.peer_us is None else f"{row.peer} {number(row.peer_us)}",
            "–" if row.ratio is None else f"{row.ratio:.2f}",
            ", ".join(goal.text(row.unit) for goal in row.goals) or "–",
            {True: "yes", False: "no", None: "–"}[row.reached],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kv_bytes(lengths: Sequence[int], num_kv_heads: int, head_dim: int) -> float:
    """What a decode must read: keys and values in 16 bits."""
    return float(sum(lengths) * num_kv_heads * head_dim * 2 * 2)


def causal_flops(chunks: Sequence[int], contexts: Sequence[int], num_heads: int, head_dim: int) -> float:
    """Multiplications and additions of both products over the pairs of query and key that a causal mask leaves."""
    pairs = sum(n * c + n * (n + 1) // 2 for n, c in zip(chunks, contexts, strict=True))
    return 4.0 * num_heads * head_dim * pairs


def decode_row(case: DecodeCase, work: float, read_tbps: float | None, on_h100: bool) -> Row:
    """The case's goals: FlashAttention-3's time where it was measured, and a share of the bandwidth measured here."""
    fa3_us = case.fa3_us if case.fa3_us is not None else work / case.fa3_tbps / 1e6 if case.fa3_tbps is not None else None
    goals = []
    if fa3_us is not None and on_h100:
        goals.append(Goal(fa3_us * SLOWER_THAN_FA3))
    if case.read_share is not None and read_tbps is not None:
        goals.append(Goal(case.read_share * read_tbps, at_least=True))
    return Row(case.name, work, "TB/s", tolerance=ATTENTION_TOLERANCE, peer=FA3, peer_us=fa3_us, goals=tuple(goals))


def prefill_row(case: PrefillCase, work: float, on_h100: bool) -> Row:
    goals = (Goal(case.least_tflops, at_least=True),) if case.least_tflops is not None and on_h100 else ()
    peer_us = work / case.fa3_tflops / 1e6
    return Row(case.name, work, "TFLOP/s", tolerance=ATTENTION_TOLERANCE, peer=FA3, peer_us=peer_us, goals=goals)
