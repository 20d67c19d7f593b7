"""Paged attention by cuDNN, through NVIDIA's frontend (https://docs.nvidia.com/cudnn/operations/Attention, pip:
nvidia-cudnn-frontend).

cuDNN wants its operation graphs built for fixed shapes. Row counts and chunk lengths are therefore rounded up, and rows added
by that have length 0 and are skipped; tables always have their full width. A step's decodes and chunks are two executions.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from engine.attention.base import AttentionNeeds, LayerSpec, RaggedBatch
from engine.attention.pages import PagedBackend, PagedStep, common_problem, import_problem
from engine.step import KVGroupSpec

_OLDEST_BACKEND = 91002  # 9.10.0 and 9.10.1 are refused by the frontend for known bugs
_MIN_CHUNK = 64


class _Uid(IntEnum):
    """Names of a graph's tensors."""

    Q = 1
    K = 2
    V = 3
    OUT = 4
    QUERY_LENS = 5
    KEY_LENS = 6
    K_TABLE = 7
    V_TABLE = 8
    Q_OFFSETS = 9
    OUT_OFFSETS = 10


@dataclass(frozen=True, slots=True)
class _Shape:
    """All that one operation graph is built for. max_query_len 1: decodes, without offsets."""

    num_rows: int
    max_query_len: int
    num_pages: int
    q_strides: tuple[int, int]  # between tokens, between heads
    layer: LayerSpec  # its index left out: equal layers share a graph
    num_blocks: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """One execution's rows, padded to a shape that has a graph. lens and tables as cuDNN wants them, four-dimensional.

    tokens: of the step, those of these rows. starts: [R + 1], first token of each row among them. scaled: starts in elements,
    by the elements between tokens; only chunks have them, which are never captured.
    """

    tokens: slice
    num_rows: int
    max_query_len: int
    query_lens: torch.Tensor
    key_lens: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor
    scaled: dict[int, torch.Tensor] = field(default_factory=dict)

    def offsets(self, stride: int) -> torch.Tensor:
        """[R + 1]: first element of each row's tokens."""
        if stride not in self.scaled:
            self.scaled[stride] = self.starts * stride
        return self.scaled[stride]


