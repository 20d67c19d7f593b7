"""What `docker compose config` prints of our files, worked out here too, because few machines that run the tests have Compose.

Only what our files use: `${NAME}`, `${NAME:-default}` and `${NAME:+other}`, nested; `extends`; merges of maps and lists;
`!reset` and `!override`. Where Docker Compose is installed, the tests compare with it.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
GPU = ("docker-compose.yml",)
CPU = (*GPU, "docker-compose.cpu.yml")
REPLICAS = (*GPU, "docker-compose.replicas.yml")

_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass
class _Tagged:
    """A value that does not merge with what is there: it takes its place, or with `!reset` takes it away."""

    tag: str
    value: Any


class _Loader(yaml.SafeLoader):
    pass


def _construct(loader: yaml.SafeLoader, node: yaml.Node) -> _Tagged:
    if isinstance(node, yaml.MappingNode):
        return _Tagged(node.tag, loader.construct_mapping(node, deep=True))
    return _Tagged(node.tag, loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else None)


for _tag in ("!reset", "!override"):
    _Loader.add_constructor(_tag, _construct)


def resolve(files: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """The model of these files of the top folder, merged, without tags."""
    resolved: dict[str, Any] = {}
    for name in files:
        content = _read(ROOT / name, environ)
        services = content.get("services", {})
        content["services"] = {key: _extended(service, ROOT / name, environ) for key, service in services.items()}
        resolved = _merge(resolved, content)
    found: dict[str, Any] = _untagged(resolved)
    return found


def docker_resolves(files: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The same by Docker Compose; None where it is not installed."""
    return _docker_resolves(tuple(files), tuple(environ.items())) if _has_docker_compose() else None


@functools.cache
def _has_docker_compose() -> bool:
    docker = shutil.which("docker")
    return (
        docker is not None and not subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode
    )


@functools.cache
def _docker_resolves(files: tuple[str, ...], environ: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    flags = [part for name in files for part in ("-f", name)]
    command = ["docker", "compose", "--env-file", "/dev/null", *flags, "config", "--format", "json"]
    made = subprocess.run(command, cwd=ROOT, env=dict(environ), capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    found: dict[str, Any] = json.loads(made.stdout)
    return found


def published(service: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(address of the host, port of the container) of each published port, in either spelling."""
    found = []
    for port in service.get("ports", []):
        if isinstance(port, str):
            address, _, target = port.split(":")
            found.append((address, int(target)))
        else:
            found.append((port.get("host_ip", "0.0.0.0"), port["target"]))
    return found


def gpus(service: Mapping[str, Any]) -> dict[str, Any] | None:
    """The GPU devices that a service reserves."""
    devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert len(devices) <= 1
    return devices[0] if devices else None


def mounts(service: Mapping[str, Any]) -> dict[str, str]:
    """Path in the container -> file of this repository, or name of a volume."""
    found = {}
    for volume in service.get("volumes", []):
        if isinstance(volume, str):
            source, target = volume.split(":")[:2]
        else:
            source, target = volume["source"], volume["target"]
        found[target] = str(Path(source).relative_to(ROOT)) if source.startswith(str(ROOT)) else source.removeprefix("./")
    return found


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """With every `${...}` replaced. Raises ValueError on a form that our files do not use."""
    out, position = "", 0
    while (start := text.find("${", position)) >= 0:
        end = _closing(text, start)
        name = _NAME.match(text, start + 2)
        if name is None:
            raise ValueError(f"no name in {text[start : end + 1]}")
        operator, word = text[name.end() : name.end() + 2], text[name.end() + 2 : end]
        value = environ.get(name[0], "")
        if name.end() < end:
            if operator not in (":-", ":+"):
                raise ValueError(f"{text[start : end + 1]} is none of ${{NAME}}, ${{NAME:-default}} and ${{NAME:+other}}")
            if (operator == ":+") == bool(value):
                value = interpolate(word, environ)
        out, position = out + text[position:start] + value, end + 1
    return out + text[position:]


def _closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if text[position] == "}" and depth == 0:
            return position
    raise ValueError(f"a brace that is not closed in {text}")


def _read(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return interpolate(value, environ)
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return _Tagged(value.tag, walk(value.value)) if isinstance(value, _Tagged) else value

    content: dict[str, Any] = walk(yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader))
    return content


def _extended(service: dict[str, Any], path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    own = {key: value for key, value in service.items() if key != "extends"}
    if "extends" not in service:
        return own
    base_path = path.parent / service["extends"]["file"]
    base = _read(base_path, environ)["services"][service["extends"]["service"]]
    merged: dict[str, Any] = _merge(_extended(base, base_path, environ), own)
    return merged


def _merge(base: Any, own: Any) -> Any:
    if isinstance(own, _Tagged):
        return own if own.tag == "!reset" else own.value
    if isinstance(base, dict) and isinstance(own, dict):
        return base | {key: _merge(base[key], value) if key in base else value for key, value in own.items()}
    if isinstance(base, list) and isinstance(own, list):
        targets = {_target(item) for item in own}
        return [item for item in base if _target(item) not in targets] + own
    return own


def _target(item: Any) -> str:
    """What tells one entry of a list from others: of a volume, the path in the container."""
    return item.split(":")[1] if isinstance(item, str) and ":/" in item else repr(item)


def _untagged(value: Any) -> Any:
    if isinstance(value, _Tagged):
        return _untagged(value.value)
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not (isinstance(item, _Tagged) and item.tag == "!reset")}
        return {key: _untagged(item) for key, item in kept.items()}
    return [_untagged(item) for item in value] if isinstance(value, list) else value
