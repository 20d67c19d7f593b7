"""How many pages, and how long a context, fit into the bytes at hand: arithmetic only, no torch.

Every KV group has pages of its own. A sequence of L tokens fills ceil(L / block_size) pages of a full-attention group, and of
a sliding group never more than its window and the chunk being computed can touch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, ModelLoadError
from engine.step import KVGroupSpec

_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


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
    num_kv_blocks: int | None = None,
) -> KVPlan:
    """Pages for each group and the context they serve.

    free_bytes: for pages. max_model_len: None serves the largest context that fits. model_context: tokens the model knows.
    num_kv_blocks: pages of every group, instead of what free_bytes would give. There are never more pages than max_num_seqs
    sequences of the whole context could use. Raises ConfigError where the asked context, or any context, does not fit.
    """
    need = _Need(tuple(groups), block_size, max_num_batched_tokens)
    if max_model_len is not None and max_model_len > model_context:
        raise ConfigError(
            f"max_model_len {max_model_len} is more than the model's context of {model_context} tokens", param="max_model_len"
        )
    wanted = max_model_len or model_context
    fitting = _largest_fitting(need, wanted, free_bytes, num_kv_blocks)
    room = f"{num_kv_blocks} KV blocks" if num_kv_blocks is not None else f"{_megabytes(free_bytes)} for the KV cache"
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
    num_blocks = [num_kv_blocks] * len(need.groups) if num_kv_blocks else _share_out(need, fitting, max_num_seqs, free_bytes)
    deciding = [count for group, count in zip(need.groups, num_blocks, strict=True) if group.window is None] or num_blocks
    return KVPlan(
        num_blocks=num_blocks,
        max_model_len=fitting,
        kv_cache_bytes=_plan_bytes(need, num_blocks),
        kv_cache_tokens=min(deciding) * block_size,
        notes=notes,
    )


def _largest_fitting(need: _Need, longest: int, free_bytes: int, num_kv_blocks: int | None) -> int:
    """The largest length in 0 .. longest of which one sequence fits; what a sequence needs never falls with its length."""

    def fits(num_tokens: int) -> bool:
        if num_kv_blocks is not None:
            return all(need.blocks(group, num_tokens) <= num_kv_blocks for group in need.groups)
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
    layer_types = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * num_layers
    members: dict[int | None, list[int]] = {}
    for index, layer_type in enumerate(layer_types[:num_layers]):
        members.setdefault(window if layer_type == "sliding_attention" else None, []).append(index)
    bytes_per_layer = 2 * block_size * num_kv_heads * head_dim * bytes_per_element
    return tuple(
        KVGroupSpec(tuple(indices), num_kv_heads, head_dim, group_window, len(indices) * bytes_per_layer)
        for group_window, indices in members.items()
    )


def estimate_weight_bytes(folder: Path, bytes_per_element: int) -> int | None:
    """Bytes of a folder's safetensors weights once floating point is cast to bytes_per_element; None where there are none.

    Reads the files' headers only (an 8-byte length, then JSON: https://huggingface.co/docs/safetensors). MXFP4 blocks
    count as the two values that each byte unpacks to. Raises ModelLoadError for a header that cannot be read.
    """
    total, paths = 0, sorted(folder.glob("*.safetensors"))
    for path in paths:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    count = math.prod(tensor["shape"])
                    is_packed = tensor["dtype"] == "U8" and name.endswith("_blocks")
                    is_float = tensor["dtype"] in _FLOAT_BYTES
                    width = bytes_per_element if is_float else _OTHER_BYTES.get(tensor["dtype"], 1)
                    total += 2 * count * bytes_per_element if is_packed else count * width
        except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
            raise ModelLoadError(f"{path} is no readable safetensors file ({error}): fetch it again") from error
    return total if paths else None
