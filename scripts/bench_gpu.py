#!/usr/bin/env python3
"""Everything about speed on this machine's GPU in one command: correctness, kernels, serving, start-up.

    scripts/bench_gpu --out results                                 # all of it; results/bench_gpu.json and the tables
    scripts/bench_gpu --models llama-3.1-8b --skip check,kernels    # the 8B workloads, about 2.5 minutes
    scripts/bench_gpu --models llama-3.1-8b --workloads single,c256 --quick --server-args "--attention-backend triton"

Models are shapes with random weights (dummy_model.py), served by this checkout as it is, over HTTP, with clients in several
processes (bench_serving.py). The figures stand beside vLLM's on the same card and the goals, where there are any. Parts that
this checkout lacks are named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_gpu_serving import measure_model, say
from bench_gpu_workloads import BY_DEFAULT, MODELS, Figures, Model
from bench_process import ROOT
from dummy_model import write_model

PARTS = ("check", "kernels", "first-load", "serving")
CHECK = ROOT / "scripts" / "gpu_check"
KERNELS = ROOT / "scripts" / "bench_kernels.py"
PART_TIME_LIMIT_S = 600
KEPT_OUTPUT = 20_000  # characters
COLUMNS = {
    "output_tps": "output tok/s",
    "total_tps": "total tok/s",
    "ttft_p50": "TTFT p50 ms",
    "ttft_p99": "TTFT p99 ms",
    "tpot_p50": "TPOT p50 ms",
    "itl_p99": "ITL p99 ms",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(BY_DEFAULT), help=f"of {', '.join(MODELS)} [%(default)s]")
    parser.add_argument("--workloads", default="", help="names, comma-separated; default: all of the model's")
    parser.add_argument("--skip", default="", help=f"parts to leave out, of {', '.join(PARTS)}")
    parser.add_argument(
        "--out", type=Path, default=Path("bench_gpu_out"), help="folder for the record and the logs [%(default)s]"
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    parser.add_argument("--server-args", default="", help="further arguments of `octavo serve`, in one string")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for one model's server [%(default)s]")
    parser.add_argument("--settle", type=float, default=3.0, help="idle seconds after the first load [%(default)s]")
    parser.add_argument(
        "--processes", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="clients [%(default)s]"
    )
    return parser


def chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    """The comma-separated names; exits with a sentence where one is unknown."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"there is no {what} {unknown[0]!r}: choose of {', '.join(known)}")
    return names


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    models = [MODELS[name] for name in chosen(args.models, list(MODELS), "model")]
    known = list(dict.fromkeys(workload.name for model in models for workload in model.workloads))
    workload_names = chosen(args.workloads, known, "workload") or known
    skip = chosen(args.skip, PARTS, "part")
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "machine": describe_machine(),
        "arguments": argv if argv is not None else sys.argv[1:],
        "models": {},
    }
    say(", ".join(f"{name}: {value}" for name, value in record["machine"].items()))
    try:
        for part, command in (("check", CHECK), ("kernels", KERNELS)):
            if part not in skip:
                record[part] = run_part(command, args.out / f"{part}.log")
        if "serving" not in skip or "first-load" not in skip:
            for model in models:
                record["models"][model.name] = serve_model(model, workload_names, skip, args)
    finally:
        (args.out / "bench_gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    tables = format_tables(record)
    (args.out / "bench_gpu.md").write_text(tables + "\n", encoding="utf-8")
    say(tables)
    failed = any(part.get("error") for part in record["models"].values()) or record.get("check", {}).get("exit_code")
    return 1 if failed else 0


def serve_model(model: Model, workload_names: Sequence[str], skip: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    workloads = [] if "serving" in skip else [workload for workload in model.workloads if workload.name in workload_names]
    with tempfile.TemporaryDirectory(prefix=f"{model.name}.") as scratch:
        return measure_model(
            model,
            write_model(model.name, Path(scratch) / model.name),
            args.out,
            workloads=[workload.quick() if args.quick else workload for workload in workloads],
            with_first_load="first-load" not in skip,
            num_processes=args.processes,
            server_args=shlex.split(args.server_args),
            settle_s=args.settle,
            time_limit_s=args.time_limit,
        )


def run_part(command: Path, log: Path) -> dict[str, Any]:
    """Another script's run: its exit code, its time and the end of its output, all of which lies in `log`."""
    if not command.is_file():
        say(f"{command.name} is not in this checkout: left out")
        return {"absent": True}
    started = time.monotonic()
    prefix = [sys.executable] if command.suffix == ".py" else []
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    with log.open("w", encoding="utf-8") as file:
        try:
            code: int | None = subprocess.run(
                [*prefix, str(command)],
                cwd=ROOT,
                env=environ,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=PART_TIME_LIMIT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    output = log.read_text(encoding="utf-8", errors="replace")
    say(f"{output[-4000:]}\n{command.name} ended with {code} after {time.monotonic() - started:.0f} s")
    return {"exit_code": code, "seconds": round(time.monotonic() - started, 1), "output": output[-KEPT_OUTPUT:]}


def describe_machine() -> dict[str, str]:
    """GPU, driver, and what of the software the figures depend on, found out without importing torch."""

    def ask(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    gpu = ask("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader").splitlines()
    versions = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('torch', 'triton', 'transformers')))"
    return {
        "gpu": gpu[0] if gpu else "none",
        "commit": ask("git", "rev-parse", "--short", "HEAD") or "unknown",
        "software": ask(sys.executable, "-c", versions) or "unknown",
        "cores": str(os.cpu_count()),
    }


def card_of(record: dict[str, Any]) -> str:
    """ "H100", "H200", or the GPU's name, for which there are no figures to compare with."""
    gpu = str(record["machine"]["gpu"])
    return next((card for card in ("H100", "H200") if card in gpu), gpu)


def format_tables(record: dict[str, Any]) -> str:
    """Markdown: every workload beside vLLM's figures; the goals; the start-ups."""
    card = card_of(record)
    blocks = []
    for name, measured in record["models"].items():
        model = MODELS[name]
        blocks.append(f"### {name} on {record['machine']['gpu']}")
        if measured.get("error"):
            blocks.append(f"**Failed:** {measured['error']}")
        if measured["workloads"]:
            blocks += [_figures_table(model, measured, card), _goals_table(model, measured, card)]
        if startup := measured.get("startup"):
            blocks.append(_startup_line(model, startup, card))
    return "\n\n".join(block for block in blocks if block)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figures_table(model: Model, measured: dict[str, Any], card: str) -> str:
    lines = [_row(["workload", "server", *COLUMNS.values()]), "|" + "---|" * (len(COLUMNS) + 2)]
    for workload in model.workloads:
        if workload.name not in measured["workloads"]:
            continue
        entry = measured["workloads"][workload.name]
        errors = entry["summary"]["num_errors"]
        title = f"{workload.name}: {entry['load']}" + (f" **({errors} errors)**" if errors else "")
        rows: list[tuple[str, str, Figures]] = [(title, "Octavo", entry["figures"])]
        if card in workload.vllm:
            rows.append(("", "vLLM 0.25.1", workload.vllm[card]))
        lines += [_row([first, server, *(_number(values.get(key)) for key in COLUMNS)]) for first, server, values in rows]
    return "\n".join(lines)


def _goals_table(model: Model, measured: dict[str, Any], card: str) -> str:
    lines = [_row(["goal", "vLLM 0.25.1", "goal", "Octavo", "reached"]), "|---|---|---|---|---|"]
    for workload in model.workloads:
        if workload.name not in measured["workloads"]:
            continue
        found = measured["workloads"][workload.name]["figures"]
        for key, goal in workload.goal.get(card, {}).items():
            value = found.get(key)
            more_is_better = key.endswith("_tps")
            reached = value is not None and (value >= goal if more_is_better else value <= goal)
            known = workload.vllm.get(card, {}).get(key)
            sign = "≥" if more_is_better else "≤"
            lines.append(
                _row(
                    [
                        f"{workload.name}, {COLUMNS[key]}",
                        _number(known),
                        f"{sign} {_number(goal)}",
                        _number(value),
                        "yes" if reached else "no",
                    ]
                )
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _startup_line(model: Model, startup: dict[str, Any], card: str) -> str:
    known, goal = model.vllm_ready_s.get(card), model.goal_ready_s
    beside = [f"vLLM {known:.0f} s"] if known else []
    beside += [f"goal {goal:.0f} s"] if goal else []
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in startup["phases"].items())
    line = f"Start-up: ready after {startup['ready_s']:.1f} s" + (f" ({', '.join(beside)})" if beside else "") + f": {parts}."
    if curve := startup.get("by_second"):
        points = ", ".join(f"{point['output_tps']:.0f} ({point['itl_p99_ms']:.0f})" for point in curve)
        steady = startup["steady_after_s"]
        line += f" Output tok/s (ITL p99 ms) by the second from then on: {points}"
        line += f"; steady after {steady} s." if steady is not None else "."
    return line


if __name__ == "__main__":
    sys.exit(main())
