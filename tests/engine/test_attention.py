"""Paged attention against a reference that knows no pages, and against Hugging Face's eager attention in whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.attention import hf
from engine.attention.base import LayerSpec, RaggedBatch, group_layers
from engine.attention.sdpa import SdpaBackend
from engine.config import ModelConfig
from engine.errors import ModelNotSupported
from engine.model_loader import load_model
from tests import tiny_models

CPU = torch.device("cpu")
BLOCK_SIZE = 4
NUM_BLOCKS = 96


def layer(index: int = 0, *, window: int | None = None, softcap: float | None = None, sinks: bool = False) -> LayerSpec:
    return LayerSpec(index, 4, 2, 16, 0.3, window, softcap, sinks)


def make_backend(layers: list[LayerSpec], num_blocks: int = NUM_BLOCKS) -> SdpaBackend:
    groups = group_layers(layers, BLOCK_SIZE, 4)
    backend = SdpaBackend(layers, groups, BLOCK_SIZE, torch.float32, CPU)
    backend.allocate([num_blocks] * len(groups))
    return backend


def reference(spec: LayerSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Causal attention of one whole sequence in float64: q [L, H, D], k and v [L, K, D] -> [L, H, D]."""
    repeat = spec.num_heads // spec.num_kv_heads
    k, v = (x.double().repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * spec.scaling
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None, :]
    hidden = distance < 0 if spec.window is None else (distance < 0) | (distance >= spec.window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(q)], v).float()


def tables(lengths: list[int], *, fragmented: bool) -> list[list[int]]:
    """Page ids for sequences of these lengths, neighbouring or scattered."""
    ids = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3)).add(1).tolist()
    supply = iter(ids if fragmented else sorted(ids))
    return [[next(supply) for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]


SPECS = {
    "full": layer(),
    "window": layer(window=6),
    "window of one page": layer(window=BLOCK_SIZE),
    "window of one token": layer(window=1),
    "softcap": layer(softcap=2.0),
    "sinks": layer(sinks=True),
    "window, softcap, sinks": layer(window=6, softcap=2.0, sinks=True),
}
# per sequence, where its chunks end: prefill alone, awkward chunks, chunk and decodes, decodes alone
CHUNK_ENDS = [[37], [5, 11, 12, 30], [16, 17, 18, 19], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("fragmented", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_ragged_steps_equal_the_reference(name: str, fragmented: bool) -> None:
    """Chunks and decodes of several sequences mixed in one step, over neighbouring and scattered pages."""
    spec = SPECS[name]
    generator = torch.Generator().manual_seed(0)
    lengths = [ends[-1] for ends in CHUNK_ENDS]
    q, k, v = ([torch.randn(n, heads, 16, generator=generator) for n in lengths] for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator) if spec.has_sinks else None
    expected = [reference(spec, *parts, sinks) for parts in zip(q, k, v, strict=True)]
    backend, block_tables = make_backend([spec]), tables(lengths, fragmented=fragmented)
    backend._pages[0].fill_(float("nan"))  # what a page held before must not matter
    for step in range(max(map(len, CHUNK_ENDS))):
        rows = [s for s, ends in enumerate(CHUNK_ENDS) if step < len(ends)]
        spans = [slice(0 if step == 0 else CHUNK_ENDS[s][step - 1], CHUNK_ENDS[s][step]) for s in rows]
        metadata = backend.prepare(
            RaggedBatch([c.stop - c.start for c in spans], [c.start for c in spans], ([block_tables[s] for s in rows],))
        )
        q_THD, k_TKD, v_TKD = (torch.cat([x[s][c] for s, c in zip(rows, spans, strict=True)]) for x in (q, k, v))
        out = backend.forward(0, q_THD, k_TKD, v_TKD, metadata, sinks)
        torch.testing.assert_close(
            out, torch.cat([expected[s][c] for s, c in zip(rows, spans, strict=True)]), atol=2e-6, rtol=1e-5
        )


def test_pages_that_left_the_window_are_not_read() -> None:
    spec = layer(window=5)
    backend = make_backend([spec])
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(20, heads, 16, generator=generator) for heads in (4, 2, 2))
    backend.forward(0, q[:19], k[:19], v[:19], backend.prepare(RaggedBatch([19], [0], ([[1, 2, 3, 4, 5]],))))
    backend._pages[0][:, :, [0, 1, 2, 3]] = float("nan")  # the window of position 19 begins at 15, in page 4
    out = backend.forward(0, q[19:], k[19:], v[19:], backend.prepare(RaggedBatch([1], [19], ([[0, 0, 0, 4, 5]],))))
    torch.testing.assert_close(out, reference(spec, q, k, v, None)[19:], atol=2e-6, rtol=1e-5)


def test_groups_have_tables_of_their_own() -> None:
    layers = [layer(0), layer(1, window=6)]
    backend = make_backend(layers)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(9, heads, 16, generator=generator) for heads in (4, 2, 2))
    metadata = backend.prepare(RaggedBatch([9], [0], ([[1, 2, 3]], [[7, 5, 9]])))
    for spec in layers:
        out = backend.forward(spec.layer_index, q, k, v, metadata)
        torch.testing.assert_close(out, reference(spec, q, k, v, None), atol=2e-6, rtol=1e-5)
    assert backend._pages[0][:, :, [5, 7, 9]].abs().sum() == 0
    assert backend._pages[1][:, :, [5, 7, 9]].abs().sum() > 0


def test_copied_pages_continue_as_the_source_would() -> None:
    backend = make_backend([layer()])
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(7, heads, 16, generator=generator) for heads in (4, 2, 2))
    backend.forward(0, q[:6], k[:6], v[:6], backend.prepare(RaggedBatch([6], [0], ([[1, 2]],))))
    backend.copy_blocks([(0, 2, 3)])
    metadata = backend.prepare(RaggedBatch([1, 1], [6, 6], ([[1, 2], [1, 3]],)))
    first, second = backend.forward(0, q[[6, 6]], k[[6, 6]], v[[6, 6]], metadata)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, reference(layer(), q, k, v, None)[6], atol=2e-6, rtol=1e-5)


