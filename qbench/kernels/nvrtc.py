"""Compiles and launches the CUDA C++ kernels with what torch itself brings: NVRTC and the driver, through ctypes.

No compiler is needed on the machine. A compiled kernel is cached in `$XDG_CACHE_HOME/qbench/kernels` (default
`~/.cache`), named by the hash of the sources, its options and NVRTC's version; a cache that cannot be written only
costs the second process its time. Compiling is never done inside a CUDA-graph capture that was preceded by one eager
call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from torch import Tensor

FOLDER = Path(__file__).parent
SOURCES = {  # of each kernel
    "dual_linear": "dual_linear.cu",
    "scale_input": "dual_linear.cu",
    "wide_linear": "wide_linear.cu",
    "tile_input": "wide_linear.cu",
    "prompt_linear": "prompt_linear.cu",
    "dequantize": "dequantize.cu",
    "rotate_input": "rotate.cu",
}


class KernelError(RuntimeError):
    """A kernel could not be compiled or launched; the message carries the compiler's or driver's own words."""


def compile_cubin(file: str, arch: str, defines: dict[str, int]) -> bytes:
    """Machine code of `file` under `defines` for `arch` (such as `sm_90a`); raises KernelError."""
    options = [f"-arch={arch}", "-std=c++17", "-default-device", *(f"-D{k}={v}" for k, v in sorted(defines.items()))]
    key = hashlib.sha256(repr((file, _sources(), options, _nvrtc_version())).encode()).hexdigest()[:32]
    cached = cache_folder() / f"{arch}-{key}.cubin"
    if cached.is_file():
        return cached.read_bytes()
    code = _compile(file, [*options, f"-I{FOLDER}"])
    _keep(code, cached)
    return code


def compile_side_by_side(device: int, wanted: Collection[tuple[str, tuple[tuple[str, int], ...]]]) -> None:
    """The kernels and defines that `load` will be asked for, a thread each; what does not compile is said by `load`."""
    arch = _arch(device)

    def one(asked: tuple[str, tuple[tuple[str, int], ...]]) -> None:
        entry, defines = asked
        with suppress(KernelError):
            _code(SOURCES[entry], arch, defines)

    with ThreadPoolExecutor(max(1, len(wanted))) as threads:
        list(threads.map(one, wanted))


@cache
def _code(file: str, arch: str, defines: tuple[tuple[str, int], ...]) -> bytes:
    return compile_cubin(file, arch, dict(defines))


def _arch(device: int) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")  # a: with wgmma, which Hopper alone has


def _keep(code: bytes, cached: Path) -> None:
    """Writes the cache in one step; a folder that cannot be written or a full disk leaves nothing behind."""
    temporary = None
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
            temporary = file.name
            file.write(code)
        os.replace(temporary, cached)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@cache
def _sources() -> list[bytes]:
    """All of them: a kernel includes others' headers."""
    return [path.read_bytes() for path in sorted(FOLDER.glob("*.cu*"))]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qbench" / "kernels"


@cache
def _nvrtc() -> ctypes.CDLL:
    import torch

    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    candidates = [name]
    for root in {Path(torch.__file__).parent.parent, *map(Path, _site_packages())}:
        candidates += [str(path) for path in root.glob(f"nvidia/*/lib/{name}")]
    for candidate in candidates:
        try:
            for builtins in sorted(Path(candidate).parent.glob("libnvrtc-builtins.so.*")) if "/" in candidate else ():
                ctypes.CDLL(str(builtins))  # NVRTC opens it by name, which finds it only if it is loaded already
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise KernelError(f"{name} was not found; it comes with torch's CUDA wheels (nvidia-cuda-nvrtc)")


def _site_packages() -> list[str]:
    import sys

    return [path for path in sys.path if path.endswith("site-packages")]


@cache
def _nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _checked(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "asking for the version")
    return major.value, minor.value


def _checked(status: int, what: str) -> None:
    if status:
        nvrtc = _nvrtc()
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise KernelError(f"NVRTC, {what}: {(nvrtc.nvrtcGetErrorString(status) or b'').decode()} (status {status})")


def _compile(file: str, options: list[str]) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    source = (FOLDER / file).read_bytes()
    _checked(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, file.encode(), 0, None, None), f"reading {file}")
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            size = ctypes.c_size_t()
            _checked(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), f"the log of {file}")
            log = ctypes.create_string_buffer(size.value)
            _checked(nvrtc.nvrtcGetProgramLog(program, log), f"the log of {file}")
            raise KernelError(f"NVRTC refused {file} {' '.join(options)}: {log.value.decode(errors='replace')}")
        size = ctypes.c_size_t()
        _checked(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), f"the size of {file}'s code")
        code = ctypes.create_string_buffer(size.value)
        _checked(nvrtc.nvrtcGetCUBIN(program, code), f"{file}'s code")
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


