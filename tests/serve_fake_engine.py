"""`octavo serve` whose engine is tests.fake_engine: `python -m tests.serve_fake_engine FOLDER --port N …`; for FOLDER see
`tests.crashes.make_model`."""

from __future__ import annotations

import sys
from functools import partial

from engine.supervisor import Supervisor
from server import cli, serve
from tests.crashes import COMMAND

if __name__ == "__main__":
    serve.Supervisor = partial(Supervisor, command=COMMAND)  # type: ignore[assignment, misc]
    sys.exit(cli.run(["serve", *sys.argv[1:]]))
