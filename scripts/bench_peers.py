#!/usr/bin/env python3
"""Octavo beside the servers a user would pick instead, on the same cores, in the same run: the table and the ratios.

    scripts/bench_peers.py                                          # ours alone, on all cores
    scripts/bench_peers.py --cpus 0,1 --llama-server PATH --llama-models DIR --vllm-python PATH --out peers.json

Servers that are not installed are named and left out. All run at once, each on the cores of --cpus, and are measured in turn,
round after round, so that a disturbance of the machine meets them all; a server that is not measured is idle, and what it
used of the processor meanwhile is watched. In every round each server meets the same prompts, and none a second time.
Requests stream, greedy, to a fixed number of tokens. Every server is started twice; the second start finds what the first kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench_gpu import chosen
from bench_gpu_serving import load_of, say, short_figures, warm_up
from bench_gpu_workloads import Workload
from bench_peers_report import WORKLOADS, Record, format_report
from bench_peers_servers import (
    FAMILIES,
    SERVERS,
    Command,
    NotInstalled,
    Setup,
    command_of,
    cpu_seconds,
    memory_peak_bytes,
    serving,
    time_limit,
)
from bench_process import ROOT, Server, free_port, on_cpus
from bench_readme import describe_machine
from bench_serving import HttpError, Load, Sample, describe, gather, probe, summarize

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

START_LIMIT_S = 600.0
IDLE_SHARE = 0.02  # of one core: what an idle server may use before the report says so
ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "avx_vnni")
BY_DEFAULT = "octavo-bf16,octavo-int8,llama-bf16,llama-q8_0,vllm-bf16"


@dataclass
class Running:
    """A server under measurement, and how to ask it."""

    name: str
    command: Command
    server: Server
    load: Load


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=BY_DEFAULT, help=f"of {', '.join(SERVERS)} [%(default)s]")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--pick", choices=("median", "best"), default="median", help="of the rounds [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    parser.add_argument("--cpus", default="", help="the servers' cores, as in 0,1 [all]")
    parser.add_argument("--client-cpus", default="", help="the client's cores [the servers']")
    parser.add_argument("--model", default="demo", help="demo or a Hugging Face folder [%(default)s]")
    parser.add_argument("--starts", type=int, choices=(1, 2), default=2, help="starts of every server [%(default)s]")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="llama.cpp's llama-server")
    parser.add_argument("--llama-models", type=Path, metavar="DIR", help="folder of its *-bf16.gguf, *-q8_0.gguf")
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="the Python that has vLLM's CPU build")
    parser.add_argument("--vllm-int8-model", type=Path, metavar="DIR", help="a W8A8 checkpoint, for vllm-int8")
    parser.add_argument("--transformers-python", type=Path, metavar="PATH", help="a Python with transformers[serving]")
    for family in FAMILIES:
        parser.add_argument(f"--{family}-args", default="", metavar="ARGS", help="further arguments, in one string")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for one workload [%(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record there, and the servers' logs beside it")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    names = chosen(args.servers, SERVERS, "server")
    workloads = [WORKLOADS[name] for name in chosen(args.workloads, list(WORKLOADS), "workload")]
    workloads = [workload.quick() if args.quick else workload for workload in workloads]
    setup = make_setup(args)
    record: Record = {
        "machine": machine(setup.cpus),
        "arguments": argv if argv is not None else sys.argv[1:],
        "num_rounds": args.rounds,
        "workloads": {workload.name: describe(load_of(workload, Load(""), seed=0)) for workload in workloads},
        "servers": {name: {} for name in names},
    }
    with tempfile.TemporaryDirectory(prefix="bench_peers.") as scratch, ExitStack() as stack:
        logs = args.out.parent if args.out else Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        stack.enter_context(on_cpus(cores_of(args.client_cpus) if args.client_cpus else setup.cpus))
        try:
            started = [start(name, setup, args.starts, Path(scratch), logs, stack, record) for name in names]
            measure([server for server in started if server], workloads, args.rounds, args.time_limit, record)
        finally:
            if args.out:
                args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            say(format_report(record, args.pick))  # of a run that was cut short too
    return 1 if any("error" in entry for entry in record["servers"].values()) else 0


def make_setup(args: argparse.Namespace) -> Setup:
    paths = ("llama_server", "llama_models", "vllm_python", "vllm_int8_model", "transformers_python")
    folder = model_folder(args.model)
    return Setup(
        model=str(folder),
        model_folder=folder,
        cpus=cores_of(args.cpus) if args.cpus else all_cores(),
        extra_args={family: tuple(shlex.split(getattr(args, f"{family}_args"))) for family in FAMILIES},
        # absolute, but not resolved: a virtual environment's python is a link whose place says which environment it is
        **{name: path and path.absolute() for name, path in ((name, getattr(args, name)) for name in paths)},
    )


def model_folder(model: str) -> Path:
    """The folder that every server loads; the demo model is fetched and converted where that has not been done."""
    from engine.config import ModelConfig
    from engine.errors import ModelLoadError
    from engine.model_files import resolve_model

    try:
        return resolve_model(ModelConfig(model=model), lambda phase, detail, fraction: None)
    except ModelLoadError as error:
        raise SystemExit(error.message) from None


def cores_of(text: str) -> tuple[int, ...]:
    """0,1 or 0-3 as numbers; exits with a sentence for anything else."""
    cores: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            cores += range(int(first), int(last or first) + 1)
    except ValueError:
        raise SystemExit(f"cores look like 0,1 or 0-3, got {text!r}") from None
    if missing := set(cores) - set(all_cores()):
        raise SystemExit(f"this process may not use core {min(missing)}: choose of {', '.join(map(str, all_cores()))}")
    return tuple(cores)


def all_cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def machine(cpus: Sequence[int]) -> dict[str, str]:
    """What the figures depend on: processor, instruction sets, cores in use."""
    found = {"machine": describe_machine(), "servers' cores": ",".join(map(str, cpus))}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line.split(":")[1].split() for line in lines if line.startswith("flags"))
        found["instructions"] = " ".join(flag for flag in ISA_FLAGS if flag in flags)
    except (OSError, StopIteration):
        pass
    limits = {name: os.environ[name] for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in os.environ}
    return found | limits


def start(
    name: str, setup: Setup, num_starts: int, scratch: Path, logs: Path, stack: ExitStack, record: Record
) -> Running | None:
    """Starts a server until it is ready, `num_starts` times, and leaves the last one running. None where it cannot be."""
    entry = record["servers"][name]
    try:
        for number in range(1, num_starts + 1):
            port = free_port()
            command = command_of(name, setup, port)
            entry["command"] = shlex.join(command.argv)
            with ExitStack() as attempt:
                log = logs / f"{name}.{number}.log"
                server = attempt.enter_context(serving(command, port, setup.cpus, scratch / name, log))
                entry.setdefault("ready_s", []).append(round(server.wait_ready(START_LIMIT_S), 2))
                entry["memory_peak_bytes"] = memory_peak_bytes(server)
                if number == num_starts:
                    stack.enter_context(attempt.pop_all())
        base = Load(server.base_url, model=command.model, ignore_eos=command.has_ignore_eos, extra_body=command.extra_body)
        with time_limit(server, START_LIMIT_S):
            load = asyncio.run(probe(base))
        say(f"{name}: ready after {' and '.join(f'{seconds:.1f}' for seconds in entry['ready_s'])} s")
        return Running(name, command, server, load)
    except NotInstalled as error:
        entry["not_installed"] = str(error)
    except (RuntimeError, OSError, EOFError, HttpError) as error:
        entry["error"] = f"did not start: {error}"
    say(f"{name}: {entry.get('error') or entry['not_installed']}")
    return None


def measure(servers: Sequence[Running], workloads: Sequence[Workload], num_rounds: int, limit_s: float, record: Record) -> None:
    """Round after round, workload after workload, the servers in turn, each round another one first."""
    if not servers:
        return
    for entry in servers[1:]:  # the texts are the same for all, so that the tokens are
        first = servers[0].load
        entry.load = replace(entry.load, tokens_per_word=first.tokens_per_word, template_tokens=first.template_tokens)
    for number in range(num_rounds):
        for index, workload in enumerate(workloads):
            turn = [*servers[number % len(servers) :], *servers[: number % len(servers)]]
            for running in turn:
                entry = record["servers"][running.name]
                if "error" not in entry:
                    others = [other for other in servers if other is not running and other.server.process.poll() is None]
                    seed = 1000 * (number + 1) + 10 * index
                    result = measure_one(running, others, workload, seed, limit_s)
                    keep(running, workload, result, entry)


def measure_one(running: Running, others: Sequence[Running], workload: Workload, seed: int, limit_s: float) -> dict[str, Any]:
    """One server's run of one workload, after a short one of its kind that is not counted."""
    with time_limit(running.server, limit_s):
        warm_up(workload, running.load, 1, seed + 1)
        others_before_s = sum(cpu_seconds(other.server) for other in others)
        own_before_s = cpu_seconds(running.server)
        began = time.monotonic()
        samples = gather(load_of(workload, running.load, seed), 1, False)
        wall_s = time.monotonic() - began
    summary = summarize(samples)
    return {
        "figures": short_figures(summary),
        "num_errors": summary["num_errors"],
        "errors": summary["errors"],
        "prompt_tokens": summary["prompt_tokens"],
        "cached_tokens": summary["cached_tokens"],
        "output_tokens": summary["output_tokens"],
        "short_answers": count_short(samples, workload.output_len),
        "cpu_s": round(cpu_seconds(running.server) - own_before_s, 3),
        "others_cpu_share": round((sum(cpu_seconds(other.server) for other in others) - others_before_s) / wall_s, 4),
    }


