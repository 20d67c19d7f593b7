"""Classes of regular expressions: what the grammar lets through matches in every dialect that the sender may have meant."""

from __future__ import annotations

import llguidance
import pytest

from tests.server.test_structured import BYTES, accepts, schema_accepts, spec_of

ARABIC_THREE, UMLAUT, BYTE_ORDER_MARK = "\u0663", "\u00e4", "\ufeff"


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"\d{2}", ["12"], [ARABIC_THREE * 2]),
        (r"\w+", ["a_9"], [UMLAUT, ARABIC_THREE]),
        (r"a\sb", ["a b", "a\tb", "a\nb"], ["a\u00a0b"]),
        (r"\S", ["a", UMLAUT], [" ", "\u00a0", "\x1c", BYTE_ORDER_MARK]),
        (r"[\d.]+", ["1.5"], [ARABIC_THREE]),
        (r"[\w-]+", ["a-b"], [UMLAUT]),
        (r"[x[\d]]", ["x", "7"], [ARABIC_THREE]),
        (r"[^\d]", ["a", UMLAUT], ["7", ARABIC_THREE]),
        (r"[^x[\w]]", ["-"], ["a", UMLAUT]),
        (r"[\w--\d]", ["a"], ["7", UMLAUT]),
        (r"[^]\d]", ["a"], ["]", "7", ARABIC_THREE]),
        (r"[]\d]", ["]", "7"], [ARABIC_THREE]),
        (r"[\]\d]", ["]", "7"], [ARABIC_THREE]),
        (r"[[:alpha:]\d]\d", ["a7", "77"], [f"a{ARABIC_THREE}"]),
        (r"\D\W", ["a-"], ["7-", f"{ARABIC_THREE}-", "aa", f"a{UMLAUT}"]),
        (r"\\d[(]\d", [r"\d(7"], [rf"\d({ARABIC_THREE}"]),
        (r"\p{Nd}\p{L}", ["7a", ARABIC_THREE + UMLAUT], ["a7"]),
        (r"(?x) \s \d", [" 7", "\t7"], ["7", f" {ARABIC_THREE}"]),
    ],
)
def test_classes_are_of_ascii(pattern: str, good: list[str], bad: list[str]) -> None:
    spec = spec_of(structured_outputs={"regex": pattern})
    assert spec is not None
    matcher = llguidance.LLMatcher(BYTES, llguidance.LLMatcher.grammar_from_regex(spec.text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    assert [accepts(matcher, text) for text in good + bad] == [True] * len(good) + [False] * len(bad)


def test_a_schemas_patterns_are_read_alike() -> None:
    schema = {"type": "object", "properties": {"pin": {"type": "string", "pattern": r"^\d{2}$"}}, "required": ["pin"]}
    assert schema_accepts(schema, '{"pin":"12"}', f'{{"pin":"{ARABIC_THREE * 2}"}}') == [True, False]
