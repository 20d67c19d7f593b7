"""The `octavo` command as a process: ready line, orderly ends, and failures in one sentence."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.cli import run
from server.serve import listen, phases_of_start

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def served(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """(process, base URL, stderr lines up to the ready line)."""
    command = [sys.executable, "-m", "tests.server.fake_serve", "--port", "0", "--device", "cpu", *flags]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        try:
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"at (http://127\.0\.0\.1:\d+)", line):
                    yield process, found[1], lines
                    break
            else:
                yield process, "", lines
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, rest = process.communicate(timeout=60)
    return process.returncode, rest


def test_an_install_before_the_start_is_not_the_frontend_s_time() -> None:
    parts = {"python": 1.0, "load": 2.0}
    assert phases_of_start(5.0, 1.5, 0.2, parts) == {"frontend": 1.5, **parts, "other": 0.5}
    assert phases_of_start(95.0, 91.5, 90.0, parts) == {"shell": 90.0, "frontend": 1.5, **parts, "other": 0.5}


def test_ready_line_and_an_orderly_end() -> None:
    with served() as (process, url, lines):
        assert any("weights: tiny (50%)" in line for line in lines)
        assert f" chat --url {url}, or: curl " in lines[-1] and "this machine only" in lines[-1]
        (phases,) = [line for line in lines if "ready after" in line]
        assert re.search(r"ready after [\d.]+ s: frontend [\d.]+ s, .*other [\d.]+ s$", phases.strip())
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 40}) as response:
            assert response.status_code == 200
            process.send_signal(signal.SIGTERM)
            text = "".join(response.iter_text())
        assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text and "error" not in text
        code, rest = end_of(process)
    assert code == 0 and "Traceback" not in rest


def test_the_engine_is_started_before_what_http_needs_is_imported() -> None:
    code = "import sys, server.serve; sys.exit(bool({'fastapi', 'starlette', 'uvicorn', 'numpy', 'torch'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("again", [True, False])
def test_streams_still_open_at_the_end_of_the_drain_get_an_error(again: bool) -> None:
    with served("slow", "--shutdown-timeout-s", "3600" if again else "0.1") as (process, url, _):
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 40}) as response:
            process.send_signal(signal.SIGINT)
            if again:
                process.send_signal(signal.SIGTERM)
            text = "".join(response.iter_text())
        assert text.endswith("data: [DONE]\n\n")
        code, rest = end_of(process)
    assert code == 0 and "Traceback" not in rest


@pytest.mark.parametrize(
    ("model", "sentence"), [("broken", "the weights are gone: fetch them again"), ("mortal", "process died")]
)
def test_a_failed_engine_ends_with_one_sentence(model: str, sentence: str) -> None:
    with served(model) as (process, _, lines):
        code, rest = end_of(process)
    assert code == 1
    (last,) = [line for line in [*lines, *rest.splitlines()] if line.startswith("octavo: ")]
    assert sentence in last and "Traceback" not in rest


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./nothing", "there is no file or folder nothing: give a Hub id"),
        ("empty", "empty has no config.json: give a Hugging Face model folder"),
        ("text.gguf", "text.gguf is no GGUF file"),
    ],
)
def test_a_wrong_path_is_said_without_waiting_for_the_engine(name: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("a text")
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "torch.py").write_text("import time\ntime.sleep(3600)\n")  # an engine that never comes to look for its model
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(shim)])
    command = [sys.executable, "-m", "server.cli", "serve", name, "--port", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("octavo: ")]
    assert sentence in line and "Traceback" not in done.stderr


def test_a_taken_port_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert run(["serve", "--port", str(port)]) == 1
    text = capsys.readouterr().err
    assert f"port {port} on 127.0.0.1 is taken" in text and f"--port {port + 1}" in text and text.count("\n") == 1


def test_the_limit_of_open_files_is_raised() -> None:
    code = (
        "import resource; from server.file_limit import raise_file_limit; kind = resource.RLIMIT_NOFILE\n"
        "resource.setrlimit(kind, (100, 200)); raise_file_limit(150); print(*resource.getrlimit(kind))\n"
        "raise_file_limit(120); raise_file_limit(1000); print(*resource.getrlimit(kind))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["150", "200", "200", "200"]


def test_listening_where_there_is_nothing_to_listen_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", "host.invalid"]) == 1
    assert "host.invalid" in capsys.readouterr().err
    assert run(["serve", "--host", "192.0.2.1"]) == 1
    assert "192.0.2.1" in capsys.readouterr().err


def test_wrong_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert run(["bake"]) == 2
    assert "there is no command bake" in capsys.readouterr().err
    assert run(["sreve"]) == 2
    assert "did you mean serve?" in capsys.readouterr().err
    assert run(["serve", "--prot", "1"]) == 2
    assert "did you mean --port?" in capsys.readouterr().err
    assert run(["serve", "--chat-template", "/no/such.jinja"]) == 2


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    command = f"{sys.executable} -m server.cli serve --help"
    done = subprocess.run(["bash", "-c", f"{command} | true; echo $?"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert re.fullmatch(r"octavo \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert run(["--help"]) == 0
    assert "octavo COMMAND --help" in capsys.readouterr().out


def test_the_command_itself_starts_light() -> None:
    code = "import sys, server.cli; sys.exit(bool({'engine', 'pydantic', 'asyncio', 'yaml'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6() -> None:
    try:
        sock = listen("::1", 0)
    except Exception:
        pytest.skip("no IPv6 loopback here")
    with sock:
        assert sock.family == socket.AF_INET6