# ------------------------------------------------------------------------------------------------ the driver

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
EARLY_START = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared_bytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the CUDA driver is missing: {error}") from error


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise KernelError(f"{what}: {text.value.decode() if text.value else status}")


@cache
def _module(file: str, device: int, defines: tuple[tuple[str, int], ...]) -> ctypes.c_void_p:
    import torch

    code, module = _code(file, _arch(device), defines), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # the driver's calls need torch's context to be current
        _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "loading a kernel")
    return module


@cache
def load(entry: str, device: int, defines: tuple[tuple[str, int], ...]) -> ctypes.c_void_p:
    """The kernel `entry` on CUDA device `device`, compiled if need be; raises KernelError."""
    import torch

    function = ctypes.c_void_p()
    module = _module(SOURCES[entry], device, defines)
    with torch.cuda.device(device):
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, entry.encode()), f"finding {entry}")
        if entry.endswith("_linear"):
            limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
            _check(_driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, limit), "raising the shared memory limit")
    return function


def clusters_at_work(function: ctypes.c_void_p, threads: int, shared_bytes: int, cluster: int) -> int:
    """How many clusters of `cluster` blocks the device runs at a time: their blocks share a part of the device."""
    return _clusters_at_work(function.value, threads, shared_bytes, cluster)


@cache
def _clusters_at_work(function: int, threads: int, shared_bytes: int, cluster: int) -> int:
    attributes = (_Attribute * 1)()
    attributes[0].id, attributes[0].value[:3] = CLUSTER_DIMENSION, (cluster, 1, 1)
    config, found = _Config(cluster, 1, 1, threads, 1, 1, shared_bytes, None, attributes, 1), ctypes.c_int()
    asked = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(found), ctypes.c_void_p(function), ctypes.byref(config))
    _check(asked, "asking how many clusters run at a time")
    return found.value


TENSOR_UINT16, SWIZZLE_128_BYTES, PROMOTE_256_BYTES = 1, 3, 3  # CU_TENSOR_MAP_...


def tensor_map(x: Tensor, rows: int, columns: int) -> ctypes.Array:
    """How box copies read x `[M, K]` of 16-bit floats: boxes `[rows, columns]`, swizzled; zeros beyond its edges.

    x starts at a multiple of 16 bytes, and so do its rows.
    """
    buffer = ctypes.create_string_buffer(128 + 64)
    at = -ctypes.addressof(buffer) % 64  # the driver wants the map at a multiple of 64 bytes
    found = (ctypes.c_uint64 * 16).from_buffer(buffer, at)
    sizes, strides = (ctypes.c_uint64 * 2)(x.shape[1], x.shape[0]), (ctypes.c_uint64 * 1)(2 * x.stride(0))
    box, steps = (ctypes.c_uint32 * 2)(columns, rows), (ctypes.c_uint32 * 2)(1, 1)
    address = ctypes.c_void_p(x.data_ptr())
    how = (0, SWIZZLE_128_BYTES, PROMOTE_256_BYTES, 0)
    encode = _driver().cuTensorMapEncodeTiled
    _check(encode(found, TENSOR_UINT16, 2, address, sizes, strides, box, steps, *how), "describing x")
    return found


def launch(
    function: ctypes.c_void_p,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    stream: int,
    arguments: list[ctypes._SimpleCData | ctypes.Structure | ctypes.Array],
    cluster: int = 1,
    early: bool = False,
) -> None:
    """Launches on `stream` (a raw handle) with `cluster` blocks along x per cluster; raises KernelError.

    `early` lets the kernel start before the one in front has ended (programmatic dependent launch); it must wait itself
    (griddepcontrol.wait) before it touches anything that an earlier kernel writes or reads. What a kernel two in front
    wrote it may read before, if the one in front waits before it lets another start: so it is with GATED experts.
    """
    attributes = (_Attribute * 2)()
    count = 0
    if cluster > 1:
        attributes[count].id, attributes[count].value[:3] = CLUSTER_DIMENSION, (cluster, 1, 1)
        count += 1
    if early:
        attributes[count].id, attributes[count].value[0] = EARLY_START, 1
        count += 1
    config = _Config(*grid, threads, 1, 1, shared_bytes, stream, attributes, count)
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
    _check(_driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), f"launching {grid}x{threads}")