def test_long_rows_are_sliced_on_the_explicit_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.attention.sdpa._MAX_SCORES", 4 * 20 * 3)
    spec = layer(softcap=2.0)
    backend = make_backend([spec])
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(20, heads, 16, generator=generator) for heads in (4, 2, 2))
    for end in (20, 13):  # plain causality, then a mask over a prefix
        start = 0 if end == 20 else 5
        metadata = backend.prepare(RaggedBatch([end - start], [start], ([[1, 2, 3, 4, 5]],)))
        out = backend.forward(0, q[start:end], k[start:end], v[start:end], metadata)
        torch.testing.assert_close(out, reference(spec, q, k, v, None)[start:end], atol=2e-6, rtol=1e-5)


@torch.inference_mode()
def run_paged(model: torch.nn.Module, layers: list[LayerSpec], token_ids: list[int], cuts: list[int]) -> torch.Tensor:
    """Logits [T, V] of one sequence computed in chunks that end at `cuts`."""
    backend = make_backend(layers)
    num_groups = len(group_layers(layers, BLOCK_SIZE, 4))
    [table] = tables([len(token_ids)], fragmented=True)
    logits = []
    for start, end in zip([0, *cuts], [*cuts, len(token_ids)], strict=True):
        batch = RaggedBatch([end - start], [start], tuple([table] for _ in range(num_groups)))
        out = model(
            input_ids=torch.tensor([token_ids[start:end]]),
            position_ids=torch.arange(start, end)[None],
            use_cache=False,
            paged_attention=hf.StepAttention.of(backend, batch),
        )
        logits.append(out.logits[0])
    return torch.cat(logits)


