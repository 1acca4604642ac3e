"""The whole job on two CPU cores in about five minutes: a real model in 4 bits learns a task it was bad at.

The base model is quantized to NF4, LoRA adapters of rank 16 are trained on about a thousand short texts, and
loss, perplexity and accuracy are measured before and after on texts that were not trained on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minipeft.files import write_text
from minipeft.training.batches import Batches, pad_id_of
from minipeft.training.config import TrainConfig
from minipeft.training.demo_data import DemoData, load_demo_data
from minipeft.training.encoding import EncodedDataset, encode_prompt, encode_records
from minipeft.training.errors import TrainingInterrupted
from minipeft.training.evaluation import accuracy, classify, evaluate_loss
from minipeft.training.generation import Sampling, generate
from minipeft.training.inspection import size
from minipeft.training.loop import Trainer, TrainResult
from minipeft.training.metrics import read_log
from minipeft.training.models import load_base_model, load_tokenizer, seed_everything
from minipeft.training.plots import check_matplotlib, plot_loss_curve
from minipeft.training.records import Record
from minipeft.training.smollm2 import smollm2_folder

# Texts of about 20 tokens are packed into rows of this many, and three rows make a step: about 16 texts. Twice
# as many a step, in half as many steps, reached 44 % accuracy instead of 56 %.
ROW_TOKENS = 128
ROWS_PER_STEP = 3
LEARNING_RATE = 1e-3
RANK = 16

SAMPLE_TOKENS = 12


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


@dataclass(frozen=True)
class Measurement:
    """How good the model is on the held-out texts. Accuracy is None where the answers are no fixed set of labels.

    Attributes:
        loss: nats per token of the answers.
        standard_error: of the accuracy.
        samples: what the model writes after some of the prompts.
    """

    loss: float
    perplexity: float
    accuracy: float | None
    standard_error: float | None
    samples: list[str]


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


def run_demo(config: DemoConfig, say: Callable[[str], None] = print) -> DemoResult:
    """Run it and print a report as it goes.

    Raises:
        TrainingError: no download, no such model, bad data, an output directory in use.
    """
    started = time.perf_counter()
    check_matplotlib()

    say("[1/6] The data")
    data = load_demo_data(config.data, config.train_rows, config.held_out_rows, config.seed, say)
    _say_data(data, say)

    say("\n[2/6] The model, in 4 bits")
    base = config.model or str(smollm2_folder(say))
    tokenizer = load_tokenizer(base)
    model = load_quantized(base)
    bytes_16bit, bytes_4bit = _say_model(model, config.model is None, say)

    say("\n[3/6] Before training")
    held_out = encode_records(data.held_out, tokenizer, ROW_TOKENS, too_long="drop")
    exam = Exam(tokenizer, data, held_out)
    before = exam.take(model)
    _say_before(before, exam, say)

    say("\n[4/6] Training (QLoRA)")
    seed_everything(config.seed)
    model = attach_lora(model)
    trainable, parameters = model.get_nb_trainable_parameters()
    share = f"{trainable:,} of {parameters:,} parameters ({100 * trainable / parameters:.2f} %)"
    say(f"LoRA of rank {RANK} on all linear layers: {share} are trained, the 4-bit rest stays as it is.")
    result = _train(model, tokenizer, data, base, config)
    say(f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s")

    say("\n[5/6] After training")
    after = exam.take(model)
    _say_after(before, after, exam, say)

    say("\n[6/6] The result")
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
    _say_result(report, result, base, exam, config, say)
    return report


def load_quantized(base: str) -> Any:
    """The base model in NF4.

    On a CPU what is not 4-bit is float32 unless the processor multiplies bfloat16: emulated, that is many times
    slower than float32.
    """
    from transformers.utils import logging

    from minipeft.kernels.arithmetic import arithmetic_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logging.disable_progress_bar()
    return load_base_model(base, quantize="nf4", dtype=arithmetic_dtype(torch.bfloat16, device), device=device)


def attach_lora(model: Any) -> Any:
    """LoRA on every linear layer of the 4-bit model."""
    from minipeft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


class Exam:
    """The held-out texts, and how a model does on them."""

    def __init__(self, tokenizer: Any, data: DemoData, encoded: EncodedDataset) -> None:
        self.tokenizer, self.labels, self.encoded = tokenizer, data.labels, encoded
        self.records = data.held_out
        self.truth = [record.completion for record in data.held_out]
        self.majority = None
        if data.labels:
            self.majority = max(map(self.truth.count, data.labels)) / len(self.truth)
        self.samples = _varied(data.held_out)

    def take(self, model: Any) -> Measurement:
        """Measure loss and, where the answers are labels, the accuracy of choosing the likeliest one."""
        batches = Batches(
            self.encoded.examples, 4, pad_id=pad_id_of(self.tokenizer), packing=True, max_length=ROW_TOKENS
        )
        result = evaluate_loss(model, batches)
        right = None
        if self.labels:
            prompts = [record.prompt or "" for record in self.records]
            with _bar(len(prompts)) as progress:
                chosen = classify(model, self.tokenizer, prompts, self.labels, batch_size=32, progress=progress)
            right = accuracy([self.labels[i] for i in chosen.predictions], self.truth)
        samples = self.write(model)
        return Measurement(
            loss=result.loss,
            perplexity=result.perplexity,
            accuracy=right.accuracy if right else None,
            standard_error=right.standard_error if right else None,
            samples=samples,
        )

    def write(self, model: Any) -> list[str]:
        """What the model writes after the sample prompts, on one line each."""
        if not self.samples:
            return []
        prompts = [encode_prompt(self.tokenizer, record.prompt or "") for record in self.samples]
        texts = generate(model, self.tokenizer, prompts, Sampling(max_new_tokens=SAMPLE_TOKENS))
        return [" ".join(text.split()) for text in texts]


def _varied(records: list[Record], count: int = 3) -> list[Record]:
    """Some records with a prompt, with different completions while there are such."""
    with_prompt = [record for record in records if record.prompt is not None]
    by_completion: dict[str | None, Record] = {}
    for record in with_prompt:
        by_completion.setdefault(record.completion, record)
    different = list(by_completion.values())
    # Spread over the labels: the first, the middle and the last.
    picked = different[:: max(1, (len(different) - 1) // (count - 1))] if len(different) >= count else different
    return (picked + with_prompt)[:count]


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, desc="measuring", unit="text", dynamic_ncols=True, leave=False) as bar:
        yield lambda done: (bar.update(done - bar.n), None)[1]


def _train(model: Any, tokenizer: Any, data: DemoData, base: str, config: DemoConfig) -> TrainResult:
    config.output.mkdir(parents=True, exist_ok=True)
    data.write(config.output)
    encoded = encode_records(data.train, tokenizer, ROW_TOKENS, too_long="drop")
    settings = TrainConfig(
        model=base,
        data=str(config.output / "train.jsonl"),
        output_dir=str(config.output),
        method="lora",
        method_args={"r": RANK, "lora_alpha": 2 * RANK},
        quantize="nf4",
        max_length=ROW_TOKENS,
        too_long="drop",
        packing=True,
        batch_size=ROWS_PER_STEP,
        max_steps=config.steps,
        lr=LEARNING_RATE,
        scheduler="cosine",
        warmup_ratio=0.06,
        seed=config.seed,
        log_every=1,
    )
    trainer = Trainer(model, encoded, settings, pad_id=pad_id_of(tokenizer))
    try:
        return trainer.train()
    except TrainingInterrupted as stop:
        # The demo is short: it starts anew rather than going on.
        message = f"demo stopped after step {stop.step}; remove {config.output} before starting it again"
        raise TrainingInterrupted(message, stop.checkpoint, stop.step) from None


def _say_data(data: DemoData, say: Callable[[str], None]) -> None:
    say(data.about)
    say(f"{len(data.train)} texts to learn from, {len(data.held_out)} others held out to measure on. Some:")
    for record in _varied(data.train):
        say(f"    {record.prompt or ''} ->{record.completion or ''}")


def _say_model(model: Any, is_smollm2: bool, say: Callable[[str], None]) -> tuple[int, int]:
    """Print and return the bytes of the model in 16 and in 4 bits."""
    from minipeft.quantization import NF4Linear

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


def _say_before(before: Measurement, exam: Exam, say: Callable[[str], None]) -> None:
    if before.accuracy is not None:
        say(f"accuracy {_percent(before)}; always answering the same label: {100 * (exam.majority or 0):.1f} %")
    say(f"loss {before.loss:.3f}, perplexity {before.perplexity:.1f} (on the answers)")


def _say_after(before: Measurement, after: Measurement, exam: Exam, say: Callable[[str], None]) -> None:
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


def _say_result(
    report: DemoResult,
    result: TrainResult,
    base: str,
    exam: Exam,
    config: DemoConfig,
    say: Callable[[str], None],
) -> None:
    rows = read_log(result.log_path)
    held_out = [
        {"step": 0, "eval_loss": report.before.loss},
        {"step": result.steps, "eval_loss": report.after.loss},
    ]
    curve = plot_loss_curve([*rows, *held_out], config.output / "loss_curve.png", title="QLoRA demo")
    say(f"adapter       {result.adapter_dir} ({size(report.adapter_bytes)})")
    say(f"loss curve    {curve}")
    say(f"all numbers   {config.output / 'report.json'}")
    say(f"time          {report.seconds:.0f} s, peak memory {size(result.peak_memory)}")
    prompt = exam.samples[-1].prompt if exam.samples else "..."
    adapter = f"--model {base} --quantize nf4 --adapter {result.adapter_dir}"
    say("\nUse it:")
    say(f"  minipeft generate {adapter} --raw --prompt {_quoted(prompt or '')}")
    say(f"  minipeft eval {adapter} --data {config.output / 'held_out.jsonl'}")
    say(f"  minipeft merge {adapter} --output {config.output.with_name(config.output.name + '-merged')}")


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _percent(measured: Measurement) -> str:
    return f"{100 * (measured.accuracy or 0):.1f} % ± {100 * (measured.standard_error or 0):.1f}"
