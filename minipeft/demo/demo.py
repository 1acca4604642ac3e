"""The whole job on two CPU cores in about five minutes: a real model in 4 bits learns a task it was bad at.

The base model is quantized to NF4, LoRA adapters of rank 16 are trained on about a thousand short texts, and
loss, perplexity and accuracy are measured before and after on texts that were not trained on.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minipeft.demo.data import DemoData, load_demo_data
from minipeft.demo.exam import ROW_TOKENS, Exam, row_tokens
from minipeft.demo.report import DemoResult, say_after, say_before, say_data, say_model, say_result
from minipeft.demo.smollm2 import smollm2_folder
from minipeft.files import write_text
from minipeft.train.batches import Batches
from minipeft.train.config import TrainConfig
from minipeft.train.encoding import EncodedDataset, encode_records
from minipeft.train.errors import TrainingInterrupted
from minipeft.train.loop import Trainer
from minipeft.train.models import load_base_model, load_tokenizer, model_position_limit, seed_everything, without_bars
from minipeft.train.report import TrainResult, check_matplotlib, plot_loss_curve, read_log

# Two packed rows make a step: about 13 texts, 74 steps. Accuracy after one pass: 54.8 % so, 52.2 % with three rows, and
# 43.8 % with 32 texts a step (± 2.5 %).
STEP_TOKENS = 2 * ROW_TOKENS
# Longer texts, of one's own, are left out.
MOST_TOKENS = 512
LEARNING_RATE = 1e-3
RANK = 16

# Held-out texts for the curve, measured this often: few, because it takes time from training.
CURVE_TEXTS, CURVE_POINTS = 100, 6


@dataclass(frozen=True)
class DemoConfig:
    """What the demo is run on.

    Attributes:
        output: directory for everything that it writes.
        model: directory or hub name to use instead of SmolLM2-135M-Instruct.
        data: JSONL file to use instead of the rated snippets.
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
    cores = Cores(say)

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
    cores.share()
    exam = Exam(tokenizer, data, encode_records(data.held_out, tokenizer, most, too_long="drop"))
    before = exam.take(model)
    say_before(before, exam, say)

    say("\n[4/6] Training (QLoRA)")
    seed_everything(config.seed)
    model = attach_lora(model)
    trainable, parameters = model.get_nb_trainable_parameters()
    share = f"{trainable:,} of {parameters:,} parameters ({100 * trainable / parameters:.2f} %)"
    say(f"LoRA of rank {RANK} on all linear layers: {share} are trained, the 4-bit rest stays as it is.")
    cores.share()
    result = _train(model, exam, data, base, config, say)
    say(f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s")

    say("\n[5/6] After training")
    cores.share()
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


class Cores:
    """Uses half the threads while others keep the machine busy, unless OMP_NUM_THREADS says how many to use.

    Threads meet after every operation, so one that has to wait for a core holds up all: on two cores under a load of
    5 from others, a step took 22 to 45 s with two threads and 3 s with one.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.all, self.own, self.say = torch.get_num_threads(), 0, say

    def share(self) -> None:
        """Decide again; between the phases, because others come and go."""
        if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg") or self.all == 1:
            return
        others = os.getloadavg()[0] - self.own
        threads = self.all // 2 if others > 0.9 * (os.cpu_count() or 1) else self.all
        if threads != torch.get_num_threads():
            self.say(f"(others load this machine with {max(others, 0):.1f}: {threads} of {self.all} threads from here)")
            torch.set_num_threads(threads)
        self.own = threads


def load_quantized(base: str) -> Any:
    """The base model in NF4.

    On a CPU what is not 4-bit is float32 unless the processor multiplies bfloat16: emulated, that is many times
    slower than float32.
    """
    from minipeft_kernels.arithmetic import arithmetic_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arithmetic_dtype(torch.bfloat16, device)
    with without_bars():
        return load_base_model(base, quantize="nf4", dtype=dtype, device=device)


def attach_lora(model: Any) -> Any:
    """LoRA on every linear layer of the 4-bit model."""
    from minipeft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


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
