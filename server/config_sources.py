"""Where settings are written: YAML files and the environment, each read into names and values with what to call them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError

CONFIGS_DIR = Path(__file__).parent.parent / "configs"
ENV_PREFIX = "OCTAVO_"


@dataclass(frozen=True)
class Source:
    """Where some values come from. `label` turns a key into what the user wrote, for messages."""

    place: str
    values: dict[str, Any]
    label: Callable[[str], str]


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' or nothing, to end an error about an unknown name."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def yaml_source(path: Path) -> Source:
    """Reads one YAML file; a null counts as not given. Raises ConfigError when it cannot be read or is not a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the configuration file {path} cannot be read: {' '.join(str(error).split())}", param="config"
        ) from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"the configuration file {path} must hold `name: value` lines", param="config")
    values = {str(key).replace("-", "_"): value for key, value in (content or {}).items() if value is not None}
    return Source(str(path), values, lambda key: key)


def env_source(environ: Mapping[str, str]) -> Source:
    values = {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and name != f"{ENV_PREFIX}CONFIG" and value  # compose files pass unset variables as ""
    }
    return Source("the environment", values, lambda key: f"{ENV_PREFIX}{key.upper()}")


def shipped_defaults() -> dict[str, str]:
    """What configs/ sets, in words: one value, or one for each device."""
    everywhere, on_cpu, on_gpu = (yaml_source(CONFIGS_DIR / f"{name}.yaml").values for name in ("default", "cpu", "gpu"))
    shown = {key: _in_words(value) for key, value in everywhere.items()}
    for key in {**on_cpu, **on_gpu}:
        values = {"a CPU": on_cpu.get(key), "a GPU": on_gpu.get(key)}
        devices = {device: _in_words(value) for device, value in values.items() if value is not None}
        only = next(iter(devices.values()))
        shown[key] = only if len(devices) == 1 else ", ".join(f"{value} on {device}" for device, value in devices.items())
    return shown


def _in_words(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
