"""Who gives way when the device has no memory for a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.errors import RequestFailed
from engine.in_flight_step import InFlightStep
from engine.request import Request


class GaveWay:
    """Remembers the requests that gave up their place for a step that did not fit, and have had no token since.

    A request to which this happens again, and not for another prompt in its step, is itself too large.
    """

    def __init__(self) -> None:
        self._requests: set[Request] = set()

    def choose(self, flight: InFlightStep, running: Sequence[Request]) -> tuple[Request | None, RequestFailed | None]:
        """Of a step's prompts, or of its decodes where there is none, the one that was admitted last; and its error, where it
        is to end. running: in order of admission. None: the step's requests have all ended, with the step before, whose
        result was taken between this one's launch and its sampling."""
        prompts = {r for r, count in zip(flight.rows, flight.step.num_tokens, strict=True) if count > 1}
        candidates = prompts or set(flight.rows)
        chosen = next((request for request in reversed(running) if request in candidates), None)
        if chosen is None:
            return None, None
        if chosen in self._requests and len(prompts) <= 1:
            sentence = (
                f"the device ran out of memory twice in a row with this request ({chosen.num_tokens} tokens, in a step of "
                f"{flight.step.total_num_tokens}); the server takes larger ones with a lower gpu_memory_utilization"
            )
            return chosen, RequestFailed(sentence)
        self._requests.add(chosen)
        return chosen, None

    def forget(self, requests: Iterable[Request]) -> None:
        """They have had a token, or have ended."""
        if self._requests:
            self._requests.difference_update(requests)
