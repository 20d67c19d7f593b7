"""How much a model takes, and how many pages and how long a context fit into the rest: arithmetic only, no torch.

The engine sizes itself by these functions at load, and `octavo plan` prints them before.

Every KV group has pages of its own. A sequence of L tokens fills ceil(L / block_size) pages of a full-attention group, and of
a sliding group never more than its window and the chunk being computed can touch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import CacheConfig
from engine.errors import ConfigError, ModelLoadError
from engine.step import KVGroupSpec

_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_TIED_BY_DEFAULT = ("gemma",)  # families whose files need not say that the head is the embedding table
_FULL_LAYER_EVERY = {"gemma2": 2, "gemma3_text": 6}  # in files that do not list their layers' types
_LOGITS_COPIES = 5  # float32, [max_num_seqs, vocabulary]: as the general sampling path holds at once
_STEP_MARGIN = 1.5  # of a step's temporaries: what the allocator cannot give back in time
MAX_GRAPH_TOKENS = 2048
"""Tokens up to which steps with prompt chunks run as graphs: beyond, the device takes longer than launching does."""

_LAUNCHES_PER_LAYER = 16
_BYTES_PER_LAUNCH = 16 << 10  # of a launch recorded in a CUDA graph, on the device, generously


@dataclass(frozen=True, slots=True)
class KVPlan:
    """num_blocks: usable pages by KV group, without the scratch page. kv_cache_bytes: of all pages, scratch pages included.
    kv_cache_tokens: tokens that the pages hold at once. notes: lines a user should read."""

    num_blocks: list[int]
    max_model_len: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Need:
    """Pages that one running sequence needs, by its length."""

    groups: tuple[KVGroupSpec, ...]
    block_size: int
    max_num_batched_tokens: int

    def blocks(self, group: KVGroupSpec, num_tokens: int) -> int:
        """A window of W ends anywhere in a page, so W - 1 tokens and a chunk can touch one page more than they fill."""
        by_length = math.ceil(num_tokens / self.block_size)
        if group.window is None:
            return by_length
        chunk = min(self.max_num_batched_tokens, num_tokens)
        return min(by_length, math.ceil((group.window - 1 + chunk) / self.block_size) + 1)

    def bytes(self, num_tokens: int) -> int:
        """Of one sequence's pages and the scratch page of every group."""
        return sum((self.blocks(group, num_tokens) + 1) * group.bytes_per_block for group in self.groups)


def plan_kv_cache(
    *,
    free_bytes: int,
    groups: Sequence[KVGroupSpec],
    block_size: int,
    max_model_len: int | None,
    model_context: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_kv_blocks: int | Sequence[int] | None = None,
) -> KVPlan:
    """Pages for each group and the context they serve.

    free_bytes: for pages. max_model_len: None serves the largest context that fits. model_context: tokens the model knows.
    num_kv_blocks: pages of every group, or a number for each of them, instead of what free_bytes would give. There are never
    more pages than max_num_seqs sequences of the whole context could use. Raises ConfigError where the asked context, or any
    context, does not fit.
    """
    if isinstance(num_kv_blocks, int):
        num_kv_blocks = [num_kv_blocks] * len(groups)
    need = _Need(tuple(groups), block_size, max_num_batched_tokens)
    if max_model_len is not None and max_model_len > model_context:
        raise ConfigError(
            f"max_model_len {max_model_len} is more than the model's context of {model_context} tokens", param="max_model_len"
        )
    wanted = max_model_len or model_context
    fitting = _largest_fitting(need, wanted, free_bytes, num_kv_blocks)
    room = f"{min(num_kv_blocks)} KV blocks" if num_kv_blocks is not None else f"{_megabytes(free_bytes)} for the KV cache"
    if fitting == 0:
        raise ConfigError(
            f"{room} hold no sequence at all: one page of {block_size} tokens takes {_megabytes(need.bytes(1))}; "
            "free memory, raise kv_cache_memory_bytes, or serve a smaller model",
            param="num_kv_blocks" if num_kv_blocks is not None else "kv_cache_memory_bytes",
        )
    if max_model_len is not None and fitting < max_model_len:
        raise ConfigError(
            f"max_model_len {max_model_len} does not fit into {room}: at most {fitting} tokens do", param="max_model_len"
        )
    notes = []
    if fitting < wanted:
        notes.append(f"serving a context of {fitting} of the model's {model_context} tokens: {room} hold no more")
    num_blocks = list(num_kv_blocks) if num_kv_blocks else _share_out(need, fitting, max_num_seqs, free_bytes)
    deciding = [count for group, count in zip(need.groups, num_blocks, strict=True) if group.window is None] or num_blocks
    return KVPlan(
        num_blocks=num_blocks,
        max_model_len=fitting,
        kv_cache_bytes=_plan_bytes(need, num_blocks),
        kv_cache_tokens=min(deciding) * block_size,
        notes=notes,
    )


