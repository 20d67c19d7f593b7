"""What scripts/build_image works out by itself; the build is in tests/test_dockerfile.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import build_image
import image_sizes
import image_tools
import pytest

ROOT = Path(__file__).parent.parent.parent


def test_help_says_what_it_does() -> None:
    done = subprocess.run([ROOT / "scripts" / "build_image", "--help"], capture_output=True, text=True, check=True)
    assert "Lint the Dockerfile, build it, try the image as its own user" in done.stdout
    assert {"--variant", "--tool", "--base", "--torch-index", "--keep"} <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_pip_s_settings_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, index, cert = tmp_path / "wheels", tmp_path / "index" / "simple", tmp_path / "ca.pem"
    wheels.mkdir()
    index.mkdir(parents=True)
    cert.touch()
    monkeypatch.setenv("PIP_FIND_LINKS", f"{wheels} {tmp_path / 'absent'}")
    monkeypatch.setenv("PIP_CERT", str(cert))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{index}")
    text, folders = image_tools.pip_settings()
    assert {f"find-links = {wheels} {tmp_path / 'absent'}", f"cert = {cert}", f"extra-index-url = file://{index}"} <= set(
        text.splitlines()
    )
    # An index's files lie beside its pages.
    assert {str(wheels), str(cert), str(index.parent)} <= set(folders) and str(tmp_path / "absent") not in folders


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/opt/octavo/lib/python3.11/site-packages/torch/lib/libtorch_cpu.so", "torch"),
        ("/opt/octavo/lib/python3.11/site-packages/torch-2.13.0+cpu.dist-info/METADATA", "torch"),
        ("/opt/octavo/lib/python3.11/site-packages/nvidia/cublas/lib/libcublas.so.13", "CUDA's libraries"),
        ("/opt/octavo/lib/python3.11/site-packages/numpy/__init__.py", "other Python packages"),
        ("/opt/octavo/lib/python3.11/site-packages/engine/core.py", "Octavo"),
        ("/usr/lib/python3.11/json/__init__.py", "Python"),
        ("/usr/bin/python3.11", "Python"),
        ("/usr/include/python3.11/Python.h", "Python"),
        ("/usr/lib/gcc/x86_64-linux-gnu/12/cc1plus", "compiler"),
        ("/usr/include/stdio.h", "compiler"),
        ("/usr/bin/x86_64-linux-gnu-ld.bfd", "compiler"),
        ("/usr/bin/bash", "Debian"),
    ],
)
def test_whose_a_file_is(path: str, part: str) -> None:
    assert next(name for name, pattern in image_sizes.PARTS if re.match(pattern, path)) == part


def test_a_step_that_fails_says_which(tmp_path: Path) -> None:
    with pytest.raises(image_tools.StepFailed, match=r"it broke \(false ended with 1\)"):
        image_tools.run(["false"], "it broke")
    assert image_tools.run([sys.executable, "-c", "print(1)"], "it broke", quiet=True) == "1\n"
    with pytest.raises(image_tools.StepFailed, match="it is not there"):
        image_tools.run([str(tmp_path / "absent")], "it is not there")


def test_the_table() -> None:
    assert (
        build_image.table({"torch": 580_400_000, "together": 1_307_000_000}) == "  torch           580\n  together      1,307"
    )
