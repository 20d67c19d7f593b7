"""What the facts of `octavo doctor` mean for `octavo serve`: pure functions from facts to findings."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.doctor_facts import Cores, Disk, Gpu, Gpus, Memory, Package, Port, ProcessLimits, SharedMemory, System

LEVELS = ("ok", "warning", "problem")
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)
LEAST_MEMORY = 2 * 2**30  # the demo model, torch and the frontend
LEAST_DISK = 2 * 10**9
LEAST_CAPABILITY = 8.0  # Ampere: bfloat16
# The first driver that runs a CUDA version's programs: https://docs.nvidia.com/deploy/cuda-compatibility
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
_INSTALL = "run scripts/install"


@dataclass(frozen=True)
class Finding:
    """remedy: what to do, for a warning or a problem."""

    subject: str
    level: Literal["ok", "warning", "problem"]
    what: str
    remedy: str = ""


def judge_system(system: System) -> list[Finding]:
    python = ".".join(map(str, system.python))
    what = f"{system.name} on {system.machine}, Python {python}"
    if system.name.startswith("Windows"):
        return [Finding("system", "problem", what, "Octavo runs on Linux and macOS: use WSL")]
    if not OLDEST_PYTHON <= system.python[:2] <= NEWEST_PYTHON:
        return [Finding("system", "problem", what, "install Python 3.11 to 3.14 and run PYTHON=/path/to/it scripts/install")]
    if system.machine not in ("x86_64", "AMD64"):
        return [Finding("system", "warning", what, "Octavo was tried on x86-64 only; there are no CPU kernels for others")]
    return [Finding("system", "ok", what)]


def judge_cores(cores: Cores) -> list[Finding]:
    limited = cores.usable if cores.quota is None else min(cores.usable, cores.quota)
    what = f"{cores.usable} of {cores.online} usable" + (f", time for {cores.quota:g}" if cores.quota is not None else "")
    threads = cores.num_threads or cores.usable
    if threads > max(1.0, limited):
        remedy = f"give --num-threads {max(1, int(limited))}: {threads} threads on {limited:g} cores wait for each other"
        return [Finding("cores", "warning", what, remedy)]
    if limited < 2:
        return [Finding("cores", "warning", what, "give it two or more: the engine and HTTP are two processes")]
    return [Finding("cores", "ok", what)]


def judge_memory(memory: Memory) -> list[Finding]:
    limit = " (a limit of its control group)" if memory.limit is not None else ""
    what = f"{_gb(memory.available)} free{limit} of {_gb(memory.total)}"
    if memory.available < LEAST_MEMORY:
        remedy = f"free some, or raise the container's limit: below {_gb(LEAST_MEMORY)} even the demo model is tight"
        return [Finding("memory", "warning", what, remedy)]
    return [Finding("memory", "ok", what)]


def judge_disks(disks: Sequence[Disk]) -> list[Finding]:
    """What is wrong with each; those that are well in one line for each file system."""
    findings = []
    well: dict[int, list[Disk]] = {}
    for disk in disks:
        if not disk.is_writable:
            what = f"{disk.path}, for {disk.purpose}, cannot be written"
            findings.append(Finding("disk", "problem", what, f"mend its owner and mode, or {disk.setting}"))
        elif disk.free < LEAST_DISK:
            what = f"{_gb(disk.free)} free for {disk.purpose} in {disk.path}"
            findings.append(Finding("disk", "warning", what, f"free some space, or {disk.setting}"))
        else:
            well.setdefault(disk.device, []).append(disk)
    for same in well.values():
        places = ", ".join(f"{disk.purpose} ({disk.path})" for disk in same)
        findings.append(Finding("disk", "ok", f"{_gb(min(disk.free for disk in same))} free for {places}"))
    return findings


def judge_limits(limits: ProcessLimits) -> list[Finding]:
    """Of open files the hard limit counts: `octavo serve` raises its own up to that."""
    files = "any number of" if limits.open_files is None else f"{limits.open_files:,}"
    findings = [Finding("limits", "ok", f"{files} open files")]
    if limits.open_files is not None and limits.open_files < limits.wanted_files:
        remedy = f"raise the hard limit to {limits.wanted_files:,} or lower --max-open-requests: each takes a file"
        findings = [Finding("limits", "warning", f"{files} open files at most", remedy)]
    if limits.cpu_s is not None:
        remedy = "ulimit -t unlimited: the kernel kills the server when that is used up"
        findings.append(Finding("limits", "problem", f"{limits.cpu_s:,} s of processor time", remedy))
    if limits.address_bytes is not None:
        remedy = "ulimit -v unlimited: torch maps far more addresses than it uses"
        findings.append(Finding("limits", "warning", f"{_gb(limits.address_bytes)} of addresses", remedy))
    return findings


def judge_shared_memory(shared: SharedMemory) -> list[Finding]:
    if not shared.exists or not shared.is_writable:
        where = "cannot be written" if shared.exists else "is not there"
        return [Finding("shared memory", "warning", f"/dev/shm {where}", "mount it: `octavo bench --processes` needs a little")]
    return [Finding("shared memory", "ok", f"{_gb(shared.free)} free of {_gb(shared.total)} in /dev/shm; little is needed")]


def judge_gpus(gpus: Gpus) -> list[Finding]:
    torch = gpus.torch
    if "error" in torch:
        return [Finding("torch", "problem", f"it does not work: {torch['error']}", _INSTALL)]
    build = f"for CUDA {torch['cuda']}" if torch["cuda"] else "for CPUs"
    findings = [Finding("torch", "ok", f"torch {torch['version']}, built {build}")]
    if gpus.wanted == "cpu":
        return [*findings, Finding("GPU", "ok", "not looked at: --device cpu")]
    if not gpus.has_driver:
        hidden = gpus.visible is not None and gpus.visible.strip() in ("", "-1")
        what = "hidden by CUDA_VISIBLE_DEVICES" if hidden else "no NVIDIA driver"
        if gpus.wanted == "cuda":
            remedy = "unset CUDA_VISIBLE_DEVICES" if hidden else "install NVIDIA's driver (in a container: --gpus all)"
            return [*findings, Finding("GPU", "problem", what, f"{remedy}, or leave out --device cuda")]
        return [*findings, Finding("GPU", "ok", f"{what}: the CPU serves")]
    if gpus.error or not gpus.cards:
        remedy = "mend the driver (a restart helps after an update of it), or serve with --device cpu"
        return [*findings, Finding("GPU", "problem", gpus.error or "nvidia-smi names no card", remedy)]
    findings += [finding for card in gpus.cards for finding in _judge_card(card)]
    findings += _judge_users(gpus)
    return [*findings, *_judge_build(gpus, torch)]


def _judge_card(card: Gpu) -> list[Finding]:
    subject = f"GPU {card.index}"
    what = f"{card.name}, {_gb(card.free)} free of {_gb(card.total)}, compute capability {card.capability:g}"
    findings = [Finding(subject, "ok", what)]
    if 0 < card.capability < LEAST_CAPABILITY:
        remedy = "take a card of 8.0 (Ampere) or later: older ones have no bfloat16, and were not tried"
        findings = [Finding(subject, "warning", what, remedy)]
    elif card.free < card.total // 2:
        remedy = "end what else uses it, or lower --gpu-memory-utilization; what is taken is missing for KV pages"
        findings = [Finding(subject, "warning", what, remedy)]
    if card.persistence == "Disabled":
        remedy = "nvidia-smi -pm 1 as root: without it a start waits for the driver, and clocks fall when idle"
        findings.append(Finding(subject, "warning", "persistence mode is off", remedy))
    return findings


def _judge_users(gpus: Gpus) -> list[Finding]:
    if not gpus.users:
        return []
    named = [f"{name} (process {pid}){f' {_gb(size)}' if size else ''}" for pid, name, size in gpus.users[:4]]
    return [Finding("GPU", "ok", f"used by {', '.join(named)}{' and others' if len(gpus.users) > 4 else ''}")]


def _judge_build(gpus: Gpus, torch: Mapping[str, Any]) -> list[Finding]:
    """Whether driver and torch fit each other."""
    driver = gpus.cards[0].driver
    if not torch["cuda"]:
        return [
            Finding(
                "driver", "problem", f"driver {driver}, and torch is the build for CPUs", f"{_INSTALL}, which takes the other"
            )
        ]
    needed = LEAST_DRIVER.get(int(torch["cuda"].split(".")[0]))
    major = re.match(r"\d+", driver)
    if needed and major and int(major[0]) < needed:
        remedy = f"update the driver to {needed} or later"
        return [Finding("driver", "problem", f"driver {driver} is too old for CUDA {torch['cuda']}", remedy)]
    if not torch["usable"]:
        remedy = "see `python -c 'import torch; torch.cuda.init()'`; in a container give it the GPU (--gpus all)"
        return [Finding("driver", "problem", f"driver {driver}, but torch finds no usable GPU", remedy)]
    return [Finding("driver", "ok", f"driver {driver}, for CUDA {torch['cuda']}")]


def judge_compilers(on_gpu: bool, answer: Mapping[str, Any]) -> list[Finding]:
    """answer: of the part `toolchain` on a GPU, of `cpu_kernels` elsewhere."""
    if on_gpu:
        if "error" in answer:
            return [Finding("compiler", "problem", "Triton could not compile its kernels", str(answer["error"]))]
        return [Finding("compiler", "ok", str(answer["said"]))]
    if "error" in answer:
        return [Finding("CPU kernels", "warning", f"could not be looked for: {answer['error']}", _INSTALL)]
    if answer["compiled"]:
        return [Finding("CPU kernels", "ok", f"compiled for this CPU, by {answer['compiler']}")]
    reason = str(answer["reason"])
    if "not compiled yet" in reason:
        return [Finding("CPU kernels", "ok", "not compiled yet: the first start does it, in some 10 s")]
    return [
        Finding("CPU kernels", "warning", f"none, so torch does everything, slower: {reason}", "serve without, or mend that")
    ]


def judge_packages(packages: Sequence[Package] | None) -> list[Finding]:
    """None: Octavo itself is not installed, so that there are no pins to compare with."""
    if packages is None:
        return [Finding("packages", "warning", "Octavo is run from a folder and not installed", _INSTALL)]
    missing = [each.name for each in packages if each.installed is None]
    other = [f"{each.name} {each.installed} (pinned {each.pinned})" for each in packages if not _is_pinned(each)]
    findings = []
    if missing:
        findings.append(Finding("packages", "problem", f"missing: {', '.join(missing)}", _INSTALL))
    if other:
        remedy = f"{_INSTALL}; Octavo is tested with its pins only"
        findings.append(Finding("packages", "warning", f"not as pinned: {', '.join(other)}", remedy))
    return findings or [Finding("packages", "ok", f"all {len(packages)} as pinned")]


def _is_pinned(package: Package) -> bool:
    return package.installed is None or package.installed.split("+")[0] == package.pinned


def judge_port(port: Port) -> list[Finding]:
    where = f"{port.number} on {port.host} ({port.setting})"
    if not port.error:
        return [Finding("port", "ok", f"{where} is free")]
    if port.error == errno.EADDRINUSE:
        holder = f" by {port.holder}" if port.holder else ""
        remedy = f"stop that, or choose another with {port.setting} {port.number + 1}"
        return [Finding("port", "problem", f"{where} is taken{holder}", remedy)]
    if port.error == errno.EACCES:
        return [Finding("port", "problem", f"{where} may not be opened by this user", "choose one above 1023")]
    return [
        Finding("port", "problem", f"{where} cannot be opened: {port.reason}", "give an address of this machine with --host")
    ]


def judge_environment(environ: Mapping[str, str], unknown: Sequence[tuple[str, str]]) -> list[Finding]:
    """unknown: OCTAVO_ variables that are no setting, each with the hint that goes behind it. No secret's value is shown."""
    findings = [
        Finding("environment", "problem", f"{name} is no setting{hint}", "correct it or unset it: the server refuses to start")
        for name, hint in unknown
    ]
    plain = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES")
    said = [f"{name}={environ[name]}" for name in plain if name in environ]
    said += [f"{name} is set" for name in ("HF_TOKEN", "OCTAVO_API_KEY", "HTTPS_PROXY", "https_proxy") if environ.get(name)]
    return [*findings, Finding("environment", "ok", ", ".join(said) or "nothing of the Hub or CUDA is set")]


def judge_exposure(host: str, has_keys: bool, has_tls: bool) -> list[Finding]:
    """What others may reach."""
    if host in ("127.0.0.1", "::1", "localhost"):
        return []
    if not has_keys:
        remedy = "set --api-key-file, unless something in front asks for keys"
        return [Finding("security", "warning", f"anybody who reaches {host} may use the server", remedy)]
    if not has_tls:
        remedy = "set --tls-cert, unless something in front does TLS"
        return [Finding("security", "warning", f"keys and prompts travel in the clear on {host}", remedy)]
    return [Finding("security", "ok", "keys and TLS")]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
