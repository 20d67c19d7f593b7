"""StepProbe: whether the engine can complete a step, by those that did lately or by a small one of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from engine.messages import AddRequest, RequestOutput
from engine.sampling_params import SamplingParams

# A step that completed so long ago is looked up by a new one, beside the answer; one of RECENT_S ago still counts.
FRESH_S = 1.0
RECENT_S = 3.0
WAIT_S = 1.0
_FIRST_OF_ALL = -(2**31)


class StepProbe:
    """One prompt token, one token sampled, ahead of everything that waits: at most one such request at a time."""

    def __init__(self, new_id: Callable[[], str], send: Callable[[AddRequest], None]) -> None:
        self._new_id = new_id
        self._send = send
        self._request_id = ""
        self._completed_s = float("-inf")
        self._completed = asyncio.Event()

    def send(self) -> None:
        """Ask the engine for a step, unless it has been asked already."""
        if not self._request_id:
            self._request_id = self._new_id()
            sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
            self._send(AddRequest(request_id=self._request_id, prompt_token_ids=[0], sampling=sampling, priority=_FIRST_OF_ALL))

    def step_completed(self) -> None:
        """The engine has sent the outputs of a step."""
        self._completed_s = time.monotonic()
        self._completed.set()

    def take(self, output: RequestOutput) -> bool:
        """Whether this is the answer to the probe; then another may be sent."""
        if not self._request_id or output.request_id != self._request_id:
            return False
        self._request_id = ""
        return True

    def forget(self) -> None:
        """The engine is gone, and what it completed says nothing of the next one."""
        self._request_id = ""
        self._completed_s = float("-inf")

    async def succeeds(self) -> bool:
        """Whether a step has completed in the last seconds; where none has, whether one does within WAIT_S."""
        age_s = time.monotonic() - self._completed_s
        if age_s > FRESH_S:
            self.send()
        if age_s <= RECENT_S:
            return True
        self._completed.clear()
        try:
            await asyncio.wait_for(self._completed.wait(), WAIT_S)
        except TimeoutError:
            return False
        return True
