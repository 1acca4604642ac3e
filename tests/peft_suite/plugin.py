"""The pytest plugin of `run.py`: leaves other methods out, picks one test of N, writes one JSON line a test.

Its settings come from the environment: SUITE_RESULTS (the file of results), SUITE_REAL, SUITE_EVERY.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import sys
import zlib
from pathlib import Path

import names
import pytest

REAL = os.environ["SUITE_REAL"] == "1"
EVERY = int(os.environ["SUITE_EVERY"])
TEST_SECONDS = 60
# The words by which minipeft refuses a method or variant that it does not have.
_REFUSED = re.compile(
    r"(?i)its configs, got peft\.\w+Config"
    rf"|\b({'|'.join(sorted(names.VARIANT_FIELDS))})=.*not supported by minipeft"
    rf"|init_lora_weights(=| must be ).*'({'|'.join(sorted(names.VARIANT_STARTS))})'"
)
_NEEDS = re.compile(r"needs (diffusers|the data set)|LocalEntryNotFound|couldn't connect|offline mode|huggingface\.co")

# Only what is not installed: the folder is the last one.
sys.path.append(str(Path(__file__).parent / "stubs"))


class _Everything(dict):
    """The ids of the models that the tests believe to have been downloaded already: all."""

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return 1


class TestTimeout(Exception):
    __test__ = False


def pytest_configure(config):
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", marker)
    if not REAL:
        _hide_peft()
    _make_data_up()


def _make_data_up():
    """Where datasets is installed, too, the data sets are those of its stand-in: there is no network."""
    import datasets

    spec = importlib.util.spec_from_file_location(
        "made_up", Path(__file__).parent / "stubs" / "datasets" / "__init__.py"
    )
    made_up = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made_up)
    datasets.load_dataset = made_up.load_dataset


def _hide_peft():
    """Whoever uses minipeft need not have PEFT: transformers and accelerate must not take the shim for it."""
    import accelerate.utils
    import accelerate.utils.imports
    import accelerate.utils.other
    import transformers.utils
    import transformers.utils.import_utils

    libraries = [transformers.utils, transformers.utils.import_utils]
    libraries += [accelerate.utils, accelerate.utils.imports, accelerate.utils.other]
    for module in libraries:
        if hasattr(module, "is_peft_available"):
            module.is_peft_available = lambda *args, **kwargs: False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    import tests.testing_utils

    tests.testing_utils._HUB_MODEL_ACCESSES = _Everything()
    # By the id alone, so that a test that comes or goes does not change which others are run.
    items[:] = [
        item
        for item in items
        if zlib.crc32(item.nodeid.encode()) % EVERY == 0
        and not (hasattr(item, "callspec") and names.uses_foreign(item.callspec.params))
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    import numpy as np
    import torch

    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    _shim(True)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(TEST_SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        _shim(False)


def _too_long(*args):
    raise TestTimeout(f"took more than {TEST_SECONDS} s")


def _shim(runs):
    if not REAL:
        import peft

        peft.test_runs = runs
        peft.foreign_calls.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    # The first thing that went wrong is what counts.
    if not hasattr(item, "suite_outcome"):
        if call.excinfo is not None and not report.skipped:
            item.suite_outcome = "failed", _error(call.excinfo)
        elif report.skipped:
            item.suite_outcome = "skipped", ""
    if report.when == "teardown":
        outcome, error = getattr(item, "suite_outcome", ("passed", ""))
        if _is_of_another_method(outcome, error) or (outcome == "failed" and _NEEDS.search(error)):
            outcome = "skipped"
        _write(id=item.nodeid, outcome=outcome, error=error[:400])
    return report


def _is_of_another_method(outcome, error):
    if REAL:
        return False
    import peft

    return bool(peft.foreign_calls) or (outcome == "failed" and _REFUSED.search(error) is not None)


def _error(excinfo):
    """The first line that says what is wrong."""
    if "DID NOT WARN" in str(excinfo.value) and isinstance(excinfo.value.__context__, Exception):
        return f"{excinfo.value.__context__!r} (instead of a warning)"
    lines = [line.strip() for line in excinfo.exconly().splitlines() if line.strip()]
    if lines and "Regex pattern did not match" in lines[0]:
        return " ".join(lines[:3])
    return lines[0] if lines else type(excinfo.value).__name__


def pytest_collectreport(report):
    if report.failed:
        lines = str(report.longrepr).strip().splitlines()
        _write(id=report.nodeid, outcome="failed", error=lines[-1] if lines else "")


def _write(**values):
    with open(os.environ["SUITE_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
