"""BlockPool: counts, hashes and the order in which free pages are reused."""

import pytest

from engine.block_pool import BlockPool, block_hashes, root_hash


def block_hash(token_ids: list[int], parent: bytes = root_hash("")) -> bytes:
    (content_hash,) = block_hashes(parent, token_ids, len(token_ids))
    return content_hash


def test_pages_are_handed_out_once_and_come_back():
    pool = BlockPool(4)
    first = pool.allocate(3)
    assert sorted(first) == [1, 2, 3] and pool.num_free == 1 and pool.num_referenced == 3
    pool.free(first)
    assert pool.num_free == 4
    pool.check_integrity({})


def test_a_shared_page_is_free_only_after_its_last_reference():
    pool = BlockPool(2)
    (page,) = pool.allocate(1)
    pool.share([page])
    pool.free([page])
    pool.check_integrity({page: 1})
    pool.free([page])
    pool.check_integrity({})
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([page])


def test_a_freed_page_keeps_its_content_until_it_is_reused():
    pool = BlockPool(2)
    (page,) = pool.allocate(1)
    content = block_hash([1, 2, 3])
    pool.set_hash(page, content)
    pool.free([page])
    assert pool.lookup(content) == page
    pool.share([page])
    pool.check_integrity({page: 1})
    pool.free([page])
    pool.allocate(2)
    assert pool.lookup(content) is None


def test_unknown_content_is_reused_first_then_the_least_recently_used_and_prefixes_last():
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for page in old + new[:1]:
        pool.set_hash(page, block_hash([page]))
    pool.free(old)
    pool.free(new)
    assert pool.allocate(4) == [new[1], old[1], old[0], new[0]]


def test_equal_content_is_known_once():
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    content = block_hash([1])
    pool.set_hash(a, content)
    pool.set_hash(b, content)
    assert pool.lookup(content) == a and pool.num_cached == 1
    pool.free([a, b])
    pool.check_integrity({})


def test_hashes_tell_parents_salts_and_order_apart():
    hashes = {
        block_hash([1, 2]),
        block_hash([1, 2], root_hash("tenant")),
        block_hash([2, 1]),
        block_hash([1, 2 + 256]),
        block_hash([1, 2], block_hash([1, 2])),
    }
    assert len(hashes) == 5 and all(len(h) == 32 for h in hashes)


def test_full_blocks_are_chained_and_the_rest_has_no_hash():
    first, second = block_hash([1, 2]), block_hash([3, 4], block_hash([1, 2]))
    assert block_hashes(root_hash(""), [1, 2, 3, 4, 5], 2) == [first, second]
    assert block_hashes(root_hash(""), [1], 2) == []
