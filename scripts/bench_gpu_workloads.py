"""What bench_gpu.py sends, and what is known of it: vLLM 0.25.1's figures on the same cards, and the goals.

vLLM's figures: FlashAttention-3, torch.compile, full and piecewise graphs, dummy weights in bfloat16, over HTTP with the same
client (2026-11-23). Times in milliseconds, throughput in tokens a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

Figures = dict[str, float]
"""Of a workload, by name: output_tps, total_tps, ttft_p50, ttft_p99, tpot_p50, itl_p99."""


@dataclass(frozen=True)
class Workload:
    """One load. rate: requests per second, Poisson; None keeps `concurrency` requests open. Lengths in tokens.

    vllm and goal: by card ("H100", "H200"), as far as they were measured or set.
    """

    name: str
    num_requests: int
    concurrency: int = 1
    rate: float | None = None
    input_len: int = 512
    output_len: int = 256
    shared_prefix_len: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    vllm: dict[str, Figures] = field(default_factory=dict)
    goal: dict[str, Figures] = field(default_factory=dict)

    def quick(self) -> Workload:
        """A quarter of the requests, but no fewer than are open at once."""
        return replace(self, num_requests=max(self.num_requests // 4, min(self.concurrency, self.num_requests)))


@dataclass(frozen=True)
class Model:
    """A shape of dummy_model.py with its workloads. first_load: what meets the server at its first ready answer; it shows
    how long full speed takes to come, and warms up for the others. vllm_ready_s: by card."""

    name: str
    first_load: Workload
    workloads: tuple[Workload, ...]
    vllm_ready_s: dict[str, float] = field(default_factory=dict)
    goal_ready_s: float | None = None


def figures(
    output_tps: float | None = None,
    total_tps: float | None = None,
    ttft_p50: float | None = None,
    ttft_p99: float | None = None,
    tpot_p50: float | None = None,
    itl_p99: float | None = None,
) -> Figures:
    """The figures given, by name."""
    return {name: value for name, value in locals().items() if value is not None}


LLAMA_8B = Model(
    "llama-3.1-8b",
    first_load=Workload("first", num_requests=512, concurrency=256),
    workloads=(
        Workload(
            "single",
            num_requests=4,
            input_len=128,
            vllm={"H100": figures(151, 227, 20.1, 41, 6.5, 8.6), "H200": figures(203, 305, 16.7, 17.6, 4.9, 5.4)},
            goal={"H100": figures(ttft_p50=15, tpot_p50=5.8), "H200": figures(ttft_p50=13, tpot_p50=4.3)},
        ),
        Workload(
            "c32",
            num_requests=128,
            concurrency=32,
            vllm={"H100": figures(3411, 10232, 340, 435, 8.3, 23)},
            goal={"H100": figures(output_tps=3700)},
        ),
        Workload(
            "c64-sampled",
            num_requests=256,
            concurrency=64,
            temperature=0.8,
            top_p=0.95,
            vllm={"H100": figures(5036, 15108, 204, 739, 9.3, 19)},
            goal={"H100": figures(output_tps=5600)},
        ),
        Workload(
            "c256",
            num_requests=1024,
            concurrency=256,
            vllm={"H100": figures(9061, 27184, 974, 3096, 23.9, 198), "H200": figures(9643, 28927, 978, 3248, 22.6, 196)},
            goal={"H100": figures(output_tps=9900, itl_p99=60), "H200": figures(output_tps=10600, itl_p99=60)},
        ),
        Workload(
            "poisson20",
            num_requests=400,
            rate=20,
            input_len=1024,
            output_len=128,
            vllm={"H100": figures(2308, 20776, 70.5, 144, 14.1, 53.8), "H200": figures(2343, 21088, 40.8, 79.5, 7.6, 25.8)},
            goal={
                "H100": figures(ttft_p50=60, ttft_p99=120, tpot_p50=11.5),
                "H200": figures(ttft_p50=38, ttft_p99=75, tpot_p50=6.8),
            },
        ),
        Workload(
            "shared-prefix",
            num_requests=512,
            concurrency=64,
            input_len=256,
            output_len=64,
            shared_prefix_len=2048,
            vllm={"H100": figures(3657, 135293, 174, 617, 14.4, 48), "H200": figures(4192, 155121, 145, 497, 13.1, 59)},
            goal={"H100": figures(output_tps=4300), "H200": figures(output_tps=4900)},
        ),
        Workload(
            "long-prompts",
            num_requests=64,
            concurrency=16,
            input_len=8000,
            output_len=8,
            vllm={"H100": figures(38, 38120, 1916, 3310, 213, 233), "H200": figures(38, 37875, 1949, 3332, 216, 225)},
            goal={"H100": figures(total_tps=39700), "H200": figures(total_tps=38500)},
        ),
    ),
    vllm_ready_s={"H100": 119, "H200": 109},
    goal_ready_s=20,
)

LLAMA_1B = Model(
    "llama-3.2-1b",
    first_load=Workload("first", num_requests=1024, concurrency=256),
    workloads=(
        Workload(
            "single",
            num_requests=8,
            input_len=128,
            vllm={"H100": figures(453, None, 13.3, 16.8, 2.1, 5.7)},
            goal={"H100": figures(tpot_p50=1.4)},
        ),
        Workload(
            "c8",
            num_requests=64,
            concurrency=8,
            input_len=128,
            vllm={"H100": figures(3149, None, 37, 41, 2.5, 5.9)},
            goal={"H100": figures(output_tps=4700)},
        ),
        Workload(
            "c64-sampled",
            num_requests=512,
            concurrency=64,
            temperature=0.8,
            top_p=0.95,
            vllm={"H100": figures(13818, None, 146, 269, 4.0, 11)},
        ),
        Workload(
            "c256",
            num_requests=1024,
            concurrency=256,
            vllm={"H100": figures(14932, None, 534, 1437, 15.4, 45)},
            goal={"H100": figures(output_tps=30000)},
        ),
    ),
    vllm_ready_s={"H100": 95},
    goal_ready_s=20,
)

QWEN3_MOE = Model(
    "qwen3-30b-a3b",
    first_load=Workload("first", num_requests=512, concurrency=256),
    workloads=(
        Workload("single", num_requests=4, input_len=128),
        Workload("c32", num_requests=128, concurrency=32),
        Workload("c256", num_requests=512, concurrency=256),
    ),
)

_TINY = (
    Workload("single", num_requests=2, input_len=16, output_len=8),
    Workload("c4-sampled", num_requests=8, concurrency=4, input_len=16, output_len=8, temperature=0.8, top_p=0.95),
    Workload("poisson", num_requests=8, rate=20, input_len=32, output_len=8),
    Workload("shared-prefix", num_requests=8, concurrency=4, input_len=16, output_len=4, shared_prefix_len=64),
)
_TINY_FIRST = Workload("first", num_requests=16, concurrency=4, input_len=32, output_len=16)

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        LLAMA_8B,
        LLAMA_1B,
        QWEN3_MOE,
        Model("llama-tiny", _TINY_FIRST, _TINY),
        Model("qwen3-moe-tiny", _TINY_FIRST, _TINY),
    )
}
"""By name. The tiny ones try the benchmark itself out, on any machine."""

BY_DEFAULT = (LLAMA_8B.name, LLAMA_1B.name, QWEN3_MOE.name)
