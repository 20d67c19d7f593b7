"""`octavo serve` as a process with keys, TLS and a metrics port: what it prints, what it lets in, and a drain over HTTP."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.server.test_cli import ROOT, end_of
from tests.server.test_tls import make_certificate

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@contextmanager
def served(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """(process, base URL, stderr up to the ready line)."""
    command = [sys.executable, "-m", "tests.server.fake_serve", "--port", "0", "--device", "cpu", *flags]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        try:
            while not (found := re.search(r"at (https?://127\.0\.0\.1:\d+)", lines[-1] if lines else "")):
                line = process.stderr.readline()
                assert line, "".join(lines)
                lines.append(line)
            yield process, found[1], "".join(lines)
        finally:
            process.kill()


def test_all_of_it_together(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "one")
    keys = tmp_path / "keys"
    keys.write_text("tulip-bulb ann\nrose-bush ops admin\n")
    keys.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        metrics_port = taken.getsockname()[1]
    flags = ["--api-key-file", str(keys), "--tls-cert", cert, "--tls-key", key, "--metrics-port", str(metrics_port)]
    with served(*flags) as (process, url, text):
        assert url.startswith("https://") and "0644" in text and "chmod 600" in text
        with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=cert), timeout=60) as http:
            assert http.get("/v1/models").status_code == 401
            assert http.get("/health/live").status_code == 200
            ann, ops = ({"Authorization": f"Bearer {word}"} for word in ("tulip-bulb", "rose-bush"))
            body = {"prompt": "peony", "max_tokens": 5}
            assert http.post("/v1/completions", json=body, headers=ann).status_code == 200
            assert http.post("/v1/completions", json=body, headers=ops).status_code == 403
            assert http.post("/admin/drain", headers=ann).status_code == 403
            metrics = http.get(f"https://127.0.0.1:{metrics_port}/metrics").text
            assert 'api_key_id="ann"' in metrics
            assert http.post("/admin/drain", headers=ops).status_code == 202
        code, rest = end_of(process)
    assert code == 0 and "Traceback" not in rest
    assert "POST /v1/completions 200, key ann" in rest and "asked for by key ops" in rest
    for secret in ("tulip", "rose", "peony"):
        assert secret not in text + rest


def test_wrong_settings_end_it_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("tulip-bulb admin\n")
    for flags, sentence in (
        (["--api-key-file", str(tmp_path / "keys")], "keys line 1: admin is a scope"),
        (["--tls-cert", str(tmp_path / "none")], "--tls-cert in the command line"),
        (["--cors-origins", "example.com"], "--cors-origins in the command line"),
        (["--max-json-depth", "100000"], "--max-json-depth in the command line"),
    ):
        command = [sys.executable, "-m", "tests.server.fake_serve", "--port", "0", *flags]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 2 and sentence in ended.stderr and "tulip" not in ended.stderr
        assert "Traceback" not in ended.stderr
