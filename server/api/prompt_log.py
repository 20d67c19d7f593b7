"""Prompts in the log, for those who ask for them; nothing else in the server logs what clients write."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from server.state import ServerState

logger = logging.getLogger("octavo.prompts")


class Asked(Protocol):
    """text is None where the caller gave token ids."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def text(self) -> str | None: ...


def log_prompts(state: ServerState, request_id: str, prompts: Sequence[Asked]) -> None:
    """A line a prompt, as a Python literal (so one line it stays); nothing without `log_prompts`."""
    if not state.config.log_prompts:
        return
    for prompt in prompts:
        text = prompt.text
        if text is None:
            text = state.client.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
        logger.info("%s prompt: %r", request_id, text)
