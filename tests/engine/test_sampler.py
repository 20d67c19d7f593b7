"""The sampler: its noise against published vectors and distributions, each knob against a plain computation, rows alone and
in a crowd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from engine.philox import log_exponential, philox4x32, token_noise, token_noise_on_host
from engine.sampler import NOISE_RANGE, compute_logprobs, edit, gumbel_argmax_dense, gumbel_argmax_pruned, sample
from engine.sampling_slots import PenaltyRows, SamplingBatch
from engine.step import BAD_TOKEN

VOCAB = 61  # no multiple of the four lanes


def batch_of(count: int, **columns: Any) -> SamplingBatch:
    """A batch whose knobs are off, but for those given (one value for all rows, or one each)."""
    floats = {
        "temperature": 1.0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    ints = {"top_k": 0, "output_index": 0, "num_logprobs": -1}
    sparse = {k: columns.pop(k) for k in ("biases", "banned", "allowed", "penalties") if k in columns}
    seed = np.broadcast_to(np.asarray(columns.pop("seed", 0), dtype=np.uint64), count).copy()
    values: dict[str, Any] = {k: np.full(count, columns.pop(k, v), dtype=np.float32) for k, v in floats.items()}
    values |= {k: np.full(count, columns.pop(k, v), dtype=np.int64) for k, v in ints.items()}
    assert not columns
    return SamplingBatch(seed=seed, **values, **sparse)


def draw(logits: torch.Tensor, count: int, **columns: Any) -> list[int]:
    """`count` tokens of one row of logits, at output indices 0 .. count - 1 of one seed."""
    batch = batch_of(count, output_index=np.arange(count), **columns)
    return sample(logits.expand(count, -1).clone(), batch).tolist()


def random_logits(rows: int, vocab: int = VOCAB, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def words(value: int) -> torch.Tensor:
    return torch.tensor([value])


# -- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the kat_vectors of Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = map(words, counter)
    assert tuple(int(w) for w in philox4x32((c0, c1, c2, c3), (words(key[0]), words(key[1])))) == expected


def test_noise_stays_within_the_range_that_pruning_trusts() -> None:
    words = [0, 1, 2**31, 2**32 - 1]
    noise = -log_exponential(torch.tensor(words).to(torch.float32)).double()
    assert noise.isfinite().all() and float(noise.max() - noise.min()) < NOISE_RANGE - 0.3
    exact = [-math.log(-math.log1p(-(word + 0.5) / 2**32)) for word in words[:3]]
    assert noise[:3].tolist() == pytest.approx(exact, rel=1e-6)


def test_noise_is_keyed_on_seed_output_index_and_vocabulary_index() -> None:
    """The definition, spelled out for single tokens with Python integers."""
    seed, output_index, logits = 0x0123456789ABCDEF, 7, random_logits(1)
    scores = []
    for token in range(VOCAB):
        counter = (words(token >> 2), words(output_index), words(0), words(0))
        word = int(philox4x32(counter, (words(seed & 0xFFFFFFFF), words(seed >> 32)))[token & 3])
        scores.append(float(logits[0, token]) - math.log(-math.log1p(-(word + 0.5) / 2**32)))
    drawn = sample(logits.clone(), batch_of(1, seed=seed, output_index=output_index)).tolist()
    assert drawn == [int(np.argmax(scores))]
    neighbours = [{"seed": seed ^ 1}, {"seed": seed ^ (1 << 63)}, {"seed": seed, "output_index": 8}]
    many = random_logits(1, 4000, scale=0.1)
    base = sample(many.clone(), batch_of(1, seed=seed, output_index=7)).tolist()
    for change in neighbours:
        assert sample(many.clone(), batch_of(1, **{"output_index": 7, **change})).tolist() != base


def test_host_noise_is_the_device_s_noise_bit_for_bit() -> None:
    seed, output_index, groups = 0xFEDCBA9876543210, 2**31 - 2, np.array([0, 3, 4, 1000, 2**30], dtype=np.uint64)
    key = words(seed & 0xFFFFFFFF), words(seed >> 32)
    on_device = token_noise(torch.from_numpy(groups.astype(np.int64)), words(output_index), key)
    assert torch.equal(token_noise_on_host(groups, output_index, seed), on_device)


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0, 30.0])
def test_pruned_equals_dense_bit_for_bit(scale: float) -> None:
    rows, vocab = 9, 5000
    scaled = random_logits(rows, vocab, scale)
    scaled[1, 17:4000] = float("-inf")
    scaled[2, :] = float("-inf")
    scaled[2, 4321] = -3.0
    scaled[3] = scaled[3].bfloat16().float().round()  # many ties
    rng = np.random.default_rng(3)
    for _ in range(5):
        seeds, output_index = rng.integers(0, 2**64, size=rows, dtype=np.uint64), rng.integers(0, 2**31, size=rows)
        dense = gumbel_argmax_dense(scaled, seeds, output_index)
        assert torch.equal(gumbel_argmax_pruned(scaled, seeds, output_index), dense)


def test_draws_follow_the_softmax() -> None:
    count = 6000
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, -3.0]])
    for temperature in (1.0, 0.6):
        observed = np.bincount(draw(logits, count, seed=42, temperature=temperature), minlength=6)
        expected = (logits[0] / temperature).softmax(0).double().numpy() * count
        chi_square = float(((observed - expected) ** 2 / expected).sum())
        assert chi_square < 20.5, "5 degrees of freedom: one in a thousand"


def test_seeds_give_independent_choices() -> None:
    logits = torch.zeros(1, 1000).expand(64, -1)
    tokens = sample(logits.clone(), batch_of(64, seed=np.arange(64)))
    assert len(set(tokens.tolist())) > 55  # 64 draws of 1000: 62 different ones expected


# -- rows and batches -------------------------------------------------------------------------------------------------


def crowd_columns(rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "temperature": rng.choice([0.0, 0.5, 1.0, 1.7], size=rows),
        "top_k": rng.choice([0, 1, 5, 40, 10000], size=rows),
        "top_p": rng.choice([1.0, 0.3, 0.9, 0.999], size=rows),
        "min_p": rng.choice([0.0, 0.0, 0.05, 0.4], size=rows),
        "typical_p": rng.choice([1.0, 1.0, 0.2, 0.9], size=rows),
        "seed": rng.integers(0, 2**64, size=rows, dtype=np.uint64),
        "output_index": rng.integers(0, 50, size=rows),
    }


@pytest.mark.parametrize("low_precision", [False, True])
def test_a_row_is_the_same_alone_and_in_a_crowd(low_precision: bool) -> None:
    rows = 48
    logits = random_logits(rows, 3001, 4.0)
    if low_precision:
        logits = logits.bfloat16().float()  # ties at every cut
    columns = crowd_columns(rows)
    together = sample(logits.clone(), batch_of(rows, **columns)).tolist()
    alone = [
        int(sample(logits[row : row + 1].clone(), batch_of(1, **{k: v[row] for k, v in columns.items()})))
        for row in range(rows)
    ]
    assert together == alone
    turned = sample(logits.flip(0), batch_of(rows, **{k: v[::-1] for k, v in columns.items()})).tolist()
    assert turned[::-1] == together


def test_greedy_takes_the_lowest_of_the_best() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, [7, 9]] = 1.0
    logits[2, 60] = 1.0
    assert sample(logits.clone(), batch_of(3, temperature=0.0)).tolist() == [7, 0, 60]
    mixed = sample(logits.clone(), batch_of(3, temperature=[0.0, 1.0, 0.0])).tolist()
    assert (mixed[0], mixed[2]) == (7, 60)


KNOBS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 7},
    {"temperature": 1.2, "min_p": 0.1, "typical_p": 0.9},
    {"temperature": [0.0, 0.8, 0.0, 0.8, 0.8, 0.0]},
]


@pytest.mark.parametrize("knobs", KNOBS)
def test_a_row_of_bad_numbers_has_no_token_and_harms_no_other(knobs: dict[str, Any]) -> None:
    logits = random_logits(6)
    logits[1] = float("nan")
    logits[2, 60] = float("nan")
    logits[3] = float("-inf")
    logits[4, 5] = float("inf")
    columns: dict[str, Any] = knobs | {"seed": np.arange(6)}
    allowed = {5: np.array([1 << 7, 0], dtype=np.int32)}
    tokens = sample(logits.clone(), batch_of(6, **columns, allowed=allowed)).tolist()
    alone = columns | {"seed": 0, "temperature": np.broadcast_to(knobs["temperature"], 6)[0]}
    assert tokens[0] == sample(logits[:1].clone(), batch_of(1, **alone)).item()
    assert tokens[1:5] == [BAD_TOKEN] * 4 and tokens[5] == 7


def test_a_tiny_temperature_is_no_bad_number() -> None:
    logits = torch.full((1, VOCAB), -20.0)
    assert sample(logits.clone(), batch_of(1, temperature=1e-38)).item() != BAD_TOKEN
    logits[0, 9] = 20.0
    assert sample(logits, batch_of(1, temperature=1e-38)).item() == 9


# -- knobs ------------------------------------------------------------------------------------------------------------


LADDER = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]]).log()


def test_temperature_near_zero_is_greedy_and_high_flattens() -> None:
    assert set(draw(LADDER, 200, temperature=0.01)) == {0}
    flat = np.bincount(draw(LADDER, 2000, temperature=2.0), minlength=6) / 2000
    assert flat[0] == pytest.approx(float((LADDER[0] / 2).softmax(0)[0]), abs=0.03) and flat[0] < 0.4


@pytest.mark.parametrize(
    ("columns", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 5}, {0, 1, 2, 3, 4, 5}),  # the fifth and sixth are equal
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.6}, {0, 1}),  # the token that crosses is in
        ({"top_p": 0.8}, {0, 1, 2}),
        ({"top_p": 0.01}, {0}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 2, "top_p": 0.7}, {0, 1}),  # of the two that are left the first has two thirds
        ({"top_k": 2, "top_p": 0.6}, {0}),
        ({"top_k": 3, "min_p": 0.4}, {0, 1}),
        ({"typical_p": 0.2}, {1}),  # the entropy is 1.94 bits: the token of 2 bits is the most typical, the best one is not
        ({"typical_p": 0.3}, {0, 1}),
        ({"typical_p": 0.8}, {0, 1, 2}),
        ({"typical_p": 0.95}, {0, 1, 2, 3, 4, 5}),  # the fifth and sixth are equally far
        ({"top_k": 2, "typical_p": 0.5}, {0}),  # of the two that are left, 0.92 bits: 0.58 is nearer than 1.58
    ],
)
def test_cuts_keep_exactly_these(columns: dict[str, Any], kept: set[int]) -> None:
    assert set(draw(LADDER, 300, **columns)) == kept
    off = {"top_p": 1.0, "typical_p": 1.0}
    mixed = draw(LADDER, 400, **{k: [v, off.get(k, 0)] * 200 for k, v in columns.items()})
    assert set(mixed[::2]) <= kept and set(mixed[1::2]) == set(range(6)), "a neighbour without the knob is not cut"


def test_top_p_against_a_full_sort() -> None:
    logits = random_logits(1, 500, 2.0)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        probs, ids = logits[0].double().softmax(0).sort(descending=True)
        kept = set(ids[(probs.cumsum(0) - probs) < top_p].tolist())
        drawn = set(draw(logits, 1500, top_p=top_p))
        assert drawn <= kept and len(drawn) > len(kept) / 4


def finite(logits: torch.Tensor) -> list[set[int]]:
    return [set(torch.nonzero(row.isfinite())[:, 0].tolist()) for row in logits]


def kept_tokens(logits: torch.Tensor, **columns: Any) -> list[set[int]]:
    """Of each row, the tokens that its knobs leave."""
    logits = logits.clone()
    sample(logits, batch_of(len(logits), **columns))  # what falls out is -inf in the logits it was given
    return finite(logits)


def plainly_typical(logits: torch.Tensor, mass: float) -> set[int]:
    """The definition, in float64: the smallest set of the tokens nearest to the entropy that has the mass."""
    logprobs = logits.double().log_softmax(0)
    probs = logprobs.exp()
    entropy = -float((probs * logprobs).nansum())
    kept: set[int] = set()
    total = 0.0
    for token in sorted(range(len(logits)), key=lambda i: abs(-float(logprobs[i]) - entropy)):
        if total >= mass:
            break
        kept.add(token)
        total += float(probs[token])
    return kept


@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_typical_p_against_its_definition(scale: float, temperature: float) -> None:
    logits = random_logits(6, 700, scale)
    masses = [0.05, 0.2, 0.5, 0.9, 0.99, 1.0]
    expected = [plainly_typical(row / temperature, mass) for row, mass in zip(logits, masses, strict=True)]
    expected[-1] = set(range(700))  # 1 is off
    assert kept_tokens(logits, typical_p=masses, temperature=temperature) == expected


def test_typical_p_is_that_of_transformers() -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(8, 300, 3.0)
    for mass in (0.1, 0.6, 0.95):
        ids = torch.zeros(8, 1, dtype=torch.int64)
        theirs = warpers.TypicalLogitsWarper(mass)(ids, warpers.TopKLogitsWarper(50)(ids, logits))
        assert kept_tokens(logits, typical_p=mass, top_k=50) == [
            set(torch.nonzero(r.isfinite())[:, 0].tolist()) for r in theirs
        ]


def test_typical_p_comes_after_the_other_cuts() -> None:
    """Of what these leave, renormalised: each alone would leave another set."""
    logits = random_logits(1, 400, 2.5)
    for columns in ({"top_k": 9}, {"top_p": 0.7}, {"min_p": 0.1}):
        (cut,) = kept_tokens(logits, **columns)
        left = torch.full_like(logits, float("-inf"))
        left[0, list(cut)] = logits[0, list(cut)]
        assert kept_tokens(logits, typical_p=0.5, **columns) == [plainly_typical(left[0], 0.5)]


def test_greedy_rows_take_the_best_token_whatever_typical_p_says() -> None:
    assert draw(LADDER, 5, temperature=0.0, typical_p=0.2) == [0] * 5


def test_logit_bias_adds() -> None:
    biases = [
        (1, np.array([5, 2]), np.array([0.5, 3.0], dtype=np.float32)),
        (2, np.array([0]), np.array([-100.0], dtype=np.float32)),
    ]
    tokens = sample(LADDER.repeat(3, 1), batch_of(3, temperature=0.0, biases=biases)).tolist()
    assert tokens == [0, 2, 1]


def penalised(logits: list[float], prompt: list[int], output: list[int], **columns: float) -> list[float]:
    """Logits of a second row after penalties; the first row is untouched."""
    size = len(logits)
    seen = torch.zeros(4, size, dtype=torch.bool)
    counts = torch.zeros(4, size, dtype=torch.int32)
    seen[3, prompt] = True
    for token in output:
        counts[3, token] += 1
    both = torch.tensor([logits, logits])
    penalties = PenaltyRows(np.array([1]), np.array([3]), seen, counts)
    sample(both, batch_of(2, temperature=0.0, penalties=penalties, **columns))
    assert both[0].tolist() == logits
    return [round(x, 4) for x in both[1].tolist()]


def test_penalties() -> None:
    logits = [2.0, -2.0, 1.0, -1.0, 4.0]
    assert penalised(logits, [0, 1], [2, 2, 3], repetition_penalty=2.0) == [1.0, -4.0, 0.5, -2.0, 4.0]
    assert penalised(logits, [0, 1], [2, 2, 3], presence_penalty=0.5) == [2.0, -2.0, 0.5, -1.5, 4.0]
    assert penalised(logits, [0, 1], [2, 2, 3], frequency_penalty=0.5) == [2.0, -2.0, 0.0, -1.5, 4.0]


def test_bias_comes_before_penalties() -> None:
    logits = torch.tensor([[1.0, 0.0]])
    seen, counts = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int32)
    batch = batch_of(
        1,
        temperature=0.0,
        repetition_penalty=2.0,
        penalties=PenaltyRows(np.array([0]), np.array([0]), seen, counts),
        biases=[(0, np.array([1]), np.array([4.0], dtype=np.float32))],
    )
    sample(logits, batch)
    assert logits.tolist() == [[0.5, 2.0]]


def test_banned_and_allowed_tokens() -> None:
    allowed = np.zeros(2, dtype=np.int32)
    allowed[0], allowed[1] = 1 << 4, -(2**31) | 1  # tokens 4, 32 and 63 (past the vocabulary)
    tokens = sample(
        torch.cat([LADDER, torch.zeros(1, VOCAB - 6)], dim=1).repeat(3, 1) - 1,
        batch_of(3, temperature=0.0, banned=[(0, np.arange(6, 60))], allowed={2: allowed}),
    ).tolist()
    assert tokens == [60, 6, 32]
    many = draw(torch.zeros(1, VOCAB), 200, allowed=dict.fromkeys(range(200), allowed))
    assert set(many) == {4, 32}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, for the interpreter: the kernel looks past it
@pytest.mark.parametrize("mode", ["greedy", "random", "filtered"])
def test_the_sampling_kernel_draws_the_same_from_edited_logits(mode: str) -> None:
    """Rows with masks, of which one leaves a single token, beside rows without; on a CPU in the interpreter."""
    pytest.importorskip("triton")
    from engine.kernels.sampling import SamplingColumns, SamplingWorkspace, sample_tokens

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, vocab = 12, 1500
    logits = random_logits(rows, vocab, 3.0, seed=4)
    columns = crowd_columns(rows) | {"typical_p": np.ones(rows)}
    if mode == "greedy":
        columns["temperature"] = np.zeros(rows)
    if mode != "filtered":
        columns |= {"top_k": np.zeros(rows), "top_p": np.ones(rows), "min_p": np.zeros(rows)}
    one_token = np.zeros(-(-vocab // 32), dtype=np.int32)
    one_token[30] = 1 << 7
    few = np.zeros_like(one_token)
    few[[3, 40]] = -1
    masks = {"allowed": {1: one_token, 4: few, 5: few}, "banned": [(7, logits[7].topk(40).indices.numpy())]}
    biases = [(9, np.array([11, 12]), np.array([50.0, -50.0], dtype=np.float32))]
    batch = batch_of(rows, **columns, **masks, biases=biases)
    expected = sample(logits.to(device).clone(), batch).tolist()
    assert expected[1] == 30 * 32 + 7

    edited = logits.to(device).clone()
    edit(edited, batch)
    on_device = SamplingColumns.create(rows, device)
    for name in ("temperature", "top_k", "top_p", "min_p", "output_index"):
        column = getattr(on_device, name)
        column.copy_(torch.from_numpy(getattr(batch, name)))
    on_device.seed.copy_(torch.from_numpy(batch.seed.view(np.int64)))
    drawn, last = torch.zeros(2, rows, dtype=torch.int64, device=device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    workspace = SamplingWorkspace.create(rows, vocab, device)
    sample_tokens(edited, slots, on_device, drawn, last, workspace=workspace, mode=mode)
    assert drawn.tolist() == last.tolist() == expected


def test_logprobs() -> None:
    logits = random_logits(4, 50)
    ids = torch.tensor([3, 0, 49, int(logits[3].argmax())])
    result = compute_logprobs(logits, ids, 5)
    expected = logits.double().log_softmax(-1)
    for row, token in enumerate(ids.tolist()):
        assert float(result.chosen[row]) == pytest.approx(float(expected[row, token]), abs=1e-5)
        assert int(result.ranks[row]) == sorted(expected[row].tolist(), reverse=True).index(float(expected[row, token])) + 1
        assert result.top_ids[row].tolist() == expected[row].topk(5).indices.tolist()
    assert compute_logprobs(logits, ids, 0).top_ids.shape == (4, 0)
