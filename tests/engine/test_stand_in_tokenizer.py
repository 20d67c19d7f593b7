"""The tokenizer of models that have none: every text has ids, every id has text."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ModelLoadError
from engine.stand_in_tokenizer import write_stand_in_tokenizer
from engine.tokenizer import Tokenizer


@pytest.mark.parametrize("vocab_size", [256, 300, 20_000])
def test_every_text_has_ids_and_every_id_has_text(vocab_size: int, tmp_path: Path) -> None:
    write_stand_in_tokenizer(tmp_path, vocab_size, ["time", "year"])
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == vocab_size
    assert not tokenizer.eos_token_ids
    for text in ("time year time", "héllo, 世界!\n", ""):
        ids = tokenizer.encode(text)
        assert all(0 <= token_id < vocab_size for token_id in ids)
        assert tokenizer.decode(ids) == text
    assert all(tokenizer.token_text(token_id) for token_id in range(vocab_size))
    assert len({tokenizer.token_bytes(token_id) for token_id in range(vocab_size)}) == vocab_size


def test_given_and_made_up_words_are_one_token_each(tmp_path: Path) -> None:
    write_stand_in_tokenizer(tmp_path, 20_000, ["time", "year"])
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer.encode("year time time year")) == 4
    assert tokenizer.encode(tokenizer.decode(range(19_000, 19_020))) == list(range(19_000, 19_020))


def test_a_chat_can_be_rendered(tmp_path: Path) -> None:
    write_stand_in_tokenizer(tmp_path, 300)
    assert Tokenizer.load(tmp_path).render_chat([{"role": "user", "content": "a"}]) == "user: a\nassistant:"


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no room for a byte-level stand-in"):
        write_stand_in_tokenizer(tmp_path, 255)
