"""What builds and runs images, docker or podman, or buildah where there is no daemon; a base image; pip's settings. For
build_image.py."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

BUILD_LIMIT_S = 3600.0
RUN_LIMIT_S = 300.0
_PIP_LINE = re.compile(r"(?:global|install|download|:env:)\.+([\w-]+)='(.*)'")
_EXCLUDED = ("doc", "man", "locale", "info", "i18n", "lintian")  # of /usr/share, as in Debian's slim images


class StepFailed(Exception):
    """A step did not work; the message says which and why."""


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def run(command: Sequence[str], failure: str, *, limit_s: float = RUN_LIMIT_S, quiet: bool = False) -> str:
    """Runs it and shows what it writes; with `quiet`, returns that instead, of stdout. Raises StepFailed."""
    stdout = subprocess.PIPE if quiet else None
    try:
        done = subprocess.run(command, stdout=stdout, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StepFailed(f"{failure}: {error}") from error
    if done.returncode:
        raise StepFailed(f"{failure} ({Path(command[0]).name} ended with {done.returncode})")
    return done.stdout or ""


class ImageTool(Protocol):
    """One way to build and run images. All of it raises StepFailed."""

    name: str

    def build(
        self, context: Path, tag: str, values: Mapping[str, str], *, secret: tuple[str, Path], volumes: Sequence[str]
    ) -> None:
        """values: build arguments. secret: id and file. volumes: HOST:CONTAINER[:ro], for the build alone."""

    def output(self, tag: str, command: Sequence[str]) -> str:
        """stdout of a command in a container, as the image's user."""

    def serve(
        self, tag: str, environ: Mapping[str, str], *, port: int, volumes: Sequence[str]
    ) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """The image's server on this port of 127.0.0.1. The process ends when it does."""

    def output_beside_server(self, command: Sequence[str], port: int) -> str:
        """stdout of a command in the server's container."""

    def clean(self, tag: str, *, keep: bool) -> None:
        """Removes containers, and the image unless it is to be kept."""


