"""Pages and contexts by arithmetic, and the memory that control groups leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from dummy_model import SHAPES
from hypothesis import given
from hypothesis import strategies as st

from engine.config import CacheConfig
from engine.errors import ConfigError, ModelLoadError
from engine.host_memory import available_bytes, total_bytes
from engine.memory_plan import (
    KVPlan,
    ModelShape,
    activation_bytes,
    bytes_for_pages,
    estimate_kv_groups,
    estimate_weight_bytes,
    graph_batch_sizes,
    graph_bytes,
    kv_bytes_per_element,
    logits_bytes,
    model_context,
    plan_kv_cache,
    requests_that_fit,
    weights_of,
)
from engine.step import KVGroupSpec

FULL = KVGroupSpec((0, 2), 2, 16, None, 1000)
SLIDING = KVGroupSpec((1, 3), 2, 16, 64, 1000)


def plan(**changes: Any) -> KVPlan:
    settings: dict[str, Any] = {
        "free_bytes": 1_000_000,
        "groups": [FULL],
        "block_size": 16,
        "max_model_len": None,
        "model_context": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
    }
    return plan_kv_cache(**{**settings, **changes})


def test_no_more_pages_than_the_sequences_could_use() -> None:
    result = plan()
    assert result == KVPlan([8 * 32], 512, 257 * 1000, 8 * 512, [])


def test_all_the_memory_is_used_when_it_is_less() -> None:
    assert plan(free_bytes=100_000).num_blocks == [99]  # and the scratch page


def test_the_largest_context_that_fits_is_served_and_said() -> None:
    result = plan(free_bytes=11_500)
    assert (result.max_model_len, result.num_blocks) == (160, [10])
    assert "serving a context of 160 of the model's 512 tokens" in result.notes[0]


def test_an_explicit_context_that_does_not_fit_names_the_number_that_would() -> None:
    with pytest.raises(ConfigError, match="at most 160 tokens") as caught:
        plan(free_bytes=11_500, max_model_len=200)
    assert caught.value.param == "max_model_len"
    assert plan(free_bytes=11_500, max_model_len=160).notes == []


def test_an_explicit_context_past_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than the model's context of 512") as caught:
        plan(max_model_len=513)
    assert caught.value.param == "max_model_len"


@pytest.mark.parametrize("free_bytes", [-5, 0, 1999])
def test_memory_for_no_page_at_all_is_refused(free_bytes: int) -> None:
    with pytest.raises(ConfigError, match="no sequence at all"):
        plan(free_bytes=free_bytes)


def test_an_explicit_page_count_overrides_the_memory() -> None:
    result = plan(free_bytes=0, num_kv_blocks=5, groups=[FULL, SLIDING])
    assert (result.num_blocks, result.max_model_len, result.kv_cache_tokens) == ([5, 5], 80, 80)
    with pytest.raises(ConfigError, match="5 KV blocks: at most 80"):
        plan(num_kv_blocks=5, max_model_len=81)


def test_a_sliding_group_needs_its_window_and_a_chunk() -> None:
    # 63 tokens before the query and a chunk of 128 are 12 pages, which may begin inside a page: 13
    result = plan(groups=[SLIDING], free_bytes=14_000, model_context=100_000)
    assert (result.max_model_len, result.num_blocks) == (100_000, [13])
    with pytest.raises(ConfigError, match="at most 192 tokens"):
        plan(
            groups=[SLIDING],
            free_bytes=14_000 - 1 + 0,
            model_context=100_000,
            max_model_len=100_000,
            max_num_batched_tokens=145,
        )


@given(
    free_bytes=st.integers(4_000, 2_000_000),
    context=st.integers(1, 5_000),
    window=st.integers(1, 600),
    chunk=st.integers(1, 2_000),
    max_num_seqs=st.integers(1, 64),
)
def test_plans_fit_and_hold_one_longest_sequence(
    free_bytes: int, context: int, window: int, chunk: int, max_num_seqs: int
) -> None:
    sliding = KVGroupSpec((1,), 2, 16, window, 700)
    result = plan(
        free_bytes=free_bytes,
        groups=[FULL, sliding],
        model_context=context,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=chunk,
    )
    assert result.kv_cache_bytes == (result.num_blocks[0] + 1) * 1000 + (result.num_blocks[1] + 1) * 700 <= free_bytes
    pages = -(-result.max_model_len // 16)
    assert pages <= result.num_blocks[0] <= max_num_seqs * pages
    touched = min(pages, -(-(window - 1 + min(chunk, result.max_model_len)) // 16) + 1)
    assert touched <= result.num_blocks[1] <= max_num_seqs * touched
    assert (result.max_model_len < context) == bool(result.notes)


def test_kv_groups_from_a_configuration() -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    [full] = estimate_kv_groups(config, 16, 2)
    assert full == KVGroupSpec((0, 1, 2, 3), 2, 16, None, 2 * 4 * 16 * 2 * 16 * 2)
    alternating = ["sliding_attention", "full_attention"] * 2
    sliding, full = estimate_kv_groups({**config, "layer_types": alternating, "sliding_window": 8, "head_dim": 32}, 16, 2)
    assert (sliding.layer_indices, sliding.window, sliding.head_dim) == ((0, 2), 8, 32)
    assert (full.layer_indices, full.window) == ((1, 3), None)
    [everywhere] = estimate_kv_groups({"text_config": {**config, "sliding_window": 8}}, 16, 2)
    assert everywhere.window == 8
    for idle in ({"sliding_window": 8, "use_sliding_window": False}, {"sliding_window": 64, "max_position_embeddings": 64}):
        assert [group.window for group in estimate_kv_groups({**config, **idle}, 16, 2)] == [None]


def write_header(path: Path, header: dict[str, Any]) -> None:
    data = json.dumps(header).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data)


def test_weight_bytes_from_safetensors_headers(tmp_path: Path) -> None:
    assert estimate_weight_bytes(tmp_path, 2) is None
    write_header(
        tmp_path / "a.safetensors",
        {
            "__metadata__": {"format": "pt"},
            "w": {"dtype": "F32", "shape": [10, 4], "data_offsets": [0, 160]},
            "ids": {"dtype": "I64", "shape": [3], "data_offsets": [160, 184]},
        },
    )
    write_header(tmp_path / "b.safetensors", {"x_blocks": {"dtype": "U8", "shape": [2, 16], "data_offsets": [0, 32]}})
    assert estimate_weight_bytes(tmp_path, 2) == 40 * 2 + 3 * 8 + 64 * 2
    (tmp_path / "c.safetensors").write_bytes(b"not a header")
    with pytest.raises(ModelLoadError, match="fetch it again"):
        estimate_weight_bytes(tmp_path, 2)


LAYER = "model.layers.0."


def test_quantized_linears_are_counted_by_their_names(tmp_path: Path) -> None:
    names = (f"{LAYER}mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight", f"{LAYER}mlp.gate.weight")
    names += (f"{LAYER}mlp.experts.0.up_proj.weight",)
    write_header(tmp_path / "a.safetensors", {name: {"dtype": "BF16", "shape": [10, 4]} for name in names})
    assert estimate_weight_bytes(tmp_path, 2) == 5 * 80
    assert estimate_weight_bytes(tmp_path, 2, 1) == 4 * 80 + 40 + 4 * 10
    assert estimate_weight_bytes(tmp_path, 2, packs_head=True) == 5 * 80
    assert estimate_weight_bytes(tmp_path, 2, 1, packs_head=True) == 3 * 80 + 2 * (40 + 4 * 10)


def test_a_packed_head_is_the_embeddings_once_more_where_files_hold_none(tmp_path: Path) -> None:
    write_header(tmp_path / "a.safetensors", {"model.embed_tokens.weight": {"dtype": "F32", "shape": [10, 4]}})
    assert estimate_weight_bytes(tmp_path, 2) == 80
    assert estimate_weight_bytes(tmp_path, 2, packs_head=True) == 160
    assert estimate_weight_bytes(tmp_path, 2, 1, packs_head=True) == 80 + 40 + 4 * 10


@pytest.mark.parametrize(
    ("name", "count", "left_out"),
    [("llama-3.1-8b", 8_030_261_248, 0), ("llama-3.2-1b", 1_235_814_400, 0), ("qwen3-30b-a3b", 30_532_122_624, 2 * 48 * 128)],
)
def test_weights_by_the_configuration_s_sizes(name: str, count: int, left_out: int, tmp_path: Path) -> None:
    """The published models' numbers of parameters; left_out: the small norms of queries and keys."""
    shape = ModelShape.of(SHAPES[name])
    assert shape.weight_bytes(2) == 2 * (count - left_out)
    assert weights_of(tmp_path, shape, load_format="auto", quantization="none", bytes_per_element=2) == (
        2 * (count - left_out),
        True,
    )
    fp8, int8 = (
        weights_of(tmp_path, shape, load_format="dummy", quantization=quantization, bytes_per_element=2, packs_head=packs_head)
        for quantization, packs_head in (("fp8", False), ("int8", True))
    )
    assert fp8[0] < 2 * count
    head = shape.vocab_size * shape.hidden_size
    dense = shape.weight_bytes(2, packs_head=True)
    assert dense == shape.weight_bytes(2) + (2 * head if shape.is_tied else 0)
    assert int8[0] == fp8[0] + (head if shape.is_tied else -head) + 4 * shape.vocab_size


