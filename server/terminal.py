"""The terminal of `octavo chat`: lines in with readline, text out as it comes, nothing that a model could do to the screen."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

_DIM, _PLAIN = "\033[2m", "\033[0m"
# All control characters but tab and line feed: a model must not move the cursor, set the title or hide what it wrote.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
BLOCK = '"""'


class Terminal:
    """Where a conversation is read from and written to.

    is_interactive: a person types the lines; else stdin holds one question. shows_reasoning: stdout is a screen.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.is_interactive = sys.stdin.isatty()
        self.shows_reasoning = sys.stdout.isatty()
        self._has_color = self.shows_reasoning and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"
        self._in_reasoning = False
        self._column_is_0 = True

    def use_readline(self, commands: Sequence[str]) -> None:
        """Line editing, where Python has it; Tab completes the commands."""
        with contextlib.suppress(ImportError):
            import readline

            _complete_commands(readline, commands)

    def read_message(self) -> str | None:
        r"""What the user wants to say; None at Ctrl-D. A trailing \ or an open triple quote goes on in the next line."""
        line = self._read_line("> ")
        if line is None:
            return None
        if line.lstrip().startswith(BLOCK):
            return self._read_block(line.lstrip().removeprefix(BLOCK))
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            following = self._read_line(". ")
            if following is None:
                return None
            line = following
        return "\n".join([*lines, line])

    def _read_block(self, line: str) -> str | None:
        lines = []
        while BLOCK not in line:
            lines.append(line)
            following = self._read_line(". ")
            if following is None:
                return None
            line = following
        return "\n".join([*lines, line[: line.rindex(BLOCK)]]).strip("\n")

    def _read_line(self, prompt: str) -> str | None:
        try:
            if self.shows_reasoning:
                return input(prompt)
            print(prompt, end="", file=sys.stderr, flush=True)  # stdout goes elsewhere, and is for answers
            return input()
        except EOFError:
            return None
        except UnicodeDecodeError:
            self.note("This line is not UTF-8, and was left out.")
            return ""

    def write_reasoning(self, text: str) -> None:
        """Dimmed; nothing where stdout is no screen."""
        if not text or not self.shows_reasoning:
            return
        if not self._in_reasoning:
            self._in_reasoning = True
            self._put(_DIM if self._has_color else "(thinking)\n")
        self._put(_CONTROL.sub("", text))

    def write_answer(self, text: str) -> None:
        if text and self._in_reasoning:
            text = text.lstrip("\n")
            if not text:
                return
            self._end_reasoning("(answer)")
        self._put(_CONTROL.sub("", text) if self.shows_reasoning else text)

    def end_answer(self) -> None:
        """Leaves the cursor at the beginning of a line, and the colors as they were."""
        if self._in_reasoning:
            self._end_reasoning("")
        if not self._column_is_0:
            self._put("\n")

    def _end_reasoning(self, mark: str) -> None:
        self._in_reasoning = False
        self._put(("" if self._column_is_0 else "\n") + (_PLAIN if self._has_color else mark) + "\n")

    def note(self, text: str) -> None:
        """A word of the program's own: on the screen, else on stderr."""
        if self.is_interactive and self.shows_reasoning:
            self._put(f"{_DIM}{text}{_PLAIN}\n" if self._has_color else f"{text}\n")
        else:
            print(text, file=sys.stderr, flush=True)

    def _put(self, text: str) -> None:
        if not text:
            return
        sys.stdout.write(text)
        sys.stdout.flush()
        self._column_is_0 = text.endswith("\n")


def _complete_commands(readline: ModuleType, commands: Sequence[str]) -> None:
    def complete(text: str, state: int) -> str | None:
        matches = [name for name in commands if text and name.startswith(text)]
        return matches[state] if state < len(matches) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")
