"""The CUDA C++ kernels on a CPU: compiled with emulator.h, launched by the library's own code."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qbench.kernels import cuda, nvrtc

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(entry, defines) -> the emulated kernel; a file is compiled once per session and set of defines."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on this machine; it compiles the CUDA kernels for the CPU")
    folder, libraries = tmp_path_factory.mktemp("emulated"), {}

    def build(entry: str, defines: tuple[tuple[str, int], ...]) -> Callable[..., None]:
        file = nvrtc.SOURCES[entry]
        if (file, defines) not in libraries:
            target = folder / f"{len(libraries)}.so"
            entries = " ".join(f"ENTRY({name})" for name, source in nvrtc.SOURCES.items() if source == file)
            flags = [f'-DSOURCE="{file}"', f"-DENTRIES={entries}", *(f"-D{name}={value}" for name, value in defines)]
            command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-w", *flags]
            command += [f"-I{nvrtc.FOLDER}", f"-I{HERE}", str(HERE / "emulator.cpp"), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            if "unrecognized command" in done.stderr or "<barrier>" in done.stderr:
                pytest.skip("this g++ is too old for C++20's barriers")
            assert done.returncode == 0, done.stderr
            libraries[file, defines] = ctypes.CDLL(str(target))
        return partial(libraries[file, defines].launch, entry.encode())

    return build


@pytest.fixture
def emulated(monkeypatch, compiled):
    """Makes qbench.kernels.cuda launch the emulated kernels on CPU tensors; returns the list of launches."""
    launches = []

    def launch(kernel, grid, threads, shared_bytes, stream, arguments, cluster=1, early=False):
        launches.append((grid, threads, shared_bytes, cluster))
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        written = kernel((ctypes.c_uint * 3)(*grid), threads, shared_bytes, cluster, pointers)
        assert written == 0, f"{written} barriers' memory was used for something else"

    def tensor_map(x, rows, columns):
        assert columns == 64
        assert x.stride(1) == 1
        assert x.stride(0) % 8 == 0
        assert x.data_ptr() % 16 == 0
        return (ctypes.c_uint64 * 16)(x.data_ptr(), x.shape[1], x.shape[0], 2 * x.stride(0), rows)

    monkeypatch.setattr(nvrtc, "tensor_map", tensor_map)
    monkeypatch.setattr(nvrtc, "clusters_at_work", lambda function, *_: 2)  # so that a block takes several tiles of y
    monkeypatch.setattr(nvrtc, "load", lambda entry, device, defines: compiled(entry, defines))
    monkeypatch.setattr(nvrtc, "launch", launch)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    return launches
