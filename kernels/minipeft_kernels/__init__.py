"""The operations on packed weights and optimizer state; `minipeft.kernels` has the public names.

Each is, or calls, an operation of `torch.ops.minipeft`: PyTorch or compiled C on a CPU, a Triton kernel on a GPU
(`dispatch` decides).
"""
