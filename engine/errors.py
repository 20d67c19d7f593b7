"""The exception tree. Every error a user can cause or meet has a class here, and `server/errors.py` maps each to a status.

OctavoError
├── ConfigError               a setting is wrong, before anything runs
├── InvalidRequest            the client asked for something impossible (400)
│   └── ContextLengthExceeded prompt + max_tokens past the served context
├── ModelNotFound             the request names a model that is not served (404)
├── ModelNotSupported         the engine cannot run this model exactly, so it refuses to load it
├── ModelLoadError            the model should work but its files could not be had or read
├── OutOfDeviceMemory         one step did not fit beside what the device holds; never leaves the engine
├── Overloaded                more is queued than can be served in time (429)
├── DeadlineExceeded          the request's own time limit passed (504)
├── EngineUnavailable         the engine is starting, stopping or gone (503)
└── RequestFailed             the engine gave up on one request (500)
"""

from __future__ import annotations


class OctavoError(Exception):
    """Base of all errors. `param` names the field at fault, `code` is a short machine-readable reason.

    retry_after_s: how long to wait before trying again, where that is known.
    """

    default_code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after_s = retry_after_s


class ConfigError(OctavoError):
    """A configuration value is missing, unknown, out of range or cannot be satisfied on this machine."""


class InvalidRequest(OctavoError):
    """A request field has a wrong type or value. The message says what was got and what is allowed."""

    default_code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus requested tokens are more than the model can hold. The message gives all three numbers."""

    default_code = "context_length_exceeded"


class ModelNotFound(OctavoError):
    """A request names a model that this server does not serve."""

    default_code = "model_not_found"


class ModelNotSupported(OctavoError):
    """The model's architecture or format cannot be run exactly; the message says why and what to use instead."""


class ModelLoadError(OctavoError):
    """The model's files could not be fetched, read or converted; the message gives the remedy."""


class OutOfDeviceMemory(OctavoError):
    """The device had no memory for a step. The engine goes on with less; see `Scheduler.roll_back`."""


class Overloaded(OctavoError):
    """As much is queued as can be served in time. retry_after_s says when there will be room, at the present pace."""

    default_code = "rate_limit_exceeded"


class DeadlineExceeded(OctavoError):
    """The request's time limit, for its first token or for the whole, passed before it was done."""

    default_code = "deadline_exceeded"


class EngineUnavailable(OctavoError):
    """The engine cannot take requests now: it is starting, stopping or has died."""

    default_code = "engine_unavailable"


class RequestFailed(OctavoError):
    """One request ended in an error inside the engine; the others live."""

    default_code = "request_failed"


ERROR_CLASSES: dict[str, type[OctavoError]] = {
    cls.__name__: cls
    for cls in (
        OctavoError,
        ConfigError,
        InvalidRequest,
        ContextLengthExceeded,
        ModelNotFound,
        ModelNotSupported,
        ModelLoadError,
        OutOfDeviceMemory,
        Overloaded,
        DeadlineExceeded,
        EngineUnavailable,
        RequestFailed,
    )
}
