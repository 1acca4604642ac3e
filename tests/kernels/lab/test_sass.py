"""Which instructions of a function are its inner loop."""

from minipeft_kernels.lab.sass import Function, Instruction, _flow


def function(text: str) -> Function:
    """One instruction a line, at addresses 0x10, 0x20, ..; "@P0 BRA 0x20" is predicated."""
    code = []
    for i, line in enumerate(text.split("\n")):
        words = line.split()
        predicate = words.pop(0) if words[0].startswith("@") else ""
        code.append(Instruction(0x10 * (i + 1), predicate, words[0], " ".join(words[1:])))
    return Function("f", tuple(code))


def names(text: str, work: tuple[str, ...] = ("HMMA",)) -> list[str]:
    loop = function(text).inner_loop(work)
    return [i.name for i in loop.instructions] if loop else []


def test_a_loop_is_what_lies_between_its_branch_and_the_branch_target() -> None:
    assert names("MOV R1\nLDS R1\nHMMA R2\nIADD3 R3\n@P0 BRA 0x20\nEXIT") == ["LDS", "HMMA", "IADD3", "BRA"]


def test_the_innermost_loop_with_the_work_is_taken() -> None:
    outer = "MOV R1\nLDG R1\nHMMA R2\nPRMT R2\n@P0 BRA 0x30\nFADD R1\n@P1 BRA 0x20\nEXIT"
    assert names(outer) == ["HMMA", "PRMT", "BRA"]
    # The work is outside the inner loop: then the outer one, its inner walked once.
    assert names(outer.replace("HMMA", "PRMT").replace("FADD", "HMMA"))[0] == "LDG"


def test_of_two_ways_through_a_loop_the_one_with_more_work_counts() -> None:
    text = "LDS R1\n@P0 BRA 0x60\nHMMA R1\nHMMA R2\nBRA 0x70\nMOV R1\nIADD3 R1\n@P1 BRA 0x10\nEXIT"
    assert names(text) == ["LDS", "BRA", "HMMA", "HMMA", "BRA", "IADD3", "BRA"]


def test_copies_for_diverged_warps_are_left_out() -> None:
    text = "SHFL R1\nBRA.DIV 0x60\nIADD3 R1\n@P0 BRA 0x10\nEXIT\nCALL 0x0\nSHFL R2\nBRA 0x30"
    assert names(text, ("SHFL",)) == ["SHFL", "BRA", "IADD3", "BRA"]


def test_no_loop_or_no_work_gives_none() -> None:
    assert function("HMMA R1\nEXIT").inner_loop() is None
    assert function("MOV R1\n@P0 BRA 0x10\nEXIT").inner_loop() is None


def test_unconditional_branches_do_not_fall_through() -> None:
    blocks, successors = _flow(function("BRA 0x30\nMOV R1\n@P0 BRA 0x10\nEXIT").instructions)
    assert set(blocks) == {0x10, 0x20, 0x30, 0x40}
    assert successors == {0x10: [0x30], 0x20: [0x30], 0x30: [0x40, 0x10], 0x40: []}
