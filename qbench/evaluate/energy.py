"""Energy of a GPU from NVML's counter, where there are the package nvidia-ml-py and a GPU that counts (from Volta on).

The counter is the whole board's: another process on it, or its idle power, is in the number as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 2.0  # the counter moves only some ten times a second: over less, its steps would show


def joules_per_token(work: Callable[[], int], device: torch.device) -> float | None:
    """Repeats `work`, which returns how many tokens it made, for SECONDS; None where the energy is not counted."""
    handle = _handle(device)
    if handle is None:
        return None
    import pynvml

    torch.cuda.synchronize(device)
    millijoules, started, tokens = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        tokens += work()
        torch.cuda.synchronize(device)
    return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - millijoules) / 1e3 / tokens


def _handle(device: torch.device) -> Any:
    """NVML's handle of a CUDA device, found by its UUID: CUDA_VISIBLE_DEVICES renumbers, NVML does not."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, a slice of a GPU, a GPU that does not count
        return None
    return handle
