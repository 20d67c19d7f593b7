"""`octavo bench`: a load on an OpenAI-compatible server, and what its clients saw."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from server.bench_http import HttpError
from server.bench_load import Load, describe, probe
from server.bench_report import MARKDOWN_HEAD, Sample, format_markdown_row, format_table, summarize
from server.bench_workers import CutShort, gather
from server.client_key import first_key
from server.help import HelpFormatter

DESCRIPTION = """\
Puts an OpenAI-compatible server under load, many streams at once, and says how long its clients waited and how much they got.

  octavo bench --concurrency 8 --num-requests 64
  octavo bench --rate 20 --num-requests 400 --processes 4 --input-len 1024
  octavo bench --url http://127.0.0.1:8080 --no-ignore-eos --json figures.json

Token counts come from the server's `usage`; prompts are random words, their number found by two probe requests. One Python
process reads some 12,000 chunks a second: give more --processes to fast servers."""

COLUMNS = """\
columns:
  TTFT  from sending the request to the first text, be it reasoning
  TPOT  (last text - first text) / (output tokens - 1)
  ITL   between two chunks of text
  E2E   from sending the request to the stream's end

Throughput is over the time from the first request sent to the last one's end. Exit code: 0 when every request was answered,
1 when one was not, 2 for a wrong command line, 130 after Ctrl-C (which reports what was measured until then)."""

_IGNORE_EOS_HINT = "the server does not know ignore_eos, which makes every answer --output-len long: add --no-ignore-eos"


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [flags]",
        description=DESCRIPTION,
        epilog=COLUMNS,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    _add_server_options(parser.add_argument_group("server"))
    _add_load_options(parser.add_argument_group("load"))
    _add_request_options(parser.add_argument_group("requests"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the figures as JSON, not as a table; with FILE beside it [off]",
    )
    output.add_argument("--markdown", action="store_true", help="a markdown table [off]")
    return parser


def _add_server_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--url", "--base-url", dest="base_url", default="http://127.0.0.1:8000", metavar="URL", help="where it is [%(default)s]"
    )
    group.add_argument("--model", default="", metavar="NAME", help="one of its models [the first of /v1/models]")
    group.add_argument("--api-key", default="", metavar="KEY", help="the server's key [OCTAVO_API_KEY]")
    group.add_argument("--endpoint", choices=("completions", "chat"), default="completions", help="what is asked [%(default)s]")


def _add_load_options(group: argparse._ArgumentGroup) -> None:
    pace = group.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=int, default=1, metavar="N", help="requests open at any time [%(default)s]")
    pace.add_argument("--rate", type=float, metavar="R", help="instead: requests per second, Poisson arrivals [none]")
    group.add_argument("--num-requests", type=int, default=16, metavar="N", help="requests in all [%(default)s]")
    group.add_argument(
        "--max-time",
        type=float,
        default=3600.0,
        dest="max_time_s",
        metavar="S",
        help="seconds after which no request is sent [%(default)g]",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        dest="timeout_s",
        metavar="S",
        help="seconds that a request may take [%(default)g]",
    )
    group.add_argument("--warmup", type=int, default=0, metavar="N", help="requests sent first and not counted [%(default)s]")
    group.add_argument("--processes", type=int, default=1, metavar="N", help="processes that send the requests [%(default)s]")


def _add_request_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--input-len", type=int, default=128, metavar="N", help="prompt tokens, about [%(default)s]")
    group.add_argument("--output-len", type=int, default=64, metavar="N", help="max_tokens [%(default)s]")
    group.add_argument(
        "--shared-prefix-len",
        type=int,
        default=0,
        metavar="N",
        help="tokens before the prompt, the same for all requests [%(default)s]",
    )
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="every answer is --output-len long, whatever the model says; needs a server that knows ignore_eos [on]",
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="randomness [%(default)g]")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="share of probability to sample from [%(default)g]"
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of prompts and arrivals; a repeated one meets a warm prefix cache [%(default)s]",
    )
    group.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="further fields of every request [none]"
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object, such as '{\"min_p\": 0.1}'")
    return value


def parse_load(argv: Sequence[str] | None, prog: str = "octavo bench") -> tuple[Load, argparse.Namespace]:
    """Ends the program with code 2 and a sentence where an option is wrong."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    for name in ("concurrency", "num_requests", "input_len", "output_len", "processes", "rate", "max_time_s", "timeout_s"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"{_flag(name)} must be above 0, got {getattr(args, name)}")
    for name in ("shared_prefix_len", "warmup"):
        if getattr(args, name) < 0:
            parser.error(f"{_flag(name)} must not be negative, got {getattr(args, name)}")
    args.api_key = args.api_key or first_key(os.environ.get("OCTAVO_API_KEY", ""))
    names = {each.name for each in fields(Load)}
    return Load(**{name: value for name, value in vars(args).items() if name in names}), args


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_s").replace("_", "-")


def main(argv: Sequence[str] | None = None, prog: str = "octavo bench") -> int:
    """Returns the exit code. Raises SystemExit for a wrong command line and where no server answers."""
    load, args = parse_load(argv, prog)
    try:
        load = asyncio.run(probe(load))
        samples, was_cut = _measure(load, args)
    except (OSError, EOFError, ValueError, LookupError, TypeError, HttpError) as error:
        hint = f" ({_IGNORE_EOS_HINT})" if load.ignore_eos and "ignore_eos" in str(error) else ""
        raise SystemExit(f"{load.base_url} does not answer as an OpenAI-compatible server: {error}{hint}") from None
    except KeyboardInterrupt:
        return 130
    if len(samples) < load.num_requests:
        reason = "Ctrl-C" if was_cut else f"--max-time {load.max_time_s:g}"
        print(f"{len(samples)} of {load.num_requests} requests were made: {reason}", file=sys.stderr)
    if not samples:
        return 130 if was_cut else 1
    figures = summarize(samples)
    _print(load, args, figures)
    return 130 if was_cut else 1 if figures["num_errors"] else 0


def _measure(load: Load, args: argparse.Namespace) -> tuple[list[Sample], bool]:
    """The samples, and whether Ctrl-C cut the run short."""
    most = load.num_requests if load.rate is not None else load.concurrency
    num_processes = min(args.processes, most)
    if args.warmup:
        warmup = replace(load, seed=load.seed + 2**32, num_requests=args.warmup, rate=None)
        gather(warmup, min(num_processes, load.concurrency), False)
    try:
        return gather(load, num_processes), False
    except CutShort as cut:
        return cut.samples, True


def _print(load: Load, args: argparse.Namespace, figures: dict[str, Any]) -> None:
    title = describe(load)
    record = {"load": {name: value for name, value in asdict(load).items() if name != "api_key"}, "figures": figures}
    text = json.dumps(record, indent=2) + "\n"
    if args.json == "-":
        print(text, end="")
        return
    if args.markdown:
        print(MARKDOWN_HEAD, format_markdown_row(title, figures), sep="\n")
    else:
        print(format_table(f"{load.model} at {load.base_url}: {title}", figures))
    if args.json:
        Path(args.json).write_text(text, encoding="utf-8")
