"""What the subcommands of `minipeft` do. Each takes parsed arguments, prints its result and returns nothing.

Checks come in the order of their cost: paths and settings, then data, then the model. Heavy imports are made
inside the functions, so that `minipeft --help` and a mistyped flag answer at once.
"""