class CudnnBackend(PagedBackend):
    """See the module. Graphs are built when first needed and kept."""

    name: ClassVar[str] = "cudnn"
    graphs: ClassVar[bool] = True

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        groups: Sequence[KVGroupSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers, groups, block_size, dtype, device)
        self._cudnn = importlib.import_module("cudnn")
        self._handle = self._cudnn.create_handle()
        self._kinds = {layer.layer_index: replace(layer, layer_index=0) for layer in layers}
        self._built: dict[_Shape, tuple[Any, int]] = {}

    @classmethod
    def unusable(cls, needs: AttentionNeeds) -> str | None:
        """Why cuDNN cannot serve these layers here; None when it can."""
        hopper = needs.device.type == "cuda" and torch.cuda.get_device_capability(needs.device) >= (9, 0)
        head_dims = range(8, 257 if hopper else 129, 8)
        why = common_problem(needs, head_dims=head_dims, softcap=False, sinks=False)
        why = why or import_problem("cudnn", "nvidia-cudnn-frontend", "pygraph")
        if why is None and (version := importlib.import_module("cudnn").backend_version()) < _OLDEST_BACKEND:
            why = f"it needs cuDNN {_OLDEST_BACKEND} or newer, and {version} is loaded"
        return why

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """See AttentionBackend."""
        super().allocate(num_blocks)
        self._built.clear()  # graphs know the number of pages

    def prepare(self, batch: RaggedBatch) -> PagedStep:
        """See AttentionBackend."""
        step = super().prepare(batch)
        step.num_pages = step.rows.block_tables[0].shape[1]
        return step

    def attend(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: PagedStep,
        sinks_H: torch.Tensor | None = None,
        *,
        out_THD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See FusedAttentionBackend."""
        assert sinks_H is None, "cuDNN has no sinks in decodes"
        out_THD = torch.zeros(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device) if out_THD is None else out_THD.zero_()
        for rows in self._shared(layer_index, metadata):
            self._attend_rows(layer_index, rows, q_THD[rows.tokens], out_THD[rows.tokens])
        return out_THD

    def _share(self, step: PagedStep, table_RP: torch.Tensor) -> list[_Rows]:
        """The step's decodes and its chunks, whichever there are."""
        rows, num_decodes, num_rows = step.rows, step.rows.num_decodes, table_RP.shape[0]
        parts = []
        if num_decodes:
            lens, starts = rows.seq_lens[:num_decodes], rows.query_starts[: num_decodes + 1]
            parts.append(_pad(slice(0, num_decodes), 1, lens.clamp(max=1), lens, table_RP[:num_decodes], starts))
        if num_decodes < num_rows:
            starts = rows.query_starts[num_decodes:] - num_decodes
            longest = _power_of_two(max(step.max_query_len, _MIN_CHUNK))
            lens = rows.seq_lens[num_decodes:]
            parts.append(_pad(slice(num_decodes, None), longest, starts.diff(), lens, table_RP[num_decodes:], starts))
        return parts

    def _attend_rows(self, layer_index: int, rows: _Rows, q_THD: torch.Tensor, out_THD: torch.Tensor) -> None:
        """Attention of some rows, into out."""
        is_decode = rows.max_query_len == 1
        if is_decode and len(q_THD) < rows.num_rows:  # the graph reads and writes as many tokens as it has rows
            padded_q = q_THD.new_zeros(rows.num_rows, q_THD.stride(0)).as_strided(
                (rows.num_rows, *q_THD.shape[1:]), q_THD.stride()
            )
            padded_out = out_THD.new_zeros(rows.num_rows, *out_THD.shape[1:])
            padded_q[: len(q_THD)] = q_THD
            self._attend_rows(layer_index, rows, padded_q, padded_out)
            out_THD.copy_(padded_out[: len(out_THD)])
            return
        k_pages, v_pages = self._pages[layer_index]
        shape = _Shape(
            num_rows=rows.num_rows,
            max_query_len=rows.max_query_len,
            num_pages=rows.table.shape[2],
            q_strides=(q_THD.stride(0), q_THD.stride(1)),
            layer=self._kinds[layer_index],
            num_blocks=k_pages.shape[0],
        )
        if shape not in self._built:
            self._built[shape] = self._build(shape)
        graph, workspace_bytes = self._built[shape]
        tensors = {
            _Uid.Q: q_THD,
            _Uid.K: k_pages,
            _Uid.V: v_pages,
            _Uid.OUT: out_THD,
            _Uid.QUERY_LENS: rows.query_lens,
            _Uid.KEY_LENS: rows.key_lens,
            _Uid.K_TABLE: rows.table,
            _Uid.V_TABLE: rows.table,
        }
        if not is_decode:
            tensors[_Uid.Q_OFFSETS] = rows.offsets(q_THD.stride(0))
            tensors[_Uid.OUT_OFFSETS] = rows.offsets(out_THD.stride(0))
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=q_THD.device)
        self._cudnn.set_stream(self._handle, torch.cuda.current_stream(self._device).cuda_stream)
        graph.execute(tensors, workspace, handle=self._handle)

    def _build(self, shape: _Shape) -> tuple[Any, int]:
        """An operation graph and the bytes of workspace it needs."""
        cudnn, layer = self._cudnn, shape.layer
        io_type = cudnn.data_type.BFLOAT16 if self._dtype == torch.bfloat16 else cudnn.data_type.HALF
        graph = cudnn.pygraph(
            io_data_type=io_type,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self._handle,
        )

        def tensor(uid: _Uid, dim: tuple[int, ...], stride: tuple[int, ...], data_type: Any) -> Any:
            return graph.tensor(name=uid.name, uid=int(uid), dim=dim, stride=stride, data_type=data_type)

        def ints(uid: _Uid, count: int) -> Any:
            return tensor(uid, (count, 1, 1, 1), (1, 1, 1, 1), cudnn.data_type.INT32)

        rows, queries, heads, size = shape.num_rows, shape.max_query_len, layer.num_heads, layer.head_dim
        token_stride, head_stride = shape.q_strides
        queries_dim = (rows, heads, queries, size)
        q = tensor(_Uid.Q, queries_dim, (queries * token_stride, head_stride, token_stride, 1), io_type)
        pages_dim = (shape.num_blocks, layer.num_kv_heads, self._block_size, size)
        pages_stride = (layer.num_kv_heads * self._block_size * size, self._block_size * size, size, 1)
        table_dim, table_stride = (rows, 1, shape.num_pages, 1), (shape.num_pages, shape.num_pages, 1, 1)
        masked = queries > 1 or layer.window is not None
        if queries > 1:
            q.set_ragged_offset(ints(_Uid.Q_OFFSETS, rows + 1))
        out, _ = graph.sdpa(
            name="attention",
            q=q,
            k=tensor(_Uid.K, pages_dim, pages_stride, io_type),
            v=tensor(_Uid.V, pages_dim, pages_stride, io_type),
            generate_stats=False,
            attn_scale=layer.scaling,
            use_padding_mask=True,
            seq_len_q=ints(_Uid.QUERY_LENS, rows),
            seq_len_kv=ints(_Uid.KEY_LENS, rows),
            diagonal_alignment=cudnn.diagonal_alignment.BOTTOM_RIGHT if masked else cudnn.diagonal_alignment.TOP_LEFT,
            diagonal_band_right_bound=0 if masked else None,
            diagonal_band_left_bound=layer.window,
            paged_attention_k_table=tensor(_Uid.K_TABLE, table_dim, table_stride, cudnn.data_type.INT32),
            paged_attention_v_table=tensor(_Uid.V_TABLE, table_dim, table_stride, cudnn.data_type.INT32),
            paged_attention_max_seq_len_kv=shape.num_pages * self._block_size,
        )
        out.set_uid(int(_Uid.OUT)).set_output(True).set_data_type(io_type)
        out.set_dim(queries_dim).set_stride((queries * heads * size, size, heads * size, 1))
        if queries > 1:
            out.set_ragged_offset(ints(_Uid.OUT_OFFSETS, rows + 1))
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        return graph, graph.get_workspace_size()


def _pad(
    tokens: slice,
    max_query_len: int,
    query_lens: torch.Tensor,
    key_lens: torch.Tensor,
    table_RP: torch.Tensor,
    starts: torch.Tensor,
) -> _Rows:
    """Rows of length 0 up to a number of rows that has a graph: every one to 8, then four an octave."""
    num_rows = len(key_lens)
    step = max(1, _power_of_two(num_rows + 1) // 8)
    size = -(-num_rows // step) * step
    extra = size - num_rows
    return _Rows(
        tokens=tokens,
        num_rows=size,
        max_query_len=max_query_len,
        query_lens=F.pad(query_lens, (0, extra)).view(size, 1, 1, 1),
        key_lens=F.pad(key_lens, (0, extra)).view(size, 1, 1, 1),
        table=F.pad(table_RP, (0, 0, 0, extra)).view(size, 1, -1, 1),
        starts=torch.cat([starts, starts[-1:].expand(extra)]),
    )


def _power_of_two(number: int) -> int:
    """The least power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
