"""Where a point runs and in which precision: turns `runtime.device` and `runtime.dtype` into torch's objects."""

from __future__ import annotations

import torch

from qbench.config import RuntimeConfig
from qbench.errors import RequestError, unknown
from qbench.layers.linear import backend_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(runtime: RuntimeConfig, here: bool = True) -> torch.device:
    """The device to run on; raises RequestError for an unknown name or, if it must be `here`, one that is not."""
    name = runtime.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise unknown("runtime.device", name, ("auto", "cpu", "cuda", "cuda:0"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("runtime.device", name, ("auto", "cpu", "cuda", "cuda:0")) from None
    if not here:
        return device
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"runtime.device={name}, but torch sees no CUDA device here; use runtime.device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"runtime.device={name}, but there are only {torch.cuda.device_count()} CUDA devices")
    return device


def check_offload(runtime: RuntimeConfig, device: torch.device) -> None:
    """Raises RequestError when there is no GPU to spare: a CPU computes where the weights are anyway."""
    if runtime.offload and device.type != "cuda":
        raise RequestError(
            "runtime.offload=true keeps the weights off a GPU until they are quantized, but this point runs on the "
            f"{device.type.upper()}; leave it out, or say runtime.device=cuda"
        )


def pick_dtype(runtime: RuntimeConfig, device: torch.device) -> torch.dtype:
    """The precision of the model's 16-bit or 32-bit parts; raises RequestError for an unknown name."""
    if runtime.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if runtime.dtype not in DTYPES:
        raise unknown("runtime.dtype", runtime.dtype, ("auto", *DTYPES))
    return DTYPES[runtime.dtype]


def path_here() -> str:
    """How packed weights are multiplied on this machine, in one line."""
    if not torch.cuda.is_available():
        return f"a CPU multiplies packed weights by: {backend_of(torch.device('cpu'))}"
    major, minor = torch.cuda.get_device_capability(0)
    name = f"{torch.cuda.get_device_name(0)} (compute capability {major}.{minor})"
    return f"{name} multiplies packed weights by: {backend_of(torch.device('cuda', 0))}"
