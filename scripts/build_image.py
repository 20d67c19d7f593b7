"""Lint the Dockerfile, build it, try the image as its own user, and say how large it is and what it is made of.

  scripts/build_image                   the image for a CPU
  scripts/build_image --variant gpu     the image for a GPU; about 3 GB to download, and the server in it is not started

With docker or podman that is `docker build` and `docker run`. Without a daemon, buildah does it (Debian: apt install buildah
debootstrap; as root), over a base image that debootstrap makes once and that stays. pip's configuration on this machine (an
index, a proxy's certificate, a folder of wheels) holds in the build too, and does not stay in the image.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from image_tools import Buildah, ImageTool, StepFailed, find_tool, make_base, pip_settings, run, say

ROOT = Path(__file__).parent.parent
START_LIMIT_S = 600.0  # fetching and converting the demo model, and compiling kernels
STOP_LIMIT_S = 90.0
_CPU_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
_PROMPT = "The capital of France is"
_FRESH = """
test "$(id -u)" = 10001 || exit 1
for volume in /models "$HOME/.cache"; do
    test -z "$(ls -A "$volume")" && touch "$volume/x" && rm "$volume/x" || exit 1
done
"""
_SIZES_PROJECT = """
[project]
name = "sizes"
version = "0"
requires-python = "==3.11.*"
dependencies = ["%s"]
[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == 'x86_64'"]
"""
_KEY = secrets.token_hex(16)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    try:
        lint()
        tool = find_tool(args.tool)
        say(f"Building with {tool.name}")
        with tempfile.TemporaryDirectory(prefix="octavo-image-") as scratch:
            tag = args.tag or f"localhost/octavo:{args.variant}"
            try:
                build(tool, args, tag, Path(scratch))
                try_image(tool, args, tag, Path(scratch))
                report_sizes(tool, tag)
            finally:
                tool.clean(tag, keep=args.keep)
        if args.variant == "cpu":
            report_gpu_downloads()
    except StepFailed as error:
        print(f"build_image: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="scripts/build_image", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=("cpu", "gpu"), default="cpu", help="which image [cpu]")
    parser.add_argument("--tool", choices=("docker", "podman", "buildah"), help="what builds [the first that works here]")
    parser.add_argument("--base", metavar="IMAGE", help="base image [buildah: made by debootstrap; else the Dockerfile's]")
    parser.add_argument("--suite", default="bookworm", help="the Debian release that debootstrap makes a base of [bookworm]")
    parser.add_argument(
        "--torch-index", metavar="URL", help="index of torch's CPU build; '' is pip's own [PyTorch's, where it answers]"
    )
    parser.add_argument(
        "--volume",
        metavar="HOST:CONTAINER",
        action="append",
        default=[],
        help="a folder that the build sees too (not with docker)",
    )
    parser.add_argument("--tag", metavar="NAME", help="the image's name [localhost/octavo:VARIANT]")
    parser.add_argument("--keep", action="store_true", help="leave the image where it was built")
    return parser.parse_args(argv)


def lint() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if hadolint is None:
        say("No hadolint here (scripts/install --dev brings it): the Dockerfile is not linted")
        return
    run([hadolint, str(ROOT / "Dockerfile")], "hadolint has something to say of the Dockerfile")
    say("hadolint: nothing to say of the Dockerfile")


def build(tool: ImageTool, args: argparse.Namespace, tag: str, scratch: Path) -> None:
    base = args.base
    if base is None and isinstance(tool, Buildah):
        base = make_base(tool, args.suite, scratch)
    values = {"VARIANT": args.variant} | ({"BASE_IMAGE": base} if base else {})
    if args.variant == "cpu":
        index = args.torch_index
        if index is None and not answers(_CPU_INDEX):
            say("PyTorch's index does not answer: torch comes from the index that pip is set up with")
            index = ""
        if index is not None:
            values["TORCH_INDEX"] = index
    pip_conf, folders = pip_settings()
    file = scratch / "pip.conf"
    file.write_text(pip_conf, encoding="utf-8")
    started_s = time.monotonic()
    tool.build(ROOT, tag, values, secret=("pip_conf", file), volumes=[*(f"{path}:{path}:ro" for path in folders), *args.volume])
    say(f"Built {tag} in {time.monotonic() - started_s:.0f} s")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


def try_image(tool: ImageTool, args: argparse.Namespace, tag: str, scratch: Path) -> None:
    """A compiler that works for the image's user; volumes that it can write; and, on a CPU, an answer from the demo model."""
    say(tool.output(tag, ["python", "-m", "engine.kernels.toolchain"]).strip())
    tool.output(tag, ["sh", "-c", _FRESH])
    say("The image's user is 10001, and may write its fresh volumes, /models and the cache of kernels")
    if args.variant == "cpu":
        serve(tool, tag, scratch)


def serve(tool: ImageTool, tag: str, scratch: Path) -> None:
    """Starts the server, has it complete a prompt, asks the health check, and drains it. Raises StepFailed."""
    pip_conf, folders = pip_settings()
    (scratch / "pip.conf").write_text(pip_conf, encoding="utf-8")
    volumes = [f"{path}:{path}:ro" for path in (*folders, scratch / "pip.conf")]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environ = {
        "OCTAVO_MODEL": "demo",
        "OCTAVO_API_KEY": f"{_KEY} owner api metrics admin",
        # The demo model comes through pip, as everything else here did.
        "PIP_CONFIG_FILE": str(scratch / "pip.conf"),
    }
    os.chmod(scratch, 0o755)
    started_s = time.monotonic()
    with tool.serve(tag, environ, port=port, volumes=volumes) as server:
        wait_until_ready(server, port)
        say(f"Ready after {time.monotonic() - started_s:.0f} s, fresh volumes: the demo model fetched, kernels compiled")
        answer = json.loads(
            ask(port, "/v1/completions", {"model": "demo", "prompt": _PROMPT, "max_tokens": 8, "temperature": 0})
        )
        text = answer["choices"][0]["text"]
        if "Paris" not in text:
            raise StepFailed(f"the demo model completed {_PROMPT!r} with {text!r}")
        say(f"{_PROMPT!r} is completed with {text!r}")
        health = tool.output_beside_server(["octavo-health"], port)
        say(f"The health check says {health.strip()[:80]}")
        if not ask(port, "/metrics").count("octavo"):
            raise StepFailed("/metrics is empty")
        ask(port, "/admin/drain", {})
        try:
            status = server.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise StepFailed("the server did not end after its drain") from None
        if status:
            raise StepFailed(f"the server ended with {status}")
        say("Drained: it ended with 0")


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s:
        with suppress(OSError):
            ask(port, "/health/ready")
            return
        if server.poll() is not None:
            raise StepFailed(f"the server ended with {server.returncode} before it was ready: see its words above")
        time.sleep(0.5)
    raise StepFailed(f"the server was not ready within {START_LIMIT_S:.0f} s")


def ask(port: int, path: str, body: Mapping[str, object] | None = None) -> str:
    """The text of a 2xx answer. Raises OSError."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {_KEY}"})
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def report_sizes(tool: ImageTool, tag: str) -> None:
    program = (ROOT / "scripts" / "image_sizes.py").read_text(encoding="utf-8")
    parts: dict[str, int] = json.loads(tool.output(tag, ["python", "-c", program]))
    parts = {part: size for part, size in parts.items() if size > 10**6}
    say("What the image is made of, in MB (10^6 bytes), not compressed:")
    print(table({**dict(sorted(parts.items(), key=lambda item: -item[1])), "together": sum(parts.values())}))


def report_gpu_downloads() -> None:
    """What torch's CUDA build would bring, by the sizes of its wheels, which `uv lock` writes down without fetching them."""
    uv = shutil.which("uv")
    if uv is None:
        say("With uv (pip install uv) here, the sizes of the GPU image's wheels would follow; none is downloaded for it")
        return
    with tempfile.TemporaryDirectory(prefix="octavo-uv-") as folder:
        wheels = list(gpu_wheels(uv, Path(folder)))
    say("The GPU image has these in place of torch's CPU build; wheels as downloaded, in MB (unpacked about 7 GB):")
    print(table({**dict(wheels), "together": sum(size for _, size in wheels)}))


def gpu_wheels(uv: str, folder: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of torch's CUDA build and what it needs, of 10 MB or more, the largest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = next(line for line in project["dependencies"] if line.startswith("torch=="))
    (folder / "pyproject.toml").write_text(_SIZES_PROJECT % torch, encoding="utf-8")
    run([uv, "lock", "--quiet", "--no-config", "--directory", str(folder)], "uv cannot resolve torch's CUDA build")
    packages = tomllib.loads((folder / "uv.lock").read_text(encoding="utf-8"))["package"]
    found = []
    for package in packages:
        fitting = [
            wheel.get("size", 0)
            for wheel in package.get("wheels", [])
            if "aarch64" not in wheel["url"]
            and any(tag in wheel["url"] for tag in ("cp311-cp311-manylinux", "py3-none", "none-any"))
        ]
        found.append((str(package["name"]), max(fitting, default=0)))
    yield from sorted((item for item in found if item[1] >= 10**7), key=lambda item: -item[1])


def table(sizes: Mapping[str, int]) -> str:
    width = max(map(len, sizes))
    return "\n".join(f"  {name:{width}}  {size / 1e6:9,.0f}" for name, size in sizes.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
