"""A local hub, a cache of its own, and a process that resolves models with them: what the tests of the Hub share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 240.0

# Every look-up of a name and every connection of Python's sockets leaves a line; those of a served client come in, not out.
GUARD = """
import os, sys
def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        named = event in ("socket.getaddrinfo", "socket.gethostbyname")
        if named and args[0] in ("127.0.0.1", "::1", None) or not named and not isinstance(args[1], tuple):
            return
        with open(os.environ["NETWORK_LOG"], "a") as log:
            log.write(f"{' '.join(sys.orig_argv)}: {event} {args}\\n")
sys.addaudithook(watch)
"""


@dataclass
class Resolved:
    """What one process said. folder or error: how it ended. progress: (phase, detail, fraction)."""

    code: int
    output: str
    folder: Path | None = None
    error: str = ""
    progress: list[tuple[str, str, float | None]] = field(default_factory=list)

    @classmethod
    def of(cls, process: subprocess.Popen[str], limit_s: float = LIMIT_S) -> Resolved:
        output, errors = process.communicate(timeout=limit_s)
        made = cls(process.returncode, output + errors)
        for line in output.splitlines():
            said = json.loads(line)
            if "phase" in said:
                made.progress.append((said["phase"], said["detail"], said["fraction"]))
            made.error = said.get("error", made.error)
            made.folder = Path(said["folder"]) if "folder" in said else made.folder
        return made

    @property
    def told(self) -> str:
        return "\n".join(detail for _, detail, _ in self.progress)


@dataclass
class Place:
    """A machine that has never seen the hub before."""

    hub: LocalHub
    path: Path

    def environ(self, **changes: str) -> dict[str, str]:
        """Of a process: this machine's cache and hub, nobody's token, on line."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        home = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.path / "hf"), "HOME": str(self.path), "NO_PROXY": "127.0.0.1"}
        home["HF_HUB_DISABLE_TELEMETRY"] = "1"  # as the supervisor does it
        python_path = os.pathsep.join([str(self.guard), str(ROOT)])
        return {**kept, **home, "PYTHONPATH": python_path, "NETWORK_LOG": str(self.network_log), **changes}

    @property
    def network_log(self) -> Path:
        return self.path / "network"

    @property
    def network_calls(self) -> list[str]:
        return self.network_log.read_text().splitlines() if self.network_log.exists() else []

    @cached_property
    def guard(self) -> Path:
        folder = self.path / "guard"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(GUARD)
        return folder

    def model_cache(self, name: str) -> Path:
        return self.path / "hf" / "hub" / f"models--{name.replace('/', '--')}"

    def begin(self, name: str, *, environ: dict[str, str] | None = None, **settings: Any) -> subprocess.Popen[str]:
        """Begin to resolve a model in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.resolve_in_child", json.dumps({"model": name, **settings})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environ(**(environ or {})),
            cwd=ROOT,
        )

    def resolve(self, name: str, *, environ: dict[str, str] | None = None, **settings: Any) -> Resolved:
        """Resolve a model in a process of its own."""
        return Resolved.of(self.begin(name, environ=environ, **settings))

    def refused(self, name: str, *, environ: dict[str, str] | None = None, **settings: Any) -> str:
        """The sentence with which a model is refused, which is all there is to the error."""
        found = self.resolve(name, environ=environ, **settings)
        assert found.code == 1, found.output
        assert found.error
        assert "\n" not in found.error
        assert "Traceback" not in found.output
        return found.error


@contextmanager
def new_place(path: Path) -> Iterator[Place]:
    with LocalHub() as hub:
        yield Place(hub, path)
