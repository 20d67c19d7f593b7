"""How many tokens a step computes, and how much of a prompt goes into it."""

from __future__ import annotations

TILE_ROWS = 128
"""Tokens that a tile of a large matrix product covers, on all cards of interest."""


PATIENCE_S = 0.04
"""A prompt that has waited so long makes steps grow, and again for each further time it has."""


class StepBudget:
    """The rule: every decode gets its token; prompts get what is left of a total that depends on who waits for whom.

    Decoding reads all weights for a few rows, and up to some 250 rows (Hopper) more of them are nearly free: prompts should
    ride along in many steps, a little in each, and not in a few large ones that keep every decode waiting. So a step that
    decodes holds half of max_num_mixed_tokens, or four times its decodes where that is more, and it grows to
    max_num_mixed_tokens while the oldest prompt waits longer than PATIENCE_S. Where few decode, few wait: the total then may
    be 16 times max_num_mixed_tokens over their number, up to max_num_batched_tokens. With 1,024 and 8,192 of these: 512 from
    32 decodes on, 1,024 with 16 or with 256, 8,192 with 2. max_num_mixed_tokens None: always max_num_batched_tokens.

    The total is a whole number of tiles, because a matrix product computes whole tiles anyway. Prompts are cut (chunked
    prefill after Sarathi-Serve, OSDI '24) at the ends of pages of block_size tokens, so that another request can share all
    that is computed. After a step that did not fit in the device's memory, steps are half its size, and grow back by a 64th
    each.
    """

    __slots__ = ("_block_size", "_max_num_batched_tokens", "_max_num_mixed_tokens", "_max_num_seqs", "_token_limit")

    def __init__(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_num_mixed_tokens: int | None, block_size: int
    ) -> None:
        if max_num_mixed_tokens is not None:
            assert max_num_seqs <= max_num_mixed_tokens <= max_num_batched_tokens, (
                "every running sequence gets its token in one step"
            )
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_mixed_tokens = max_num_mixed_tokens
        self._block_size = block_size
        self._token_limit = max_num_batched_tokens

    def prompt_tokens(self, num_decodes: int, oldest_wait_s: float = 0.0) -> int:
        """Prompt tokens that may join a step of num_decodes decodes. oldest_wait_s: of the prompts not yet computed."""
        total = self._token_limit
        mixed = self._max_num_mixed_tokens
        if num_decodes and mixed is not None:
            impatience = max(0.0, oldest_wait_s / PATIENCE_S - 1.0)
            many = min(mixed, max(mixed // 2 * (1.0 + impatience), 4 * num_decodes))
            few = 16 * mixed // num_decodes
            total = min(total, max(int(many), few))
        whole_tiles = total // TILE_ROWS * TILE_ROWS
        return (whole_tiles if whole_tiles > num_decodes else max(total, num_decodes)) - num_decodes

    def cut(self, start: int, num_tokens: int, left: int) -> tuple[int, int]:
        """How many of num_tokens from position `start` on fit the tokens left, and how many of those that spends. A chunk that
        is cut ends with a page, where it reaches one, and spends all, so that no other prompt is begun with the few left."""
        if num_tokens <= left:
            return num_tokens, num_tokens
        page_end = (start + left) // self._block_size * self._block_size
        return (page_end - start if page_end > start else left), left

    def shrink(self, num_tokens: int) -> None:
        """A step of num_tokens did not fit in the device's memory."""
        self._token_limit = max(self._max_num_seqs, num_tokens // 2)

    def grow(self) -> None:
        """A step has run."""
        if self._token_limit < self._max_num_batched_tokens:
            self._token_limit = min(self._max_num_batched_tokens, self._token_limit + self._token_limit // 64 + 1)
