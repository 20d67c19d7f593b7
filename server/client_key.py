"""The API key of the commands that talk to a server; light, for a terminal that waits."""

from __future__ import annotations


def first_key(listed: str) -> str:
    """The key itself of the first entry of `OCTAVO_API_KEY`, entries being `KEY [ID [SCOPE ...]]`; empty without any."""
    return next(iter(listed.split(",", maxsplit=1)[0].split()), "")
