"""The whole job on two CPU cores in one to five minutes: a real model in 4 bits learns a task it was bad at.

The base model is quantized to NF4, LoRA adapters of rank 16 are trained on about a thousand short texts, and
loss, perplexity and accuracy are measured before and after on texts that were not trained on.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minipeft import LoraConfig
from minipeft.demo.assets import smollm2_folder
from minipeft.demo.data import DemoData, load_demo_data
from minipeft.demo.exam import ROW_TOKENS, Exam, Measurement, row_tokens, varied
from minipeft.files import size, write_text
from minipeft.train.batches import Batches
from minipeft.train.config import TrainConfig
from minipeft.train.encoding import EncodedDataset, encode_records
from minipeft.train.errors import TrainingInterrupted
from minipeft.train.loop import Trainer
from minipeft.train.methods import attach
from minipeft.train.models import load_base_model, load_tokenizer, model_position_limit, seed_everything, without_bars
from minipeft.train.report import TrainResult, check_matplotlib, plot_loss_curve, read_log

# Two packed rows make a step: about 13 texts, 77 steps. Accuracy after one pass (± 2.5 %): 54.8 % with two rows a step,
# 52.2 % with three, 43.8 % with 32 texts.
STEP_TOKENS = 2 * ROW_TOKENS
# Longer texts of a user's own data are left out.
MOST_TOKENS = 512
LEARNING_RATE = 1e-3
RANK = 16

# Held-out texts measured for the curve, and how often: few, because it takes time from training.
CURVE_TEXTS, CURVE_POINTS = 100, 6


@dataclass(frozen=True)
class DemoConfig:
    """The settings of the demo.

    Attributes:
        output: directory for everything that it writes.
        model: directory or hub name to use instead of SmolLM2-135M-Instruct.
        data: place of records to use instead of the rated snippets.
        steps: optimizer steps; None is one pass over the data.
        train_rows, held_out_rows: texts to learn from and to measure on, at most.
    """

    output: Path
    model: str | None = None
    data: str | None = None
    steps: int | None = None
    seed: int = 0
    train_rows: int = 1000
    held_out_rows: int = 400


@dataclass(frozen=True)
class DemoResult:
    """The findings of the demo; `report.json` holds them too.

    Attributes:
        majority: accuracy of always answering the commonest label; None without labels.
        parameters, trainable: of the base model, and of the adapter.
        bytes_16bit, bytes_4bit: of the base model in either form.
        adapter_bytes: of the adapter's folder. seconds: for everything.
    """

    before: Measurement
    after: Measurement
    majority: float | None
    parameters: int
    trainable: int
    bytes_16bit: int
    bytes_4bit: int
    adapter_bytes: int
    seconds: float


def say_now(line: str) -> None:
    """Print at once, also into a pipe."""
    print(line, flush=True)


def run_demo(config: DemoConfig, say: Callable[[str], None] = say_now) -> DemoResult:
    """Run it and print a report as it goes.

    Raises:
        TrainingError: no download, no such model, bad data, an output directory in use.
    """
    started = time.perf_counter()
    check_matplotlib()

    say("[1/6] The data")
    data = load_demo_data(config.data, config.train_rows, config.held_out_rows, config.seed, say)
    say_data(data, say)

    say("\n[2/6] The model, in 4 bits")
    base = config.model or str(smollm2_folder(say))
    tokenizer = load_tokenizer(base)
    model = load_quantized(base)
    bytes_16bit, bytes_4bit = say_model(model, config.model is None, say)

    say("\n[3/6] Before training")
    most = min(MOST_TOKENS, model_position_limit(model) or MOST_TOKENS)
    exam = Exam(tokenizer, data, encode_records(data.held_out, tokenizer, most, too_long="drop"))
    before = exam.take(model)
    say_before(before, exam, say)

    say("\n[4/6] Training (QLoRA)")
    seed_everything(config.seed)
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = attach(model, adapter)
    trainable, parameters = model.get_nb_trainable_parameters()
    share = f"{trainable:,} of {parameters:,} parameters ({100 * trainable / parameters:.2f} %)"
    say(f"LoRA of rank {RANK} on all linear layers: {share} are trained, the 4-bit rest stays as it is.")
    result = _train(model, exam, data, base, config, say)
    say(f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s")

    say("\n[5/6] After training")
    after = exam.take(model)
    say_after(before, after, exam, say)

    say("\n[6/6] The result")
    title = f"QLoRA demo (evaluation: {CURVE_TEXTS} held-out texts)"
    plot_loss_curve(read_log(result.log_path), config.output / "loss_curve.png", title=title)
    report = DemoResult(
        before=before,
        after=after,
        majority=exam.majority,
        parameters=parameters - trainable,
        trainable=trainable,
        bytes_16bit=bytes_16bit,
        bytes_4bit=bytes_4bit,
        adapter_bytes=sum(file.stat().st_size for file in result.adapter_dir.iterdir()),
        seconds=time.perf_counter() - started,
    )
    write_text(config.output / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    say_result(report, result, base, data.example, say)
    return report


def load_quantized(base: str) -> Any:
    """The base model in NF4.

    On a CPU the parts that are not 4-bit are float32, unless the processor multiplies bfloat16: emulated bfloat16 is
    many times slower than float32.
    """
    from minipeft_kernels.arithmetic import arithmetic_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arithmetic_dtype(torch.bfloat16, device)
    with without_bars():
        return load_base_model(base, quantize="nf4", dtype=dtype, device=device)


def _train(
    model: Any, exam: Exam, data: DemoData, base: str, config: DemoConfig, say: Callable[[str], None]
) -> TrainResult:
    encoded = encode_records(data.train, exam.tokenizer, exam.encoded.max_length, too_long="drop")
    for notice in encoded.notices:
        say(notice)
    width = row_tokens(encoded, exam.encoded)
    encoded.max_length = width
    curve = EncodedDataset(exam.encoded.examples[:CURVE_TEXTS], width, CURVE_TEXTS)
    rows = max(1, STEP_TOKENS // width)
    steps = config.steps or len(Batches(encoded.examples, rows, packing=True, max_length=width))
    settings = TrainConfig(
        model=base,
        data=str(config.output / "train.jsonl"),
        output_dir=str(config.output),
        method="lora",
        method_args={"r": RANK, "lora_alpha": 2 * RANK},
        quantize="nf4",
        max_length=width,
        too_long="drop",
        packing=True,
        batch_size=rows,
        max_steps=steps,
        lr=LEARNING_RATE,
        scheduler="cosine",
        warmup_ratio=0.06,
        seed=config.seed,
        log_every=1,
        eval_at_start=True,
        eval_every=math.ceil(steps / CURVE_POINTS),
    )
    config.output.mkdir(parents=True, exist_ok=True)
    data.write(config.output)
    trainer = Trainer(model, encoded, settings, eval_data=curve, pad_id=exam.pad_id)
    try:
        return trainer.train()
    except TrainingInterrupted as stop:
        # The demo is short: it starts anew rather than going on.
        message = f"demo stopped after step {stop.step}; remove {config.output} before starting it again"
        raise TrainingInterrupted(message, stop.checkpoint, stop.step) from None


def say_data(data: DemoData, say: Callable[[str], None]) -> None:
    """Print the task, with some examples."""
    say(data.about)
    say(f"{len(data.train)} texts to learn from, {len(data.held_out)} others held out to measure on. Some:")
    for record in varied(data.train):
        say(f"    {record.prompt or ''} ->{record.completion or ''}")


def say_model(model: Any, is_smollm2: bool, say: Callable[[str], None]) -> tuple[int, int]:
    """Print the sizes of the model; return its bytes in 16 bits and in 4 bits."""
    from minipeft.packed import numbers_of

    packed = numbers_of(model)
    linear = sum(packed.values())
    rest = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    bytes_16bit, bytes_4bit = 2 * (linear + rest), model.get_memory_footprint()
    if is_smollm2:
        say("SmolLM2-135M-Instruct. The file it came from holds weights rounded to 4 bits (Q4_1), so it is a little")
        say("worse than the original.")
    say(f"in 16 bits    {size(bytes_16bit):>9}   {linear + rest:,} parameters")
    kept = str(model.dtype).removeprefix("torch.")
    say(f"in 4 bits     {size(bytes_4bit):>9}   {linear:,} of them in NF4, the embeddings in {kept}")
    return bytes_16bit, bytes_4bit


def say_before(before: Measurement, exam: Exam, say: Callable[[str], None]) -> None:
    """Print the measurement before training."""
    if before.accuracy is not None:
        say(f"accuracy {_percent(before)}; always answering the same label: {100 * (exam.majority or 0):.1f} %")
    say(f"loss {before.loss:.2f}, perplexity {before.perplexity:.0f}: it does not know what kind of answer is wanted")


def say_after(before: Measurement, after: Measurement, exam: Exam, say: Callable[[str], None]) -> None:
    """Print both measurements side by side."""
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


def say_result(report: DemoResult, result: TrainResult, base: str, example: str, say: Callable[[str], None]) -> None:
    """Print the places of all results, and the commands that use them."""
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
