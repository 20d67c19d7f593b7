"""KVCacheManager: the block tables, by KV group; prefix-cache hits; what is allocated and freed for a request.

Layers with equal window form a group with a pool of its own. A sliding-window group gives back pages that have left the
window, and a prefix hit needs only the pages of its last window there.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engine.block_pool import BlockPool, block_hashes, root_hash
from engine.request import Request
from engine.step import SCRATCH_BLOCK_ID, KVGroupSpec


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """num_tokens of the request are in pages already; block_ids: the table so far, by group."""

    num_tokens: int
    block_ids: tuple[list[int], ...]


@dataclass(slots=True)
class _Holding:
    """What a running request holds: its block tables by group, how many of its blocks are hashed, and by group how many have
    left the window."""

    tables: tuple[list[int], ...]
    num_hashed: int
    num_dropped: list[int]


class KVCacheManager:
    """max_step_tokens: the most new tokens of one request that can be in flight at once, which bounds what a sliding-window
    group needs beside its window."""

    def __init__(
        self,
        groups: Sequence[KVGroupSpec],
        num_blocks: Sequence[int],
        *,
        block_size: int,
        max_step_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.groups = tuple(groups)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._max_step_tokens = max_step_tokens
        self._pools = [BlockPool(count) for count in num_blocks]
        self._has_windows = any(group.window is not None for group in groups)
        self._holdings: dict[int, _Holding] = {}  # by the request's uid
        # Blocks that a running request is about to compute, by hash: others wait for them instead of computing them again.
        self._announced: dict[bytes, int] = {}

    # -- sizes ------------------------------------------------------------------------------------------------------

    def blocks_needed(self, group: int, num_tokens: int) -> int:
        """The most pages of a group that one request of num_tokens holds at any moment."""
        blocks = -(-num_tokens // self.block_size)
        window = self.groups[group].window
        if window is None:
            return blocks
        return min(blocks, -(-(window - 1 + self._max_step_tokens) // self.block_size) + 1)

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of num_tokens can run to its end when it is alone."""
        return all(self.blocks_needed(g, num_tokens) <= pool.num_blocks for g, pool in enumerate(self._pools))

    def max_request_tokens(self, limit: int) -> int:
        """The longest request, up to limit tokens, that `fits`."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle - 1)
        return low

    @property
    def num_blocks(self) -> int:
        return sum(pool.num_blocks for pool in self._pools)

    @property
    def num_referenced_blocks(self) -> int:
        return sum(pool.num_referenced for pool in self._pools)

    @property
    def num_cached_blocks(self) -> int:
        return sum(pool.num_cached for pool in self._pools)

    # -- prefix hits ------------------------------------------------------------------------------------------------

    def reads_prefix(self, request: Request) -> bool:
        """Whether a request's prompt is looked up in the cache: not where something of each of its positions is wanted."""
        return self.enable_prefix_caching and not request.wants_prompt_logprobs and request.pooling != "mean"

    def find_prefix(self, request: Request) -> PrefixHit | None:
        """The longest cached prefix, leaving at least one token to compute; None: the next block is being computed by
        another request right now, so wait for it."""
        empty = PrefixHit(0, tuple([] for _ in self.groups))
        if not self.reads_prefix(request):
            return empty
        hashes = self._hashes(request)[: (request.num_tokens - 1) // self.block_size]
        num_blocks = self._longest_hit(hashes)
        if num_blocks < len(hashes) and self._announced.get(hashes[num_blocks], request.uid) != request.uid:
            return None
        if num_blocks == 0:
            return empty
        table = tuple(self._hit_table(g, hashes[:num_blocks]) for g in range(len(self.groups)))
        return PrefixHit(num_blocks * self.block_size, table)

    def _longest_hit(self, hashes: Sequence[bytes]) -> int:
        """Blocks of the longest prefix that every group can serve. Each group can only shorten it, so this ends."""
        length = len(hashes)
        while length:
            shortened = length
            for g in range(len(self.groups)):
                shortened = self._hit_in_group(g, hashes[:shortened])
            if shortened == length:
                break
            length = shortened
        return length

    def _hit_in_group(self, group: int, hashes: Sequence[bytes]) -> int:
        pool = self._pools[group]
        if self.groups[group].window is None:
            for i, content_hash in enumerate(hashes):
                if pool.lookup(content_hash) is None:
                    return i
            return len(hashes)
        # A sliding group: the longest prefix whose last window is there. Walk back, restarting at every hole.
        length, i = len(hashes), len(hashes) - 1
        while i >= self._first_needed_block(group, length * self.block_size):
            if pool.lookup(hashes[i]) is None:
                length = i
            i -= 1
        return length

    def _first_needed_block(self, group: int, num_computed_tokens: int) -> int:
        """The first block that a query at position num_computed_tokens still sees."""
        window = self.groups[group].window
        return 0 if window is None else max(0, num_computed_tokens - window + 1) // self.block_size

    def _hit_table(self, group: int, hashes: Sequence[bytes]) -> list[int]:
        first = self._first_needed_block(group, len(hashes) * self.block_size)
        ids = [self._pools[group].lookup(content_hash) for content_hash in hashes[first:]]
        return [SCRATCH_BLOCK_ID] * first + [block_id for block_id in ids if block_id is not None]

    def _hashes(self, request: Request) -> list[bytes]:
        """The request's chained block hashes, extended to all its full blocks of known tokens."""
        hashes, size = request.block_hashes, self.block_size
        start = len(hashes) * size
        if start + size <= request.num_tokens:
            parent = hashes[-1] if hashes else root_hash(request.cache_salt)
            hashes += block_hashes(parent, request.token_ids[start:], size)
        return hashes

    # -- allocate and free ------------------------------------------------------------------------------------------

    def can_admit(self, request: Request, hit: PrefixHit, reserve_blocks: int) -> bool:
        """Whether all of the request's known tokens would fit beside what is referenced now, leaving reserve_blocks."""
        for g, pool in enumerate(self._pools):
            shared = [block_id for block_id in hit.block_ids[g] if block_id != SCRATCH_BLOCK_ID]
            needed = max(0, self.blocks_needed(g, request.num_tokens) - len(shared))
            if needed + pool.num_free_among(shared) + reserve_blocks > pool.num_free:
                return False
        return True

    def admit(self, request: Request, hit: PrefixHit) -> None:
        """Give the request a table that shares the hit's pages, and announce the blocks it is going to compute."""
        for pool, ids in zip(self._pools, hit.block_ids, strict=True):
            pool.share(block_id for block_id in ids if block_id != SCRATCH_BLOCK_ID)
        num_hit_blocks = hit.num_tokens // self.block_size
        self._holdings[request.uid] = _Holding(
            tables=tuple(list(ids) for ids in hit.block_ids),
            num_hashed=num_hit_blocks,
            num_dropped=[self._first_needed_block(g, hit.num_tokens) for g in range(len(self.groups))],
        )
        request.page_capacity = hit.num_tokens
        if self.enable_prefix_caching:
            for content_hash in self._hashes(request)[num_hit_blocks:]:
                self._announced.setdefault(content_hash, request.uid)
        self._set_next_mark(request, self._holdings[request.uid])

    def allocate(self, request: Request, num_tokens: int) -> tuple[list[int], ...] | None:
        """Extend the table to cover num_tokens positions; returns the new ids by group, empty where it covers them already, or
        None (nothing changed) where pages are short."""
        tables = self._holdings[request.uid].tables
        count = -(-num_tokens // self.block_size) - len(tables[0])  # the tables of all groups are equally long
        if count <= 0:
            return ()
        if any(count > pool.num_free for pool in self._pools):
            return None
        new_ids = tuple([pool.allocate(count) for pool in self._pools])
        for table, ids in zip(tables, new_ids, strict=True):
            table.extend(ids)
        request.page_capacity = len(tables[0]) * self.block_size
        return new_ids

    def fork(self, parent: Request, child: Request) -> list[tuple[int, int, int]] | None:
        """Give the child a table over the parent's prompt: full pages are shared, a partly filled last page gets a page of
        its own. Returns the copies to make (group, source, target), or None where pages are short."""
        num_full, partial = divmod(parent.num_prompt_tokens, self.block_size)
        if partial and any(pool.num_free < 1 for pool in self._pools):
            return None
        copies = []
        child_tables = []
        held = self._holdings[parent.uid]
        for g, (pool, table) in enumerate(zip(self._pools, held.tables, strict=True)):
            shared = table[:num_full]
            pool.share(block_id for block_id in shared if block_id != SCRATCH_BLOCK_ID)
            if partial:
                target = pool.allocate(1)
                copies.append((g, table[num_full], target[0]))
                shared = shared + target
            child_tables.append(shared)
        child.block_hashes = parent.block_hashes[:num_full]
        child.page_capacity = len(child_tables[0]) * self.block_size
        # The parent hashes the shared blocks; the child begins after them.
        self._holdings[child.uid] = _Holding(tuple(child_tables), num_full, list(held.num_dropped))
        self._set_next_mark(child, self._holdings[child.uid])
        return copies

    def table(self, request: Request) -> tuple[list[int], ...]:
        """A copy of the request's block table, by group."""
        return tuple(list(ids) for ids in self._holdings[request.uid].tables)

    def mark_computed(self, request: Request, num_computed_tokens: int) -> None:
        """These positions are in pages now and their tokens known: full blocks become hits for others, and pages that have
        left a sliding window are given back. Does nothing while fewer than request.next_mark tokens are computed."""
        if num_computed_tokens < request.next_mark:
            return
        held = self._holdings[request.uid]
        if self.enable_prefix_caching:
            self._publish(request, held, num_computed_tokens // self.block_size)
        if self._has_windows:
            self._leave_windows(held, num_computed_tokens)
        self._set_next_mark(request, held)

    def _publish(self, request: Request, held: _Holding, num_full: int) -> None:
        """The request's first num_full blocks become hits for others."""
        hashes = self._hashes(request)
        for i in range(held.num_hashed, num_full):
            for pool, table in zip(self._pools, held.tables, strict=True):
                if table[i] != SCRATCH_BLOCK_ID:
                    pool.set_hash(table[i], hashes[i])
            self._withdraw(hashes[i], request)
        held.num_hashed = max(num_full, held.num_hashed)

    def _leave_windows(self, held: _Holding, num_computed_tokens: int) -> None:
        """Give back what no query from position num_computed_tokens on sees."""
        for g, (table, dropped) in enumerate(zip(held.tables, held.num_dropped, strict=True)):
            first = min(self._first_needed_block(g, num_computed_tokens), len(table))
            if first > dropped:
                self._pools[g].free(table[dropped:first])
                table[dropped:first] = [SCRATCH_BLOCK_ID] * (first - dropped)
                held.num_dropped[g] = first

    def _set_next_mark(self, request: Request, held: _Holding) -> None:
        """Find where the next block is full, or the next page leaves a window."""
        mark = (held.num_hashed + 1) * self.block_size if self.enable_prefix_caching else sys.maxsize
        if self._has_windows:
            for spec, dropped in zip(self.groups, held.num_dropped, strict=True):
                if spec.window is not None:
                    mark = min(mark, (dropped + 1) * self.block_size + spec.window - 1)
        request.next_mark = mark

    def free(self, request: Request) -> None:
        """Give back everything the request holds; a request without a table is left alone."""
        held = self._holdings.pop(request.uid, None)
        if held is None:
            return
        for pool, table in zip(self._pools, held.tables, strict=True):
            pool.free(table)
        for content_hash in request.block_hashes[held.num_hashed :]:
            self._withdraw(content_hash, request)

    def taint(self, request: Request) -> None:
        """The request had bad numbers, and its pages may too: no other finds them, and they are zeroed when nobody has them."""
        held = self._holdings.get(request.uid)
        for g, pool in enumerate(self._pools):
            # Pages that it gave back already may be known by what it computed.
            known = (pool.lookup(content_hash) for content_hash in request.block_hashes)
            pool.taint([*(held.tables[g] if held else ()), *(block_id for block_id in known if block_id is not None)])

    def take_to_zero(self) -> list[tuple[int, int]]:
        """(group, page id) of what the next step must zero before all else."""
        return [(g, block_id) for g, pool in enumerate(self._pools) for block_id in pool.take_to_zero()]

    def zero_again(self, blocks: Sequence[tuple[int, int]]) -> None:
        """They were taken for a step that did not run."""
        for g, block_id in blocks:
            self._pools[g].zero_again([block_id])

    def _withdraw(self, content_hash: bytes, request: Request) -> None:
        if self._announced.get(content_hash) == request.uid:
            del self._announced[content_hash]

    def reset_prefix_cache(self) -> None:
        """Forget every cached block; running requests keep their pages."""
        for pool in self._pools:
            pool.forget_all()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every pool agrees with the tables."""
        for g, pool in enumerate(self._pools):
            references: Counter[int] = Counter()
            for held in self._holdings.values():
                references.update(block_id for block_id in held.tables[g] if block_id != SCRATCH_BLOCK_ID)
            pool.check_integrity(dict(references))
        assert set(self._announced.values()) <= set(self._holdings), "a block is announced by a request that holds no pages"