@pytest.mark.parametrize("cuts", [[], [13], [13, 14, 15, 31]], ids=["whole", "two chunks", "chunks and decodes"])
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_models_equal_eager(name: str, cuts: list[int], tmp_path: Path) -> None:
    folder = tiny_models.build(name, tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    loaded = load_model(folder, ModelConfig(model=str(folder)), CPU, torch.float32)
    token_ids = torch.randint(5, 300, (41,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = eager(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(run_paged(loaded.model, loaded.layers, token_ids, cuts), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", tiny_models.ROPE_BY_LENGTH)
def test_a_short_request_does_not_feel_a_long_one(name: str, tmp_path: Path) -> None:
    """Rotary frequencies that would follow the batch's longest position are those of the served context, always."""
    folder = tiny_models.build(name, tmp_path)
    served = 160
    loaded = load_model(folder, ModelConfig(model=str(folder), max_model_len=served), CPU, torch.float32)
    generator = torch.Generator().manual_seed(6)
    long, short = (torch.randint(5, 300, (n,), generator=generator).tolist() for n in (120, 20))
    alone = [run_paged(loaded.model, loaded.layers, ids, []) for ids in (long, short)]
    backend = make_backend(loaded.layers)
    batch = RaggedBatch([120, 20], [0, 0], (tables([120, 20], fragmented=True),))
    with torch.inference_mode():
        together = loaded.model(
            input_ids=torch.tensor([long + short]),
            position_ids=torch.cat([torch.arange(120), torch.arange(20)])[None],
            use_cache=False,
            paged_attention=hf.StepAttention.of(backend, batch),
        ).logits[0]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run_paged(loaded.model, loaded.layers, long, [50, 100]), alone[0], atol=1e-4, rtol=1e-4)
    # and a sequence as long as the served context gets what transformers gives it
    full = torch.randint(5, 300, (served,), generator=generator).tolist()
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = eager(torch.tensor([full])).logits[0]
    torch.testing.assert_close(run_paged(loaded.model, loaded.layers, full, []), expected, atol=1e-4, rtol=1e-4)


def _tiny(tmp_path: Path) -> torch.nn.Module:
    hf.register()
    folder = tiny_models.build("llama", tmp_path)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=hf.ATTENTION_NAME).eval()


def test_probe_refuses_a_layer_that_does_not_arrive(tmp_path: Path) -> None:
    model = _tiny(tmp_path)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ModelNotSupported, match=r"layers \[1\] do not reach attention"):
        hf.probe_layers(model, 3, 512)


def test_probe_refuses_layers_that_share_an_index_or_have_none(tmp_path: Path) -> None:
    model = _tiny(tmp_path)
    model.model.layers[2].self_attn.layer_idx = 1
    with pytest.raises(ModelNotSupported, match="layer 1 attends more than once"):
        hf.probe_layers(model, 3, 512)
    del model.model.layers[2].self_attn.layer_idx
    with pytest.raises(ModelNotSupported, match="LlamaAttention has no layer index"):
        hf.probe_layers(model, 3, 512)


def test_probe_refuses_positions_mixed_outside_attention(tmp_path: Path) -> None:
    model = _tiny(tmp_path)
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: out + out.roll(1, dims=1))
    with pytest.raises(ModelNotSupported, match="equal tokens at equal positions"):
        hf.probe_layers(model, 3, 512)


def test_probe_refuses_a_model_that_ignores_position_ids(tmp_path: Path) -> None:
    model = _tiny(tmp_path)
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(position_ids.shape[1])[None])
    with pytest.raises(ModelNotSupported, match="different queries, keys or values"):
        hf.probe_layers(model, 3, 512)


def test_probe_refuses_attention_that_is_not_causal(tmp_path: Path) -> None:
    model = _tiny(tmp_path)
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ModelNotSupported, match="layer 0 is not causal"):
        hf.probe_layers(model, 3, 512)


def test_a_forward_without_the_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotSupported, match="keyword arguments"):
        _tiny(tmp_path)(input_ids=torch.tensor([[5, 6]]), use_cache=False)
