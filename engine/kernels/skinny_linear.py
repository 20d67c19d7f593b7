"""Linears of few rows: y = x W^T where reading W is all the work.

A step of few tokens reads every weight once and multiplies it with a handful of rows, so its time is bytes over bandwidth, and
what is lost is lost at the edges: a kernel of 10 to 80 microseconds spends several of them on launch, first loads and last
waves. Two kernels (in skinny_linear_kernels.py):

- `vector`, one or two rows: products on the ordinary units, a program takes a few rows of W whole;
- `matrix`, up to 64 rows: products on the tensor cores with W as the tall operand, E split over programs where N alone
  gives too few; the last program to arrive adds the float32 parts in order, so that the sum does not depend on who was last.

On Hopper both are launched as programmatic dependents (CUDA programming guide, "Programmatic Dependent Launch and
Synchronization"): a kernel starts while its predecessor ends and fetches its first weights, since nothing before it writes
weights, and only then waits for its input.

Around the product, each saving a kernel: RMSNorm of the input (vector), bias, gated activation of merged gate and up rows, and
the addition to the residual stream.

The bits of a row do not depend on the number of rows within one kernel. Names: M rows, E inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch.nn import functional as F

from engine.kernels.compiler import HAS_TRITON, triton
from engine.kernels.skinny_linear_kernels import matrix_kernel, vector_kernel

MAX_ROWS = 64
Activation = Literal["silu", "gelu_tanh"]
_SMALLEST_WEIGHT = 1 << 18
"""Elements below which a product is all launch, whoever makes it."""
_LANE = 8
"""Inputs that a thread loads at once: 16 bytes of a 16-bit weight."""


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """How one product is cut. block_rows: rows of x a program holds (padded); block_n, block_e: its tile of W; splits: programs
    along E (matrix); num_stages: tiles of W under way (vector: 1 or 2). As a programmatic dependent: prefetch: inputs of each
    row of W asked for before the predecessor has ended (matrix); early: whether the successor may start at once, or only
    when the product is done (matrix)."""

    kind: Literal["vector", "matrix"]
    block_rows: int
    block_n: int
    block_e: int
    splits: int
    num_warps: int
    num_stages: int
    prefetch: int = 0
    early: bool = True


@dataclass(frozen=True, slots=True)
class Card:
    """What of a GPU decides a plan. shared_bytes: shared memory that one program may have."""

    capability: tuple[int, int]
    shared_bytes: int
    num_sms: int

    @classmethod
    def of(cls, device: torch.device) -> Card:
        properties = torch.cuda.get_device_properties(device)
        return cls(
            (properties.major, properties.minor),
            properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
            properties.multi_processor_count,
        )

    @property
    def has_dependent_launch(self) -> bool:
        return self.capability >= (9, 0)


@dataclass(frozen=True, slots=True)
class SkinnyWorkspace:
    """Memory that launches on one stream share: float32 parts of split products, and how many have arrived (zero at rest)."""

    parts: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def allocate(cls, device: torch.device | str, parts_bytes: int = 32 << 20, tiles: int = 8192) -> SkinnyWorkspace:
        return cls(
            torch.empty(parts_bytes // 4, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class SkinnyDevice:
    """A card, and the workspace for one stream of it."""

    card: Card
    workspace: SkinnyWorkspace

    @classmethod
    def of(cls, device: torch.device) -> SkinnyDevice:
        return cls(Card.of(device), SkinnyWorkspace.allocate(device))

    def plan(self, rows: int, num_outputs: int, num_inputs: int, weight_bytes: int, gated: bool = False) -> SkinnyPlan | None:
        return plan_skinny(rows, num_outputs, num_inputs, weight_bytes, gated, self.card)


@cache
def plan_skinny(rows: int, num_outputs: int, num_inputs: int, weight_bytes: int, gated: bool, card: Card) -> SkinnyPlan | None:
    """How to multiply `rows` rows by a weight of so many bytes an element, or None where cuBLAS is not beaten.

    gated: with an activation. Only 16-bit activations have plans.
    """
    if not 1 <= rows <= MAX_ROWS or weight_bytes > 2 or num_inputs % 16 or num_outputs * num_inputs < _SMALLEST_WEIGHT:
        return None
    if weight_bytes == 1:
        return _vector_plan(1, num_inputs, block_n=8, num_warps=4, num_stages=1) if rows == 1 else None
    if rows == 1:
        return _vector_plan(1, num_inputs, block_n=4, num_warps=8, num_stages=2)
    if rows == 2 and gated:
        return _vector_plan(2, num_inputs, block_n=4, num_warps=4, num_stages=1)
    if rows == 2:
        return _vector_plan(2, num_inputs, block_n=8, num_warps=8, num_stages=2)
    # With more rows, arithmetic and reads of x take a vector program longer than reads of W.
    block_rows = max(16, triton.next_power_of_2(rows))
    if block_rows == 16:
        block_n, block_e, num_warps, num_stages = 64, 256, 4, 3
    elif num_outputs >= 128 * card.num_sms:
        block_n, block_e, num_warps, num_stages = 128, 128, 8, 3
    else:
        block_n, block_e, num_warps, num_stages = 64, 128, 4, 4
    while num_stages > 2 and _shared_bytes(block_rows, block_n, block_e, num_stages, weight_bytes) > card.shared_bytes:
        num_stages -= 1
    while _shared_bytes(block_rows, block_n, block_e, num_stages, weight_bytes) > card.shared_bytes:
        block_e //= 2
    # As many parts as run side by side: a second wave of them costs more than idle multiprocessors.
    splits = 1
    while splits < 4 and 2 * splits * triton.cdiv(num_outputs, block_n) <= card.num_sms and num_inputs >= 4 * splits * block_e:
        splits *= 2
    return SkinnyPlan(
        "matrix", block_rows, block_n, block_e, splits, num_warps, num_stages, 0 if splits > 1 else 512, splits == 1
    )


def _vector_plan(block_rows: int, num_inputs: int, *, block_n: int, num_warps: int, num_stages: int) -> SkinnyPlan:
    """With one load a thread and row of W across a tile's inputs, so that x needs no exchange between threads."""
    num_warps = min(num_warps, triton.next_power_of_2(triton.cdiv(num_inputs, 32 * _LANE)))
    return SkinnyPlan("vector", block_rows, block_n, 32 * _LANE * num_warps, 1, num_warps, num_stages)


