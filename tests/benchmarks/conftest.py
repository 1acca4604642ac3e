"""The benchmarks lie outside the package: make them importable as `benchmarks`."""

from minipeft.bench_command import load_benchmarks

load_benchmarks()
