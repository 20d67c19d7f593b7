"""A runner without a model, for tests of scheduler and core. Its pages hold token ids, and its "model" is a hash of what it
reads back through the block tables: a wrong hit, a lost copy or a page freed too early changes the output, or fails here."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.errors import OutOfDeviceMemory
from engine.messages import TokenLogprobs
from engine.step import BAD_TOKEN, SCRATCH_BLOCK_ID, HostMasks, KVGroupSpec, ModelRunnerOutput, NewRow, SchedulerOutput

VOCAB_SIZE = 97


def next_token(context: Sequence[int], seed: int, allowed: Sequence[int] = range(3, VOCAB_SIZE)) -> int:
    """The fake model: one of the allowed tokens from all that came before (1 and 2 are free to be stop tokens)."""
    return allowed[zlib.crc32(bytes(context) + seed.to_bytes(8, "little")) % len(allowed)]


def expected_tokens(prompt: Sequence[int], seed: int, count: int) -> list[int]:
    """What the fake model says after a prompt, computed without pages."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


def group(window: int | None = None) -> KVGroupSpec:
    return KVGroupSpec(layer_indices=(0,), num_kv_heads=1, head_dim=1, window=window, bytes_per_block=1)


@dataclass
class _Slot:
    row: NewRow
    tables: list[list[int]]
    tokens: list[int]


@dataclass
class _Pending:
    output: ModelRunnerOutput

    def done(self) -> bool:
        return True

    def wait(self) -> ModelRunnerOutput:
        return self.output


