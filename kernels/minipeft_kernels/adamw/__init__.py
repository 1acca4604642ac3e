"""AdamW's update of many tensors at once, with float32 or 8-bit moments: `reference` has the arithmetic."""
