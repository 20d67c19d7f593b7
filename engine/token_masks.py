"""Which tokens a step's rows may draw: what each slot is told once, and what the host says for a single step.

Bans (bad words, stop tokens before min_tokens) and permissions (allowed_token_ids, a grammar) may leave no token at all. Then
what was asked for gives way, as far as it must: first the bans, then allowed_token_ids. A grammar always holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.step import HostMasks, NewRow

IntArray = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]
"""A bit a token, 32 tokens a word, the lowest bit first."""

Banned = list[tuple[int, IntArray]]
Allowed = dict[int, Words]

_NO_IDS: IntArray = np.zeros(0, dtype=np.int64)


class TokenMasks:
    """The masks of every slot, as its sampling parameters give them.

    stop_ids: by slot, tokens that are banned until the choice has min_tokens.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._every_token = self._pack(np.arange(vocab_size))
        self._allowed: Allowed = {}
        self._banned: dict[int, IntArray] = {}
        self.stop_ids: dict[int, IntArray] = {}

    def fill(self, row: NewRow) -> None:
        sampling, slot = row.sampling, row.slot
        if sampling.allowed_token_ids is not None:
            self._allowed[slot] = self._pack(np.array(sampling.allowed_token_ids, dtype=np.int64))
        # Words of several tokens depend on the tokens before: they come with HostMasks.
        if single := [word[0] for word in sampling.bad_words if len(word) == 1]:
            self._banned[slot] = np.array(single, dtype=np.int64)
        stop_ids = {*row.stop_token_ids, *sampling.stop_token_ids}
        if sampling.min_tokens and stop_ids:
            self.stop_ids[slot] = np.array(sorted(stop_ids), dtype=np.int64)

    def free(self, slot: int) -> None:
        for by_slot in (self._allowed, self._banned, self.stop_ids):
            by_slot.pop(slot, None)

    def __contains__(self, slot: int) -> bool:
        """Whether the slot has masks that hold in every step."""
        return slot in self._allowed or slot in self._banned

    def take(
        self, slots: Sequence[int], too_short: Sequence[int], source_rows: Sequence[int], host: HostMasks
    ) -> tuple[Banned, Allowed]:
        """Banned and allowed tokens of the rows that have any. Row i draws for slots[i], after the step's row source_rows[i].

        too_short: rows that have not reached min_tokens.
        """
        short_rows = set(too_short) if self.stop_ids else set()
        banned: Banned = []
        allowed: Allowed = {}
        if not (self._allowed or self._banned or short_rows or host.allowed or host.banned):
            return banned, allowed
        for i, slot in enumerate(slots):
            source = source_rows[i] if source_rows else -1
            ids = self._banned_ids(slot, i in short_rows, host.banned.get(source, ()))
            words = self._allowed_words(slot, host.allowed.get(source))
            if words is not None:
                allowed[i] = self._without(words, ids) if ids.size else words
            elif 0 < ids.size < self._vocab_size:
                banned.append((i, ids))
        return banned, allowed

    def _banned_ids(self, slot: int, is_short: bool, host_ids: Sequence[int]) -> IntArray:
        """Every banned id once, ascending."""
        parts = [self._banned.get(slot, _NO_IDS)]
        if is_short:
            parts.append(self.stop_ids.get(slot, _NO_IDS))
        if host_ids:
            parts.append(np.array(host_ids, dtype=np.int64))
        return np.unique(np.concatenate(parts))

    def _allowed_words(self, slot: int, host_words: Words | None) -> Words | None:
        own = self._allowed.get(slot)
        if host_words is None:
            return own
        # A grammar knows the tokenizer's vocabulary, which may be shorter or longer than the model's.
        words = np.zeros_like(self._every_token)
        words[: host_words.size] = host_words[: words.size]
        words &= self._every_token
        if own is not None and (both := words & own).any():
            return both
        return words

    def _without(self, words: Words, ids: IntArray) -> Words:
        left = words & ~self._pack(ids)
        return left if left.any() else words

    def _pack(self, token_ids: IntArray) -> Words:
        bits = np.zeros(-(-self._vocab_size // 32) * 32, dtype=np.uint8)
        bits[token_ids] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)
