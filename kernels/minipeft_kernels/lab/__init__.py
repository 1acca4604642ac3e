"""The GPU kernels, studied without a GPU: their machine code, bounds on their time, runs in the emulator."""
