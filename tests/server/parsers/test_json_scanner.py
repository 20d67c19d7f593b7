"""The scanner agrees with `json` about what a value is and where it ends."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.parsers.json_scanner import JsonScanner
from server.parsers.markers import Found, Markers

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def scan(pieces: str | list[str]) -> tuple[str, int, bool]:
    """What belongs to the value, characters read, and whether it is one."""
    scanner, taken, length = JsonScanner(), "", 0
    for piece in pieces:
        text, end = scanner.feed(piece, 0)
        taken, length = taken + text, length + end
        if end < len(piece):
            break
    scanner.finish()
    assert scanner.is_done != scanner.is_broken
    return taken, length, scanner.is_done


@settings(max_examples=300, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]), st.text(alphabet='{}[]",:1\\ x', max_size=5))
def test_values_end_where_they_end(value: object, ascii_only: bool, indent: int | None, tail: str) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert scan([text]) == (text, len(text), True)
    if isinstance(value, dict | list | str):  # a number goes on with the next digit
        assert scan([text + tail]) == (text, len(text), True)


@settings(max_examples=1000, deadline=None)
@given(st.text(alphabet='{}[]",:10-.eE\\u \ntrufalsn', max_size=14))
def test_as_json_reads_it(text: str) -> None:
    taken, length, is_value = scan([text])
    assert scan(list(text)) == (taken, length, is_value)
    try:
        json.loads(text, strict=False)
    except ValueError:
        assert not is_value or text[length:].strip()
    else:
        assert is_value
        assert json.loads(taken) == json.loads(text, strict=False)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("{'a': 1}", "{"),
        ('{"a": 1,}', '{"a": 1,'),
        ('{"a" 1}', '{"a" '),
        ("[1 2]", "[1 "),
        ("[01]", "[0"),
        ("[1.]", "[1."),
        ("[1e+]", "[1e+"),
        ("[-]", "[-"),
        ("[nul]", "[nul"),
        ("[NaN]", "["),
        ('["\\x"]', '["\\'),
        ('["\\u12g4"]', '["\\u12'),
        ("[1}", "[1"),
        ("]", ""),
        ('{"a": {"b": [1, 2', '{"a": {"b": [1, 2'),
    ],
)
def test_broken_values(text: str, taken: str) -> None:
    assert scan([text]) == (taken, len(taken), False)


def test_control_characters_in_strings_are_escaped() -> None:
    taken, _, is_value = scan(['{"a\n": "\t\x00\x1f"}'])
    assert is_value and taken == '{"a\\n": "\\t\\u0000\\u001f"}'


@pytest.mark.parametrize(
    ("text", "is_final", "found"),
    [
        ("ab <a> c", False, Found(3, 6, "<a>")),
        ("ab <a", False, Found(3, 3, None)),
        ("ab <a", True, Found(5, 5, None)),
        ("ab <a>", False, Found(3, 3, None)),  # may become <a>b
        ("ab <a>", True, Found(3, 6, "<a>")),
        ("ab <a>b", False, Found(3, 7, "<a>b")),
        ("<<a>c", False, Found(1, 4, "<a>")),
        ("x>y>z<", False, Found(5, 5, None)),
        ("", False, Found(0, 0, None)),
    ],
)
def test_markers(text: str, is_final: bool, found: Found) -> None:
    assert Markers(["<a>", "<a>b", "<c>"]).find(text, 0, is_final=is_final) == found


def test_no_markers() -> None:
    assert Markers([]).find("abc", 1, is_final=False) == Found(3, 3, None)
