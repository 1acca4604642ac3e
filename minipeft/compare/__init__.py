"""Methods compared on the same batches: `minipeft compare`."""
