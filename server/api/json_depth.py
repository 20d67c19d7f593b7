"""How deep JSON is nested, and how much of it there is, told before it is decoded: a decoder and whoever walks what it made
would recurse, and every array costs many times the two bytes that it is written in."""

from __future__ import annotations

MAX_CONTAINERS = 1_000_000
CHUNK_BYTES = 2**20

_OPEN, _CLOSE, _QUOTE = b'[]"'
_ALL_ELSE = bytes(set(range(256)) - set(b'[]{}"'))
_BRACKETS = bytes.maketrans(b"{}", b"[]")


def structure_fault(content: bytes, max_depth: int) -> str | None:
    """What is wrong with the arrays and objects of a body, for "The body ..."; None where they are few and shallow enough.

    What is no JSON is the decoder's to refuse: what it reads of that before it does is as shallow as what is told here. Most
    bodies have so few brackets that nothing more is looked at; the others cost about 10 ns a byte.
    """
    if content.count(b"[") + content.count(b"{") <= max_depth:
        return None
    import numpy as np  # here, so that a frontend starts without it

    # Escapes first, the escaped backslash before the escaped quote: then strings end at the next quote.
    structure = content.replace(rb"\\", b"").replace(rb"\"", b"").translate(_BRACKETS, _ALL_ELSE)
    in_string, depth, num_containers = 0, 0, 0
    for start in range(0, len(structure), CHUNK_BYTES):
        chunk = np.frombuffer(structure, np.uint8, min(CHUNK_BYTES, len(structure) - start), start)
        quotes = np.cumsum(chunk == _QUOTE, dtype=np.int32) + in_string
        outside = quotes % 2 == 0
        opens = (chunk == _OPEN) & outside
        steps = opens.astype(np.int8) - ((chunk == _CLOSE) & outside)
        depths = np.cumsum(steps, dtype=np.int32) + depth
        if int(depths.max()) > max_depth:
            return f"nests arrays and objects more than {max_depth} deep"
        in_string, depth = int(quotes[-1]) % 2, int(depths[-1])
        num_containers += int(np.count_nonzero(opens))
        if num_containers > MAX_CONTAINERS:
            return f"holds more than {MAX_CONTAINERS:,} arrays and objects"
    return None
