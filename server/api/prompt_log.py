"""Prompts in the log, for those who ask for them; nothing else in the server logs what clients write."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from server.state import ServerState

logger = logging.getLogger("octavo.prompts")


class Asked(Protocol):
    """text is None where the caller gave token ids."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def text(self) -> str | None: ...


class _LoggedPrompt(NamedTuple):
    """A Python literal for people, so that one line it stays."""

    text: str

    def sentence(self) -> str:
        return f"prompt: {self.text!r}"

    def fields(self) -> dict[str, Any]:
        return {"prompt": self.text}


def log_prompts(state: ServerState, prompts: Sequence[Asked]) -> None:
    """A line a prompt; nothing without the setting of that name."""
    if not state.config.log_prompts:
        return
    for prompt in prompts:
        text = prompt.text
        if text is None:
            text = state.client.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
        logger.info("prompt", extra={"summary": _LoggedPrompt(text)})
