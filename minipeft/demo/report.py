"""What the demo prints, and the numbers that it keeps."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minipeft.commands.inspect import size
from minipeft.demo.data import DemoData
from minipeft.demo.exam import Exam, Measurement, varied
from minipeft.train.report import TrainResult

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; also in `report.json`."""

    before: Measurement
    after: Measurement
    majority: float | None
    parameters: int
    trainable: int
    bytes_16bit: int
    bytes_4bit: int
    adapter_bytes: int
    seconds: float


def say_data(data: DemoData, say: Say) -> None:
    """What is learned, with some examples."""
    say(data.about)
    say(f"{len(data.train)} texts to learn from, {len(data.held_out)} others held out to measure on. Some:")
    for record in varied(data.train):
        say(f"    {record.prompt or ''} ->{record.completion or ''}")


def say_model(model: Any, is_smollm2: bool, say: Say) -> tuple[int, int]:
    """Print and return the bytes of the model in 16 and in 4 bits."""
    from minipeft.nf4 import NF4Linear

    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    linear = sum(module.in_features * module.out_features for module in packed)
    rest = sum(p.numel() for p in model.parameters()) - sum(module.weight.numel() for module in packed)
    bytes_16bit, bytes_4bit = 2 * (linear + rest), model.get_memory_footprint()
    if is_smollm2:
        say("SmolLM2-135M-Instruct. The file it came from holds weights rounded to 4 bits (Q4_1), so it is a little")
        say("worse than the original.")
    say(f"in 16 bits    {size(bytes_16bit):>9}   {linear + rest:,} parameters")
    kept = str(model.dtype).removeprefix("torch.")
    say(f"in 4 bits     {size(bytes_4bit):>9}   {linear:,} of them in NF4, the embeddings in {kept}")
    return bytes_16bit, bytes_4bit


def say_before(before: Measurement, exam: Exam, say: Say) -> None:
    """The first measurement."""
    if before.accuracy is not None:
        say(f"accuracy {_percent(before)}; always answering the same label: {100 * (exam.majority or 0):.1f} %")
    say(f"loss {before.loss:.2f}, perplexity {before.perplexity:.0f}: it does not know what kind of answer is wanted")


def say_after(before: Measurement, after: Measurement, exam: Exam, say: Say) -> None:
    """Both measurements side by side."""
    say(f"{'on the held-out texts':<32}{'before':>16}{'after':>16}")
    if before.accuracy is not None:
        say(f"{'accuracy':<32}{_percent(before):>16}{_percent(after):>16}")
        say(f"{'  always the same label':<32}{100 * (exam.majority or 0):>14.1f} %")
    say(f"{'loss (nats per answer token)':<32}{before.loss:>16.3f}{after.loss:>16.3f}")
    say(f"{'perplexity':<32}{before.perplexity:>16.2f}{after.perplexity:>16.2f}")
    for record, old, new in zip(exam.samples, before.samples, after.samples, strict=True):
        say(f"\n    prompt   {record.prompt}")
        say(f"    before   {old}")
        say(f"    after    {new}")
        say(f"    wanted  {record.completion}")


def say_result(report: DemoResult, result: TrainResult, base: str, example: str, say: Say) -> None:
    """Where everything is, and the commands that use it."""
    output = result.adapter_dir.parent
    say(f"adapter       {result.adapter_dir} ({size(report.adapter_bytes)})")
    say(f"loss curve    {output / 'loss_curve.png'}")
    say(f"all numbers   {output / 'report.json'}")
    say(f"time          {report.seconds:.0f} s, peak memory {size(result.peak_memory)}")
    adapter = f"--model {shlex.quote(base)} --quantize nf4 --adapter {shlex.quote(str(result.adapter_dir))}"
    merged = output.with_name(output.name + "-merged")
    say("\nUse it:")
    say(f"  minipeft generate {adapter} --raw --prompt {shlex.quote(example)}")
    say(f"  minipeft eval {adapter} --data {shlex.quote(str(output / 'held_out.jsonl'))}")
    say(f"  minipeft merge {adapter} --output {shlex.quote(str(merged))}")


def _percent(measured: Measurement) -> str:
    return f"{100 * (measured.accuracy or 0):.1f} % ± {100 * (measured.standard_error or 0):.1f}"
