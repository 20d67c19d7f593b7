"""ServerState: what every endpoint of one server is given."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from engine.client import EngineClient
from engine.errors import EngineUnavailable, ModelNotFound
from engine.messages import EngineReady
from server.backlog import Backlog
from server.config import ServerConfig
from server.drain import Drain
from server.metrics import Metrics
from server.request_record import current


@dataclass(frozen=True)
class ServerState:
    """created: seconds since 1970, for /v1/models."""

    client: EngineClient
    config: ServerConfig
    metrics: Metrics
    drain: Drain
    created: int = field(default_factory=lambda: int(time.time()))
    backlog: Backlog = field(init=False)

    def __post_init__(self) -> None:
        backlog = Backlog(
            lambda: self.client.stats,
            max_wait_s=self.config.max_wait_s,
            max_waiting_requests=self.config.max_waiting_requests,
            max_waiting_tokens=self.config.max_waiting_tokens,
            observe_shed=self.metrics.observe_shed,
            read_life=lambda: self.client.num_restarts if self.client.state == "ready" else None,
        )
        self.metrics.add_gauge("backlog_wait_seconds", "How long who came now would wait for the engine.", backlog.wait_s)
        self.metrics.add_gauge("backlog_tokens", "Expected tokens of what waits for the engine.", backlog.tokens_ahead)
        object.__setattr__(self, "backlog", backlog)

    def require_ready(self) -> EngineReady:
        """What the engine decided at load; the next one, while it takes the place of one that died, decides the same.

        Raises EngineUnavailable while the first one is loading, or it is gone for good.
        """
        if self.client.state in ("ready", "recovering") and self.client.ready is not None:
            return self.client.ready
        raise EngineUnavailable(self.describe())

    def describe(self) -> str:
        """The engine's state in a sentence."""
        client = self.client
        if self.drain.has_begun and client.state != "failed":
            return "The server is shutting down."
        if client.state == "starting":
            progress = client.progress
            if progress is None:
                return "The model is being loaded; try again soon."
            done = "" if progress.fraction is None else f", {progress.fraction:.0%}"
            return (
                f"The model is being loaded ({' '.join(f'{progress.phase} {progress.detail}'.split())}{done}); try again soon."
            )
        if client.state == "recovering":
            return "The engine is being started again after it died; open requests go on when it is ready."
        if client.state == "failed":
            return f"The engine is not running: {client.failure.message if client.failure else 'it ended unexpectedly'}"
        return "The model is ready." if client.state == "ready" else "The server is shutting down."

    def resolve_model(self, name: str | None) -> str:
        """The name to answer with; the first one for a request that names none. Raises ModelNotFound."""
        names = self.config.model_names
        known = names[0] if name is None else name
        if known not in names:
            sentence = f"This server does not serve the model asked for; it serves {', '.join(names)}."
            raise ModelNotFound(sentence, param="model")
        current().model = known
        return known
