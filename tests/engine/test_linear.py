"""Linear: merged rows, names, memory shared with the sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from engine.kernels.cpu_library import cpu_kernels, unavailable_reason
from engine.kernels.cpu_ops import CpuKernels, Format
from engine.kernels.skinny_linear import Card, SkinnyDevice, SkinnyWorkspace
from engine.linear import Linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def linears(*rows: int, in_features: int = 32, bias: bool = False) -> list[nn.Linear]:
    return [nn.Linear(in_features, count, bias=bias, device=DEVICE).requires_grad_(False) for count in rows]


@pytest.mark.parametrize("bias", [False, True])
def test_is_callable_in_place_of_a_linear(bias: bool) -> None:
    (source,) = linears(48, bias=bias)
    linear = Linear.from_linear(source, "o_proj")
    assert (linear.in_features, linear.out_features, linear.sources) == (32, 48, ("o_proj",))
    for shape in ((5, 32), (1, 5, 32)):
        x = torch.randn(shape, device=DEVICE)
        torch.testing.assert_close(linear(x), source(x))
    assert linear.weight.data_ptr() == source.weight.data_ptr()  # tied weights stay tied


@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, True)])
def test_merge_keeps_the_rows_of_each_source(biases: tuple[bool, ...]) -> None:
    sources = [linears(count, bias=bias)[0] for count, bias in zip((16, 8, 8), biases, strict=True)]
    x = torch.randn(3, 32, device=DEVICE)
    expected = [source(x) for source in sources]
    merged = Linear.merge(sources, ["q_proj", "k_proj", "v_proj"])
    assert merged.sources == ("q_proj", "k_proj", "v_proj")
    assert (merged.bias is None) == (not any(biases))
    y = merged(x)
    for rows, want in zip(merged.slices, expected, strict=True):
        torch.testing.assert_close(y[:, rows], want)


def test_the_sources_of_a_merge_become_views_of_it_and_work_on() -> None:
    sources = linears(16, 8, bias=True)
    x = torch.randn(3, 32, device=DEVICE)
    expected = [source(x) for source in sources]
    merged = Linear.merge(sources, ["gate_proj", "up_proj"])
    memory = merged.weight.untyped_storage().data_ptr()
    assert all(source.weight.untyped_storage().data_ptr() == memory for source in sources)
    for source, want in zip(sources, expected, strict=True):
        torch.testing.assert_close(source(x), want)


def test_merge_takes_linears_that_are_merged_already() -> None:
    q, k, v = linears(16, 8, 8)
    both = Linear.merge([k, v], ["k_proj", "v_proj"])
    merged = Linear.merge([Linear.from_linear(q, "q_proj"), both])
    assert merged.sources == ("q_proj", "k_proj", "v_proj")
    assert merged.slices == (slice(0, 16), slice(16, 24), slice(24, 32))


def test_merge_refuses_linears_of_different_inputs() -> None:
    with pytest.raises(ValueError, match="different inputs"):
        Linear.merge([*linears(8), *linears(8, in_features=16)], ["a", "b"])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("weight_format", ["dense", "fp8"])
def test_the_result_goes_where_it_is_asked_to(bias: bool, activation: Any, weight_format: str) -> None:
    (source,) = linears(32, bias=bias)
    linear = Linear.from_linear(source, "o_proj")
    if weight_format == "fp8":
        linear.quantize()
    x = torch.randn(3, 32, device=DEVICE)
    want = linear(x, activation=activation)
    out = torch.full_like(want, torch.nan)
    y = linear(x, out=out, activation=activation)
    assert y.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, want)


@dataclass(frozen=True)
class Norm:
    weight: torch.Tensor
    eps: float = 1e-5
    offset: float = 0.0
    round_before_weight: bool = True


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.float() - reference.float()).norm() / reference.float().norm())


def skinny_device() -> SkinnyDevice:
    """The device's, or one for Triton's interpreter."""
    if DEVICE == "cuda":
        return SkinnyDevice.of(torch.device(DEVICE))
    return SkinnyDevice(Card((8, 0), 163 << 10, 4), SkinnyWorkspace.allocate(DEVICE))


@pytest.mark.parametrize("rows", [1, 3, 9, 70])
@pytest.mark.parametrize("weight_format", ["dense", "fp8"])
def test_few_rows_come_out_like_many_and_so_does_what_goes_around_the_product(rows: int, weight_format: str) -> None:
    if weight_format == "fp8" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    linear = Linear(torch.randn(512, 512, device=DEVICE).half() / 20, torch.randn(512, device=DEVICE).half(), ("a",))
    x = torch.randn(1, rows, 512, device=DEVICE).half()
    norm = Norm(torch.rand(512, device=DEVICE).half() + 0.5)
    residual = torch.randn(1, rows, 512, device=DEVICE).half()
    options: list[dict[str, Any]] = [{}, {"norm": norm}, {"activation": "silu", "norm": norm}, {"activation": "gelu_tanh"}]
    expected = [linear(x, **option) for option in options]
    added = linear(x, residual=residual.clone())
    if weight_format == "fp8":
        linear.quantize()
    linear.use_skinny(skinny_device())
    assert linear.fuses(rows) == (rows <= (64 if weight_format == "dense" else 1))
    limit = 0.08 if weight_format == "fp8" else 5e-3
    for option, want in zip(options, expected, strict=True):
        y = linear(x, **option)
        assert y.shape == want.shape
        assert relative_error(y, want) < limit
    memory = residual.clone()
    y = linear(x, residual=memory)
    assert y.data_ptr() == memory.data_ptr() and relative_error(y, added) < limit


def test_a_quantized_weight_frees_the_one_it_came_from() -> None:
    sources = linears(32, 16, bias=True)
    merged = Linear.merge(sources, ["gate_proj", "up_proj"])
    x = torch.randn(3, 32, device=DEVICE)
    want = merged(x)
    merged.quantize()
    assert merged.weight.dtype == torch.float8_e4m3fn and merged.weight_scale is not None
    assert merged.weight_format == "fp8"
    assert all(source.weight.numel() == 0 for source in sources)
    assert relative_error(merged(x), want) < 0.08
    merged.quantize()  # once is enough
    with pytest.raises(ValueError, match="before they are quantized"):
        Linear.merge([merged], ["a"])


def test_what_cannot_be_quantized_says_why_and_stays() -> None:
    (source,) = linears(30)
    linear = Linear.from_linear(source, "odd")
    with pytest.raises(ValueError, match="divisible by 16"):
        linear.quantize()
    assert linear.weight_format == "dense"
    torch.testing.assert_close(linear(torch.eye(32, device=DEVICE)), source.weight.T)


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest) -> CpuKernels | None:
    """The compiled CPU kernels, and what stands for them where there are none."""
    if request.param == "torch":
        return None
    if reason := unavailable_reason():
        pytest.skip(reason)
    return cpu_kernels()


# What rounding costs: of the weight to its format, and of the result to its dtype.
PACKED_ERROR = {"float32": 1e-5, "bfloat16": 4e-3, "int8": 0.015}
DTYPE_ERROR = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_weight_gives_what_the_dense_one_gave(
    format: Format, dtype: torch.dtype, bias: bool, kernels: CpuKernels | None
) -> None:
    source = nn.Linear(96, 80, bias=bias, dtype=dtype).requires_grad_(False)
    linear = Linear.from_linear(source, "o_proj")
    norm = Norm(torch.rand(96).to(dtype) + 0.5)
    options: list[dict[str, Any]] = [{}, {"norm": norm}, {"activation": "silu", "norm": norm}, {"activation": "gelu_tanh"}]
    inputs = [torch.randn(*shape, 96).to(dtype) for shape in ((1,), (7,), (1, 40), (2, 3, 4), (0,))]
    expected = [[linear(x, **option) for option in options] for x in inputs]
    residuals = [torch.randn_like(wants[0]) for wants in expected]
    added = [linear(x, residual=residual.clone()) for x, residual in zip(inputs, residuals, strict=True)]
    linear.pack(kernels, format)
    assert linear.bias is None or torch.equal(linear.bias, source.bias)
    limit = PACKED_ERROR[format] + DTYPE_ERROR[dtype]
    for x, wants, residual, sum_ in zip(inputs, expected, residuals, added, strict=True):
        for option, want in zip(options, wants, strict=True):
            y = linear(x, **option)
            assert y.shape == want.shape and y.dtype == dtype
            assert x.numel() == 0 or relative_error(y, want) < 2 * limit
            out = torch.full_like(want, torch.nan).view(-1, want.shape[-1])
            assert linear(x, out=out, **option).data_ptr() == out.data_ptr()
            assert torch.equal(out.view(want.shape), y)
        y = linear(x, residual=residual)
        assert y.data_ptr() == residual.data_ptr() and (x.numel() == 0 or relative_error(y, sum_) < limit)


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_packing_frees_the_sources_but_no_tied_embedding(format: Format, kernels: CpuKernels | None) -> None:
    embedding, head = nn.Embedding(80, 32).requires_grad_(False), nn.Linear(32, 80, bias=False)
    head.weight = embedding.weight
    ids, rows = torch.arange(80), embedding.weight.clone()
    linear = Linear.from_linear(head, "lm_head")
    linear.pack(kernels, format)
    assert torch.equal(embedding(ids), rows) and head.weight.numel() == 0
    assert relative_error(linear(rows), rows @ rows.T) < 0.03
    sources = [nn.Linear(32, count).requires_grad_(False) for count in (16, 8)]
    merged = Linear.merge(sources, ["gate_proj", "up_proj"])
    merged.pack(kernels, format)
    assert all(source.weight.numel() == 0 for source in sources)
    assert merged.weight_format == ("int8" if format == "int8" else "packed")
    with pytest.raises(ValueError, match="packed once"):
        merged.pack(kernels, format)
    with pytest.raises(ValueError, match="before they are quantized or packed"):
        Linear.merge([merged], ["a"])


def test_a_released_weight_is_free() -> None:
    sources = [nn.Linear(32, count).requires_grad_(False) for count in (16, 8)]
    merged = Linear.merge(sources, ["gate_proj", "up_proj"])
    merged.release()
    assert not any(linear.weight.numel() for linear in (merged, *sources))
    assert merged.bias is not None and merged.bias.numel() == 24


def test_a_weight_that_onednn_cannot_reorder_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    source = nn.Linear(32, 16).requires_grad_(False)
    linear = Linear.from_linear(source, "o_proj")
    linear.pack(None, "float32")
    x = torch.randn(3, 32)
    assert linear.weight_format == "dense" and torch.equal(linear(x), source(x))


def test_what_the_kernels_cannot_hold_says_why_and_stays(kernels: CpuKernels | None) -> None:
    if kernels is None:
        pytest.skip("torch holds it")
    source = nn.Linear(33, 16, dtype=torch.bfloat16).requires_grad_(False)
    linear = Linear.from_linear(source, "odd")
    with pytest.raises(ValueError, match="in pairs"):
        linear.pack(kernels, "bfloat16")
    assert linear.weight_format == "dense" and source.weight.numel() > 0
