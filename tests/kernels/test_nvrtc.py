"""What happens when a kernel cannot be compiled, kept or loaded: a fallback that is said, and nothing left behind."""

from __future__ import annotations

import ctypes

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


@pytest.mark.parametrize("broken", sorted(nvrtc.SOURCES))
def test_a_kernel_that_cannot_be_compiled_is_said_and_replaced(monkeypatch, broken):
    """Whichever it is: a point must not find out in the middle of its evaluation."""

    def load(entry, device, defines):
        if entry == broken:
            raise nvrtc.KernelError(f"NVRTC refused {entry}")

    monkeypatch.setattr(nvrtc, "load", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "refusal", cuda.refusal.__wrapped__)
    monkeypatch.setattr(ops, "_has_triton", lambda: True)
    assert cuda.refusal(0) == f"NVRTC refused {broken}"
    assert ops.backend(torch.device("cuda", 0), torch.bfloat16).startswith("dual_linear (triton)")


@pytest.mark.slow
def test_the_kernels_that_are_tried_compile(compiled):
    """As refusal asks for them, in the emulator."""
    assert {entry for entry, _ in cuda._EACH_KERNEL} == set(nvrtc.SOURCES)
    for entry, defines in cuda._EACH_KERNEL:
        assert compiled(entry, defines)
