"""The `octavo` command: which command it is; each one's own file is imported when it is asked for."""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

BEGUN_S = time.monotonic()  # a shell that became this process, as scripts/serve does, may have installed for minutes before

USAGE = """\
usage: octavo COMMAND [MODEL] [flags]

Octavo serves a model over the OpenAI API.

commands:
  serve [MODEL]      serve a model
  chat               talk in this terminal with a model that is served
  bench              put a server under load, and time its answers
  plan [MODEL]       say what a model takes of the memory, before it is loaded
  doctor [MODEL]     look at machine, GPU, packages, port and model
  completion SHELL   print the completions of bash, zsh or fish

  octavo COMMAND --help       a command's flags
  octavo COMMAND --help WORD  serve, plan, doctor: those about a word
  octavo --version

first steps:
  octavo doctor               is this machine fit for it?
  octavo serve                the demo model on http://127.0.0.1:8000
  octavo chat                 and a talk with it, in another terminal"""


def main() -> None:
    """Console entry. Exit codes: 0 after an orderly end, 1 when the command failed, 2 for a wrong command line or setting."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read stdout has gone; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """One command; returns the exit code."""
    match argv:
        case ["--version" | "-V"]:
            from server.api.health import VERSION

            print(f"octavo {VERSION}")
            return 0
        case ["--help" | "-h" | "help"]:
            print(USAGE)
            return 0
        case ["help", name] if name in _COMMANDS:
            return _COMMANDS[name](["--help"])
        case [name, *rest] if name in _COMMANDS:
            return _COMMANDS[name](rest)
        case [name, *_]:
            found = difflib.get_close_matches(name, [*_COMMANDS, "--version", "--help"], n=1)
            hint = f" (did you mean {found[0]}?)" if found else ""
            return _fail(f"there is no command {name}{hint}\n{USAGE}", 2)
        case _:
            print(USAGE, file=sys.stderr)
            return 2


def _serve(argv: Sequence[str]) -> int:
    from server.serve import run_serve

    return _with_settings(partial(run_serve, begun_s=BEGUN_S), argv)


def _plan(argv: Sequence[str]) -> int:
    from server.plan import run_plan

    return _with_settings(run_plan, argv)


def _chat(argv: Sequence[str]) -> int:
    from server.terminal_chat import run_chat

    return run_chat(argv)


def _doctor(argv: Sequence[str]) -> int:
    from server.doctor import run_doctor

    return _with_settings(run_doctor, argv)


def _completion(argv: Sequence[str]) -> int:
    from server.completion import run_completion

    return run_completion(argv)


def _bench(argv: Sequence[str]) -> int:
    from server.bench import main as run_bench

    return run_bench(argv)


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "chat": _chat,
    "bench": _bench,
    "plan": _plan,
    "doctor": _doctor,
    "completion": _completion,
}


def _with_settings(command: Callable[[Sequence[str], Mapping[str, str]], int], argv: Sequence[str]) -> int:
    """Runs a command that reads ServerConfig; what goes wrong is one sentence."""
    from engine.errors import ConfigError, OctavoError

    try:
        return command(argv, os.environ)
    except ConfigError as error:
        return _fail(error.message, 2)
    except OctavoError as error:
        return _fail(error.message, 1)


def _fail(message: str, code: int) -> int:
    print(f"octavo: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
