"""What a GPU runs in place of the plain torch in qbench.quant and plugins.

Multiplying with packed weights: tiles.py is the layout, ops.py the torch.library ops and what runs where,
dual_linear.cu the CUDA C++ kernels for compute capability 9.0 and up, nvrtc.py their compilation, cuda.py their launch,
triton_linear.py the same in Triton for other GPUs. Quantizing: the other files, in Triton.
"""
