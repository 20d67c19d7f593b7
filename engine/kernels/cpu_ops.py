"""The CPU kernels of `cpu/`, called through ctypes: packed weights, products, paged attention, and whole decoder layers.

The structures mirror the C++ ones of the same names, field by field; shapes and dtypes are checked here, where an error still
has a name. Tensors named in a structure must outlive it: the Python objects that hold both are returned together.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

Format = Literal["float32", "bfloat16", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)

INT8_GROUP = 64
"""Inputs of a row that share a scale, in int8 products."""

_ARENA_BYTES = 64 << 20


class LinearStruct(ctypes.Structure):
    _fields_ = [
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("format", ctypes.c_int64),
        ("gated", ctypes.c_int64),
    ]


class NormStruct(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_float), ("offset", ctypes.c_float)]


class AttentionStruct(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class RowsStruct(ctypes.Structure):
    _fields_ = [
        ("num_rows", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
    ]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("input_norm", NormStruct),
        ("mlp_norm", NormStruct),
        ("post_attention_norm", NormStruct),
        ("post_mlp_norm", NormStruct),
        ("query_norm", NormStruct),
        ("key_norm", NormStruct),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("rotary_half", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("attention", ctypes.c_void_p),
    ]


ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}

DECODER_PARTS = ("input_norm", "qkv", "rotary", "attention", "output", "mlp_norm", "gate_up", "down", "final_norm")
"""`Part` of `cpu/decoder.h`, and the norm behind the last layer."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [n, k] in the panels of `cpu/linear.h`, and what its structure points to."""

    struct: LinearStruct
    held: tuple[torch.Tensor | None, ...]
    format: Format

    @property
    def out_features(self) -> int:
        return int(self.struct.n)

    @property
    def in_features(self) -> int:
        return int(self.struct.k)


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step's rows as the kernels take them; see `Rows` in `cpu/attention.h`."""

    struct: RowsStruct
    held: tuple[Any, ...]

    @classmethod
    def of(
        cls, query_lens: Sequence[int], context_lens: Sequence[int], block_tables: Sequence[Sequence[Sequence[int]]]
    ) -> StepRows:
        """block_tables: by KV group, each row's page ids (as in attention.base.RaggedBatch)."""
        num_rows = len(query_lens)
        starts = np.zeros(num_rows + 1, dtype=np.int64)
        np.cumsum(query_lens, out=starts[1:])
        contexts = np.asarray(context_lens, dtype=np.int64)
        width = max((len(table) for tables in block_tables for table in tables), default=0)
        tables = np.zeros((len(block_tables), num_rows, width), dtype=np.int32)
        for group, rows in enumerate(block_tables):
            for row, table in enumerate(rows):
                tables[group, row, : len(table)] = table
        pointers = (ctypes.c_void_p * len(block_tables))(*(group.ctypes.data for group in tables))
        struct = RowsStruct(
            num_rows, int(starts[-1]), width, starts.ctypes.data, contexts.ctypes.data, ctypes.addressof(pointers)
        )
        return cls(struct, (starts, contexts, tables, pointers))


