"""The excerpts of nf4_tile.md, taken from a run of the kernel in the emulator.

    python docs/nf4_tile.py          writes them into nf4_tile.md
    python docs/nf4_tile.py --check  fails if they differ

The numbers are exact: weights and inputs are fractions of powers of two, and the emulator rounds as the hardware does.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minipeft.kernels.emulator import emulate
from minipeft_kernels.emulator.trace import Entry, Trace, results_of
from minipeft_kernels.linear.gpu import launch_forward
from minipeft_kernels.nf4.codebooks import NF4_LEVELS, dynamic_map
from minipeft_kernels.nf4.quantize import nf4_quantize_reference, quantize_absmax_reference
from minipeft_kernels.packed import NF4

LESSON = Path(__file__).with_suffix(".md")
TRITON = "3.9"
"""The version whose code the lesson shows: another one may choose other registers."""
THREAD = 5
_BLOCK = re.compile(r"(<!-- (\w+) -->\n```\n).*?(```\n)", re.S)


def main() -> int:
    """Write or check the lesson's excerpts."""
    text = LESSON.read_text()
    fresh = rendered(text)
    if "--check" in sys.argv:
        print("up to date" if fresh == text else f"{LESSON.name} differs from what the emulator does now")
        return int(fresh != text)
    LESSON.write_text(fresh)
    return 0


def rendered(text: str) -> str:
    """The lesson with its excerpts as they are now."""
    found = excerpts()
    return _BLOCK.sub(lambda m: m[1] + found[m[2]] + m[3], text)


def excerpts() -> dict[str, str]:
    """Run one tile, 64 x 256 weights and 8 rows, and cut out what thread 5 does with its first word of codes."""
    codes, entries = _run()
    decode = next(i for i, e in enumerate(entries) if e.instruction.opcode == "lop3") - 3
    word = entries[decode].sources[0]
    load = _last(entries[:decode], lambda e: word in results_of(e.instruction))
    # Thread 5 is lane 1 of the second row of eight: it holds the second word of row 1 of the tile.
    expected = int.from_bytes(bytes(codes[1, 4:8].tolist()), "little")
    assert entries[load].results[word] == expected, (entries[load].results, hex(expected))
    copies = [i for i, e in enumerate(entries[:load]) if e.instruction.opcode == "cp"]
    first_copy = next(i for i in copies if entries[i].address is not None)
    commit = next(i for i in copies if i > first_copy and "commit_group" in entries[i].instruction.modifiers)
    wait = _last(entries[:load], lambda e: "wait_group" in e.instruction.modifiers)
    pairs = [e for e in entries[decode : decode + 21] if e.instruction.text.endswith(("0x4051", "0x6273"))]
    out = [next(iter(e.results)) for e in pairs]
    product = next(i for i, e in enumerate(entries) if e.instruction.opcode == "mma" and i > decode)
    assert out[0] in entries[product].sources
    sums = list(entries[product].results)
    scale = next(i for i, e in enumerate(entries) if i > product and e.instruction.opcode == "fma")
    store = _last(entries, lambda e: e.instruction.opcode == "st" and e.instruction.space == "global")
    return {
        "codes": _codes(codes),
        "copy": _lines([entries[first_copy], entries[commit], entries[wait], entries[wait + 1]]),
        "load": _lines([entries[load]]),
        "decode": _lines(entries[decode : decode + 21]),
        "levels": _levels(codes, [e.results[name] for e, name in zip(pairs, out, strict=True)]),
        "product": _lines([entries[product]]) + _sums(sums, entries[product]),
        "scale": _lines([entries[scale]]),
        "store": _lines([entries[store]]),
    }


def _run() -> tuple[Tensor, list[Entry]]:
    n, k, m = 64, 256, 8
    # A linear congruence, as fractions of 2^15: no rounding anywhere, so the same on every machine.
    numbers = torch.arange(n * k).mul(40503).add(12345).remainder(65536).sub(32768).div(32768)
    codes, absmax = nf4_quantize_reference(numbers.view(n, k), 64)
    offset = torch.tensor(0.75)
    stored, nested = quantize_absmax_reference(absmax, offset)
    x = torch.arange(m * k).mul(7919).remainder(33).sub(16).div(16).view(m, k).bfloat16()
    weight = NF4(codes, stored, NF4_LEVELS.clone(), nested, dynamic_map().clone(), offset, n, k, 64)
    trace = Trace(THREAD)
    with emulate("sm_80", counts=False, watch=[trace]) as run:
        launch_forward(x, weight)
    assert run.launches[0].grid == (1, 1, 1), run.launches[0].grid
    return codes.view(n, k // 2), trace.entries


def _last(entries: list[Entry], holds: Callable[[Entry], bool]) -> int:
    return max(i for i, e in enumerate(entries) if holds(e))


def _lines(entries: list[Entry]) -> str:
    """Instructions as the compiler wrote them, with what thread 5 gets."""
    lines = []
    for e in entries:
        text = " ".join(e.instruction.text.replace("{ ", "{").replace(" }", "}").replace("[ ", "[").split())
        got = "  ".join(f"{name.split('$')[0]}={value:#x}" for name, value in e.results.items())
        if len(text) > 46 or len(got) > 60:
            lines += [text, *([f"{'':46} // {got}"] if got else [])]
        else:
            lines.append(f"{text:46} // {got}" if got else text)
    return "\n".join(lines) + "\n"


def _codes(codes: Tensor) -> str:
    four = codes[1, 4:8].tolist()
    nibbles = [n for byte in four for n in (byte >> 4, byte & 15)]
    return (
        f"row 1, weights 8 to 15: codes {' '.join(f'{n:2}' for n in nibbles)}\n"
        f"bytes 4 to 7 of the row:      {' '.join(f'{b:#04x} ' for b in four)}\n"
        f"as one word:                  {int.from_bytes(bytes(four), 'little'):#010x}\n"
    )


def _levels(codes: Tensor, words: list[int]) -> str:
    """The decoded pairs, beside the table's levels, which they must be to the bit."""
    four = codes[1, 4:8].tolist()
    right = NF4_LEVELS[[n for byte in four for n in (byte >> 4, byte & 15)]].bfloat16()
    lines = []
    for i, word in enumerate(words):
        pair = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        assert torch.equal(pair, right[2 * i : 2 * i + 2]), (pair, right)
        low, high = pair.tolist()
        lines.append(f"{word:#010x}   weight {8 + 2 * i:2} = {low:+.6f}   weight {9 + 2 * i:2} = {high:+.6f}")
    return "\n".join(lines) + "\n"


def _sums(names: list[str], entry: Entry) -> str:
    """The four sums that the thread holds of the 16 x 8 tile."""
    values = [struct.unpack("<f", struct.pack("<I", entry.results[name]))[0] for name in names]
    places = ["W row 1, x row 2", "W row 1, x row 3", "W row 9, x row 2", "W row 9, x row 3"]
    return "".join(f"{name:6} = {v:+.6f}   {place}\n" for name, v, place in zip(names, values, places, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
