"""Attention of one token by its Triton kernels in the interpreter."""

from __future__ import annotations

import pytest

import tests.kernels.interpreted  # noqa: F401  (skips where there is a GPU or no Triton)
from qbench.kernels import triton_attend
from tests.kernels.test_attend import SIZES, check


@pytest.mark.parametrize("sizes", SIZES)
def test_two_launches(sizes):
    check(triton_attend.attend, *sizes)
