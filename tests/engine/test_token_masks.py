"""Token masks: what a slot is told once, what the host says of a step, and what gives way when nothing is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.sampling_params import SamplingParams
from engine.step import HostMasks, NewRow
from engine.token_masks import TokenMasks, Words

VOCAB = 70  # no multiple of a word's 32 tokens


def words_of(ids: list[int], num_words: int = 3) -> Words:
    words = np.zeros(num_words, dtype=np.int64)
    for token_id in ids:
        words[token_id // 32] |= 1 << token_id % 32
    return words.astype(np.uint32).view(np.int32)


def ids_of(words: Words) -> list[int]:
    return [i for i in range(words.size * 32) if int(words[i // 32]) >> i % 32 & 1]


def row_of(slot: int, ends: tuple[int, ...] = (), **sampling: Any) -> NewRow:
    params = SamplingParams(**{"max_tokens": 30, **sampling})
    return NewRow(slot, np.arange(4, dtype=np.int32), 4, 0, params, 0, ([1],), ends)


def taken(
    *rows: NewRow, too_short: list[int] | None = None, host: HostMasks | None = None
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Banned and allowed ids by row, of rows in slots 0, 1, .. that are their own source rows."""
    masks = TokenMasks(VOCAB)
    for row in rows:
        masks.fill(row)
    slots = [row.slot for row in rows]
    banned, allowed = masks.take(slots, too_short or [], list(range(len(rows))), host or HostMasks())
    return {row: ids.tolist() for row, ids in banned}, {row: ids_of(words) for row, words in allowed.items()}


def test_rows_without_masks_have_none() -> None:
    assert taken(row_of(0), row_of(1), too_short=[0, 1]) == ({}, {})
    masks = TokenMasks(VOCAB)
    masks.fill(row_of(0, min_tokens=3, stop_token_ids=(5,)))
    assert 0 not in masks, "stop tokens are banned for a while only"


def test_allowed_token_ids_and_single_bad_words() -> None:
    rows = row_of(0, allowed_token_ids=(0, 31, 32, 69, 31)), row_of(1, bad_words=((7,), (3, 4), (2,), (7,))), row_of(2)
    assert taken(*rows) == ({1: [2, 7]}, {0: [0, 31, 32, 69]})
    masks = TokenMasks(VOCAB)
    for row in rows:
        masks.fill(row)
    assert [slot in masks for slot in range(3)] == [True, True, False]
    for slot in range(3):
        masks.free(slot)
        masks.fill(row_of(slot))
    assert masks.take([0, 1, 2], [], [0, 1, 2], HostMasks()) == ([], {})


def test_a_word_of_several_tokens_bans_nothing_by_itself() -> None:
    assert taken(row_of(0, bad_words=((3, 4),))) == ({}, {})


def test_stop_tokens_are_banned_until_min_tokens() -> None:
    rows = [row_of(slot, (9,), min_tokens=3, stop_token_ids=(5,), bad_words=((5,),)) for slot in range(2)]
    assert taken(*rows, too_short=[1]) == ({0: [5], 1: [5, 9]}, {})


def test_bans_are_taken_from_what_is_allowed() -> None:
    row = row_of(0, (9,), min_tokens=3, allowed_token_ids=(5, 9, 40), bad_words=((40,),))
    assert taken(row, too_short=[0]) == ({}, {0: [5]})
    assert taken(row) == ({}, {0: [5, 9]})


def test_the_host_s_masks_hold_for_their_source_row() -> None:
    masks = TokenMasks(VOCAB)
    for slot in (4, 6, 2):
        masks.fill(row_of(slot))
    host = HostMasks({3: words_of([1, 2])}, {1: [8, 8]})
    # slot 2 is a fork of the scheduled row 3
    banned, allowed = masks.take([4, 6, 2], [], [1, 3, 3], host)
    assert [(row, ids.tolist()) for row, ids in banned] == [(0, [8])]
    assert {row: ids_of(words) for row, words in allowed.items()} == {1: [1, 2], 2: [1, 2]}


def test_the_host_s_masks_join_the_slot_s() -> None:
    row = row_of(0, allowed_token_ids=(1, 2, 3, 4), bad_words=((1,),))
    assert taken(row, host=HostMasks({0: words_of([1, 2, 3, 60])}, {0: [3]})) == ({}, {0: [2]})


@pytest.mark.parametrize("num_words", [1, 2, 3, 5])
def test_a_grammar_of_another_vocabulary_size(num_words: int) -> None:
    ids = [i for i in (0, 31, 32, 63, 69, 70, 95, 130) if i < num_words * 32]
    assert taken(row_of(0), host=HostMasks({0: words_of(ids, num_words)})) == ({}, {0: [i for i in ids if i < VOCAB]})


def test_bans_give_way_to_what_is_allowed() -> None:
    row = row_of(0, (9,), min_tokens=3, allowed_token_ids=(9, 40), bad_words=((40,),))
    assert taken(row, too_short=[0]) == ({}, {0: [9, 40]}), "nothing would be left"
    assert taken(row) == ({}, {0: [9]})
    # a grammar that only lets the choice end, before min_tokens
    assert taken(row_of(0, (9,), min_tokens=3), too_short=[0], host=HostMasks({0: words_of([9])})) == ({}, {0: [9]})


def test_allowed_token_ids_give_way_to_a_grammar() -> None:
    row = row_of(0, allowed_token_ids=(1, 2), bad_words=((5,),))
    assert taken(row, host=HostMasks({0: words_of([5, 6])})) == ({}, {0: [6]})


def test_bans_of_the_whole_vocabulary_ban_nothing() -> None:
    every = [(token_id,) for token_id in range(VOCAB)]
    assert taken(row_of(0, bad_words=tuple(every))) == ({}, {})
    assert taken(row_of(0, bad_words=tuple(every[1:]))) == ({0: list(range(1, VOCAB))}, {})
