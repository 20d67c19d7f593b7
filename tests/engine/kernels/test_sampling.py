"""Sampling without sorting against the sampler's definition: noise bit for bit, each filter alone and mixed, ties, odd rows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from engine.kernels import sampling, sampling_noise
from engine.kernels.compiler import tl, triton
from engine.kernels.sampling import SamplingColumns, SamplingWorkspace, sample_tokens, sample_tokens_reference
from engine.philox import log_exponential, philox4x32, token_noise
from engine.step import BAD_TOKEN

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 1500  # one tile: the interpreter's time goes by programs, not by tokens


@dataclass
class Case:
    """B rows of logits [B, V] and the slots they belong to; parameters are by slot."""

    logits: torch.Tensor
    slots: torch.Tensor
    params: SamplingColumns

    @property
    def used(self) -> torch.Tensor:
        return self.slots >= 0

    def run(self, mode: str = "filtered", workspace: SamplingWorkspace | None = None) -> torch.Tensor:
        """The tokens of the rows in use; everything else that the call should leave behind, or alone, is asserted."""
        rows, vocab = self.logits.shape
        num_slots = self.params.seed.numel()
        workspace = workspace or SamplingWorkspace.create(rows, vocab, DEVICE)
        out = torch.full((rows,), -7, device=DEVICE)
        last = torch.full((num_slots,), -7, device=DEVICE)
        before = self.params.output_index.clone()
        sample_tokens(self.logits, self.slots, self.params, out, last, workspace=workspace, mode=mode)
        assert (out[~self.used] == -7).all()
        slots = self.slots[self.used].long()
        expected_last, advanced = torch.full_like(last, -7), before.clone()
        expected_last[slots] = out[self.used].clamp(min=0)
        advanced[slots] += 1
        assert torch.equal(last, expected_last) and torch.equal(self.params.output_index, advanced)
        assert (workspace.best == sampling._NEVER).all() and not workspace.arrived.any() and not workspace.states.any()
        self.params.output_index.copy_(before)
        return out[self.used]

    def expected(self) -> torch.Tensor:
        slots = self.slots[self.used].long()
        params = [getattr(self.params, name)[slots].cpu() for name in ("temperature", "top_k", "top_p", "min_p")]
        noise = noise_of(self.params.seed[slots].cpu(), self.params.output_index[slots].cpu(), self.logits.shape[1])
        return sample_tokens_reference(self.logits[self.used].cpu(), noise, *params).to(DEVICE)

    def check(self, mode: str = "filtered") -> None:
        assert self.run(mode).tolist() == self.expected().tolist()


def noise_of(seeds: torch.Tensor, output_index: torch.Tensor, vocab: int) -> torch.Tensor:
    """log E of every token of each row, [B, V]."""
    low, high, index = seeds[:, None] & 0xFFFFFFFF, seeds[:, None] >> 32 & 0xFFFFFFFF, output_index[:, None].long()
    return token_noise(torch.arange(-(-vocab // 4)), index, (low, high)).flatten(1)[:, :vocab]


def make_case(logits: torch.Tensor, dtype: torch.dtype = torch.float32, slots: list[int] | None = None, **columns: Any) -> Case:
    """Rows in slots of a shuffled order if not given; knobs are off but for those given, one value for all or one a row."""
    rows = logits.shape[0]
    slots_B = torch.randperm(rows + 2)[:rows] if slots is None else torch.tensor(slots)
    params = SamplingColumns.create(rows + 2, DEVICE)
    params.seed.copy_(torch.randint(-(2**63), 2**63 - 1, (rows + 2,)))
    params.output_index.copy_(torch.randint(0, 5000, (rows + 2,)))
    for name, value in {"temperature": 1.0, **columns}.items():
        column = getattr(params, name)
        column[slots_B[slots_B >= 0].to(DEVICE)] = torch.as_tensor(value).expand(rows)[slots_B >= 0].to(DEVICE, column.dtype)
    return Case(logits.to(DEVICE, dtype), slots_B.to(DEVICE, torch.int32), params)


def random_logits(rows: int, vocab: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab) * scale


# -- noise ------------------------------------------------------------------------------------------------------------


@triton.jit
def _noise_kernel(seed_ptr, index_ptr, words_ptr, noise_ptr, start, TILE: tl.constexpr):
    words = sampling_noise.token_words(start, tl.load(seed_ptr), tl.load(index_ptr), TILE)
    places = tl.arange(0, TILE // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(words_ptr + places, words.to(tl.int64))
    tl.store(noise_ptr + places, sampling_noise.log_exponential(words))


@pytest.mark.parametrize(
    ("seed", "start", "index"),
    [(0, 0, 0), (-1, 4096, 1), (-(2**63), 8, 2**31 - 1), (0x0123456789ABCDEF, 128_000, 77_777)],
)
def test_noise_is_philox_of_seed_output_index_and_token(seed: int, start: int, index: int) -> None:
    tile = 64
    words = torch.full((tile,), -1, device=DEVICE)
    noise = torch.full((tile,), float("nan"), device=DEVICE)
    seed_tensor, index_tensor = torch.tensor([seed], device=DEVICE), torch.tensor([index], dtype=torch.int32, device=DEVICE)
    _noise_kernel[(1,)](seed_tensor, index_tensor, words, noise, start, TILE=tile)
    groups = torch.arange(start // 4, (start + tile) // 4)
    zero, key = torch.zeros_like(groups), (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF))
    expected = torch.stack(philox4x32((groups, zero + index, zero, zero), key), dim=-1).flatten()
    assert words.tolist() == expected.tolist()
    torch.testing.assert_close(noise.cpu(), log_exponential(expected.float()), rtol=3e-7, atol=2e-7)


@triton.jit
def _transform_kernel(words_ptr, noise_ptr, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(noise_ptr + places, sampling_noise.log_exponential(tl.load(words_ptr + places).to(tl.uint32)))


def test_noise_keeps_its_tails() -> None:
    tails = torch.cat([torch.arange(2048), 2**32 - 1 - torch.arange(1024), 2**31 - 512 + torch.arange(1024)])
    noise = torch.full((tails.numel(),), float("nan"), device=DEVICE)
    _transform_kernel[(1,)](tails.to(DEVICE), noise, N=tails.numel())
    torch.testing.assert_close(noise.cpu(), log_exponential(tails.float()), rtol=3e-7, atol=2e-7)


# -- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("mode", "vocab"), [("greedy", 5003), ("random", 5003), ("filtered", 61)])
def test_greedy_and_random_rows(dtype: torch.dtype, mode: str, vocab: int) -> None:
    temperature = torch.zeros(4) if mode == "greedy" else torch.tensor([0.0, 1.0, 0.3, 2.0])
    make_case(random_logits(4, vocab), dtype, temperature=temperature).check(mode)


@pytest.mark.parametrize("mode", ["random", "filtered"])
def test_padding_rows_and_strided_logits(mode: str) -> None:
    logits = random_logits(5, 3000).to(DEVICE)
    case = make_case(logits[:, :2500], slots=[3, -1, 0, -1, 5], temperature=0.8)
    assert case.logits.stride(0) == 3000
    case.check(mode)


def test_ties_go_to_the_lowest_token() -> None:
    logits = random_logits(3, 5000)
    for row, places in enumerate([(17, 4000), (2047, 2048), (0, 4999)]):
        logits[row, list(places)] = 50.0
    assert make_case(logits, temperature=0.0).run("greedy").tolist() == [17, 2047, 0]
    zeros = torch.full((1, 3000), -1.0)
    zeros[0, 2500], zeros[0, 20] = 0.0, -0.0
    assert make_case(zeros, temperature=0.0).run("greedy").tolist() == [20]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_p": 0.5, "top_k": 4, "min_p": 0.1}])
def test_rows_of_bad_numbers_have_no_token(options: dict[str, float]) -> None:
    logits = random_logits(6, 3000)
    logits[0, 2999] = float("nan")
    logits[1] = float("nan")
    logits[2] = float("-inf")
    logits[3] = float("-inf")
    logits[3, 2222] = -5.0
    logits[4, 17] = float("inf")
    case = make_case(logits, **options)
    tokens = case.run().tolist()
    assert tokens[:3] == [BAD_TOKEN] * 3 and tokens[3:5] == [2222, BAD_TOKEN]
    assert tokens[5] == case.expected().tolist()[5], "its neighbours draw as ever"


@pytest.mark.parametrize("mode", ["random", "filtered"])
def test_a_tiny_temperature_is_no_bad_number(mode: str) -> None:
    logits = torch.full((2, 2500), -20.0)
    logits[1, 2400] = 20.0
    tokens = make_case(logits, temperature=1e-38).run(mode).tolist()
    assert tokens[0] != BAD_TOKEN and tokens[1] == 2400


# -- filters ----------------------------------------------------------------------------------------------------------

TOP_K = [1, 2, 50, 400, 1499, 1500, 0]
TOP_P = [1e-6, 0.1, 0.5, 0.95, 1.0]
MIN_P = [0.0, 1e-4, 0.05, 1.0]


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1.0), (torch.float32, 6.0), (torch.float16, 3.0), (torch.bfloat16, 0.01)]
)
@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_one_filter(dtype: torch.dtype, scale: float, name: str) -> None:
    values = torch.tensor({"top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P}[name])
    rows = values.numel()
    make_case(random_logits(rows, VOCAB, scale), dtype, temperature=0.5 + torch.rand(rows), **{name: values}).check()


@pytest.mark.parametrize(
    ("dtype", "vocab"), [(torch.float32, 5003), (torch.float32, VOCAB), (torch.float16, VOCAB), (torch.bfloat16, VOCAB)]
)
def test_filters_together(dtype: torch.dtype, vocab: int) -> None:
    rows = 6 if vocab == VOCAB else 2

    def choose(values: list[Any]) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,))]

    case = make_case(
        random_logits(rows, vocab, 3.0) * torch.rand(rows, 1),
        dtype,
        temperature=choose([0.2, 0.7, 1.0, 2.0]),
        top_k=choose(TOP_K),
        top_p=choose(TOP_P),
        min_p=choose(MIN_P),
    )
    case.check()


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.4}, {"top_k": 900, "top_p": 0.4}, {"min_p": 0.6}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_search_alone_finds_the_same_tokens(
    options: dict[str, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the second draw, rejected rows go straight to the search for their thresholds."""
    launches = []
    kernel = sampling.draw_kernel

    class FirstDrawOnly:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            def launch(*args: Any, **keywords: Any) -> None:
                launches.append(keywords["AGAIN"])
                if not keywords["AGAIN"]:
                    kernel[grid](*args, **keywords)

            return launch

    monkeypatch.setattr(sampling, "draw_kernel", FirstDrawOnly())
    make_case(random_logits(3, VOCAB), dtype, **options).check()
    assert launches == [False, True]


