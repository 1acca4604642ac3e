"""The operations on packed weights and optimizer state; `minipeft.kernels` has the public names.

Each is `torch.ops.minipeft.<name>`: PyTorch or compiled C on a CPU, a Triton kernel on a GPU (`dispatch` decides).
"""