def _largest_fitting(need: _Need, longest: int, free_bytes: int, num_kv_blocks: Sequence[int] | None) -> int:
    """The largest length in 0 .. longest of which one sequence fits; what a sequence needs never falls with its length."""

    def fits(num_tokens: int) -> bool:
        if num_kv_blocks is not None:
            return all(need.blocks(group, num_tokens) <= n for group, n in zip(need.groups, num_kv_blocks, strict=True))
        return need.bytes(num_tokens) <= free_bytes

    low, high = 0, longest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _share_out(need: _Need, max_model_len: int, max_num_seqs: int, free_bytes: int) -> list[int]:
    """Pages by group: one longest sequence first, the rest by what sequences of a quarter of the context need.

    The groups' proportion depends on how long sequences are, which nobody knows yet: shared out by the longest, short
    sequences would run out of sliding pages while full-attention pages lie idle.
    """
    typical_len = max(1, max_model_len // 4)
    most = [max_num_seqs * need.blocks(group, max_model_len) for group in need.groups]
    first = [need.blocks(group, max_model_len) for group in need.groups]
    typical = [need.blocks(group, typical_len) for group in need.groups]
    parts = 1024  # of a typical sequence, so that little of the memory is left over

    def blocks(shares: int) -> list[int]:
        return [min(m, f + shares * t // parts) for m, f, t in zip(most, first, typical, strict=True)]

    low, high = 0, parts * max(math.ceil(m / t) for m, t in zip(most, typical, strict=True))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _plan_bytes(need, blocks(middle)) <= free_bytes else (low, middle - 1)
    return blocks(low)


def _plan_bytes(need: _Need, num_blocks: Sequence[int]) -> int:
    return sum((count + 1) * group.bytes_per_block for group, count in zip(need.groups, num_blocks, strict=True))


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder, as its configuration states them. num_experts is 0 where every token takes the whole MLP; then
    experts_per_token, expert_size and num_expert_layers are 0 too. shared_size: of an MLP beside the experts."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool
    num_experts: int
    experts_per_token: int
    expert_size: int
    shared_size: int
    num_expert_layers: int

    @classmethod
    def of(cls, hf_config: Mapping[str, Any]) -> ModelShape:
        """From config.json, or a transformers config's `to_dict()`. Raises ModelLoadError where a size is not stated."""
        config: Mapping[str, Any] = hf_config.get("text_config") or hf_config
        try:
            num_layers, num_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
            hidden_size = int(config["hidden_size"])
            num_experts = int(_first(config, "num_experts", "num_local_experts", "n_routed_experts") or 0)
            intermediate_size = int(_first(config, "intermediate_size") or 4 * hidden_size)
            expert_size = int(_first(config, "moe_intermediate_size") or intermediate_size)
            tied = config.get("tie_word_embeddings", hf_config.get("tie_word_embeddings"))
            return cls(
                num_layers=num_layers,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_heads=num_heads,
                num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
                head_dim=int(config.get("head_dim") or hidden_size // num_heads),
                vocab_size=int(config["vocab_size"]),
                is_tied=str(config.get("model_type")).startswith(_TIED_BY_DEFAULT) if tied is None else bool(tied),
                num_experts=num_experts,
                experts_per_token=int(config.get("num_experts_per_tok") or 1) if num_experts else 0,
                expert_size=expert_size if num_experts else 0,
                shared_size=int(
                    config.get("shared_expert_intermediate_size") or expert_size * (config.get("n_shared_experts") or 0)
                ),
                num_expert_layers=_num_expert_layers(config, num_layers) if num_experts else 0,
            )
        except KeyError as error:
            raise ModelLoadError(f"config.json states no {error.args[0]}, so the model's sizes are unknown: add it") from error
        except (TypeError, ValueError) as error:
            raise ModelLoadError(f"config.json holds a size that is no number ({error}): mend it") from error

    def weight_bytes(self, bytes_per_element: int, linear_bytes: int | None = None, *, packs_head: bool = False) -> int:
        """Of all weights, biases left out. linear_bytes: of an element of the layers' linears, where these are quantized
        (embeddings, head, norms, routers and experts are not); each row then has a float32 scale as well. packs_head: the head
        is packed as the linears are, and so has memory of its own even where it is tied to the embeddings."""
        hidden, q_width, kv_width = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        dense_layers = self.num_layers - self.num_expert_layers
        linears = self.num_layers * hidden * 2 * (q_width + kv_width) + 3 * hidden * (
            dense_layers * self.intermediate_size + self.num_expert_layers * self.shared_size
        )
        rows = self.num_layers * (q_width + 2 * kv_width + hidden) + dense_layers * (2 * self.intermediate_size + hidden)
        experts = self.num_expert_layers * self.num_experts * hidden * (3 * self.expert_size + 1)
        table = self.vocab_size * hidden
        others = table + (2 * self.num_layers + 1) * hidden + experts
        if packs_head:
            linears, rows = linears + table, rows + self.vocab_size
        elif not self.is_tied:
            others += table
        if linear_bytes is None:
            return (linears + others) * bytes_per_element
        return linears * linear_bytes + 4 * rows + others * bytes_per_element


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _num_expert_layers(config: Mapping[str, Any], num_layers: int) -> int:
    """Layers that have experts: all but those that families name as dense, each in its own way."""
    every = int(config.get("decoder_sparse_step") or 1)
    dense = set(config.get("mlp_only_layers") or ()) | set(range(int(config.get("first_k_dense_replace") or 0)))
    return sum(index not in dense and (index + 1) % every == 0 for index in range(num_layers))


def activation_bytes(shape: ModelShape, *, max_num_batched_tokens: int, max_num_seqs: int, bytes_per_element: int) -> int:
    """An upper estimate of a step's temporaries: a layer's activations for every token, and the sampled rows' logits."""
    attention = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    experts = shape.experts_per_token * (2 * shape.hidden_size + 3 * shape.expert_size)
    widest_mlp = max(3 * shape.intermediate_size if shape.num_expert_layers < shape.num_layers else 0, experts)
    per_token = 4 * shape.hidden_size + attention + widest_mlp
    return int(_STEP_MARGIN * max_num_batched_tokens * per_token * bytes_per_element) + logits_bytes(shape, max_num_seqs)


def logits_bytes(shape: ModelShape, max_num_seqs: int) -> int:
    """Of the copies of float32 logits that sampling may hold at once."""
    return _LOGITS_COPIES * 4 * max_num_seqs * shape.vocab_size


def graph_batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Row counts that CUDA graphs are made for, ascending: 1, 2, 4, then steps of about an eighth, up to max_num_seqs."""
    sizes = [1, 2, 4]
    while sizes[-1] < max_num_seqs:
        last = sizes[-1]
        sizes.append(last + (4 if last < 16 else 8 if last < 64 else 16 if last < 256 else 64))
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def graph_token_counts() -> tuple[int, ...]:
    """Token counts that graphs of steps with prompt chunks are made for, ascending: multiples of 16, in steps of at most an
    eighth, to MAX_GRAPH_TOKENS."""
    sizes = [16]
    while sizes[-1] < MAX_GRAPH_TOKENS:
        sizes.append(sizes[-1] + max(16, 1 << (sizes[-1].bit_length() - 3)))
    return tuple(sizes)


def graph_bytes(shape: ModelShape, *, max_num_seqs: int, bytes_per_element: int) -> int:
    """Set aside for CUDA graphs: a pool of temporaries for the largest step, and the recorded launches of every size."""
    num_sizes = len(graph_batch_sizes(max_num_seqs)) + len(graph_token_counts())
    launches = _LAUNCHES_PER_LAYER * shape.num_layers * num_sizes
    experts = shape.experts_per_token * (2 * shape.hidden_size + 3 * shape.expert_size)
    width = 8 * shape.hidden_size + max(4 * shape.intermediate_size, experts)
    values = max(max_num_seqs, MAX_GRAPH_TOKENS) * width + max_num_seqs * shape.vocab_size
    return launches * _BYTES_PER_LAUNCH + values * bytes_per_element


def kv_bytes_per_element(kv_cache_dtype: str, bytes_per_element: int) -> int:
    """Of a stored key or value: kv_cache_dtype "auto" is the model's own dtype."""
    return 1 if kv_cache_dtype == "fp8" else bytes_per_element


def model_context(hf_config: Mapping[str, Any]) -> int:
    """Tokens of context that the model knows. Dynamic NTK and YaRN stretch their pretrained length by a factor; elsewhere the
    configuration states the stretched length itself. Raises ModelLoadError where it states none."""
    config: Mapping[str, Any] = hf_config.get("text_config") or hf_config
    stated = config.get("max_position_embeddings")
    if not stated:
        raise ModelLoadError("config.json states no max_position_embeddings, so the model's context is unknown: add it there")
    context = int(stated)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if kind == "dynamic" and factor:
        context = int(context * factor)
    if kind == "yarn" and factor and rope.get("original_max_position_embeddings"):
        context = max(context, int(rope["original_max_position_embeddings"] * factor))
    return context


def weights_of(
    folder: Path, shape: ModelShape, *, load_format: str, quantization: str, bytes_per_element: int, packs_head: bool = False
) -> tuple[int, bool]:
    """(bytes of the weights as they will be kept, whether that is by the configuration's sizes alone): by the files' headers
    where there are files to load, and for random weights by the sizes. packs_head: as it is done on a CPU."""
    widths = bytes_per_element, None if quantization == "none" else 1
    stored = None if load_format == "dummy" else estimate_weight_bytes(folder, *widths, packs_head=packs_head)
    return (shape.weight_bytes(*widths, packs_head=packs_head), True) if stored is None else (stored, False)


def bytes_for_pages(
    cache: CacheConfig, *, on_gpu: bool, total_bytes: int, free_bytes: int, weights: int, activations: int, graphs: int
) -> int:
    """Memory for KV pages on a device with total_bytes, of which free_bytes are free: what the rest leaves within the share of
    a card that Octavo may take, or on a CPU a share of what the weights leave."""
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes
    if not on_gpu:
        return max(0, int((free_bytes - weights) * cache.cpu_memory_share))
    reserve = total_bytes - int(total_bytes * cache.gpu_memory_utilization)
    return max(0, free_bytes - reserve - weights - activations - graphs)


def requests_that_fit(
    plan: KVPlan, groups: Sequence[KVGroupSpec], block_size: int, num_tokens: int, max_num_batched_tokens: int
) -> int:
    """Sequences of num_tokens each (prompt and answer together) whose pages the plan holds at once."""
    need = _Need(tuple(groups), block_size, max_num_batched_tokens)
    return min(count // need.blocks(group, num_tokens) for group, count in zip(groups, plan.num_blocks, strict=True))


def estimate_kv_groups(hf_config: Mapping[str, Any], block_size: int, bytes_per_element: int) -> tuple[KVGroupSpec, ...]:
    """The KV groups that the model will turn out to have, from its configuration (a transformers config's `to_dict()`).

    An estimate made before the weights are loaded; what the loaded layers ask for is what counts in the end.
    """
    config = hf_config.get("text_config") or hf_config
    num_layers = int(config["num_hidden_layers"])
    num_heads = int(config["num_attention_heads"])
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window >= (config.get("max_position_embeddings") or math.inf):
        window = None
    layer_types = config.get("layer_types") or _layer_types(config, num_layers, window)
    members: dict[int | None, list[int]] = {}
    for index, layer_type in enumerate(layer_types[:num_layers]):
        members.setdefault(window if layer_type == "sliding_attention" else None, []).append(index)
    bytes_per_layer = 2 * block_size * num_kv_heads * head_dim * bytes_per_element
    return tuple(
        KVGroupSpec(tuple(indices), num_kv_heads, head_dim, group_window, len(indices) * bytes_per_layer)
        for group_window, indices in members.items()
    )


def _layer_types(config: Mapping[str, Any], num_layers: int, window: int | None) -> list[str]:
    if not window:
        return ["full_attention"] * num_layers
    every = config.get("sliding_window_pattern") or _FULL_LAYER_EVERY.get(str(config.get("model_type")), num_layers + 1)
    return ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(num_layers)]


def estimate_weight_bytes(
    folder: Path, bytes_per_element: int, linear_bytes: int | None = None, *, packs_head: bool = False
) -> int | None:
    """Bytes of a folder's safetensors weights once floating point is cast to bytes_per_element; None where there are none.

    linear_bytes, packs_head: see ModelShape.weight_bytes. Reads the files' headers only (an 8-byte length, then JSON:
    https://huggingface.co/docs/safetensors). MXFP4 blocks count as the two values that each byte unpacks to. Raises
    ModelLoadError for a header that cannot be read.
    """
    shapes = dict(_stored_tensors(folder))
    if not shapes:
        return None
    if packs_head and "lm_head.weight" not in shapes:
        table = next((tensor for name, tensor in shapes.items() if name.endswith("embed_tokens.weight")), None)
        if table is not None:
            shapes["lm_head.weight"] = table
    total = 0
    for name, (dtype, shape) in shapes.items():
        count, is_float = math.prod(shape), dtype in _FLOAT_BYTES
        is_linear = _is_linear(name, shape) or (packs_head and name == "lm_head.weight")
        if linear_bytes is not None and is_float and is_linear:
            total += count * linear_bytes + 4 * shape[0]
        elif dtype == "U8" and name.endswith("_blocks"):
            total += 2 * count * bytes_per_element
        else:
            total += count * (bytes_per_element if is_float else _OTHER_BYTES.get(dtype, 1))
    return total


def _stored_tensors(folder: Path) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """Name, and dtype and shape, of all tensors in a folder's safetensors files. Raises ModelLoadError."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    yield name, (str(tensor["dtype"]), [int(size) for size in tensor["shape"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            raise ModelLoadError(f"{path} is no readable safetensors file ({error}): fetch it again") from error


def _is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight belongs to a linear of the layers: neither embeddings, head nor router, and no expert."""
    others = ("embed", "lm_head", "router", ".experts.", ".mlp.gate.", "block_sparse_moe.gate.")
    return len(shape) == 2 and ".layers." in name and not any(part in name for part in others)
