"""Tables that a GPU chose: which products take them, how they are written, and what no file of them may say."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import minipeft_kernels.linear.gpu as module
from minipeft.kernels import nf4_dequantize
from minipeft.nf4 import NF4Weight
from minipeft_kernels.linear import tables
from minipeft_kernels.linear.tables import Table, read_table, table_on, write_table
from minipeft_kernels.linear.tiles import FLOAT32_FORWARD, Tile, fused_max_rows, tile_for

GPU = "NVIDIA Test GPU (80GB)"
MEASURED = {"torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-28", "command": "minipeft bench --tune"}
FORWARD = (Tile("direct", 8, 32, 1, 1, 2, fill=3), Tile("staged", 64, 32, 1, 2, 2, fill=5))
TABLE = Table(GPU, MEASURED, FORWARD, (Tile("staged", 16, 32, 1, 1, 2),), 48)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of tables, empty, and a CPU that has the GPU's name."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(tables, "gpu_name", lambda device: GPU)
    tables.forget()
    yield tmp_path / "tuned"
    tables.forget()


def plan(m: int, grad: bool, tuned: Table | None, dtype: torch.dtype = torch.bfloat16) -> Any:
    operands = (m, 256, 512, 64, 0, dtype, grad, True, False, False)
    return module._planned(module.tile_for, module.split_for, tuned, *operands, 90, 132, False, False)


def test_a_written_table_is_read_back_and_goes_before_the_rules(folder: Path) -> None:
    file = write_table(TABLE)
    assert file == folder / "nvidia-test-gpu-80gb.json" and list(folder.iterdir()) == [file]
    found = table_on(CPU)
    assert found is not None and vars(found) == vars(TABLE)
    assert [tile_for(m, False, 90, False, tuned=found) for m in (1, 8, 9, 64, 500)] == [
        FORWARD[i] for i in (0, 0, 1, 1, 1)
    ]
    assert tile_for(1, True, 90, False, tuned=found) == TABLE.input_grad[0]
    assert fused_max_rows(90, False, found) == 48
    # No sweep times float32.
    assert tile_for(1, False, 90, True, tuned=found) == FLOAT32_FORWARD[0] and fused_max_rows(90, True, found) == 16


def test_products_take_the_table_and_see_a_changed_one(folder: Path) -> None:
    x, weight = torch.randn(48, 512).bfloat16(), _weight()
    assert plan(8, False, table_on(CPU)).launch.constants["BN"] == 32
    assert module.is_fused(x, weight) and plan(8, False, table_on(CPU)).launch.constants["NB"] == 2
    write_table(TABLE)
    assert plan(8, False, table_on(CPU)).launch.constants["NB"] == 1
    assert plan(8, True, table_on(CPU)).launch.constants["BM"] == 16
    assert module.is_fused(x, weight) and not module.is_fused(torch.cat((x, x[:1])), weight)
    write_table(Table(GPU, MEASURED, (Tile("direct", 8, 64, 4, 2, 2),), TABLE.input_grad, None))
    assert plan(8, False, table_on(CPU)).launch.constants["NB"] == 4
    assert module.is_fused(x.repeat(100, 1), weight)


def test_a_product_launches_the_tables_tile_and_is_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(TABLE)
    planned, plans = module._planned, []
    monkeypatch.setattr(module, "_planned", lambda *a: plans.append(planned(*a)) or plans[-1])
    x, weight = torch.randn(5, 512).bfloat16(), _weight()
    y = module.launch_forward(x, weight)
    dx = module.launch_input_gradient(torch.ones(5, 256).bfloat16(), weight)
    assert [(p.launch.constants["BM"], p.launch.constants["BN"]) for p in plans] == [(8, 32), (16, 32)]
    exact = nf4_dequantize(weight, torch.float32).double()
    for found, right in ((y, x.double() @ exact.T), (dx, exact.sum(0).expand(5, -1))):
        assert (found.double() - right).norm() < 1e-2 * right.norm()


def test_without_a_file_the_rules_hold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table_on(CPU) is None
    monkeypatch.undo()
    assert tables.gpu_name(CPU) == "" and table_on(torch.device("cpu")) is None


MISSING = object()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("gpu", "NVIDIA H200", r"gpu must be 'NVIDIA Test GPU \(80GB\)', got 'NVIDIA H200'"),
        ("gpu", MISSING, "must be an object of gpu, measured, forward, input_grad, fused_max_rows, got"),
        ("more", 1, "must be an object of gpu"),
        ("measured", [], "measured must be an object of torch, triton, date, command, got"),
        ("measured.date", 7, "measured: date must be text, got 7"),
        ("fused_max_rows", -1, "fused_max_rows must be null for any number, or a whole number from 0 to .*, got -1"),
        ("fused_max_rows", 48.0, "fused_max_rows must be .*, got 48.0"),
        ("fused_max_rows", True, "fused_max_rows must be .*, got True"),
        ("forward", [], r"forward must be a list of tiles, one at least, got \[\]"),
        ("forward", {"0": 1}, "forward must be a list"),
        ("forward.1", None, "forward: tile 1 must be an object of kernel, rows, bn, nb, warps, stages, fill, got None"),
        ("forward.1.fill", MISSING, "forward: tile 1 must be an object of"),
        ("forward.0.kernel", "indirect", "tile 0: kernel must be 'direct' or 'staged', got 'indirect'"),
        ("forward.0.kernel", [], "kernel must be 'direct' or 'staged'"),
        ("forward.0.rows", 4, "tile 0: rows must be a power of two from 8 to 256, got 4"),
        ("forward.0.rows", 24, "rows must be a power of two from 8 to 256, got 24"),
        ("forward.0.rows", 64, "tile 1: rows must be more than the tile's before it, 64, got 64"),
        ("forward.0.bn", 48, "bn must be a power of two from 16 to 256, got 48"),
        ("forward.0.nb", 16, "nb must be a power of two from 1 to 8, got 16"),
        ("forward.1.nb", 2, "tile 1: nb must be 1 for 'staged', got 2"),
        ("forward.0.warps", 3, "warps must be a power of two from 1 to 16, got 3"),
        ("forward.0.warps", "2", "warps must be .*, got '2'"),
        ("forward.0.stages", 0, "stages must be a whole number from 1 to 8, got 0"),
        ("forward.0.fill", math.inf, "fill must be a whole number from 1 to 64, got inf"),
        ("forward.0.fill", 10**400, "fill must be a whole number from 1 to 64, got 1000"),
        ("input_grad.0.kernel", "direct", "input_grad: tile 0: kernel must be 'staged', which alone has a gradient"),
    ],
)
def test_an_impossible_value_is_named_with_its_file_and_what_was_expected(
    folder: Path, path: str, value: Any, says: str
) -> None:
    file = write_table(TABLE)
    values = json.loads(file.read_text())
    *above, last = path.split(".")
    inner = values
    for name in above:
        inner = inner[int(name) if name.isdecimal() else name]
    key: Any = int(last) if last.isdecimal() else last
    if value is MISSING:
        del inner[key]
    else:
        inner[key] = value
    file.write_text(json.dumps(values))
    tables.forget()
    with pytest.raises(ValueError, match=says) as raised:
        module.launch_forward(torch.randn(5, 512).bfloat16(), _weight())
    assert str(file) in str(raised.value) and "delete it" in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b"1" * 5000, b" " * (2 << 20)])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "nvidia-test.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"nvidia-test\.json.*delete it"):
        read_table(file, "NVIDIA Test")


def test_a_table_that_cannot_be_read_back_is_not_written(folder: Path) -> None:
    file = write_table(TABLE)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="rows must be a power of two from 8 to 256, got 7"):
        write_table(Table(GPU, MEASURED, (Tile("direct", 7, 32, 1, 1, 2),), TABLE.input_grad, 1))
    assert list(folder.iterdir()) == [file] and file.read_bytes() == before


def _weight() -> Any:
    torch.manual_seed(0)
    return NF4Weight.quantize(torch.randn(256, 512).bfloat16(), 64, double_quant=True).packed()
