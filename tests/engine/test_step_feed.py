"""StepFeed: what the host notes reaches the device with the next send, and padding means nothing."""

from __future__ import annotations

import numpy as np
import torch

from engine.step_feed import StepFeed

CPU = torch.device("cpu")


def make() -> StepFeed:
    return StepFeed(num_groups=2, num_slots=3, max_blocks=5, max_tokens=8, device=CPU)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_tables_and_columns_change_with_the_next_send():
    feed = make()
    feed.append_blocks(1, 2, 0, [7, 8])
    feed.append_blocks(1, 2, 2, [9])
    seed = 0xFEDCBA9876543210
    feed.set_sampling(1, temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, seed=seed, output_index=6)
    assert not feed.tables[1].any()
    feed.send({}, padded_to=1)
    assert feed.tables[1].tolist() == [[0] * 5, [0] * 5, [7, 8, 9, 0, 0]]
    assert not feed.tables[0].any()
    columns = feed.columns
    assert columns.temperature.tolist() == [0.0, 0.5, 0.0]
    assert columns.top_k.tolist() == [0, 4, 0]
    torch.testing.assert_close(columns.top_p[1], torch.tensor(0.9))
    torch.testing.assert_close(columns.min_p[1], torch.tensor(0.1))
    assert int(columns.seed[1]) % 2**64 == seed
    assert columns.output_index.tolist() == [0, 6, 0]


def test_the_last_change_of_a_slot_counts():
    feed = make()
    for block_id in (3, 4):
        feed.append_blocks(0, 0, 0, [block_id])
    feed.set_output_index(ints(0, 2), ints(5, 6))
    feed.send({}, padded_to=1)
    assert int(feed.tables[0][0, 0]) == 4
    assert feed.columns.output_index.tolist() == [5, 0, 6]


def test_rows_are_padded_with_rows_that_mean_nothing():
    feed = make()
    feed.send({"row_slots": ints(2, 1, 0), "seq_lens": ints(9, 8, 7), "sample_slots": ints(2, 1, 0)}, padded_to=3)
    feed.send({"row_slots": ints(1), "seq_lens": ints(4), "input_ids": ints(-1), "sample_slots": ints(1)}, padded_to=3)
    feed.last_token[:] = torch.tensor([10, 11, 12])
    rows = feed.decode_rows(3)
    assert rows.seq_lens.tolist() == [4, 0, 0]
    assert rows.positions.tolist() == [3, -1, -1], "position -1 leaves nothing in any page"
    assert feed.field("sample_slots", 3).tolist() == [1, -1, -1]
    assert feed.decode_ids(1).tolist() == [11], "an unknown token is the slot's last sampled one"


def test_tokens_are_padded_with_tokens_that_mean_nothing():
    feed = make()
    feed.send_tokens(ints(5, 6), ints(0, 1), ints(2, 2), padded_to=4)
    input_ids, positions, slots = feed.tokens(4)
    assert (input_ids.tolist(), positions.tolist(), slots.tolist()) == ([5, 6, 0, 0], [0, 1, -1, -1], [2, 2, 0, 0])