@pytest.mark.parametrize("levels", [[1.0], [3.0, 1.0], [2.0, 1.0, -1e-30, -3.0], [1.0, float("-inf")]])
def test_equal_logits_are_kept_together(levels: list[float]) -> None:
    """Few distinct values: the threshold is one of them, and all tokens that share it stay."""
    logits = torch.tensor(levels)[torch.randint(len(levels), (6, VOCAB))]
    top_p = torch.tensor([0.3, 1.0]).repeat(3)
    make_case(logits, top_k=torch.tensor([1, 30, 1000]).repeat_interleave(2), top_p=top_p).check()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter takes minutes for so many rows")
def test_distribution_under_top_p() -> None:
    """Draws of many seeds follow the renormalised distribution of the kept tokens."""
    rows = 20_000
    probs = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    tokens = make_case(probs.log().expand(rows, -1), top_p=0.75).run()
    counts = torch.bincount(tokens, minlength=6).cpu() / rows
    expected = torch.tensor([0.5, 0.3125, 0.1875, 0, 0, 0])
    assert (counts - expected).abs().max() < 4 * (0.25 / rows) ** 0.5


def test_a_row_draws_the_same_alone_and_in_a_crowd() -> None:
    crowd = make_case(random_logits(4, 2500), top_p=0.7, temperature=1.5)
    tokens = crowd.run().tolist()
    for row in range(4):
        alone = Case(crowd.logits[row : row + 1], crowd.slots[row : row + 1], crowd.params)
        assert alone.run().tolist() == tokens[row : row + 1]


def test_a_larger_workspace_serves_smaller_batches_again_and_again() -> None:
    workspace = SamplingWorkspace.create(4, 2500, DEVICE)
    for mode, rows in (("filtered", 3), ("greedy", 2), ("random", 4), ("filtered", 2)):
        case = make_case(random_logits(rows, 2500), temperature=0.0 if mode == "greedy" else 1.0)
        if mode == "filtered":
            case.params.top_k.fill_(20)
        assert case.run(mode, workspace).tolist() == case.expected().tolist()


def test_columns_start_greedy() -> None:
    columns = SamplingColumns.create(3, DEVICE)
    assert {field.name: getattr(columns, field.name).tolist() for field in fields(columns)} == {
        "temperature": [0.0] * 3,
        "top_k": [0] * 3,
        "top_p": [1.0] * 3,
        "min_p": [0.0] * 3,
        "seed": [0] * 3,
        "output_index": [0] * 3,
    }