def count_short(samples: Sequence[Sample], output_len: int) -> int:
    """Answers that ended before they had as many tokens as were asked for."""
    return sum(not sample.error and sample.output_tokens != output_len for sample in samples)


def keep(running: Running, workload: Workload, result: dict[str, Any], entry: Record) -> None:
    """Enters a result, says it, and warns of what would make it no fair one."""
    entry.setdefault("workloads", {}).setdefault(workload.name, []).append(result)
    entry["memory_peak_bytes"] = max(entry["memory_peak_bytes"], memory_peak_bytes(running.server))
    shown = result["figures"]
    say(f"{running.name} {workload.name}: {shown['output_tps']:.1f} tok/s, TPOT {shown.get('tpot_p50', 0.0):.1f} ms")
    warnings = entry.setdefault("warnings", [])
    if result["num_errors"]:
        warnings.append(f"{workload.name}: {result['num_errors']} errors: {result['errors']}")
    if result["short_answers"]:
        warnings.append(f"{workload.name}: {result['short_answers']} answers of another length than was asked for")
    if result["others_cpu_share"] > IDLE_SHARE:
        warnings.append(f"{workload.name}: the other servers used {result['others_cpu_share']:.0%} of a core meanwhile")
    if running.server.process.poll() is not None:
        entry["error"] = f"ended with {running.server.process.returncode} in the workload {workload.name}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through main's `finally`, so that no server is left behind
    sys.exit(main())