class Daemon:
    """docker or podman."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._container = f"octavo-{secrets.token_hex(4)}"

    def build(
        self, context: Path, tag: str, values: Mapping[str, str], *, secret: tuple[str, Path], volumes: Sequence[str]
    ) -> None:
        if volumes and self.name == "docker":
            say(f"docker build knows no --volume: pip's settings hold, but {', '.join(volumes)} will not be there")
            volumes = ()
        command = [self.name, "build", "--tag", tag, "--secret", f"id={secret[0]},src={secret[1]}"]
        command += [part for name, value in values.items() for part in ("--build-arg", f"{name}={value}")]
        command += [part for volume in volumes for part in ("--volume", volume)]
        run([*command, str(context)], "the build failed: see the lines above", limit_s=BUILD_LIMIT_S)

    def output(self, tag: str, command: Sequence[str]) -> str:
        entry, *rest = command
        return run([self.name, "run", "--rm", "--entrypoint", entry, tag, *rest], f"{entry} failed in the image", quiet=True)

    @contextmanager
    def serve(
        self, tag: str, environ: Mapping[str, str], *, port: int, volumes: Sequence[str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        command = [self.name, "run", "--rm", "--init", "--name", self._container, "--publish", f"127.0.0.1:{port}:8000"]
        command += [part for name, value in environ.items() for part in ("--env", f"{name}={value}")]
        command += [part for volume in volumes for part in ("--volume", volume)]
        with subprocess.Popen([*command, tag]) as server:
            try:
                yield server
            finally:
                subprocess.run([self.name, "rm", "--force", self._container], capture_output=True, check=False)

    def output_beside_server(self, command: Sequence[str], port: int) -> str:
        return run([self.name, "exec", self._container, *command], f"{command[0]} failed", quiet=True)

    def clean(self, tag: str, *, keep: bool) -> None:
        if not keep:
            subprocess.run([self.name, "rmi", "--force", tag], capture_output=True, check=False)


class Buildah:
    """buildah without a daemon and without rights to mount layers: chroot isolation, and storage by plain copies.

    Containers share the network of this machine, so servers listen on 127.0.0.1.
    """

    name = "buildah"

    def __init__(self) -> None:
        self._container: str | None = None

    def command(self, *words: str) -> list[str]:
        return ["buildah", "--storage-driver", "vfs", *words]

    def build(
        self, context: Path, tag: str, values: Mapping[str, str], *, secret: tuple[str, Path], volumes: Sequence[str]
    ) -> None:
        # Docker's format, because OCI's has no health check; one layer a stage, because each is a copy of all before it.
        command = self.command("build", "--isolation", "chroot", "--format", "docker", "--layers=false", "--tag", tag)
        command += ["--secret", f"id={secret[0]},src={secret[1]}"]
        command += [part for name, value in values.items() for part in ("--build-arg", f"{name}={value}")]
        command += [part for volume in volumes for part in ("--volume", volume)]
        run([*command, str(context)], "the build failed: see the lines above", limit_s=BUILD_LIMIT_S)

    def output(self, tag: str, command: Sequence[str]) -> str:
        return run(self._run(self._container_of(tag), command), f"{command[0]} failed in the image", quiet=True)

    @contextmanager
    def serve(
        self, tag: str, environ: Mapping[str, str], *, port: int, volumes: Sequence[str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        here = {"OCTAVO_HOST": "127.0.0.1", "OCTAVO_PORT": str(port)}
        command = self._run(self._container_of(tag), ["octavo", "serve"], environ=here | dict(environ), volumes=volumes)
        with subprocess.Popen(command, start_new_session=True) as server:
            try:
                yield server
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)

    def output_beside_server(self, command: Sequence[str], port: int) -> str:
        assert self._container is not None
        inside = self._run(self._container, command, environ={"OCTAVO_PORT": str(port)})
        return run(inside, f"{command[0]} failed", quiet=True)

    def clean(self, tag: str, *, keep: bool) -> None:
        unwanted = [("rm", self._container)] if self._container else []
        unwanted += [] if keep else [("rmi", tag)]
        for verb, name in unwanted:
            subprocess.run(self.command(verb, name), capture_output=True, check=False)

    def has_image(self, tag: str) -> bool:
        return subprocess.run(self.command("inspect", "--type", "image", tag), capture_output=True, check=False).returncode == 0

    def commit_folder(self, folder: Path, tag: str) -> None:
        """An image of one layer, which is what lies in `folder`."""
        container = run(self.command("from", "scratch"), "buildah cannot begin an image", quiet=True).strip()
        run(self.command("add", "--quiet", container, str(folder), "/"), "buildah cannot copy the base", quiet=True)
        run(self.command("commit", "--quiet", "--rm", container, tag), "buildah cannot keep the base", quiet=True)

    def _container_of(self, tag: str) -> str:
        if self._container is None:
            self._container = run(self.command("from", tag), "buildah cannot start the image", quiet=True).strip()
        return self._container

    def _run(
        self, container: str, command: Sequence[str], *, environ: Mapping[str, str] | None = None, volumes: Sequence[str] = ()
    ) -> list[str]:
        options = [part for name, value in (environ or {}).items() for part in ("--env", f"{name}={value}")]
        options += [part for volume in volumes for part in ("--volume", volume)]
        return self.command("run", "--isolation", "chroot", *options, container, "--", *command)


def find_tool(name: str | None) -> ImageTool:
    """The one named, else the first that works here. Raises StepFailed."""
    for daemon in ("docker", "podman"):
        if name == daemon or (name is None and _works([daemon, "info"])):
            return Daemon(daemon)
    if name == "buildah" or (name is None and _works(["buildah", "--version"])):
        if os.geteuid() != 0:
            raise StepFailed("buildah is used as root here: run this with sudo, or with podman")
        return Buildah()
    raise StepFailed("neither docker nor podman nor buildah works here: install one (Debian/Ubuntu: apt install buildah)")


def _works(command: Sequence[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def make_base(tool: Buildah, suite: str, scratch: Path) -> str:
    """The tag of a base image of this Debian release, made by debootstrap if there is none yet. Raises StepFailed."""
    tag = f"localhost/octavo-base:{suite}"
    if tool.has_image(tag):
        say(f"The base image {tag} is there already")
        return tag
    debootstrap = shutil.which("debootstrap") or shutil.which("debootstrap", path="/usr/sbin")
    if debootstrap is None:
        raise StepFailed("there is no debootstrap to make a base image with: apt install debootstrap, or name one with --base")
    root = scratch / "base"
    say(f"Making the base image {tag} with debootstrap")
    command = [debootstrap, "--variant=minbase", "--include=ca-certificates", suite, str(root)]
    run(command, "debootstrap failed", limit_s=BUILD_LIMIT_S, quiet=True)
    for folder in ("var/cache/apt", "var/lib/apt/lists", *(f"usr/share/{name}" for name in _EXCLUDED)):
        shutil.rmtree(root / folder, ignore_errors=True)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)
    (root / "var/lib/apt/lists/partial").mkdir(parents=True)
    excluded = "".join(f"path-exclude /usr/share/{name}/*\n" for name in _EXCLUDED)
    (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(excluded, encoding="utf-8")
    tool.commit_folder(root, tag)
    return tag


def pip_settings() -> tuple[str, list[str]]:
    """(a pip.conf that holds what this machine's pip is set to, files and folders that it names)."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    # Variables are stronger than files.
    lines_of_pip = sorted(listed.splitlines(), key=lambda line: line.startswith(":env:"))
    settings = {found[1]: found[2].replace("\\n", " ") for line in lines_of_pip if (found := _PIP_LINE.fullmatch(line))}
    words = [word.removeprefix("file://") for value in settings.values() for word in value.split()]
    folders = [_index_root(Path(word)) for word in words if word.startswith("/") and Path(word).exists()]
    lines = [f"{name} = {value}" for name, value in settings.items()]
    return "\n".join(["[global]", *lines, ""]), list(dict.fromkeys(map(str, folders)))


def _index_root(path: Path) -> Path:
    """An index of its own, `…/simple`, names files that lie beside it."""
    return path.parent if path.name == "simple" else path
