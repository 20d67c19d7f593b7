"""`octavo doctor [MODEL] [flags of serve]`: looks at everything that a start depends on, and says what to do where it is wrong.

Nothing is fetched, loaded or changed. All looks are taken at once, each in a thread with a time limit: a disk that hangs, a
driver that does not answer or a package that is broken costs its own line and no other. At the top this file imports the
standard library alone, so that it can say which package is missing.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server import doctor_checks as checks
from server import doctor_facts as facts
from server.doctor_checks import Finding

if TYPE_CHECKING:
    from server.config import ServerConfig

LOOK_LIMIT_S = 20.0
ENGINE_LIMIT_S = facts.PROBE_LIMIT_S + facts.NVIDIA_SMI_LIMIT_S + 10.0
_COLORS = {"ok": "\033[32m", "warning": "\033[33m", "problem": "\033[31m"}
_PLAIN = "\033[0m"


@dataclass(frozen=True)
class Look:
    """One thing to look at. judge_what: from what `read` returned to findings; never raises."""

    subject: str
    read: Callable[[], Any]
    judge: Callable[[Any], Iterable[Finding]]
    limit_s: float = LOOK_LIMIT_S


def run_doctor(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Prints the findings; 0, or 1 where one is a problem. Raises ConfigError for a wrong command line."""
    as_json = "--json" in argv
    try:
        looks, found = _looks([each for each in argv if each != "--json"], environ)
    except ImportError as error:
        looks, found = (
            _looks_without_settings(),
            [Finding("packages", "problem", f"the server's own packages do not import: {error}", "run scripts/install")],
        )
    findings = []
    for finding in (*found, *examine(looks)):
        findings.append(finding)
        if not as_json:
            print(_line(finding, environ), flush=True)
    problems, warnings = (sum(each.level == level for each in findings) for level in ("problem", "warning"))
    if as_json:
        print(
            json.dumps({"problems": problems, "warnings": warnings, "findings": [asdict(each) for each in findings]}, indent=2)
        )
    else:
        print(_summary(problems, warnings))
    return int(problems > 0)


def examine(looks: Sequence[Look]) -> Iterator[Finding]:
    """All at once; the findings come in the order of `looks`, each as soon as it and those before it are there."""
    results: list[list[Finding]] = [[] for _ in looks]
    start_s = time.monotonic()

    def take(look: Look, into: list[Finding]) -> None:
        try:
            into.extend(look.judge(look.read()))
        except Exception as error:
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            into.append(Finding(look.subject, "warning", f"could not be looked at: {why}", "look at it yourself"))

    # Daemons: one that hangs in the kernel must not keep the program from ending.
    threads = [threading.Thread(target=take, args=pair, daemon=True) for pair in zip(looks, results, strict=True)]
    for thread in threads:
        thread.start()
    for look, thread, result in zip(looks, threads, results, strict=True):
        thread.join(max(0.0, start_s + look.limit_s - time.monotonic()))
        if thread.is_alive():
            yield Finding(look.subject, "warning", f"no answer within {look.limit_s:g} s", "look at it yourself: it hangs")
        else:
            yield from result


