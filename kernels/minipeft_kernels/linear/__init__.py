"""The linear layer over a frozen weight, dense or NF4, with LoRA's update or without: `op` is the place to start."""
