"""Triton kernels: what a GPU runs in place of the plain torch in qbench.quant and plugins."""
