"""UsageMeter: what the engine process and its device have in use, looked at beside the step loop."""

from __future__ import annotations

import threading
import time
from typing import Any

import psutil

from engine.host_cores import usable_cores
from engine.host_memory import total_bytes
from engine.messages import DeviceUsage

INTERVAL_S = 1.0


class UsageMeter:
    """resident_bytes, devices: as they were at the last look. A driver that hangs holds up the looks, and no step."""

    def __init__(self, device: str) -> None:
        """device: as torch names it."""
        self._device = device
        self.resident_bytes = 0
        self.devices: list[DeviceUsage] = []

    def start(self) -> None:
        """Look every INTERVAL_S from a thread, as long as the process runs."""
        threading.Thread(target=self._run, name="usage-meter", daemon=True).start()

    def _run(self) -> None:
        device = _Cpu() if self._device == "cpu" else _Gpu(self._device)
        process = psutil.Process()
        while True:
            self.resident_bytes = int(process.memory_info().rss)
            self.devices = [device.read(self.resident_bytes)]
            time.sleep(INTERVAL_S)


class _Cpu:
    """The engine process as a user of the machine: its resident memory, and its share of the cores."""

    def __init__(self) -> None:
        self._total_bytes = total_bytes()
        self._num_cores = usable_cores()
        self._read_s = time.monotonic()
        self._busy_s = time.process_time()

    def read(self, resident_bytes: int) -> DeviceUsage:
        now, busy_s = time.monotonic(), time.process_time()
        elapsed_s, spent_s = now - self._read_s, busy_s - self._busy_s
        self._read_s, self._busy_s = now, busy_s
        share = min(1.0, spent_s / (elapsed_s * self._num_cores)) if elapsed_s > 0 else None
        return DeviceUsage("cpu", resident_bytes, self._total_bytes, share)


class _Gpu:
    """A card as its driver's library (NVML) sees it; where there is none, torch's books tell what this process holds.

    Not by CUDA calls: those of another thread break a graph that is being captured.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda
        self._index = torch.device(device).index or 0
        properties = torch.cuda.get_device_properties(self._index)
        self._total_bytes = int(properties.total_memory)
        self._nvml, self._handle = _open_nvml(str(properties.uuid))

    def read(self, resident_bytes: int) -> DeviceUsage:
        name = f"cuda:{self._index}"
        if self._nvml is None:
            return DeviceUsage(name, int(self._cuda.memory_reserved(self._index)), self._total_bytes)
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError:
            self._nvml = None
            return self.read(resident_bytes)
        try:
            utilization = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        except self._nvml.NVMLError:  # a slice of a card has none
            utilization = None
        return DeviceUsage(name, int(memory.used), int(memory.total), utilization)


def _open_nvml(uuid: str) -> tuple[Any, Any]:
    """NVML and the card's handle; (None, None) where the library or the card is not to be found. By UUID: NVML counts all cards
    of the machine, CUDA those that this process may see."""
    import pynvml

    try:
        pynvml.nvmlInit()
        for kind in ("GPU", "MIG"):
            try:
                return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
            except pynvml.NVMLError_NotFound:
                continue
    except pynvml.NVMLError:
        pass
    return None, None
