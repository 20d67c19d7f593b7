"""`octavo completion bash|zsh|fish`: prints the shell's completions of every command, made from the commands' own parsers.

The script is plain shell: nothing of Python runs when Tab is pressed. Names of models are read from the cache's folders.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from server.help import HelpFormatter

SHELLS = ("bash", "zsh", "fish")

DESCRIPTION = """\
Print the completions of a shell: commands, flags, their values, files, and the models in the cache.

  bash   octavo completion bash > ~/.octavo.bash
         and in ~/.bashrc: source ~/.octavo.bash
  zsh    octavo completion zsh > ~/.zfunc/_octavo
         and in ~/.zshrc: fpath=(~/.zfunc $fpath)
                          autoload -U compinit; compinit
  fish   octavo completion fish > ~/.config/fish/completions/octavo.fish

For this shell alone: eval "$(octavo completion bash)", or octavo completion fish | source. Print it again after an update."""

SUMMARIES = {
    "serve": "serve a model over the OpenAI API",
    "chat": "talk in this terminal with a model that is served",
    "bench": "put a server under load, and time its answers",
    "plan": "say what a model takes of the memory, before it is loaded",
    "doctor": "look at machine, GPU, packages, port and model",
    "completion": "print the completions of bash, zsh or fish",
}

# demo, what lies in the Hub's cache (models--OWNER--NAME), and files. "file" in its name makes shtab treat words as paths.
_MODELS = {
    "bash": """
_octavo_model_file() {
  local hub="${HF_HUB_CACHE:-${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}/hub}" folder names=demo
  for folder in "$hub"/models--*/; do
    [ -d "$folder" ] || continue
    folder=${folder%/}
    folder=${folder##*/models--}
    names="$names ${folder/--//}"
  done
  compgen -W "$names" -- "$1"
  compgen -f -- "$1"
}
""",
    "zsh": """
_octavo_model_file() {
  local hub=${HF_HUB_CACHE:-${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}/hub} folder
  local -a names=(demo)
  for folder in $hub/models--*(N/); do
    folder=${${folder:t}#models--}
    names+=(${folder/--//})
  done
  compadd -a names
  _files
}
""",
    "fish": """
function _octavo_model_file
  set -l hub ~/.cache/huggingface/hub
  set -q XDG_CACHE_HOME; and set hub $XDG_CACHE_HOME/huggingface/hub
  set -q HF_HOME; and set hub $HF_HOME/hub
  set -q HF_HUB_CACHE; and set hub $HF_HUB_CACHE
  echo demo
  for folder in $hub/models--*/
    string replace -- -- / (string replace -r '.*/models--(.*)/' '$1' $folder)
  end
  __fish_complete_path (commandline -ct)
end
""",
}
_MODEL = {"bash": "_octavo_model_file", "zsh": "_octavo_model_file", "fish": "(_octavo_model_file)", "preamble": _MODELS}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo completion", usage="%(prog)s bash|zsh|fish", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    return parser


def run_completion(argv: Sequence[str]) -> int:
    """Raises SystemExit for a wrong command line."""
    print(completion_script(make_parser().parse_args(argv).shell), end="")
    return 0


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    from server.bench import make_parser as make_bench_parser
    from server.config import command_parser
    from server.terminal_chat import make_parser as make_chat_parser

    parsers: dict[str, argparse.ArgumentParser] = {name: command_parser(name) for name in ("serve", "plan", "doctor")}
    return parsers | {"chat": make_chat_parser(), "bench": make_bench_parser("octavo bench"), "completion": make_parser()}


def completion_script(shell: str) -> str:
    """The whole script, for one of SHELLS."""
    import shtab

    whole = argparse.ArgumentParser(prog="octavo", add_help=False)
    whole.add_argument("-h", "--help", action="store_true", help="the commands")
    whole.add_argument("-V", "--version", action="store_true", help="the version")
    commands = whole.add_subparsers()
    for name, parser in sorted(command_parsers().items()):
        for action in parser._actions:
            _say_what_completes(action)
        commands.add_parser(name, parents=[parser], add_help=False, help=SUMMARIES[name], description=SUMMARIES[name])
    script: str = shtab.complete(whole, shell=shell)
    return script.rstrip("\n") + "\n"


def _say_what_completes(action: Any) -> None:
    """In shtab's terms: what `server.flags.completed_by` noted, and the files that other commands write."""
    import shtab

    if isinstance(action, argparse._HelpAction):
        return
    kind = getattr(action, "octavo_kind", "file" if action.metavar == "FILE" else "")
    completers = {"file": shtab.FILE, "dir": shtab.DIRECTORY, "model": _MODEL}
    if kind in completers:
        action.complete = completers[kind]
    if choices := getattr(action, "octavo_choices", ()):
        action.choices = choices
