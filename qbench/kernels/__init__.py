"""What a GPU runs in place of the plain torch in qbench.quant and plugins.

Multiplying with packed weights: tiles.py is the layout, ops.py the torch.library ops and what runs where. CUDA C++ for
compute capability 9.0 and up: dual_linear.cu for up to 16 rows of x, wide_linear.cu for more, dequantize.cu; the .cuh
files are what they share. nvrtc.py compiles them, blocks.py cuts a problem into blocks, cuda.py launches.
triton_linear.py is the same in Triton for other GPUs. Quantizing: the other files, in Triton.
"""
