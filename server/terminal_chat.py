"""`octavo chat`: a conversation in a terminal with a model that is served; or one question from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.chat_client import DEFAULT_URL, ChatError, ChatServer
from server.client_key import first_key
from server.help import HelpFormatter
from server.terminal import Terminal

DESCRIPTION = """\
Talk with a model that is served. Answers come as they are written; Ctrl-C stops one, Ctrl-D leaves, /help lists the commands.

A question from a pipe is answered on stdout, and that is all:

  echo "What is the capital of France?" | octavo chat

Exit code: 0 after an orderly end, 1 when the server does not answer, 2 for a wrong command line, 130 after Ctrl-C."""

HELP = """\
/help             this
/clear, /new      forget the conversation; the system message stays
/regenerate       answer the last question anew
/system [TEXT]    the system message: show it, or set it (/system - takes it away)
/model [NAME]     the served models, or another one from here on
/stats [on|off]   figures of the last answer; on shows them after every one
/save FILE        the conversation as JSON, in the form of the API
/load FILE        go on with a saved one
/exit             leave, as Ctrl-D does
A line that ends with \\ goes on in the next, as do all lines between \"\"\" and \"\"\". Ctrl-C stops an answer.
To send a line that begins with /, write // there."""


@dataclass
class Answer:
    """One answer as it came; times in seconds of the monotonic clock."""

    started: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    text: str = ""
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, chunk: dict[str, Any]) -> tuple[str, str]:
        """(reasoning, text) that a chunk brings."""
        self.usage = chunk.get("usage") or self.usage
        choice: dict[str, Any] = next(iter(chunk.get("choices") or ()), {})
        delta = choice.get("delta") or {}
        reasoning, text = delta.get("reasoning_content") or delta.get("reasoning") or "", delta.get("content") or ""
        if reasoning or text:
            self.last = time.monotonic()
            self.first = self.first or self.last
        self.text += text
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return reasoning, text

    def figures(self) -> str:
        """Counts by the server's usage, times as seen from here, and what an Octavo server adds of its own."""
        if not self.usage:
            return "The server sent no usage with the last answer."
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        num_output = self.usage.get("completion_tokens", 0)
        parts = [f"{self.usage.get('prompt_tokens', 0)} prompt tokens ({cached} cached), {num_output} output tokens"]
        if self.first:
            parts.append(f"first token after {self.first - self.started:.2f} s")
        if num_output > 1 and self.last > self.first:
            parts.append(f"{(num_output - 1) / (self.last - self.first):.1f} tokens/s")
        own = self.usage.get("octavo")
        if isinstance(own, dict):
            shown = [f"{label} {own[name]:.3f} s" for name, label in _OCTAVO_TIMES.items() if isinstance(own.get(name), float)]
            shown += [f"{name} {own[name]}" for name in ("preemptions", "seed") if own.get(name)]
            parts.append(f"in the server: {', '.join(shown)}")
        return "; ".join(parts)


_OCTAVO_TIMES = {"queue_s": "queue", "prefill_s": "prefill", "ttft_s": "first token", "total_s": "all"}


