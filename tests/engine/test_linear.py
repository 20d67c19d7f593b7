"""Linear: merged rows, names, memory shared with the sources."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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


def test_the_result_goes_where_it_is_asked_to() -> None:
    (source,) = linears(8)
    x = torch.randn(3, 32, device=DEVICE)
    out = torch.full((3, 8), torch.nan, device=DEVICE)
    y = Linear.from_linear(source, "o_proj")(x, out=out)
    assert y.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, source(x))
