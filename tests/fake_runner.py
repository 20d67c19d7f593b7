"""A runner without a model, for tests of scheduler and core. Its pages hold token ids, and its "model" is a hash of what it
reads back through the block tables: a wrong hit, a lost copy or a page freed too early changes the output, or fails here."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.errors import OutOfDeviceMemory
from engine.messages import TokenLogprobs
from engine.step import SCRATCH_BLOCK_ID, HostMasks, KVGroupSpec, ModelRunnerOutput, NewRow, SchedulerOutput

VOCAB_SIZE = 97


def next_token(context: Sequence[int], seed: int) -> int:
    """The fake model: one token from all that came before, 3 .. VOCAB_SIZE - 1 (1 and 2 are free to be stop tokens)."""
    return 3 + zlib.crc32(bytes(context) + seed.to_bytes(8, "little")) % (VOCAB_SIZE - 3)


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
    """Results are computed at launch and handed over at wait, as a device ahead of the host would.

    out_of_memory: says of a step whether it does not fit, which `sample` tells instead of `launch` with fails_late.
    idle_work: pieces of it that are left.
    """

    groups: Sequence[KVGroupSpec]
    block_size: int
    num_computed: int = 0
    steps: list[SchedulerOutput] = field(default_factory=list)
    out_of_memory: Callable[[SchedulerOutput], bool] = lambda step: False
    fails_late: bool = False
    idle_work: int = 0

    def __post_init__(self) -> None:
        self._pages: list[dict[tuple[int, int], int]] = [{} for _ in self.groups]
        self._slots: dict[int, _Slot] = {}
        self._results: deque[ModelRunnerOutput] = deque()
        self._fits = True

    def launch(self, step: SchedulerOutput) -> None:
        self._apply(step)
        self._fits = not self.out_of_memory(step)
        if self._fits:
            self._compute(step)
        elif not self.fails_late:
            raise OutOfDeviceMemory("a step does not fit")

    def sample(self, masks: HostMasks | None) -> _Pending:
        assert masks is None
        if not self._fits:
            raise OutOfDeviceMemory("sampling a step does not fit")
        return _Pending(self._results.popleft())

    def idle(self) -> bool:
        self.idle_work = max(0, self.idle_work - 1)
        return self.idle_work > 0

    def _apply(self, step: SchedulerOutput) -> None:
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
        tokens = [self._sample(self._slots[step.slots[row]], step, row) for row in step.sampled_rows]
        for fork in step.forks:
            for g, source, target in fork.block_copies:
                for offset in range(self.block_size):
                    if (source, offset) in self._pages[g]:
                        self._pages[g][target, offset] = self._pages[g][source, offset]
            slot = self._slots[fork.row.slot]
            tokens.append(self._next(slot, len(slot.tokens)))
        self._results.append(ModelRunnerOutput(step.step_id, tokens, [None] * len(tokens), self._prompt_logprobs(step)))
        slots = [step.slots[row] for row in step.sampled_rows] + [fork.row.slot for fork in step.forks]
        for slot_id, token in zip(slots, tokens, strict=True):
            self._slots[slot_id].tokens.append(token)

    def _fill(self, row: NewRow) -> None:
        assert row.slot not in self._slots, "a slot was filled twice"
        self._slots[row.slot] = _Slot(row, [list(ids) for ids in row.block_ids], row.token_ids.tolist())

    def _write(self, slot: _Slot, start: int, count: int) -> None:
        for position in range(start, start + count):
            block, offset = divmod(position, self.block_size)
            for pages, table in zip(self._pages, slot.tables, strict=True):
                assert table[block] != SCRATCH_BLOCK_ID, "a token of a request was written to the scratch page"
                pages[table[block], offset] = slot.tokens[position]

    def _sample(self, slot: _Slot, step: SchedulerOutput, row: int) -> int:
        return self._next(slot, step.start_positions[row] + step.num_tokens[row])

    def _next(self, slot: _Slot, length: int) -> int:
        for spec, pages, table in zip(self.groups, self._pages, slot.tables, strict=True):
            first = 0 if spec.window is None else max(0, length - spec.window)
            read = [pages.get((table[p // self.block_size], p % self.block_size)) for p in range(first, length)]
            assert read == slot.tokens[first:length], "the pages do not hold what this request computed"
        return next_token(slot.tokens[:length], slot.row.seed)

    def _prompt_logprobs(self, step: SchedulerOutput) -> dict[int, list[TokenLogprobs]]:
        entries = {}
        for row in step.prompt_logprobs_rows:
            slot, start = self._slots[step.slots[row]], step.start_positions[row]
            stop = min(start + step.num_tokens[row], slot.row.num_prompt_tokens - 1)
            entries[row] = [TokenLogprobs(-float(slot.tokens[p + 1]), 1, [], []) for p in range(start, stop)]
        return entries
