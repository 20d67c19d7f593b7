"""The time limits of a request: from its fields, else from headers, else the server's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple

from pydantic import Field

from engine.errors import InvalidRequest
from server.api.body import RequestBody
from server.config import ServerConfig

TIMEOUT_HEADER = "X-Request-Timeout"
FIRST_TOKEN_TIMEOUT_HEADER = "X-First-Token-Timeout"
MAX_TIMEOUT_S = 86400

Seconds = Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)]


class Deadlines(NamedTuple):
    """Times of time.monotonic(); None is no limit."""

    first_token_s: float | None
    whole_s: float | None

    def nearest_s(self) -> float | None:
        return min((at_s for at_s in self if at_s is not None), default=None)


class TimeLimit(RequestBody):
    """timeout: seconds that the whole answer may take, from the request's arrival."""

    timeout: Seconds | None = None

    def read_time_limits(self, headers: Mapping[str, str]) -> None:
        """Take limits from headers where no field gives them: for clients that cannot add fields. Raises InvalidRequest."""
        if self.timeout is None:
            self.timeout = _seconds(headers, TIMEOUT_HEADER)

    def deadlines(self, arrival_s: float, config: ServerConfig) -> Deadlines:
        """When a request that came at arrival_s has to be done."""
        return Deadlines(None, _after(arrival_s, self.timeout, config.request_timeout_s))


class TimeLimits(TimeLimit):
    """first_token_timeout: seconds that its first token may take."""

    first_token_timeout: Seconds | None = None

    def read_time_limits(self, headers: Mapping[str, str]) -> None:
        super().read_time_limits(headers)
        if self.first_token_timeout is None:
            self.first_token_timeout = _seconds(headers, FIRST_TOKEN_TIMEOUT_HEADER)

    def deadlines(self, arrival_s: float, config: ServerConfig) -> Deadlines:
        first_token_s = _after(arrival_s, self.first_token_timeout, config.first_token_timeout_s)
        return super().deadlines(arrival_s, config)._replace(first_token_s=first_token_s)


def _after(arrival_s: float, asked: float | None, default: float) -> float | None:
    seconds = default if asked is None else asked
    return arrival_s + seconds if seconds else None


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    given = headers.get(name)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise InvalidRequest(f"The header {name} must be seconds, above 0 and at most {MAX_TIMEOUT_S}.", param=name)
    return seconds
