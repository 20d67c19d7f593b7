"""The compiled CPU kernels' products against torch, for every format, shape of tile and number of threads."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine.kernels.cpu_build import CpuLibraryUnavailable, load_cpu_library
from engine.kernels.cpu_ops import FORMATS, CpuKernels, Format

TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3, "int8": 1.5e-2}
SHAPES = [(96, 64), (100, 70), (33, 192), (576, 1536), (1, 2)]


@pytest.fixture(scope="module", params=[1, 3])
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    try:
        found = load_cpu_library()
    except CpuLibraryUnavailable as reason:
        pytest.skip(str(reason))
    return CpuKernels(found.library, request.param)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_weight(kernels: CpuKernels, format: Format, shape: tuple[int, int], source: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(source)
    bias = torch.randn(shape[0], generator=generator)
    packed = kernels.pack(weight, format, bias_N=bias)
    for num_rows in (1, 2, 3, 5, 6, 7, 12, 13, 16, 17, 31, 33, 100, 200):
        x = torch.randn(num_rows, shape[1], generator=generator)
        expected = F.linear(x, weight.float(), bias)
        assert relative_error(kernels.linear(x, packed), expected) < TOLERANCE[format]


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_a_row_does_not_depend_on_the_others(kernels: CpuKernels, format: Format):
    generator = torch.Generator().manual_seed(1)
    packed = kernels.pack(torch.randn(160, 128, generator=generator), format)
    x = torch.randn(150, 128, generator=generator)
    together = kernels.linear(x, packed)
    for row in (0, 1, 11, 95, 96, 149):
        assert torch.equal(kernels.linear(x[row : row + 1], packed)[0], together[row])


@pytest.mark.parametrize("format", FORMATS)
def test_bad_numbers_stay_in_their_row_and_stay_bad(kernels: CpuKernels, format: Format):
    packed = kernels.pack(torch.randn(64, 64, generator=torch.Generator().manual_seed(2)), format)
    x = torch.ones(8, 64)
    x[3, 5], x[6, 9] = float("nan"), float("inf")
    y = kernels.linear(x, packed)
    assert not y[3].isfinite().any()
    assert not y[6].isfinite().any()
    assert y[[0, 1, 2, 4, 5, 7]].isfinite().all()


def test_zeros_give_the_bias(kernels: CpuKernels):
    for format in FORMATS:
        packed = kernels.pack(torch.zeros(40, 64), format, bias_N=torch.arange(40.0))
        assert torch.equal(kernels.linear(torch.zeros(3, 64), packed), torch.arange(40.0).expand(3, 40))


def test_what_cannot_be_packed_is_refused(kernels: CpuKernels):
    with pytest.raises(ValueError, match="in pairs, and a weight has 7 inputs"):
        kernels.pack(torch.zeros(4, 7), "bfloat16")
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        kernels.pack(torch.zeros(4, 8, dtype=torch.float16), "int8")


def test_no_rows_make_no_rows(kernels: CpuKernels):
    assert kernels.linear(torch.zeros(0, 64), kernels.pack(torch.zeros(8, 64), "int8")).shape == (0, 8)