def test_sizes_as_families_write_them() -> None:
    base = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 100}
    shape = ModelShape.of(base)
    assert (shape.num_kv_heads, shape.head_dim, shape.intermediate_size, shape.num_experts) == (4, 16, 256, 0)
    assert not shape.is_tied and ModelShape.of(base | {"model_type": "gemma3_text"}).is_tied
    mixtral = ModelShape.of(base | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96})
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.expert_size, mixtral.num_expert_layers) == (8, 2, 96, 4)
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2}
    partly = ModelShape.of({"text_config": base | experts | {"first_k_dense_replace": 1}})
    assert (partly.num_expert_layers, partly.shared_size) == (3, 64)
    assert ModelShape.of(base | experts | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}).num_expert_layers == 1
    with pytest.raises(ModelLoadError, match="states no vocab_size"):
        ModelShape.of({key: value for key, value in base.items() if key != "vocab_size"})
    with pytest.raises(ModelLoadError, match="no number"):
        ModelShape.of(base | {"hidden_size": "wide"})


def test_activations_graphs_and_stored_bytes() -> None:
    shape = ModelShape.of(SHAPES["llama-3.1-8b"])
    small = activation_bytes(shape, max_num_batched_tokens=2048, max_num_seqs=64, bytes_per_element=2)
    large = activation_bytes(shape, max_num_batched_tokens=8192, max_num_seqs=64, bytes_per_element=2)
    logits = logits_bytes(shape, 64)
    assert large - logits == 4 * (small - logits) and logits == 20 * 64 * 128256
    assert graph_bytes(shape, max_num_seqs=256, bytes_per_element=2) > graph_bytes(shape, max_num_seqs=8, bytes_per_element=2)
    assert graph_batch_sizes(1) == (1,) and graph_batch_sizes(5) == (1, 2, 4, 5)
    sizes = graph_batch_sizes(300)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == 300 and 256 in sizes
    assert (kv_bytes_per_element("auto", 2), kv_bytes_per_element("fp8", 2)) == (2, 1)