def _looks(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[list[Look], list[Finding]]:
    """What is to be looked at for these flags, and what is wrong with the settings already. Raises ConfigError."""
    from engine.model_cache import cache_root, hub_cache
    from server.doctor_model import judge_model, read_model

    config, found = _settings(argv, environ)
    engine = config.engine_config()
    from server.config import has_nvidia_driver

    on_gpu = engine.device == "cuda" or (engine.device == "auto" and has_nvidia_driver(environ))
    part = "toolchain" if on_gpu else "cpu_kernels"
    looks = [
        Look("system", facts.read_system, checks.judge_system),
        Look("cores", lambda: facts.read_cores(config.num_threads), checks.judge_cores),
        Look("memory", facts.read_memory, checks.judge_memory),
        _disk_look(cache_root(engine.model), hub_cache(engine.model), environ, on_gpu=on_gpu),
        Look("shared memory", facts.read_shared_memory, checks.judge_shared_memory),
        Look("limits", lambda: facts.read_limits(config.max_open_requests), checks.judge_limits),
        Look("packages", facts.read_packages, checks.judge_packages),
        Look("GPU", lambda: facts.read_gpus(config.device, environ), checks.judge_gpus, ENGINE_LIMIT_S),
        Look("compiler", lambda: facts.ask_engine(part), lambda answer: checks.judge_compilers(on_gpu, answer), ENGINE_LIMIT_S),
        *_port_looks(config),
        Look(
            "security",
            config.read_keys,
            lambda keys: checks.judge_exposure(config.host, bool(keys), bool(config.tls_cert)),
        ),
        Look("environment", lambda: _unknown(environ), lambda unknown: checks.judge_environment(environ, unknown)),
        Look("model", lambda: read_model(engine, environ), judge_model, ENGINE_LIMIT_S),
    ]
    return looks, found


def _looks_without_settings() -> list[Look]:
    """What can be looked at by the standard library alone."""
    return [
        Look("system", facts.read_system, checks.judge_system),
        Look("packages", facts.read_packages, checks.judge_packages),
    ]


def _settings(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[ServerConfig, list[Finding]]:
    """The settings, and what is wrong with those of the environment: such are left out. Raises ConfigError for wrong flags."""
    from engine.errors import ConfigError
    from server.config import load_config

    others = {name: value for name, value in environ.items() if not name.startswith("OCTAVO_")}
    unknown = {name for name, _ in _unknown(environ)}
    known = {name: value for name, value in environ.items() if name not in unknown}
    try:
        return load_config(argv, known, command="doctor"), []
    except ConfigError as error:
        config = load_config(argv, others, command="doctor")
        remedy = "correct it: the server refuses to start; all of the environment's settings are left out below"
        return config, [Finding("settings", "problem", error.message, remedy)]


def _unknown(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    from server.config import ServerConfig
    from server.config_sources import nearest

    known = list(ServerConfig.model_fields)
    names = [f"OCTAVO_{name.upper()}" for name in known]
    return [(name, nearest(name, names)) for name in facts.unknown_settings(environ, known)]


def _disk_look(models: Path, hub: Path, environ: Mapping[str, str], *, on_gpu: bool) -> Look:
    home = Path.home() / ".cache"
    folders = [("models", models, "name another folder with --download-dir")]
    if hub != models:
        folders.append(("downloads of the Hub", hub, "name another folder with HF_HOME or --download-dir"))
    if on_gpu:
        triton = Path(environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        folders.append(("kernels", triton, "name another folder with TRITON_CACHE_DIR"))
    else:
        folders.append(("kernels", home / "octavo" / "kernels", "set HOME to a folder that this user may write"))
    folders.append(("temporary files", Path(tempfile.gettempdir()), "name another folder with TMPDIR"))
    return Look("disk", lambda: [facts.read_disk(*folder) for folder in folders], checks.judge_disks)


def _port_looks(config: ServerConfig) -> list[Look]:
    ports = [("--port", config.port), ("--metrics-port", config.metrics_port)]
    return [
        Look("port", lambda each=(name, number): facts.read_port(each[0], config.host, each[1]), checks.judge_port)  # type: ignore[misc]
        for name, number in ports
        if number
    ]


def _line(finding: Finding, environ: Mapping[str, str]) -> str:
    """`level  subject: what: remedy`; in a terminal filled to its width, with the level in color."""
    text = f"{finding.subject}: {finding.what}" + (f": {finding.remedy}" if finding.remedy else "")
    level = f"{finding.level:<9}"
    if not sys.stdout.isatty():
        return level + text
    width = max(40, shutil.get_terminal_size().columns - 1)
    lines = textwrap.wrap(text, width - len(level), break_on_hyphens=False, break_long_words=False)
    if not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb":
        level = f"{_COLORS[finding.level]}{level}{_PLAIN}"
    return level + ("\n" + " " * 9).join(lines)


def _summary(problems: int, warnings: int) -> str:
    def count(number: int, noun: str) -> str:
        return f"{number} {noun}{'' if number == 1 else 's'}"

    if not problems and not warnings:
        return "All is well."
    return f"{count(problems, 'problem')}, {count(warnings, 'warning')}. docs/troubleshooting.md says more."
