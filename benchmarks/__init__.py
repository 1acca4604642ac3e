"""How fast minipeft's operations are, beside their peers and the hardware's limits: `minipeft bench`."""
