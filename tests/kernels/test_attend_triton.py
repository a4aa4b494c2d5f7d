"""Attention of one token by its Triton kernels in the interpreter."""

from __future__ import annotations

import pytest

import tests.kernels.interpreted  # noqa: F401  (skips where there is a GPU or no Triton)
from qbench.kernels import triton_attend
from tests.kernels.test_attend import LATENTS, SIZES, check, check_latent


@pytest.mark.parametrize("sizes", SIZES)
def test_two_launches(sizes):
    check(triton_attend.attend, *sizes)


@pytest.mark.parametrize("sizes", LATENTS)
def test_four_launches_over_latents(sizes):
    check_latent(triton_attend.attend_latent, *sizes, limit=4e-3)


def test_a_program_of_many_positions(monkeypatch):
    monkeypatch.setattr(triton_attend, "MOST_PARTS", 2)
    check(triton_attend.attend, *SIZES[1])
