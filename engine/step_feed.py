"""What the device is told each step: rows in one small copy, and changes to what it remembers of every slot.

The device keeps an arena of int32: the block tables of every KV group and the sampling columns of every slot. The host notes
changes and sends them with the next step. A step's rows go to a static buffer, because captured graphs read them there; the
tokens of a step with prompt chunks go beside them in a copy of their own size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import DeviceRows
from engine.kernels.sampling import SamplingColumns

Ints = npt.NDArray[np.int32]
AnyInts = npt.NDArray[np.integer[Any]]

_COLUMNS = ("temperature", "top_p", "min_p", "top_k", "output_index")
_FLOAT_COLUMNS = frozenset({"temperature", "top_p", "min_p"})
_ROW_FIELDS = ("row_slots", "seq_lens", "input_ids", "sample_slots")
_TOKEN_FIELDS = ("input_ids", "positions", "token_slots")
_NUM_HOST_BUFFERS = 4  # a step in flight still reads its own: two are in flight at most


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Shares memory on a CPU; elsewhere copies through pinned memory, which torch reuses only when the copy is done."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class StepFeed:
    """Persistent device memory of `num_slots` slots: block tables, sampling columns, last tokens, and a step's rows.

    tables: by KV group, int32 [num_slots, max_blocks]. columns: the sampling knobs by slot. last_token: int64 [num_slots].
    max_tokens: of a step whose tokens may lie in static memory too.
    """

    def __init__(self, *, num_groups: int, num_slots: int, max_blocks: int, max_tokens: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self._device = device
        self._max_blocks = max_blocks
        table_size = num_slots * max_blocks
        self._seeds_at = -(-num_groups * table_size // 2) * 2  # 64-bit words, so at an even place
        self._columns_at = self._seeds_at + 2 * num_slots
        self._arena = torch.zeros(self._columns_at + len(_COLUMNS) * num_slots, dtype=torch.int32, device=device)
        self.tables = tuple(
            self._arena[g * table_size : (g + 1) * table_size].view(num_slots, max_blocks) for g in range(num_groups)
        )
        columns = {name: self._column(i) for i, name in enumerate(_COLUMNS)}
        self.columns = SamplingColumns(
            seed=self._arena[self._seeds_at : self._columns_at].view(torch.int64),
            **{name: values.view(torch.float32) if name in _FLOAT_COLUMNS else values for name, values in columns.items()},
        )
        self.last_token = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._rows = torch.zeros(len(_ROW_FIELDS), num_slots, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host_rows = [
            torch.zeros(self._rows.shape, dtype=torch.int32, pin_memory=pinned) for _ in range(_NUM_HOST_BUFFERS)
        ]
        self._tokens = torch.zeros(len(_TOKEN_FIELDS), max_tokens, dtype=torch.int32, device=device)
        self._next_host_buffer = 0
        self._changes: list[tuple[npt.NDArray[np.int64], Ints]] = []

    def _column(self, index: int) -> torch.Tensor:
        start = self._columns_at + index * self.num_slots
        return self._arena[start : start + self.num_slots]

    # -- what changes between steps ---------------------------------------------------------------------------------

    def append_blocks(self, group: int, slot: int, start: int, block_ids: Sequence[int]) -> None:
        """Entries start .. of a slot's table become block_ids with the next `send`."""
        if block_ids:
            first = (group * self.num_slots + slot) * self._max_blocks + start
            self._changes.append((np.arange(first, first + len(block_ids)), np.array(block_ids, dtype=np.int32)))

    def set_sampling(
        self, slot: int, *, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, output_index: int
    ) -> None:
        """A slot's knobs, from the next `send` on. seed: 64 bits. output_index: output tokens so far; the sampling kernel
        counts on from there."""
        floats = np.array([temperature, top_p, min_p], dtype=np.float32).view(np.int32)
        seed_words = np.array([seed], dtype=np.uint64).view(np.int32)
        values = np.concatenate([seed_words, floats, [top_k, output_index]]).astype(np.int32)
        columns = self._columns_at + np.arange(len(_COLUMNS)) * self.num_slots + slot
        seed_at = self._seeds_at + 2 * slot
        self._changes.append((np.concatenate([[seed_at, seed_at + 1], columns]), values))

    def set_output_index(self, slots: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> None:
        """Output tokens so far of some slots, from the next `send` on: for tokens that the sampling kernel did not draw."""
        at = self._columns_at + _COLUMNS.index("output_index") * self.num_slots
        self._changes.append((at + slots, values.astype(np.int32)))

    # -- a step -----------------------------------------------------------------------------------------------------

    def send(self, fields: Mapping[str, AnyInts], padded_to: int) -> None:
        """Send noted changes and a step's rows (see _ROW_FIELDS; missing ones stay zero), padded to `padded_to` rows.

        Padding rows have seq_len 0 and name slot 0, and no slot (-1) to sample for.
        """
        if self._changes:
            indices, values = (np.concatenate(parts) for parts in zip(*self._changes, strict=True))
            # A slot that was filled twice since the last step: only its last change counts.
            last = indices.size - 1 - np.unique(indices[::-1], return_index=True)[1]
            changes = to_device(np.stack([indices[last], values[last]]).astype(np.int64), self._device)
            self._arena[changes[0]] = changes[1].to(torch.int32)
            self._changes.clear()
        buffer = self._host_rows[self._next_host_buffer]
        self._next_host_buffer = (self._next_host_buffer + 1) % _NUM_HOST_BUFFERS
        host = buffer.numpy()
        host[:, :padded_to] = 0
        host[_ROW_FIELDS.index("sample_slots"), :padded_to] = -1
        for name, given in fields.items():
            host[_ROW_FIELDS.index(name), : given.size] = given
        self._rows.copy_(buffer, non_blocking=True)

    def send_tokens(self, input_ids: AnyInts, positions: AnyInts, token_slots: AnyInts, padded_to: int) -> None:
        """A step's tokens into static memory, padded with tokens at position -1, which leave nothing in any page."""
        host = np.zeros((len(_TOKEN_FIELDS), padded_to), dtype=np.int32)
        count = input_ids.size
        host[0, :count], host[1, :count], host[2, :count] = input_ids, positions, token_slots
        host[1, count:] = -1
        self._tokens[:, :padded_to].copy_(to_device(host, self._device))

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first `count` of the static input ids, positions and slots, int32."""
        return self._tokens[0, :count], self._tokens[1, :count], self._tokens[2, :count]

    def field(self, name: str, count: int) -> torch.Tensor:
        """The first `count` entries of a row field, int32, a view of the static buffer."""
        return self._rows[_ROW_FIELDS.index(name), :count]

    def decode_rows(self, num_rows: int) -> DeviceRows:
        """A step of decodes alone, all from static memory: one token a row. Runs a few small operations on the device."""
        row_slots, seq_lens = self.field("row_slots", num_rows), self.field("seq_lens", num_rows)
        positions = seq_lens - 1
        return DeviceRows(
            block_tables=self.tables,
            row_slots=row_slots,
            seq_lens=seq_lens,
            context_lens=positions,
            query_starts=torch.arange(num_rows + 1, dtype=torch.int32, device=self._device),
            positions=positions,
            token_slots=row_slots,
            num_decodes=num_rows,
        )

    def decode_ids(self, num_rows: int) -> torch.Tensor:
        """int64 [num_rows]: the token ids given by the host, and each slot's last sampled token where it gave -1."""
        return self.resolve_ids(self.field("input_ids", num_rows), self.field("row_slots", num_rows))

    def resolve_ids(self, input_ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """int64: input_ids, with each slot's last sampled token where they are -1."""
        return torch.where(input_ids < 0, self.last_token[slots], input_ids)