def test_bytes_for_pages() -> None:
    parts: dict[str, Any] = {"total_bytes": 1000, "free_bytes": 900, "weights": 300, "activations": 50, "graphs": 10}
    assert bytes_for_pages(CacheConfig(gpu_memory_utilization=0.9), on_gpu=True, **parts) == 900 - 100 - 360
    assert bytes_for_pages(CacheConfig(cpu_memory_share=0.5), on_gpu=False, **parts) == 300
    assert bytes_for_pages(CacheConfig(kv_cache_memory_bytes=7), on_gpu=True, **parts) == 7
    assert bytes_for_pages(CacheConfig(), on_gpu=True, **parts | {"weights": 5000}) == 0


def test_contexts_as_configurations_state_them() -> None:
    assert model_context({"max_position_embeddings": 64}) == 64
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    assert model_context({"text_config": {"max_position_embeddings": 64, "rope_parameters": dynamic}}) == 256
    yarn = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    assert model_context({"max_position_embeddings": 64, "rope_scaling": yarn}) == 512
    with pytest.raises(ModelLoadError, match="max_position_embeddings"):
        model_context({})


def test_layer_types_that_a_family_does_not_list() -> None:
    config = {"num_hidden_layers": 12, "num_attention_heads": 4, "hidden_size": 64, "sliding_window": 8}
    sliding, full = estimate_kv_groups(config | {"model_type": "gemma3_text"}, 16, 2)
    assert (len(sliding.layer_indices), full.layer_indices) == (10, (5, 11))
    sliding, full = estimate_kv_groups(config | {"sliding_window_pattern": 3}, 16, 2)
    assert (len(sliding.layer_indices), full.layer_indices) == (8, (2, 5, 8, 11))


