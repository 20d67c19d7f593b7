#!/usr/bin/env python3
"""The README's figures: Octavo over HTTP, then plain `generate`, same model, same machine, one after the other; one table.

    scripts/bench_readme.py [--model demo] [--dtype bfloat16]

Starts `scripts/serve` on a free port (which installs where that is needed), loads it with bench_serving.py, stops it, and runs
bench_generate.py on the same workloads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench_serving import MARKDOWN_HEAD, format_markdown_row

SCRIPTS = Path(__file__).resolve().parent
PYTHON = SCRIPTS.parent / ".venv" / "bin" / "python"
START_TIMEOUT_S = 1800  # a first start installs and fetches the model


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(server: subprocess.Popen[bytes], base_url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with code {server.returncode} before it was ready; see above")
        try:
            with urllib.request.urlopen(f"{base_url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server was not ready after {START_TIMEOUT_S} s")


def stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def measure_server(args: argparse.Namespace, folder: Path) -> dict[int, Any]:
    """Figures of bench_serving.py by concurrency. Each has its own seed, so that none meets cached prompts."""
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    command = [str(SCRIPTS / "serve"), args.model, "--port", str(port), "--dtype", args.dtype]
    server = subprocess.Popen(command, stdout=sys.stderr)
    figures = {}
    try:
        wait_ready(server, base_url)
        for concurrency in args.concurrency:
            result = folder / f"serving-{concurrency}.json"
            load = ["--concurrency", concurrency, "--num-requests", max(4, 4 * concurrency), "--warmup", concurrency]
            load += ["--input-len", args.input_len, "--output-len", args.output_len, "--seed", concurrency, "--json", result]
            bench = [sys.executable, SCRIPTS / "bench_serving.py", "--base-url", base_url, *load]
            subprocess.run([str(part) for part in bench], check=True, stdout=sys.stderr)
            figures[concurrency] = json.loads(result.read_text())["figures"]
    finally:
        stop(server)
    return figures


def measure_generate(args: argparse.Namespace, folder: Path) -> dict[int, Any]:
    result = folder / "generate.json"
    command = [PYTHON, SCRIPTS / "bench_generate.py", "--model", args.model, "--dtype", args.dtype, "--json", result]
    command += ["--input-len", args.input_len, "--output-len", args.output_len, "--batch-sizes", *args.concurrency]
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
    return {int(size): figures for size, figures in json.loads(result.read_text()).items()}


def describe_machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    except OSError:
        cpu = platform.processor()
    return f"{os.cpu_count()} cores, {cpu or platform.machine()}, {platform.system()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of both")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = measure_server(args, Path(folder))
        theirs = measure_generate(args, Path(folder))
    print(f"\n{args.model}, {args.dtype}, {args.input_len} tokens in / {args.output_len} out; {describe_machine()}\n")
    print(MARKDOWN_HEAD)
    for concurrency in args.concurrency:
        print(format_markdown_row(f"Octavo, {concurrency} at once", ours[concurrency]))
        print(format_markdown_row(f"`generate`, batch of {concurrency}", theirs[concurrency]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
