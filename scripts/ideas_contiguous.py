"""Contiguous KV memory as a policy of the engine's own KV cache manager, for ideas_paging.py.

A request gets one run of neighbouring pages when it is admitted, for every token that it may have, and gives it back when it
ends. Scheduler, block tables and attention are as ever: only who is admitted, and when, changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.kv_cache_manager import KVCacheManager, PrefixHit
from engine.request import Request


class BuddyAllocator:
    """Runs of pages whose lengths, and starts, are multiples of powers of two: a run too long is halved, and halves that are
    both free become one again (Knuth, The Art of Computer Programming, volume 1, 2.5). num_pages is a power of two."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages & (num_pages - 1) == 0, "a buddy allocator's memory is a power of two"
        self._top = num_pages.bit_length() - 1
        self._free: list[set[int]] = [set() for _ in range(self._top + 1)]
        self._free[self._top].add(0)

    @staticmethod
    def order(count: int) -> int:
        """Of the smallest run that holds `count` pages, which are 2 ** order."""
        return (count - 1).bit_length()

    def has(self, order: int) -> bool:
        """Whether there is such a run in one piece."""
        return any(self._free[larger] for larger in range(order, self._top + 1))

    def allocate(self, order: int) -> int:
        """The first page of a run; the caller has asked `has`."""
        larger = next(larger for larger in range(order, self._top + 1) if self._free[larger])
        start = min(self._free[larger])
        self._free[larger].remove(start)
        for smaller in range(larger - 1, order - 1, -1):
            self._free[smaller].add(start + (1 << smaller))
        return start

    def free(self, start: int, order: int) -> None:
        while order < self._top and start ^ (1 << order) in self._free[order]:
            self._free[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)


class ContiguousKVCache(KVCacheManager):
    """reserved_tokens: for how many a request gets its run, which is rounded up to a power of two of pages. For models with one
    KV group and no window; without prefix caching, which needs pages that requests can share."""

    def __init__(self, *args: Any, reserved_tokens: Callable[[Request], int], **settings: Any) -> None:
        super().__init__(*args, enable_prefix_caching=False, **settings)
        assert len(self.groups) == 1 and self.groups[0].window is None
        self._reserved_tokens = reserved_tokens
        self._buddies = BuddyAllocator(self._pools[0].num_blocks)
        self._runs: dict[int, tuple[int, int]] = {}  # by the request's uid: first page and order

    def can_admit(self, request: Request, hit: PrefixHit, reserve_blocks: int) -> bool:
        """Nothing is kept for requests that run: they have all that they will need."""
        return self._buddies.has(self._order(request))

    def admit(self, request: Request, hit: PrefixHit) -> None:
        super().admit(request, hit)
        order = self._order(request)
        start = self._buddies.allocate(order)
        self._runs[request.uid] = start, order
        block_ids = range(start + 1, start + 1 + (1 << order))  # page 0 is the scratch page
        self._pools[0].share(block_ids)
        self._holdings[request.uid].tables[0].extend(block_ids)
        request.page_capacity = len(block_ids) * self.block_size

    def free(self, request: Request) -> None:
        super().free(request)
        if request.uid in self._runs:
            self._buddies.free(*self._runs.pop(request.uid))

    def _order(self, request: Request) -> int:
        return BuddyAllocator.order(-(-self._reserved_tokens(request) // self.block_size))