def test_requests_that_fit() -> None:
    result = plan(free_bytes=100_000)  # 99 pages of 16 tokens
    assert requests_that_fit(result, [FULL], 16, 17, 128) == 49
    assert requests_that_fit(result, [FULL], 16, 512, 128) == 3
    mixed = plan(free_bytes=100_000, groups=[FULL, SLIDING])
    assert requests_that_fit(mixed, [FULL, SLIDING], 16, 512, 128) == min(mixed.num_blocks[0] // 32, mixed.num_blocks[1] // 13)


def cgroup(folder: Path, limit: str, used: int, cache: int, *, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for name, text in zip((*names[:2], "memory.stat"), (limit, str(used), f"anon 5\n{names[2]} {cache}\n"), strict=True):
        (folder / name).write_text(text + "\n")


def test_without_control_groups_the_machine_decides(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert 0 < available_bytes(tmp_path, tmp_path / "absent") <= total
    assert total_bytes(tmp_path, tmp_path / "absent") == total


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_binds(tmp_path: Path, version: int) -> None:
    root = tmp_path / "memory" if version == 1 else tmp_path
    own = tmp_path / "self"
    own.write_text("4:cpu,cpuacct:/x\n3:memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    cgroup(root / "outer", "5000000", 1_500_000, 500_000, version=version)
    cgroup(root / "outer" / "inner", "max" if version == 2 else str(2**62), 1_000, 0, version=version)
    assert available_bytes(tmp_path, own) == 4_000_000
    assert total_bytes(tmp_path, own) == 5_000_000
    cgroup(root / "outer" / "inner", "3000000", 2_999_000, 0, version=version)
    assert available_bytes(tmp_path, own) == 1_000
    assert total_bytes(tmp_path, own) == 3_000_000
    cgroup(root / "outer" / "inner", "3000000", 4_000_000, 0, version=version)
    assert available_bytes(tmp_path, own) == 0


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("0::/\n")
    cgroup(tmp_path, "2000000", 500_000, 0, version=2)
    assert available_bytes(tmp_path, own) == 1_500_000
    own.write_text("0::/docker/abc\n")  # the host's path, which the container cannot see
    assert available_bytes(tmp_path, own) == 1_500_000
