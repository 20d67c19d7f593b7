"""Prompts in the log, for those who ask for them; nothing else in the server logs what clients write."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from server.api.generation import Prompt
from server.config import ServerConfig

logger = logging.getLogger("octavo.prompts")


def log_prompts(config: ServerConfig, request_id: str, prompts: Sequence[Prompt]) -> None:
    """A line a prompt, as a Python literal (so one line it stays); nothing without `log_prompts`."""
    if not config.log_prompts:
        return
    for prompt in prompts:
        logger.info("%s prompt: %r", request_id, prompt.token_ids if prompt.text is None else prompt.text)
