"""`octavo serve` with the fake engine behind it: `python -m tests.serve_fake_engine [CRASH_POINT] MODEL ...`.

CRASH_POINT: one as JSON, or null. MODEL, a path, and flags are those of `octavo serve`.
"""

from __future__ import annotations

import sys
from functools import partial

import msgspec

from engine.messages import CrashPoint
from engine.supervisor import Supervisor
from server import cli, serve
from tests.crashes import COMMAND

if __name__ == "__main__":
    arguments = sys.argv[1:]
    crash_point = msgspec.json.decode(arguments.pop(0), type=CrashPoint | None) if arguments[0][0] in "{n" else None
    serve.Supervisor = partial(Supervisor, command=COMMAND, crash_point=crash_point)  # type: ignore[misc, assignment]
    sys.exit(cli.run(["serve", *arguments]))
