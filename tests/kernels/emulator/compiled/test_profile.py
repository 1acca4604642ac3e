"""`minipeft kernels --profile`: each operation, by the command, and what its numbers must be."""

from pathlib import Path

import pytest
import torch

from minipeft.commands.cli import main
from minipeft_kernels.lab.cases import OPERATIONS, case
from minipeft_kernels.lab.profile import counts_of, profile, report, some_tiles

SHAPES = {
    "nf4_matmul": "16,512,1024",
    "nf4_matmul_input_grad": "16,512,1024",
    "lora_matmul": "8,512,512,8",
    "lora_matmul_input_grad": "8,512,512",
    "experts": "8,16,256,512",
    "experts_input_grad": "40,4,256,512",
    "nf4_dequantize": "256,512",
    "nf4_quantize": "256,512",
    "adamw": "20000",
    "adamw_8bit": "20000",
}


def test_every_operation_has_a_shape_here() -> None:
    assert set(SHAPES) == set(OPERATIONS)


@pytest.mark.parametrize("operation", SHAPES)
def test_the_command_prints_and_plots(operation: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    main(["kernels", "--profile", operation, "--shape", SHAPES[operation], "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert "Bounds, not times" in printed and "bound on A100 SXM 80 GB" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bytes_and_tensor_operations_are_those_of_the_mathematics() -> None:
    """Each byte of weight, x and y moves once at least; the tensor cores do 2 M N K and no more, on whole tiles."""
    found = profile("nf4_matmul", (8, 512, 1024))
    (launch,) = found.launches
    counts = counts_of(launch)
    assert counts.tensor_flops == found.case.flops == 2 * 8 * 512 * 1024
    assert counts.tensors["codes"].unique_read == 512 * 1024 // 2
    assert counts.tensors["y"].unique_written == 2 * 8 * 512
    assert f"the operation has {found.case.least_bytes:,} to read and write" in report(found)


def test_part_of_a_grid_scales_to_the_whole() -> None:
    found = profile("nf4_dequantize", (64, 1024))
    counts = counts_of(found.launches[0])
    assert counts.blocks == 32 and counts.executed == 4
    assert counts.tensors["out"].unique_written == 64 * 1024 * 2
    assert counts.global_store.efficiency == 1.0
    # Blocks of two warps, whose lanes store 64 bytes each, 16 at a time: 16 sectors a store of a warp.
    assert counts.global_store.transactions == 32 * 2 * 4 * 16


@pytest.mark.parametrize(
    ("grid", "expected"),
    [((1, 1, 1), [0]), ((3, 2, 1), [0, 1, 2, 3, 4, 5]), ((10, 2, 1), [0, 3, 6, 9, 10, 13, 16, 19])],
)
def test_the_blocks_of_a_tile_go_together(grid: tuple[int, int, int], expected: list[int]) -> None:
    assert some_tiles(grid) == expected


def test_many_rows_are_decoded_and_say_so() -> None:
    found = profile("nf4_matmul", (300, 128, 128))
    assert [launch.name for launch in found.launches] == ["_nf4_dequantize_pairs_kernel"]
    assert "multiplied by the vendor's library, which is not counted" in report(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "nope", "--shape", "1"], "there is no operation 'nope' to profile: known are nf4_matmul"),
        (["--profile", "nf4_matmul", "--shape", "1,2"], "--shape of nf4_matmul is M,N,K"),
        (["--profile", "nf4_matmul", "--shape", "a,2"], "--shape must be numbers"),
        (["--profile", "nf4_matmul"], "--shape must be numbers"),
        (["--shape", "1,2,3"], "go with --profile"),
        (["--profile", "adamw", "--shape", "64", "--json", "x"], "do not go with --profile"),
        (["--profile", "adamw", "--shape", "64", "--plot", "/nowhere/p.png"], "its folder does not exist"),
    ],
)
def test_what_is_asked_wrongly_is_answered(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_case_refuses_what_is_no_shape() -> None:
    with pytest.raises(ValueError, match="each 1 or more, got 0,64"):
        case("nf4_dequantize", (0, 64), torch.bfloat16)
