"""4-bit NormalFloat: its number tables, quantization to it and decoding, each with its PyTorch reference."""
