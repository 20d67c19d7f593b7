"""The command lines of `octavo serve`, `plan` and `doctor`: a flag for every setting, its help and what completes it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from engine.errors import ConfigError
from server.help import HelpAction, HelpFormatter

# The groups of settings, in the order in which they are shown, with their titles.
GROUPS = {
    "model": "The model, and how it is read",
    "server": "The server",
    "limits": "Limits and times",
    "security": "Keys, TLS and other safeguards",
    "observability": "Logs, metrics and traces",
    "engine": "Device and engine",
    "KV cache": "Memory for the KV cache",
}

_SOURCES = """\
A default stands in brackets. Every flag is an environment variable too (--max-model-len: OCTAVO_MAX_MODEL_LEN), and a \
line of a YAML file (max_model_len: 8K); the first of flag, environment, file and default decides. Numbers may end in k, m, g \
(thousands) or K, M, G (1024s)."""

DESCRIPTIONS = {
    "serve": "Serve a model over the OpenAI API.",
    "plan": "Say what serving a model would take of a device's memory, and what fits, before anything is loaded. The flags "
    "are those of `octavo serve`, and --memory.",
    "doctor": "Look at this machine, its GPU, the packages, the port and the model, and say of each whether `octavo serve` "
    "with these flags can do with it, and if not, what to do. The flags are those of `octavo serve`, and --json. Exit "
    "code: 0, or 1 where there is a problem.",
}

EXAMPLES = {
    "serve": """\
examples:
  octavo serve                               the demo model on port 8000
  octavo serve Qwen/Qwen3-0.6B --port 8080   a model of the Hugging Face Hub
  octavo serve ./model --api-key-file keys --host 0.0.0.0
                                             a local folder, for others too
  octavo serve model.gguf --quantization int8
                                             a GGUF file, on a CPU
  octavo serve --help memory                 the flags about memory

docs/configuration.md lists all settings, docs/tuning.md says which to change when.""",
    "plan": """\
examples:
  octavo plan Qwen/Qwen3-0.6B                on this machine
  octavo plan ./model --memory 80G           on a GPU of 80 GiB
  octavo plan ./model --device cpu --memory 32G
                                             on a machine of 32 GiB""",
    "doctor": """\
examples:
  octavo doctor                              before a first start
  octavo doctor ./model --port 8080          with the flags of a failed start
  octavo doctor --json                       for programs""",
}


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would end the program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def flag_name(key: str) -> str:
    return "--" + key.replace("_", "-")


def make_parser(command: str, fields: Mapping[str, FieldInfo], shipped: Mapping[str, str]) -> Parser:
    """The parser of `octavo COMMAND`. shipped: defaults of the files in configs/, as they are to be shown."""
    parser = Parser(
        prog=f"octavo {command}",
        usage="%(prog)s [MODEL] [flags]",
        description=f"{DESCRIPTIONS[command]}\n\n{_SOURCES}",
        epilog=EXAMPLES[command],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    about = parser.add_argument_group("The command")
    if command == "plan":
        about.add_argument(
            "--memory",
            metavar="SIZE",
            default=argparse.SUPPRESS,
            help="plan for a GPU of so much memory (80G = 80 GiB), or with --device cpu for such a machine [this machine's]",
        )
    elif command == "doctor":
        about.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="the findings as JSON")
    add_flags(parser, about, fields, shipped)
    return parser


def add_flags(
    parser: argparse.ArgumentParser,
    about: argparse._ArgumentGroup,
    fields: Mapping[str, FieldInfo],
    shipped: Mapping[str, str],
) -> None:
    """One flag for every setting, in its group. A flag that is not given leaves nothing behind."""
    about.add_argument("-h", "--help", action=HelpAction, help="this; or only the flags that have to do with WORD")
    model = about.add_argument("model_positional", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    completed_by(model, "model")
    config = about.add_argument("--config", metavar="FILE", help="a YAML file of these settings (OCTAVO_CONFIG) [none]")
    completed_by(config, "file")
    names = {group_of(field): None for field in fields.values()}
    ordered = sorted(names, key=lambda name: list(GROUPS).index(name) if name in GROUPS else len(GROUPS))
    groups = {name: parser.add_argument_group(GROUPS.get(name, name)) for name in ordered}
    for key, field in fields.items():
        add: Callable[..., argparse.Action] = groups[group_of(field)].add_argument
        options: dict[str, Any] = {"dest": key, "default": argparse.SUPPRESS, "help": help_of(key, field, shipped)}
        if field.annotation is bool:
            add(flag_name(key), action=argparse.BooleanOptionalAction, **options)
            continue
        if field.default == []:
            options["nargs"] = "+"
        completed_by(add(flag_name(key), metavar=_metavar(key, field), **options), extra(field, "kind"), choices_of(field))


def completed_by(action: argparse.Action, kind: str = "", choices: tuple[str, ...] = ()) -> None:
    """Notes for shell completion what the action takes: a file, a dir, a model, or one of some words."""
    action.octavo_kind, action.octavo_choices = kind, choices  # type: ignore[attr-defined]


def extra(field: FieldInfo, name: str) -> Any:
    """What `_setting` noted of a field under `name`; "" where it noted nothing."""
    return field.json_schema_extra.get(name, "") if isinstance(field.json_schema_extra, dict) else ""


def group_of(field: FieldInfo) -> str:
    return str(extra(field, "group") or "other")


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The words that a setting may be, where they are few and known."""
    if get_origin(field.annotation) is Literal:
        return tuple(map(str, get_args(field.annotation)))
    return tuple(extra(field, "choices"))


def help_of(key: str, field: FieldInfo, shipped: Mapping[str, str]) -> str:
    """Description, choices and default, ready for argparse."""
    choices = choices_of(field)
    parts = [str(field.description), *([f"({', '.join(choices)})"] if choices else []), f"[{default_of(key, field, shipped)}]"]
    return " ".join(parts).replace("%", "%%")


def default_of(key: str, field: FieldInfo, shipped: Mapping[str, str]) -> str:
    """The default in words: as the field says it, else as the shipped files have it, else the one written in ServerConfig."""
    if said := extra(field, "shown") or shipped.get(key):
        return str(said)
    if field.annotation is bool:
        return "on" if field.default else "off"
    if field.default in (None, []):
        return "none"
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def _metavar(key: str, field: FieldInfo) -> str:
    kind, last = extra(field, "kind"), key.rsplit("_", 1)[-1].upper()
    if kind in ("file", "dir"):
        return str(kind).upper()
    if last == "S":
        return "SECONDS"
    if field.default == []:
        return str(extra(field, "metavar") or "NAME")
    return "N" if _is_count(field.annotation) and last not in ("BYTES", "PORT") else last


def _is_count(annotation: Any) -> bool:
    return annotation is int or any(get_args(part)[:1] == (int,) for part in get_args(annotation))