class TerminalChat:
    """The conversation and its commands. `options`: further fields of every request."""

    def __init__(self, server: ChatServer, terminal: Terminal, model: str, system: str, options: Mapping[str, Any]) -> None:
        self._server = server
        self._terminal = terminal
        self._model = model
        self._system = system
        self._options = dict(options)
        self._messages: list[dict[str, str]] = []
        self._unanswered = ""
        """A question whose answer failed: it is not in the conversation, and /regenerate asks it again."""
        self._last: Answer | None = None
        self._shows_figures = False
        self._own_files: set[Path] = set()

    def ask(self, question: str) -> bool:
        """Streams the answer to the terminal; False where there was none, or not the whole of it. Ctrl-C stops it."""
        self._messages.append({"role": "user", "content": question})
        answer = self._last = Answer()
        trouble = ""
        try:
            with contextlib.closing(self._server.stream(self._body())) as chunks:
                for chunk in chunks:
                    reasoning, text = answer.take(chunk)
                    self._terminal.write_reasoning(reasoning)
                    self._terminal.write_answer(text)
        except ChatError as error:
            trouble = f"{error}." + (" /regenerate asks again." if self._terminal.is_interactive else "")
        except KeyboardInterrupt:
            if not self._terminal.is_interactive:
                raise
            trouble = "Stopped."
        finally:
            self._terminal.end_answer()
        self._keep(question, answer)
        if trouble:
            self._terminal.note(trouble[0].upper() + trouble[1:])
        elif answer.finish_reason == "length":
            self._terminal.note("Cut at the limit of tokens (--max-tokens, or the end of the model's context).")
        if self._shows_figures and answer.usage:
            self._terminal.note(answer.figures())
        return not trouble

    def run(self) -> int:
        """Reads and answers until Ctrl-D or /exit."""
        self._terminal.use_readline(sorted(self._commands()))
        self._terminal.note(f"{self._model} at {self._server.url}. /help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                line = self._terminal.read_message()
                if line is None:
                    self._terminal.note("")  # Ctrl-D leaves the cursor behind the prompt
                if line is None or line.strip() in ("/exit", "/quit"):
                    return 0
                self._obey(line) if line.startswith("/") and not line.startswith("//") else self._say(line)
            except ChatError as error:
                self._terminal.note(f"{str(error)[0].upper()}{str(error)[1:]}.")
            except KeyboardInterrupt:
                self._terminal.note("\nCtrl-D or /exit leaves.")

    def _say(self, line: str) -> None:
        if line.strip():
            self.ask(line.removeprefix("/") if line.startswith("//") else line)

    def _body(self) -> dict[str, Any]:
        body = {"model": self._model, "messages": self._all_messages(), "stream": True, **self._options}
        body["stream_options"] = {"include_usage": True}
        if self._server.is_octavo:
            body["explain"] = True
        return body

    def _all_messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._messages]

    def _keep(self, question: str, answer: Answer) -> None:
        """A part of an answer stays in the conversation; a question without any goes, for many templates want turns."""
        if answer.text:
            self._messages.append({"role": "assistant", "content": answer.text})
            self._unanswered = ""
        else:
            self._messages.pop()
            self._unanswered = question

    def _commands(self) -> dict[str, Any]:
        return {
            "/help": lambda _: self._terminal.note(HELP),
            "/clear": self._clear,
            "/new": self._clear,
            "/regenerate": self._regenerate,
            "/system": self._set_system,
            "/model": self._choose_model,
            "/stats": self._show_figures,
            "/save": self._save,
            "/load": self._load,
            "/exit": None,  # by `run`
        }

    def _obey(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        commands = self._commands()
        if name not in commands:
            close = difflib.get_close_matches(name, commands, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ChatError(f"there is no command {name}{hint}; /help lists them, and // sends a line that begins with /")
        commands[name](argument.strip())

    def _clear(self, _: str) -> None:
        self._messages.clear()
        self._unanswered = ""
        self._terminal.note("A new conversation.")

    def _regenerate(self, _: str) -> None:
        question = self._unanswered
        if not question:
            if not self._messages:
                raise ChatError("there is no question yet")
            if self._messages[-1]["role"] == "assistant":
                self._messages.pop()
            if not self._messages or self._messages[-1]["role"] != "user":
                raise ChatError("there is no question to answer anew")
            question = self._messages.pop()["content"]
        self.ask(question)

    def _set_system(self, text: str) -> None:
        if text:
            self._system = "" if text == "-" else text
        self._terminal.note(f"System message: {self._system}" if self._system else "There is no system message.")

    def _choose_model(self, name: str) -> None:
        if name:
            self._model = self._server.choose_model(name)
            self._terminal.note(f"{self._model} answers from here on.")
            return
        for each in self._server.models():
            self._terminal.note(f"{'*' if each == self._model else ' '} {each}")

    def _show_figures(self, argument: str) -> None:
        if argument not in ("", "on", "off"):
            raise ChatError("/stats takes on, off or nothing")
        if argument:
            self._shows_figures = argument == "on"
        elif self._last is None:
            raise ChatError("there is no answer yet")
        if self._last is not None and argument != "off":
            self._terminal.note(self._last.figures())

    def _save(self, name: str) -> None:
        path = _path_of(name, "/save")
        if path.exists() and path not in self._own_files:
            raise ChatError(f"{path} exists, and stays as it is: choose another name")
        content = json.dumps({"model": self._model, "messages": self._all_messages()}, indent=2, ensure_ascii=False)
        try:
            path.write_text(content + "\n", encoding="utf-8", errors="replace")
        except OSError as error:
            raise ChatError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}") from None
        self._own_files.add(path)
        self._terminal.note(f"{len(self._all_messages())} messages are in {path}.")

    def _load(self, name: str) -> None:
        path = _path_of(name, "/load")
        self._system, self._messages = _read_conversation(path)
        self._unanswered = ""
        self._own_files.add(path)
        self._terminal.note(f"{len(self._messages)} messages of {path}.")


def _path_of(name: str, command: str) -> Path:
    if not name:
        raise ChatError(f"{command} wants the name of a file")
    return Path(name).expanduser().absolute()


def _read_conversation(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The system message and the others. Raises ChatError for a file that holds no conversation."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ChatError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError):
        raise ChatError(f"{path} is no JSON") from None
    messages = content.get("messages") if isinstance(content, dict) else None
    roles = ("system", "user", "assistant")
    if not isinstance(messages, list) or not all(
        isinstance(each, dict) and each.get("role") in roles and isinstance(each.get("content"), str) for each in messages
    ):
        raise ChatError(f'{path} holds no conversation: {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    system = "\n\n".join(each["content"] for each in messages if each["role"] == "system")
    return system, [{"role": each["role"], "content": each["content"]} for each in messages if each["role"] != "system"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo chat", usage="%(prog)s [flags]", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    where = "where it is served [%(default)s]"
    parser.add_argument("--url", "--base-url", dest="url", default=DEFAULT_URL, metavar="URL", help=where)
    parser.add_argument("--model", metavar="NAME", help="one of its models [the first of /v1/models]")
    parser.add_argument("--api-key", default="", metavar="KEY", help="the server's key [OCTAVO_API_KEY]")
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token [the model's]")
    parser.add_argument("--top-p", type=float, metavar="P", help="share of probability to sample from [the model's]")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="limit of an answer [the rest of the context]")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.max_tokens is not None and args.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {args.max_tokens}")
    if args.temperature is not None and not 0 <= args.temperature <= 2:
        parser.error(f"--temperature must be between 0 and 2, got {args.temperature}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top-p must be above 0 and at most 1, got {args.top_p}")
    return args


def _read_question() -> str:
    """All of stdin. Raises SystemExit."""
    try:
        question = sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError:
        question = None
    if not question:
        print(f"octavo: stdin is {'empty' if question == '' else 'not UTF-8'}: it should hold a question", file=sys.stderr)
        raise SystemExit(2)
    return question


def run_chat(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """The command; returns the exit code. Raises SystemExit for a wrong command line."""
    args = _parse(argv)
    terminal = Terminal(environ)
    question = None if terminal.is_interactive else _read_question()
    api_key = args.api_key or first_key(environ.get("OCTAVO_API_KEY", ""))
    options = {name: value for name in ("temperature", "top_p", "max_tokens") if (value := getattr(args, name)) is not None}
    try:
        server = ChatServer(args.url, api_key, terminal.note)
        model = server.choose_model(args.model)
        server.wait_until_ready()
        chat = TerminalChat(server, terminal, model, args.system, options)
        return chat.run() if question is None else int(not chat.ask(question))
    except ChatError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read stdout has gone; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
