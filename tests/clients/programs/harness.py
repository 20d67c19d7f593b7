"""The client's side of tests/clients: runs scenarios by name, a line of JSON in and one out. Octavo is not there.

In: {"scenario", "url", "key", "model"}; out: {"seconds"} or {"error"}. What a library prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Target:
    """url: of the server, without /v1."""

    url: str
    key: str
    model: str

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


class Person(BaseModel):
    """Somebody."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
    colors: list[str] = Field(max_length=2)


CITIES = ["Paris", "Rome", "Oslo"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": CITIES}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
QUESTION = "What is the weather in Paris?"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
COUNT = "One, two, three, four, five,"
PARALLEL = 32


def check_call(name: str, arguments: str | dict[str, Any]) -> None:
    """A call of get_weather whose arguments are as its schema wants them."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "get_weather"
    assert set(given) == {"city", "days"}, given
    assert given["city"] in CITIES and isinstance(given["days"], int) and 1 <= given["days"] <= 7, given


def check_usage(prompt: int, completion: int, total: int) -> None:
    assert prompt > 0 and completion > 0 and prompt + completion == total, (prompt, completion, total)


def check_vectors(vectors: list[list[float]]) -> None:
    """Two vectors of length 1 that are not the same."""
    assert len(vectors) == 2 and len(vectors[0]) == len(vectors[1]) > 8
    for vector in vectors:
        assert abs(sum(number * number for number in vector) - 1) < 1e-3
    assert vectors[0] != vectors[1]


def expect(error: type[Exception], status: int, act: Callable[[], object]) -> Any:
    """The error that `act` raises."""
    try:
        act()
    except Exception as caught:
        return check_error(caught, error, status)
    raise AssertionError(f"no {error.__name__}")


def check_error(caught: Exception, error: type[Exception], status: int) -> Any:
    assert isinstance(caught, error), f"{type(caught).__name__} instead of {error.__name__}: {caught}"
    assert getattr(caught, "status_code", status) == status
    return caught


def serve(scenarios: dict[str, Callable[[Target], object]]) -> None:
    """Runs what it is told to until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        scenario = scenarios[job.pop("scenario")]
        begin = time.monotonic()
        try:
            scenario(Target(**job))
            result = {"seconds": round(time.monotonic() - begin, 2)}
        except Exception:
            result = {"error": traceback.format_exc()}
        print(json.dumps(result), file=out, flush=True)


def scenarios_of(module: dict[str, Any]) -> dict[str, Callable[[Target], object]]:
    """The functions of a program that are scenarios: those that take a target and have no underscore in front."""
    return {
        name: value
        for name, value in module.items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == "__main__"
    }