class CpuKernels:
    """The loaded library with a team of threads. One caller at a time.

    library: from cpu_build. num_threads: members of the team, the caller among them.
    """

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._library = library
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "octavo_isa": (ctypes.c_char_p, []),
            "octavo_open": (pointer, [integer]),
            "octavo_close": (None, [pointer]),
            "octavo_packed_bytes": (integer, [integer] * 4),
            "octavo_padded_columns": (integer, [integer] * 2),
            "octavo_column_order": (None, [integer, integer, pointer]),
            "octavo_pack": (None, [pointer, integer, pointer, integer, integer, integer, integer, pointer, pointer]),
            "octavo_linear": (None, [pointer, pointer, pointer, integer, pointer]),
            "octavo_attention": (None, [pointer] * 7),
            "octavo_decode": (None, [pointer, pointer, integer, pointer, integer, *[pointer] * 5]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.isa: str = library.octavo_isa().decode()
        self.num_threads = num_threads
        self._context = library.octavo_open(num_threads)
        self._arena = _Arena()

    def close(self) -> None:
        """End the team's threads; nothing may be called afterwards."""
        self._library.octavo_close(self._context)
        self._context = None

    def pack(
        self, weight_NE: torch.Tensor, format: Format, *, bias_N: torch.Tensor | None = None, gated: bool = False
    ) -> PackedLinear:
        """weight_NE: float32 or bfloat16, contiguous, on the CPU. gated: the first half of its rows are gates of the second
        half, which only `decode` multiplies. Raises ValueError where the kernels cannot hold such a weight."""
        obstacle = linear_obstacle(weight_NE, format)
        if obstacle is not None:
            raise ValueError(obstacle)
        (n, k), kind = weight_NE.shape, FORMATS.index(format)
        panels = self._arena.take(self._library.octavo_packed_bytes(kind, n, k, gated))
        columns = self._library.octavo_padded_columns(n, gated)
        scales = torch.zeros(columns, dtype=torch.float32) if format == "int8" else None
        is_bf16 = weight_NE.dtype == torch.bfloat16
        self._library.octavo_pack(
            self._context, kind, weight_NE.data_ptr(), is_bf16, n, k, gated, panels.data_ptr(), _pointer(scales)
        )
        bias = None if bias_N is None else self._packed_bias(bias_N, n, gated, columns)
        struct = LinearStruct(panels.data_ptr(), _pointer(scales), _pointer(bias), n, k, kind, gated)
        return PackedLinear(struct, (panels, scales, bias), format)

    def _packed_bias(self, bias_N: torch.Tensor, n: int, gated: bool, columns: int) -> torch.Tensor:
        order = torch.empty(columns, dtype=torch.int64)
        self._library.octavo_column_order(n, gated, order.data_ptr())
        bias = bias_N.float()[order.clamp(min=0)]
        return bias.masked_fill(order < 0, 0.0).contiguous()

    def linear(self, x_TE: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        """x W^T + b, float32 [T, n], of x [T, k] in any float dtype."""
        x = x_TE.float().contiguous()
        assert x.ndim == 2 and x.shape[1] == packed.in_features and not packed.struct.gated
        y = torch.empty(x.shape[0], packed.out_features, dtype=torch.float32)
        if x.shape[0]:
            self._library.octavo_linear(self._context, ctypes.addressof(packed.struct), x.data_ptr(), x.shape[0], y.data_ptr())
        return y

    def attention(
        self, layer: AttentionStruct, rows: StepRows, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        """Write k and v to the layer's pages, then attend: float32 [T, H, D]."""
        q, k, v = (x.float().contiguous() for x in (q_THD, k_TKD, v_TKD))
        out = torch.empty_like(q)
        self._library.octavo_attention(
            self._context,
            ctypes.addressof(layer),
            ctypes.addressof(rows.struct),
            *(x.data_ptr() for x in (q, k, v, out)),
        )
        return out

    def decode(
        self,
        layers: ctypes.Array[LayerStruct],
        kinds: npt.NDArray[np.int64],
        norm: NormStruct | None,
        rows: StepRows,
        residual_TE: torch.Tensor,
        *,
        seconds: npt.NDArray[np.float64] | None = None,
    ) -> torch.Tensor:
        """Run all layers over the residual, in place; returns its final norm, float32 [T, E]. kinds: [layers], equal for layers
        that attend alike (heads, window, KV group). norm: None returns the residual itself. seconds: [len(DECODER_PARTS)], to
        which the time of each part, in all layers together, is added."""
        assert residual_TE.dtype == torch.float32 and residual_TE.is_contiguous()
        assert len(residual_TE) == rows.struct.num_tokens
        assert seconds is None or (seconds.dtype == np.float64 and seconds.shape == (len(DECODER_PARTS),))
        hidden = torch.empty_like(residual_TE) if norm is not None else residual_TE
        self._library.octavo_decode(
            self._context,
            ctypes.addressof(layers),
            len(layers),
            kinds.ctypes.data,
            int(kinds.max()) + 1,
            None if norm is None else ctypes.addressof(norm),
            ctypes.addressof(rows.struct),
            residual_TE.data_ptr(),
            hidden.data_ptr(),
            None if seconds is None else seconds.ctypes.data,
        )
        return hidden


def linear_obstacle(weight_NE: torch.Tensor, format: Format) -> str | None:
    """Why the kernels cannot hold a weight in this format; None where they can."""
    if weight_NE.dtype not in (torch.float32, torch.bfloat16) or not weight_NE.is_contiguous() or weight_NE.is_cuda:
        return f"the CPU kernels take contiguous float32 or bfloat16 weights, not {weight_NE.dtype}"
    if format == "bfloat16" and weight_NE.shape[1] % 2:
        return f"the CPU kernels multiply bfloat16 in pairs, and a weight has {weight_NE.shape[1]} inputs"
    return None


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Arena:
    """Memory for weights, in large parts that the system may map with huge pages: weights are streamed, and small pages cost
    address translations on the way."""

    def __init__(self) -> None:
        self._part = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], at a multiple of 64."""
        start = -(-self._used // 64) * 64
        if start + num_bytes > len(self._part):
            self._part, start = _huge_memory(max(num_bytes, _ARENA_BYTES)), 0
        self._used = start + num_bytes
        return self._part[start : start + num_bytes]


def _huge_memory(num_bytes: int) -> torch.Tensor:
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
