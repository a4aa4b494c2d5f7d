"""What happens when a kernel cannot be compiled, kept or loaded: a fallback that is said, and nothing left behind."""

from __future__ import annotations

import ctypes
import threading
from functools import cache

import pytest
import torch

from qbench.kernels import cuda, nvrtc, ops


class Library:
    """NVRTC, with one of its calls failing."""

    def __init__(self, failing: str) -> None:
        self.destroyed = 0
        calls = ("Version", "CreateProgram", "CompileProgram", "GetProgramLogSize", "GetProgramLog", "GetCUBINSize")
        for call in (*calls, "GetCUBIN"):
            setattr(self, f"nvrtc{call}", lambda *_, fails=call == failing: 7 if fails else 0)
        self.nvrtcGetErrorString = _Call(lambda status: b"NVRTC_ERROR")

    def nvrtcDestroyProgram(self, program) -> int:  # noqa: N802
        self.destroyed += 1
        return 0


class _Call:
    restype: object = ctypes.c_int

    def __init__(self, call) -> None:
        self.call = call

    def __call__(self, *arguments):
        return self.call(*arguments)


@pytest.mark.parametrize("failing", ["CreateProgram", "GetCUBINSize", "GetCUBIN"])
def test_every_call_that_fails_is_an_error(monkeypatch, failing):
    library = Library(failing)
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: library)
    with pytest.raises(nvrtc.KernelError, match=r"NVRTC, .*dequantize\.cu.*: NVRTC_ERROR \(status 7\)"):
        nvrtc._compile("dequantize.cu", [])
    assert library.destroyed == (failing != "CreateProgram")


def test_a_disk_without_room_keeps_no_part_of_a_kernel(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    nvrtc._keep(b"code", tmp_path / "kept" / "a.cubin")
    assert [path.read_bytes() for path in (tmp_path / "kept").iterdir()] == [b"code"]
    monkeypatch.setattr(nvrtc.os, "replace", full)
    nvrtc._keep(b"code", tmp_path / "full" / "a.cubin")
    assert list((tmp_path / "full").iterdir()) == []


def test_what_is_tried_is_compiled_side_by_side(monkeypatch):
    """Each once; one that does not compile is no hindrance, and says so when it is loaded."""
    together, asked = threading.Barrier(3, timeout=30), []

    def compile_cubin(file, arch, defines):
        asked.append((file, arch, defines))
        if threading.current_thread() is not threading.main_thread():
            together.wait()
        if file == "rotate.cu":
            raise nvrtc.KernelError("refused")
        return b"code"

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
    monkeypatch.setattr(nvrtc, "_code", cache(nvrtc._code.__wrapped__))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    nvrtc.compile_side_by_side(0, [("dequantize", (("OUT", 0),)), ("rotate_input", ()), ("wide_linear", ())])
    assert nvrtc._code("dequantize.cu", "sm_90a", (("OUT", 0),)) == b"code"
    assert len(asked) == 3
    with pytest.raises(nvrtc.KernelError, match="refused"):
        nvrtc._code("rotate.cu", "sm_90a", ())


@pytest.fixture
def gpu(monkeypatch):
    """Lets the machine have a GPU of a compute capability, on which `broken` kernels do not compile."""

    def make(capability, broken=()):
        def load(entry, device, defines):
            if entry in broken:
                raise nvrtc.KernelError(f"NVRTC refused {entry}")

        monkeypatch.setattr(nvrtc, "load", load)
        monkeypatch.setattr(nvrtc, "compile_side_by_side", lambda device, wanted: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(cuda, "refusal", cuda.refusal.__wrapped__)
        monkeypatch.setattr(cuda, "_plain", cuda._plain.__wrapped__)
        monkeypatch.setattr(ops, "_has_triton", lambda: True)
        return ops.backend(torch.device("cuda", 0), torch.bfloat16)

    return make


@pytest.mark.parametrize("broken", sorted(nvrtc.SOURCES))
def test_a_kernel_that_cannot_be_compiled_is_said_and_replaced(gpu, broken):
    """Whichever it is: a point must not find out in the middle of its evaluation."""
    said = gpu((9, 0), [broken])
    (kernel,) = (name for name, (_, _, launches) in cuda.KERNELS.items() if broken in dict(launches))
    assert cuda.refusal(0, kernel) == f"NVRTC refused {broken}"
    if kernel == "dual_linear":
        assert said.startswith("dual_linear (triton)")
    elif kernel == "dequantize":
        assert "dequantize (triton) + matmul" in said
    else:
        assert kernel not in said


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        ((7, 5), "dual_linear (triton), dequantize (triton) + matmul above batch 64"),
        ((8, 0), "dual_linear (cuda), dequantize (cuda) + matmul above batch 16"),
        ((8, 9), "dual_linear (cuda), dequantize (cuda) + matmul above batch 16"),
        (
            (9, 0),
            "dual_linear, wide_linear, prompt_linear (cuda) or dequantize (cuda) + matmul, by batch",
        ),
        ((10, 0), "dual_linear (cuda), dequantize (cuda) + matmul above batch 16"),
    ],
)
def test_every_gpu_says_what_it_runs(gpu, capability, said):
    assert gpu(capability) == said
    assert cuda._plain(0) == (capability[0] < 9)


@pytest.mark.slow
def test_the_kernels_that_are_tried_compile(compiled):
    """As refusal asks for them, in the emulator."""
    tried = [launch for _, _, launches in cuda.KERNELS.values() for launch in launches]
    assert {entry for entry, _ in tried} == set(nvrtc.SOURCES)
    for entry, defines in tried:
        assert compiled(entry, defines)
