"""What a model takes: the bytes of its weights by component, and the peak of the memory while something runs.

Weights are counted from the buffers as they are held. What an allocator or the kernel reports holds caches and
whatever else is alive; it is good for one thing, a peak, and is read for that alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbench.layers.experts import stacked_parameters
from qbench.layers.linear import packed_weights
from qbench.model.linears import find_linears
from qbench.record.quantization import WeightBytes


def weight_bytes(model: Any) -> WeightBytes:
    """Bytes that the model's parameters and buffers take in memory now, by component; a shared one counts once.

    A weight that is laid out for a GPU's kernel counts as laid out. What is stored is `Format.nbytes`.
    Linear weights that are not quantized (all of the original's, the routers of a mixture) are `linears`.
    """
    quantized: Counter[str] = Counter()
    others: Counter[str] = Counter()
    holders = packed_weights(model).values()
    for holder in holders:
        quantized.update(holder.held_bytes())
    packed = {id(buffer) for holder in holders for buffer in holder.buffers(recurse=False)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = id(getattr(model.get_output_embeddings(), "weight", None))
    linears = linear_names(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in packed:
            continue
        if id(tensor) in embeddings:
            place = "embeddings"
        elif id(tensor) == head:
            place = "head"
        else:
            place = "linears" if name in linears else "rest"
        others[place] += tensor.nbytes
    return WeightBytes(dict(quantized), **others)


def linear_names(model: Any) -> set[str]:
    """Names of the parameters that are linear weights and not quantized."""
    found = find_linears(model)
    names = {f"{name}.weight" for name in found.layers} | {s.name for s in found.skipped}
    # Skipped.name is a module's name for an nn.Linear, and a parameter's name otherwise
    names |= {f"{s.name}.weight" for s in found.skipped}
    return names | {f"{name}.{key}" for name, module in found.experts.items() for key in stacked_parameters(module)}


class Peak:
    """The peak of what is in use from `Peak(device)` on: the CUDA allocator's, or the resident memory of the process.

    Both count everything alive, weights included. Resident memory needs Linux, whose high-water mark can be reset.
    """

    def __init__(self, device: torch.device, tidy: bool = True) -> None:
        """With `tidy`, what is free is given back first, which takes a tenth of a second."""
        self.device = device
        if tidy:
            gc.collect()
        if device.type == "cuda":
            if tidy:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.reset = _reset_resident_peak()

    @property
    def alloc_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    @property
    def rss_bytes(self) -> int | None:
        if self.device.type == "cuda" or not self.reset:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _reset_resident_peak() -> bool:
    """Sets the process's high-water mark to what is resident now; False where that cannot be done."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc keeps is not in use
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