@dataclass
class FakeRunner:
    """Pages are written at launch, tokens drawn at sample and handed over at wait, as a device ahead of the host would.
    The embedding of a chunk is the sum (or the last) of its token ids, and the number of tokens in it.

    out_of_memory: says of a step whether it does not fit, which `sample` tells instead of `launch` with fails_late.
    idle_work: pieces of it that are left. bad_token: whatever follows it in a request is bad numbers, and so are the pages it
    is in and those after it.
    """

    groups: Sequence[KVGroupSpec]
    block_size: int
    num_computed: int = 0
    steps: list[SchedulerOutput] = field(default_factory=list)
    out_of_memory: Callable[[SchedulerOutput], bool] = lambda step: False
    fails_late: bool = False
    idle_work: int = 0
    bad_token: int | None = None

    def __post_init__(self) -> None:
        self._bad_pages: set[tuple[int, int]] = set()
        self._pages: list[dict[tuple[int, int], int]] = [{} for _ in self.groups]
        self._slots: dict[int, _Slot] = {}
        self._launched: deque[SchedulerOutput] = deque()
        self._fits = True

    def launch(self, step: SchedulerOutput) -> None:
        self._apply(step)
        self._fits = not self.out_of_memory(step)
        if self._fits:
            self._compute(step)
            self._launched.append(step)
        elif not self.fails_late:
            raise OutOfDeviceMemory("a step does not fit")

    def sample(self, masks: HostMasks | None) -> _Pending:
        if not self._fits:
            raise OutOfDeviceMemory("sampling a step does not fit")
        step, masks = self._launched.popleft(), masks or HostMasks()
        tokens = [self._sample(self._slots[step.slots[row]], step, row, masks) for row in step.sampled_rows]
        for fork in step.forks:
            slot = self._slots[fork.row.slot]
            tokens.append(self._next(slot, len(slot.tokens), _allowed(masks, fork.parent_row)))
        slots = [step.slots[row] for row in step.sampled_rows] + [fork.row.slot for fork in step.forks]
        for slot_id, token in zip(slots, tokens, strict=True):
            self._slots[slot_id].tokens.append(max(token, 0))
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        pooled = self._pooled(step)
        bad_rows = [
            row for row in step.pooled_rows + step.prompt_logprobs_rows if self.bad_token in self._slots[step.slots[row]].tokens
        ]
        return _Pending(ModelRunnerOutput(step.step_id, tokens, logprobs, self._prompt_logprobs(step), pooled, bad_rows))

    def idle(self) -> bool:
        self.idle_work = max(0, self.idle_work - 1)
        return self.idle_work > 0

    def _apply(self, step: SchedulerOutput) -> None:
        self._bad_pages.difference_update(step.zeroed_blocks)
        for slot in step.freed_slots:
            del self._slots[slot]
        for row in [*step.new_rows, *(fork.row for fork in step.forks)]:
            self._fill(row)
        for slot, ids in step.new_blocks:
            for table, new in zip(self._slots[slot].tables, ids, strict=True):
                table.extend(new)

    def _compute(self, step: SchedulerOutput) -> None:
        self.steps.append(step)
        self.num_computed += step.total_num_tokens
        for slot, start, count in zip(step.slots, step.start_positions, step.num_tokens, strict=True):
            self._write(self._slots[slot], start, count)
        for fork in step.forks:
            for g, source, target in fork.block_copies:
                for offset in range(self.block_size):
                    if (source, offset) in self._pages[g]:
                        self._pages[g][target, offset] = self._pages[g][source, offset]

    def _fill(self, row: NewRow) -> None:
        assert row.slot not in self._slots, "a slot was filled twice"
        self._slots[row.slot] = _Slot(row, [list(ids) for ids in row.block_ids], row.token_ids.tolist())

    def _write(self, slot: _Slot, start: int, count: int) -> None:
        for position in range(start, start + count):
            block, offset = divmod(position, self.block_size)
            for g, (pages, table) in enumerate(zip(self._pages, slot.tables, strict=True)):
                assert table[block] != SCRATCH_BLOCK_ID, "a token of a request was written to the scratch page"
                pages[table[block], offset] = slot.tokens[position]
                page = g, table[block]
                if self.bad_token in slot.tokens[: position + 1]:
                    self._bad_pages.add(page)
                assert self.bad_token in slot.tokens or page not in self._bad_pages, "a page was not zeroed before reuse"

    def _sample(self, slot: _Slot, step: SchedulerOutput, row: int, masks: HostMasks) -> int:
        return self._next(slot, step.start_positions[row] + step.num_tokens[row], _allowed(masks, row))

    def _next(self, slot: _Slot, length: int, allowed: Sequence[int]) -> int:
        for spec, pages, table in zip(self.groups, self._pages, slot.tables, strict=True):
            first = 0 if spec.window is None else max(0, length - spec.window)
            read = [pages.get((table[p // self.block_size], p % self.block_size)) for p in range(first, length)]
            assert read == slot.tokens[first:length], "the pages do not hold what this request computed"
        if self.bad_token in slot.tokens[:length]:
            return BAD_TOKEN
        return next_token(slot.tokens[:length], slot.row.seed, allowed)

    def _prompt_logprobs(self, step: SchedulerOutput) -> dict[int, list[TokenLogprobs]]:
        entries = {}
        for row in step.prompt_logprobs_rows:
            slot, start = self._slots[step.slots[row]], step.start_positions[row]
            stop = min(start + step.num_tokens[row], slot.row.num_prompt_tokens - 1)
            entries[row] = [TokenLogprobs(-float(slot.tokens[p + 1]), 1, [], []) for p in range(start, stop)]
        return entries

    def _pooled(self, step: SchedulerOutput) -> dict[int, npt.NDArray[np.float32]]:
        pooled = {}
        for row in step.pooled_rows:
            slot, start = self._slots[step.slots[row]], step.start_positions[row]
            chunk = slot.tokens[start : start + step.num_tokens[row]]
            chosen = chunk if slot.row.pooling == "mean" else chunk[-1:]
            pooled[row] = np.array([sum(chosen), len(chosen)], dtype=np.float32)
        return pooled


def _allowed(masks: HostMasks, row: int) -> list[int]:
    """The token ids that may be drawn in a row. A mask may let through what the fake model would not say."""
    words = masks.allowed.get(row)
    known = range(3, VOCAB_SIZE) if words is None else [i for i in range(VOCAB_SIZE) if int(words[i // 32]) >> i % 32 & 1]
    banned = masks.banned.get(row, ())
    return [token_id for token_id in known if token_id not in banned]
