"""PTX text to a program."""

import pytest

from minipeft_kernels.emulator import PtxSyntaxError, parse
from minipeft_kernels.emulator.program import Address, Immediate, Pair, Register, Vector

TEXT = """
// a comment with { and ;
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 first,
    .param .u8 small,   /* padded */
    .param .align 64 .b8 block[128],
    .param .f32 last
)
.maxntid 128, 1, 1
{
    .reg .pred %p<3>;
    .reg .b32 %r<4>, %other;
    .shared .align 8 .b8 fixed[24];
    .loc 1 10 4
    mov.u32 %r0, 0f3F800000;
    { .reg .b32 %r0, tmp; mov.b32 tmp, -0x10; mov.b32 %r0, tmp; }
    .loc 2 20 4, function_name $L__info, inlined_at 1 30 7
    // begin inline asm
    @!%p1 ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [ %rd + -8 ];
    // end inline asm
$L__BB0_1:                       // the loop
    setp.lt.s32 %p1|%p2, %r0, 010;
    @%p2 bra $L__BB0_1;
    .pragma "nounroll";
    ret;
}
.file 1 "/some/where/one.py"
.file 2 "two.py"
.section .debug_str { .b8 1 }
""".replace("%rd", "%other")


def test_the_parts_of_a_program() -> None:
    program = parse(TEXT)
    assert (program.name, program.target, program.threads) == ("kernel", "sm_80", 128)
    found = [(p.name, p.type, p.size, p.offset) for p in program.parameters]
    assert found == [("first", "u64", 8, 0), ("small", "u8", 1, 8), ("block", "b8", 128, 64), ("last", "f32", 4, 192)]
    assert program.labels == {"$L__BB0_1": 4}
    assert program.shared["fixed"].size == 24
    assert program.shared["dynamic"].address >= program.shared["fixed"].address + 24


def test_instructions_know_their_source_and_parts() -> None:
    first, _, _, load, compare, branch, _ = parse(TEXT).instructions
    assert first.source == ("one.py", 10) and first.operands == (Register("%r0"), Immediate(1.0))
    assert load.source == ("two.py", 20) and load.caller == ("one.py", 30)
    assert load.inline and not compare.inline
    assert (load.opcode, load.modifiers, load.types, load.space) == ("ld", ("global", "v4"), ("b32",), "global")
    assert isinstance(load.operands[0], Vector) and load.operands[1] == Address(Register("%other"), -8)
    assert load.predicate is not None and load.predicate.negated and load.mnemonic == "ld.global.v4.b32"
    assert compare.operands[0] == Pair(Register("%p1"), Register("%p2")) and compare.operands[2] == Immediate(8)
    assert branch.predicate is not None and not branch.predicate.negated
    assert load.place.endswith("(instruction 3, two.py:20)")


def test_an_inner_scope_has_registers_of_its_own() -> None:
    program = parse(TEXT)
    inner = program.instructions[2].operands
    assert inner == (Register("%r0$1"), Register("tmp$1"))
    assert program.registers["%r0"] == program.registers["%r0$1"] == "b32"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (TEXT.replace(".entry", ".func"), "one .entry, found 0"),
        (TEXT.replace("%other + -8", "%nobody"), ""),
        (TEXT.replace("@!%p1", "@!%q1"), "'%q1' is not declared"),
        (TEXT.replace(".pragma", ".strange"), "directive not understood"),
        (TEXT.replace("[ %other + -8 ]", "[ %other * 8 ]"), "address not understood"),
    ],
)
def test_what_is_not_understood_is_named(wrong: str, message: str) -> None:
    if not message:
        assert parse(wrong).instructions[3].operands[1] == Address(Register("%nobody"), 0)
        return
    with pytest.raises(PtxSyntaxError, match=message):
        parse(wrong)
