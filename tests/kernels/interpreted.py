"""Runs the quantization kernels on CPU tensors in Triton's interpreter, so that their logic is tested without a GPU.

Functions are made interpretable when they are defined, so TRITON_INTERPRET is set in tests/conftest.py, before anything
imports triton. Without Triton, or where a GPU is present and the `gpu` tests run the compiled kernels instead, the
importing module is skipped.
"""

from __future__ import annotations

import os

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU is here: the kernels are tested compiled, with -m gpu", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is set to something else than 1", allow_module_level=True)
interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    _patch(tensor, scope)
    # scalars are arrays of one element here, which numpy 2.4 no longer turns into an int by itself
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor


@pytest.fixture
def kernels(monkeypatch):
    """A function that calls another twice, on plain torch and on the interpreted kernels, and returns both results."""
    from qbench.quant import gpu

    def both(call):
        plain = call()
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "enabled", lambda tensor: True)
            return plain, call()

    return both
