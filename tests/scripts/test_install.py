"""What scripts/install says where it cannot go on: one sentence with the remedy, and exit code 1. And what does not stop it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The little of the repository that the install reads, in a folder with a space in its name."""
    folder = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def fake_python(folder: Path, failing: str) -> Path:
    """A Python in which every command line that contains `failing` fails."""
    path = folder / "python3"
    path.write_text(f'#!/usr/bin/env bash\ncase "$*" in *"{failing}"*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


def install(checkout: Path, python: Path | str, *args: str) -> str:
    run = subprocess.run(
        [str(checkout / "scripts" / "install"), *args],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    return run.stderr


def test_old_python(checkout: Path) -> None:
    said = install(checkout, fake_python(checkout, "sys.version_info"))
    assert said.startswith("install: Octavo needs Python 3.11 to 3.14 and found ")
    assert said.count("\n") == 1


def test_python_without_venv(checkout: Path) -> None:
    said = install(checkout, fake_python(checkout, "import venv, ensurepip"))
    assert "has no venv module: install it (Debian/Ubuntu: apt install python3." in said
    assert said.count("\n") == 1


def test_full_disk(checkout: Path) -> None:
    bin_folder = checkout / "bin"
    bin_folder.mkdir()
    df = bin_folder / "df"
    df.write_text("#!/bin/sh\necho 'Filesystem 1024-blocks Used Available Capacity Mounted on'\necho 'x 100 90 10240 90% /'\n")
    df.chmod(0o755)
    run = subprocess.run(
        [str(checkout / "scripts" / "install")],
        env={"PATH": f"{bin_folder}:/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert "the disk has 10 MB free: make room there" in run.stderr
    assert run.stderr.count("\n") == 1


def test_unknown_argument(checkout: Path) -> None:
    assert install(checkout, sys.executable, "--prod") == "install: unknown argument '--prod': there are --dev and --clients.\n"


@pytest.mark.skipif(
    Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists(), reason="no kernels for GPUs"
)
@pytest.mark.parametrize("compile_exit", [0, 1])
def test_cpu_kernels_are_compiled_and_never_fail_an_install(checkout: Path, compile_exit: int) -> None:
    environment = checkout / ".venv" / "bin"
    environment.mkdir(parents=True)
    # The environment's Python installs nothing and compiles nothing; all else it does.
    python = environment / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in\n'
        '  *version*"torch"*) sed -n \'s/^ *"torch==\\([0-9.]*\\)".*/\\1/p\' pyproject.toml ;;\n'
        '  *"import sys, pip"*) exec "' + sys.executable + '" -c \'import sys; print("%d.%d" % sys.version_info[:2])\' ;;\n'
        '  "-m pip "*) ;;\n'
        f'  "-m engine.kernels.cpu_build") echo "Compiled in $PWD"; exit {compile_exit} ;;\n'
        f'  *) exec "{sys.executable}" "$@" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    run = subprocess.run(
        [str(checkout / "scripts" / "install")],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert f"Compiled in {checkout}\n" in run.stderr
    assert (checkout / ".venv" / "installed").exists()


@pytest.mark.parametrize("has_node", [True, False])
def test_clients_have_an_environment_of_their_own(checkout: Path, has_node: bool) -> None:
    clients = checkout / "tests" / "clients"
    shutil.copytree(ROOT / "tests" / "clients" / "node", clients / "node", ignore=shutil.ignore_patterns("node_modules"))
    shutil.copy(ROOT / "tests" / "clients" / "requirements.txt", clients)
    tools = checkout / "tools"
    tools.mkdir()
    for name, script in (("node", f"exit {0 if has_node else 1}"), ("npm", 'echo "npm $*" >&2')):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    python = checkout / ".venv-clients" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase "$*" in "-m pip "*) echo "pip $*" >&2 ;; *) exec "{sys.executable}" "$@" ;; esac\n')
    python.chmod(0o755)

    def run() -> str:
        return subprocess.run(
            [str(checkout / "scripts" / "install"), "--clients"],
            env={"PATH": f"{tools}:/usr/bin:/bin", "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stderr

    said = run()
    assert "requirements.txt" in said and "torch" not in said
    assert ("npm ci --ignore-scripts" in said) == has_node
    assert ("No Node 20 or later with npm here" in said) != has_node
    assert run() == "", "a second call returns at once"
    assert not (checkout / ".venv").exists()