def _shared_bytes(block_rows: int, block_n: int, block_e: int, num_stages: int, weight_bytes: int) -> int:
    """Shared memory of a matrix program: its tiles of W and x under way. The result passes through less."""
    return num_stages * block_e * (block_n * weight_bytes + block_rows * 2)


_compiled: dict[tuple[Any, ...], Any] = {}
"""Kernels by all that their compilation depends on: Triton's own way from arguments to kernel takes some 40 microseconds."""


def skinny_linear(
    x_ME: torch.Tensor,
    weight_NE: torch.Tensor,
    plan: SkinnyPlan,
    workspace: SkinnyWorkspace | None = None,
    *,
    weight_scale_N: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    norm_weight_E: torch.Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: Activation | None = None,
    residual_MN: torch.Tensor | None = None,
    out_MN: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """act(norm(x) W^T * scale + bias), [M, N] ([M, N / 2] with an activation, whose gate rows come first); or, with a residual,
    that added to it in place and the residual returned.

    weight_NE: contiguous, in x's dtype or float8_e4m3fn with weight_scale_N. norm_weight_E (vector plans): RMSNorm of x
    in float32, times norm_weight + norm_offset, not rounded in between. pdl: launched as a programmatic dependent, which reads
    weights at once, and x only when the kernel before it has ended.
    """
    rows, num_inputs = x_ME.shape
    assert x_ME.stride(1) == 1 and weight_NE.is_contiguous()
    num_outputs = weight_NE.shape[0] // (2 if activation else 1)
    if residual_MN is not None:
        y = residual_MN
    else:
        y = out_MN if out_MN is not None else x_ME.new_empty((rows, num_outputs))
    if rows > plan.block_rows:
        raise ValueError(f"{rows} rows are more than the plan's {plan.block_rows}")
    tiles = triton.cdiv(num_outputs, plan.block_n // (2 if activation else 1))
    # Arguments that a variant does not read still need a pointer.
    scale = x_ME if weight_scale_N is None else weight_scale_N
    bias = x_ME if bias_N is None else bias_N
    norm = x_ME if norm_weight_E is None else norm_weight_E
    # The stride of a single row means nothing, and must not pick another specialisation of the kernel.
    stride_x, stride_y = (x_ME.stride(0), y.stride(0)) if rows > 1 else (num_inputs, num_outputs)
    around = (weight_scale_N is not None, bias_N is not None, residual_MN is not None, activation, pdl)
    arguments: tuple[Any, ...]
    if plan.kind == "vector":
        kernel, grid = vector_kernel, (tiles, 1, 1)
        arguments = (
            x_ME, weight_NE, scale, bias, norm, y, y, rows, num_outputs, stride_x, stride_y, eps,
            num_inputs, plan.block_rows, plan.block_n, plan.block_e, _LANE, plan.num_stages,
            norm_weight_E is not None, norm_offset, *around,
        )  # fmt: skip
    else:
        if norm_weight_E is not None:
            raise ValueError("only vector plans have a norm")
        parts, arrived = (workspace.parts, workspace.arrived) if workspace is not None else (y, y)
        if plan.splits > 1:
            needed = tiles * plan.splits * plan.block_rows * plan.block_n
            if workspace is None or parts.numel() < needed or arrived.numel() < tiles:
                raise ValueError(f"{plan.splits} splits need {4 * needed} bytes of workspace and {tiles} counters")
        split_e = triton.cdiv(triton.cdiv(num_inputs, plan.splits), plan.block_e) * plan.block_e
        kernel, grid = matrix_kernel, (plan.splits, tiles, 1)
        arguments = (
            x_ME, weight_NE, scale, bias, y, y, parts, arrived, rows, num_outputs, stride_x, stride_y,
            num_inputs, plan.block_rows, plan.block_n, plan.block_e, plan.splits, split_e, plan.num_stages,
            *around, plan.prefetch if pdl else 0, plan.early,
        )  # fmt: skip
    # What a compilation depends on.
    addresses = x_ME.data_ptr() | weight_NE.data_ptr() | scale.data_ptr() | bias.data_ptr() | norm.data_ptr() | y.data_ptr()
    key = (
        plan, around, num_inputs, norm_offset, norm_weight_E is not None, x_ME.device, x_ME.dtype, weight_NE.dtype, bias.dtype,
        norm.dtype, scale.dtype, addresses % 16, num_outputs % 16, stride_x % 16, stride_y % 16,
    )  # fmt: skip
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments)
        return y
    options = {"launch_pdl": True} if pdl else {}
    launched = kernel[grid](*arguments, num_warps=plan.num_warps, **options)
    if HAS_TRITON and isinstance(launched, triton.compiler.CompiledKernel):  # not one that is only being compiled ahead
        _compiled[key] = launched
    return y


def skinny_linear_reference(
    x_ME: torch.Tensor,
    weight_NE: torch.Tensor,
    *,
    weight_scale_N: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    norm_weight_E: torch.Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: Activation | None = None,
    residual_MN: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch, float32 inside; the residual is not changed."""
    x, weight = x_ME.float(), weight_NE.float()
    if norm_weight_E is not None:
        x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps) * (norm_weight_E.float() + norm_offset)
    if weight_scale_N is not None:
        weight = weight * weight_scale_N.reshape(-1, 1)
    y = F.linear(x, weight, None if bias_N is None else bias_N.float()).to(x_ME.dtype)
    if activation is not None:
        gate, up = y.chunk(2, dim=1)
        y = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    return y if residual_MN is None else residual_MN + y
