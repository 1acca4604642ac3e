"""The subcommands of `minipeft`. Each takes parsed arguments and prints its result; `compare` returns an exit code.

Checks come in the order of their cost: paths and settings, then data, then the model. Heavy imports are made
inside the functions, so that `minipeft --help` and a mistyped flag answer at once.
"""
