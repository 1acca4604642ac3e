"""The speed of minipeft's operations, beside their peers and the hardware's limits: `minipeft bench`."""
