"""The pages under docs/ show what the emulator does now."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import triton
from processes import run_process

from minipeft.kernels.emulator import emulate
from minipeft_kernels.emulator.trace import Trace

DOCS = Path(__file__).parents[4] / "docs"


def test_the_excerpts_of_the_lesson_are_what_a_run_gives() -> None:
    spec = importlib.util.spec_from_file_location("nf4_tile", DOCS / "nf4_tile.py")
    assert spec is not None and spec.loader is not None
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    text = lesson.LESSON.read_text()
    # Another Triton may choose other registers; that the excerpts can be found and decode rightly holds for any.
    fresh = lesson.rendered(text)
    assert fresh.count("prmt.b32") >= 16
    if triton.__version__.startswith(lesson.TRITON):
        assert fresh == text, "run python docs/nf4_tile.py"


def test_the_ten_lines_of_the_guide_run(tmp_path: Path) -> None:
    """Written to a file: Triton reads a kernel's source."""
    code = re.search(r"```python\n(.*?)```", (DOCS / "emulator.md").read_text(), re.S)
    assert code is not None
    program = tmp_path / "guide.py"
    program.write_text(code[1])
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = run_process([sys.executable, str(program)], env=environment, check=True)
    assert "transactions=" in done.stdout


@pytest.mark.parametrize("thread", [0, 70])
def test_a_trace_has_the_values_of_one_thread(thread: int) -> None:
    import torch
    from tutorial_kernels import add_kernel

    x, y, out = torch.arange(128.0), torch.ones(128), torch.empty(128)
    trace = Trace(thread)
    with emulate("sm_80", watch=[trace]):
        add_kernel[(1,)](x, y, out, 128, BLOCK=128, num_warps=4)
    (addition,) = (e for e in trace.entries if e.instruction.opcode == "add" and "f32" in e.instruction.types)
    bits = torch.tensor(thread + 1.0).view(torch.int32).item()
    assert list(addition.results.values()) == [bits]
    store = next(e for e in trace.entries if e.instruction.opcode == "st")
    load = next(e for e in trace.entries if e.instruction.opcode == "ld" and e.instruction.space == "global")
    assert store.address is not None and load.address is not None
    assert store.address % 4096 == (out.data_ptr() + 4 * thread) % 4096
    assert addition.sources and trace.entries[-1].instruction.opcode == "ret"
