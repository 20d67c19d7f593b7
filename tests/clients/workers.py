"""Programs that use a client library, each a process that is kept and told scenario by scenario what to do."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
PROGRAMS = Path(__file__).parent / "programs"
NODE = Path(__file__).parent / "node"
TIMEOUT_S = 280

# Nothing is fetched while tests run: whatever tries meets a closed port, at once.
_NOWHERE = "http://127.0.0.1:9"
ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), _NOWHERE),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "PYTHONUNBUFFERED": "1",
}


def why_missing(program: str) -> str | None:
    """Why a program cannot run here; None where it can."""
    if not program.endswith(".mjs"):
        return None if PYTHON.exists() else "no clients here: scripts/install --clients"
    if not (NODE / "node_modules" / "openai").is_dir():
        return "no OpenAI client for Node here: scripts/install --clients, with Node 20 or later and npm"
    return None if shutil.which("node") else "no node here"


class Worker:
    """One program, started by the first scenario."""

    def __init__(self, program: str, log: Path) -> None:
        self._command = ["node", str(NODE / program)] if program.endswith(".mjs") else [str(PYTHON), str(PROGRAMS / program)]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, scenario: str, *, url: str, key: str, model: str) -> float:
        """Seconds it took. Raises AssertionError with the program's traceback, or what it last said."""
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        job = {"scenario": scenario, "url": url, "key": key, "model": model}
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        deadline = time.monotonic() + TIMEOUT_S
        answered = bool(select.select([process.stdout], [], [], deadline - time.monotonic())[0])
        line = process.stdout.readline() if answered else b""
        if not line:
            self.stop()
            raise AssertionError(f"{scenario}: {'ended' if answered else 'no answer in time'}\n{self._log.read_text()[-4000:]}")
        result = json.loads(line)
        assert "error" not in result, f"\n{result['error']}"
        return float(result["seconds"])

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=ENVIRONMENT
                )
        return self._process
