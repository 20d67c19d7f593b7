"""How deep JSON is nested, told before it is decoded: what is deeper than any request would have whoever walks it recurse."""

from __future__ import annotations

import re

_OPEN, _CLOSE = b"[{", b"]}"
_STRUCTURE = b'[]{}"'
_ALL_ELSE = bytes(set(range(256)) - set(_STRUCTURE))
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_STRING = re.compile(rb'"[^"]*"?')


def is_deeper_than(content: bytes, limit: int) -> bool:
    """Whether brackets are nested more than `limit` deep. What is no JSON may be told either way.

    Only the few whole-string operations below touch every byte, and most bodies have too few brackets to come so far.
    """
    if content.count(b"[") + content.count(b"{") <= limit:
        return False
    # Escapes first, the escaped backslash before the escaped quote: then strings end at the next quote.
    structure = content.replace(rb"\\", b"").replace(rb"\"", b"").translate(_BRACKETS, _ALL_ELSE)
    brackets = _STRING.sub(b"", structure)
    for _ in range(limit):  # each pass takes the innermost level away
        inner = brackets.replace(b"[]", b"")
        if len(inner) == len(brackets):
            break
        brackets = inner
    return b"[]" in brackets or brackets.count(b"[") > limit
