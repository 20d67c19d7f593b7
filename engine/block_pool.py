"""BlockPool: the pages of one KV group. Owns reference counts, content hashes and the LRU list of free pages.

A free page keeps its content and its hash until it is handed out again, so the free list is the prefix cache
(after PagedAttention, arXiv 2309.06180). `num_free + referenced pages == num_blocks` holds after every call.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engine.step import SCRATCH_BLOCK_ID

ROOT_HASH = b"octavo prefix cache 2"


def root_hash(cache_salt: str) -> bytes:
    """The parent of every first block: requests with different salts share nothing."""
    return hashlib.blake2b(ROOT_HASH + cache_salt.encode(), digest_size=32).digest()


def block_hashes(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """256-bit hashes of consecutive full blocks: each of its tokens and, through the one before it, of all before them."""
    packed = array("i", token_ids).tobytes()
    num_bytes = block_size * array("i").itemsize
    hashes = []
    for start in range(0, len(packed) - num_bytes + 1, num_bytes):
        parent = hashlib.blake2b(parent + packed[start : start + num_bytes], digest_size=32).digest()
        hashes.append(parent)
    return hashes


class Block:
    """One page: how many tables name it, what it holds if that is known, and whether that may be bad numbers."""

    __slots__ = ("content_hash", "is_tainted", "ref_count")

    def __init__(self) -> None:
        self.ref_count = 0
        self.content_hash: bytes | None = None
        self.is_tainted = False


class BlockPool:
    """Pages 1 .. num_blocks; id 0 is the scratch page, which is never handed out."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blocks = [Block() for _ in range(num_blocks + 1)]
        # Oldest first: pages are handed out from the front, and freed pages join at the back.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._by_hash: dict[bytes, int] = {}
        self._to_zero: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages whose content is known, referenced or free."""
        return len(self._by_hash)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each, least recently used first. The caller has checked `num_free`."""
        assert count <= len(self._free), f"asked for {count} pages of {len(self._free)} free ones"
        ids = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            block = self._blocks[block_id]
            if block.content_hash is not None:
                del self._by_hash[block.content_hash]
                block.content_hash = None
            block.ref_count = 1
            ids.append(block_id)
        return ids

    def lookup(self, content_hash: bytes) -> int | None:
        """The page with this content, or None."""
        return self._by_hash.get(content_hash)

    def num_free_among(self, ids: Iterable[int]) -> int:
        """How many of these pages nobody references: sharing them takes them off the free list."""
        return sum(1 for block_id in ids if block_id in self._free)

    def share(self, ids: Iterable[int]) -> None:
        """One more reference to each page."""
        for block_id in ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                del self._free[block_id]
            block.ref_count += 1

    def free(self, ids: Sequence[int]) -> None:
        """One reference less to each page of a table, in table order; the last pages of the table are reused first,
        because a prefix is worth more than what follows it."""
        for block_id in reversed(ids):
            if block_id == SCRATCH_BLOCK_ID:
                continue
            block = self._blocks[block_id]
            assert block.ref_count > 0, f"page {block_id} freed twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.is_tainted:
                    self._zero(block_id)
                if block.content_hash is None:
                    # Nothing to keep: reuse it before anything that a later request could hit.
                    self._free.move_to_end(block_id, last=False)

    def set_hash(self, block_id: int, content_hash: bytes) -> None:
        """The page now holds this content. A second page of equal content stays unknown: one is enough for hits."""
        block = self._blocks[block_id]
        if block.content_hash is None and content_hash not in self._by_hash and not block.is_tainted:
            block.content_hash = content_hash
            self._by_hash[content_hash] = block_id

    def taint(self, ids: Iterable[int]) -> None:
        """These pages may hold bad numbers: nothing hits them from now on, and once nobody references them they are zeroed."""
        for block_id in ids:
            if block_id == SCRATCH_BLOCK_ID:
                continue
            block = self._blocks[block_id]
            if block.content_hash is not None:
                del self._by_hash[block.content_hash]
                block.content_hash = None
            block.is_tainted = True
            if block.ref_count == 0:
                self._zero(block_id)

    def _zero(self, block_id: int) -> None:
        # From now on it is as good as any other: it is zeroed before the next step computes anything.
        self._blocks[block_id].is_tainted = False
        self._to_zero.append(block_id)

    def take_to_zero(self) -> list[int]:
        """Pages that the next step must zero before all else."""
        taken, self._to_zero = self._to_zero, []
        return taken

    def zero_again(self, ids: Iterable[int]) -> None:
        """These were taken for a step that did not run."""
        self._to_zero.extend(ids)

    def forget_all(self) -> None:
        """Drop every hash: no page can be hit any more."""
        for block_id in self._by_hash.values():
            self._blocks[block_id].content_hash = None
        self._by_hash.clear()

    def check_integrity(self, expected_references: dict[int, int]) -> None:
        """Raise AssertionError unless counts, free list and hashes agree with the tables' references (id -> count)."""
        for block_id in range(1, self.num_blocks + 1):
            block = self._blocks[block_id]
            expected = expected_references.get(block_id, 0)
            assert block.ref_count == expected, f"page {block_id}: {block.ref_count} references, tables hold {expected}"
            assert (block_id in self._free) == (expected == 0), f"page {block_id}: on the free list and referenced, or neither"
            if block.is_tainted:
                assert block.ref_count and block.content_hash is None, f"page {block_id}: of bad numbers, and free or known"
            if block.content_hash is not None:
                assert self._by_hash.get(block.content_hash) == block_id, f"page {block_id}: its hash leads elsewhere"
        assert all(self._blocks[i].content_hash == h for h, i in self._by_hash.items()), "a hash names a page without it"
        assert SCRATCH_BLOCK_ID not in self._free and SCRATCH_BLOCK_ID not in expected_references
        assert self.num_free + sum(1 for count in expected_references.values() if count) == self.num_blocks
