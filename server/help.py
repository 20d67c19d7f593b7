"""How every command's --help looks: as wide as the terminal, prose filled, examples as they are, each flag's names once."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

_WIDEST = 120  # columns; longer lines are hard to read
_NARROW = 100


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Paragraphs are filled, unless they hold an indented line: those are examples or tables, and stay as they are."""

    def __init__(self, prog: str, **options: Any) -> None:
        width = max(40, min(_WIDEST, shutil.get_terminal_size().columns) - 1)
        options |= {"max_help_position": 26 if width < _NARROW else 34, "width": width}
        super().__init__(prog, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [
            paragraph if "\n " in f"\n{paragraph}" else "\n".join(self._split_lines(paragraph, width))
            for paragraph in text.strip("\n").split("\n\n")
        ]
        return textwrap.indent("\n\n".join(paragraphs), indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--url, --base-url URL`, `--[no-]strict`: names once, whatever they take once."""
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        names = ", ".join(action.option_strings)
        if action.nargs == 0:
            return names
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar or default_metavar}..."
        return super()._format_args(action, default_metavar)


class HelpAction(argparse.Action):
    """`--help`, or `--help WORD`: only the groups of that name, or the flags that have the word in their name or text."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", metavar="WORD", default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, _namespace: object, values: object, _option: object = None) -> None:
        print(parser.format_help() if values is None else _format_matches(parser, str(values)), end="")
        parser.exit()


def _format_matches(parser: argparse.ArgumentParser, word: str) -> str:
    """The groups and flags that `word` fits. Ends in the parser's error where there are none."""
    wanted = word.lower().lstrip("-")
    formatter = parser._get_formatter()  # argparse has no public way to print a part
    found = False
    for group in parser._action_groups:
        title = group.title or ""
        actions = [action for action in group._group_actions if wanted in title.lower() or wanted in _words(action)]
        if actions:
            found = True
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
    if not found:
        titles = "; ".join(str(group.title) for group in parser._action_groups if group._group_actions)
        parser.error(f"no flag has {word!r} in its name or text, nor has a group: there are {titles}")
    return formatter.format_help()


def _words(action: argparse.Action) -> str:
    names = " ".join(action.option_strings)
    return f"{names} {names.replace('-', '_')} {names.replace('-', ' ')} {action.help or ''}".lower()
