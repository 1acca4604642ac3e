"""The measurement under budgets: the same numbers as torch, the least bytes, what a disk does by itself."""

import importlib

import pytest


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("benchmarks.bench_paged_adamw")


def test_a_budget_changes_bytes_and_no_bit(bench, tmp_path):
    numel = 1 << 22
    settings = {"numel": numel, "spill_dir": str(tmp_path), "steps": 2}
    whole = bench._measure("torch fused", budget=0, **settings)
    paged = bench._measure("minipeft", budget=numel * 8 // 4, **settings)
    assert whole["digest"] == paged["digest"]
    assert paged["bytes_in"] + paged["bytes_out"] == paged["least"] > 0 == whole["least"]
    assert not list(tmp_path.iterdir())


def test_disk_rates_are_of_a_file_that_is_gone(bench, tmp_path):
    write, read = bench.disk_rates(tmp_path, 8 << 20)
    assert write > 0 and read > 0 and not list(tmp_path.iterdir())
