"""One prepared run on a GPU that is at hand for minutes: is all right, how fast, beside whom, and why.

`python -m benchmarks.first_contact smoke` and `main`. Every stage is a process of its own with a limit of time, and
every row that it finds is in the file at once, so that an illegal access, a hang or the end of the lease loses one row.
"""
