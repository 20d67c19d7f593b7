"""UsageMeter: the process on a CPU, and a card with its driver's library, without it, and in slices (by a stand-in of NVML)."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from engine.usage_meter import UsageMeter, _Cpu, _Gpu

GIB = 2**30


def test_a_cpu_is_what_the_process_takes_of_it() -> None:
    cpu = _Cpu()
    until_s = time.process_time() + 0.05
    while time.process_time() < until_s:
        pass
    usage = cpu.read(123)
    assert (usage.name, usage.memory_used_bytes) == ("cpu", 123)
    assert 0 < usage.memory_total_bytes <= psutil.virtual_memory().total
    assert usage.utilization is not None and 0 < usage.utilization <= 1


def test_it_looks_from_a_thread() -> None:
    meter = UsageMeter("cpu")
    meter.start()
    limit_s = time.monotonic() + 30
    while not meter.devices and time.monotonic() < limit_s:
        time.sleep(0.01)
    assert meter.resident_bytes > 2**20 and meter.devices[0].memory_used_bytes == meter.resident_bytes


class NvmlError(Exception):
    pass


class NotFound(NvmlError):
    pass


class Nvml:
    """uuids: of the cards and slices there are; None is a machine without the library."""

    NVMLError, NVMLError_NotFound = NvmlError, NotFound

    def __init__(self, uuids: list[str] | None) -> None:
        self.uuids = uuids
        self.lost = False

    def nvmlInit(self) -> None:
        if self.uuids is None:
            raise NvmlError

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert self.uuids is not None
        if uuid not in self.uuids:
            raise NotFound
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        if self.lost:
            raise NvmlError
        return SimpleNamespace(used=30 * GIB, total=80 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle.startswith("MIG"):
            raise NvmlError
        return SimpleNamespace(gpu=75)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(uuids: list[str] | None) -> tuple[_Gpu, Nvml]:
        nvml = Nvml(uuids)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        properties = SimpleNamespace(total_memory=81 * GIB, uuid="11-22")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 20 * GIB)
        return _Gpu("cuda"), nvml

    return make


@pytest.mark.parametrize(
    ("uuids", "used", "total", "utilization"),
    [
        (["GPU-33", "GPU-11-22"], 30, 80, 0.75),
        (["MIG-11-22"], 30, 80, None),
        (["GPU-33"], 20, 81, None),
        (None, 20, 81, None),
    ],
)
def test_a_card(card: Any, uuids: list[str] | None, used: int, total: int, utilization: float | None) -> None:
    usage = card(uuids)[0].read(0)
    assert (usage.name, usage.utilization) == ("cuda:0", utilization)
    assert (usage.memory_used_bytes, usage.memory_total_bytes) == (used * GIB, total * GIB)


def test_a_card_that_is_lost_leaves_torchs_books(card: Any) -> None:
    gpu, nvml = card(["GPU-11-22"])
    nvml.lost = True
    assert gpu.read(0).memory_used_bytes == gpu.read(0).memory_used_bytes == 20 * GIB
