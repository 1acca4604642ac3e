"""The training loop.

One optimizer step is one `_step`: a group of micro-batches, each forward and backward, then clip, update,
schedule. Everything that decides the next step is in model, optimizer, schedule, `Progress` and torch's
generators; those go into a checkpoint, always as they were between two optimizer steps, so a resumed run
repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from minipeft.files import atomic_directory
from minipeft.shards import is_sharded, whole
from minipeft.train.batches import Batch, Batches, check_isolation
from minipeft.train.checkpoint import (
    Progress,
    capture_random,
    checkpoint_path,
    load_checkpoint,
    prune_checkpoints,
    restore_random,
    save_checkpoint,
)
from minipeft.train.config import TrainConfig
from minipeft.train.encoding import EncodedDataset, check_vocabulary
from minipeft.train.errors import NonFiniteError, TrainingError, TrainingInterrupted
from minipeft.train.evaluation import EvalResult, evaluate_loss
from minipeft.train.loss import autocast
from minipeft.train.models import training_mode, vocabulary_of
from minipeft.train.processes import Processes
from minipeft.train.pushing import check_login, push
from minipeft.train.report import (
    Reporter,
    RunLog,
    TrainResult,
    check_matplotlib,
    logged_evaluation,
    peak_memory_bytes,
    plot_loss_curve,
    read_log,
)
from minipeft.train.run import StopSignal, check_output_dir, hold_run, open_run, run_identity
from minipeft.train.schedule import make_optimizer, make_schedule, trainable_parameters
from minipeft.train.summary import complete_card, summarize, write_page
from minipeft.train.trackers import Trackers, check_trackers

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the parameters of `model` that require a gradient, and saves them with `model.save_pretrained`.

    Args:
        model: a causal language model with an adapter, on the device to train on.
        data: what to train on.
        config: `model`, `data`, `method` and what else concerns loading is not looked at.
        eval_data: what to evaluate on, if anything.
        pad_id: token id for padding.
        progress_bar: show one on stderr.
        on_log: called with every log row.
        processes: those that train together, each with a Trainer of its own over the same data (`processes.join`); the
            batch size and the accumulation are each one's. The model may be sharded over them (FSDP2's `fully_shard`).
            None for this one alone.
    """

    def __init__(
        self,
        model: Any,
        data: EncodedDataset,
        config: TrainConfig,
        *,
        eval_data: EncodedDataset | None = None,
        pad_id: int = 0,
        progress_bar: bool = True,
        on_log: Callable[[dict[str, Any]], None] = lambda row: None,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.data, self.eval_data, self.config = model, data, eval_data, config
        self.processes = processes or Processes()
        self.group_size = config.gradient_accumulation * self.processes.count
        self.output_dir = Path(config.output_dir)
        self.device = next(model.parameters()).device
        self._sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self.parameters = list(trainable_parameters(model).values())
        if self._sharded and not all(map(is_sharded, self.parameters)):
            raise TrainingError(
                "an adapter that was loaded after the model was sharded (FSDP2) cannot be trained: nobody would "
                "average its gradients; load it before fully_shard"
            )
        rows = vocabulary_of(model)
        for examples in (data.examples, [] if eval_data is None else eval_data.examples):
            check_vocabulary(examples, rows)
        # Padding is masked: an id of a token that the model lacks would only be out of range.
        pad_id = pad_id if rows is None or pad_id < rows else 0
        layout: dict[str, Any] = {"pad_id": pad_id, "packing": config.packing, "max_length": data.max_length}
        self.batches = Batches(data.examples, config.batch_size, seed=config.seed, **layout)
        self.eval_batches = None
        if eval_data is not None:
            size = config.eval_batch_size or config.batch_size
            layout["max_length"] = max(data.max_length, eval_data.max_length)
            self.eval_batches = Batches(eval_data.examples, size, **layout)
        self.total_steps = self._steps_of(config)
        self.optimizer = make_optimizer(model, config)
        self.schedule = make_schedule(self.optimizer, config, self.total_steps)
        if config.warmup_steps is not None and config.warmup_steps >= self.total_steps:
            logger.warning(
                "the warm-up of %d steps is as long as the whole run of %d: the learning rate never reaches %g",
                *(config.warmup_steps, self.total_steps, config.lr),
            )
        self.progress = Progress()
        self._stopping = False
        self._progress_bar, self._on_log = progress_bar and self.processes.first, on_log

    def train(self, resume: bool | str | Path = False) -> TrainResult:
        """Run to the end.

        Args:
            resume: False starts a run; True goes on from the newest checkpoint in output_dir, or from the
                start if the run has none yet; a path goes on from that checkpoint. With more epochs or steps than the
                run had, it is prolonged: the steps to come take the learning rates that a run of the new length has at
                them; the steps that were taken keep theirs.

        Raises:
            OutputDirError, CheckpointError: see `run.check_output_dir`; a resumed run that is a different
                one.
            PushError: the run is complete, and its adapter could not be sent to `push_to_hub`.
            NonFiniteError: the loss or gradient is not finite; the last checkpoint is untouched.
            TrainingInterrupted: SIGINT or SIGTERM; the run is saved.
        """
        self._check_extras()
        self.processes.by_first(lambda: check_output_dir(self.output_dir, resume))
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with hold_run(self.output_dir) if self.processes.first else contextlib.nullcontext():
            return self._train(resume)

    def _steps_of(self, config: TrainConfig) -> int:
        """The optimizer steps of a run over this data with such settings."""
        return total_steps(len(self.batches), config, self.processes.count)

    def _train(self, resume: bool | str | Path) -> TrainResult:
        identity = run_identity(self.model, self.data, self.config, self.processes.count)
        checkpoint, shorter = self.processes.by_first(lambda: self._open(resume, identity))
        # Dropout differs from process to process; one alone draws as it always has.
        torch.manual_seed(self.config.seed + (self.processes.rank << 32))
        if checkpoint is not None:
            self.progress, random_state = load_checkpoint(Path(checkpoint), self.model, self.optimizer, self.schedule)
            self._restore_random(random_state)
        if shorter is not None:
            self._prolong(shorter)
        self._random = capture_random()
        self._identity = identity
        self._loss_of = self.processes.loss_of(self.model)
        self._report = self._reporter()
        mode = training_mode(self.model, self.config.gradient_checkpointing)
        with contextlib.closing(self._report), StopSignal() as self._stop, mode:
            return self._run()

    def _open(self, resume: bool | str | Path, identity: dict[str, Any]) -> tuple[str | None, int | None]:
        checkpoint, shorter = open_run(self.output_dir, resume, self.config, identity, self._steps_of)
        return None if checkpoint is None else str(checkpoint), shorter

    def _restore_random(self, state: dict[str, torch.Tensor]) -> None:
        """Put torch's generators back into this process's stored state; another number of processes starts new ones."""
        stored = 1 + len({name.split("/")[0] for name in state if name.startswith("rank")})
        start = f"rank{self.processes.rank}/" if self.processes.rank else ""
        own = {name.removeprefix(start): t for name, t in state.items() if name.startswith(start or ("cpu", "cuda."))}
        if stored == self.processes.count:
            restore_random(own)
        elif self.processes.count > 1 or stored > 1:
            torch.manual_seed(self.config.seed + (self.processes.rank << 32) + (self.progress.step << 16))

    def _prolong(self, shorter: int) -> None:
        """Go over from the learning rates of a run of `shorter` steps, in which the checkpoint was made, to this one's.

        The schedule has this run's length already; the optimizer has the rate that the shorter run would take next.
        """
        groups, taken = self.optimizer.param_groups, self.progress.step
        before = groups[0]["lr"]
        schedule: Any = self.schedule
        for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * factor(taken)
        schedule._last_lr = [group["lr"] for group in groups]
        logger.warning(
            "prolonged: the run of %d steps goes on to %d; from step %d the learning rate is that of the %s schedule "
            "over %d steps, %.3g now where the shorter one had come to %.3g",
            *(shorter, self.total_steps, taken + 1, self.config.scheduler, self.total_steps, groups[0]["lr"], before),
        )

    def evaluate(self) -> EvalResult | None:
        """Loss on the evaluation data as the model is now; None without evaluation data."""
        if self.eval_batches is None:
            return None
        return self._evaluate()

    def _evaluate(self, should_stop: Callable[[], bool] = lambda: False) -> EvalResult:
        assert self.eval_batches is not None
        return evaluate_loss(
            self.model,
            self.eval_batches,
            precision=self.config.precision,
            should_stop=should_stop,
            processes=self.processes,
        )

    def _run(self) -> TrainResult:
        config, progress = self.config, self.progress
        start = self._evaluate_and_log() if config.eval_at_start and progress.step == 0 else None
        end: EvalResult | None = None
        for group in self._groups():
            self._step(group)
            last = progress.step == self.total_steps
            if last or progress.step % config.log_every == 0:
                self._report.log_window()
            if last or (config.eval_every and progress.step % config.eval_every == 0):
                end = self._evaluate_and_log()
            if last or (config.save_every and progress.step % config.save_every == 0):
                self._save()
            if self._stopping:
                self._save_and_stop()
        return self._finish(start, end)

    def _groups(self) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step still to be taken; an epoch's last group may be smaller."""
        progress = self.progress
        while progress.step < self.total_steps:
            batches = self.batches.epoch(progress.epoch, progress.batch)
            while progress.step < self.total_steps:
                group = list(itertools.islice(batches, self.group_size))
                if not group:
                    break
                yield group
            else:
                return
            progress.epoch, progress.batch = progress.epoch + 1, 0

    def _step(self, group: list[Batch]) -> None:
        """Take one optimizer step, or none at all."""
        progress, step = self.progress, self.progress.step + 1
        tokens = sum(batch.loss_tokens for batch in group)

        # 1. Forward and backward. Each micro-batch adds its share of the mean over all tokens of the step.
        losses: list[torch.Tensor] = []
        own, count = self.processes.share(group), self.processes.count
        for index, (batch, counts) in enumerate(own):
            if index and self._stop.requested and count == 1:
                # Nothing of a half-done step is kept: the whole step is taken when the run is resumed.
                self._save_and_stop()
            with autocast(self.device, self.config.precision), self.processes.meeting():
                loss = self._loss_of(batch.to(self.device), index == len(own) - 1)
                # The gradients are averaged over the processes, and the loss is to be added up over them.
                (loss * (count * counts / tokens)).backward()
            if counts:
                losses.append(loss.detach())

        # 2. Check before the update: a step with a non-finite gradient would ruin the parameters for good.
        # Reading a loss waits for the device, so all are read here, once a step.
        stop = float(self._stop.requested)
        loss_sum, stopping = self.processes.sum(sum(loss.item() for loss in losses), stop)
        self._stopping = stopping > 0
        mean_loss = loss_sum / tokens
        with self.processes.meeting():
            norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)).item()
        self._check_finite(step, mean_loss, norm)

        # 3. Update.
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

        # 4. Account. From here on the run is between two steps again, as a checkpoint stores it.
        real_tokens = sum(batch.tokens for batch in group)
        progress.step, progress.batch = step, progress.batch + len(group)
        progress.tokens += real_tokens
        progress.window_loss += loss_sum
        progress.window_loss_tokens += tokens
        self._random = capture_random()
        self._report.step(real_tokens, mean_loss, lr, norm)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm} (loss {loss:.4g})"
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        message = f"training stopped at step {step}: the {what}, at learning rate {lr:.3g}"
        advice = "the step was not taken and saved checkpoints are unaffected; try a lower lr"
        raise NonFiniteError(f"{message}; {advice}", step)

    def _evaluate_and_log(self) -> EvalResult | None:
        if self.eval_batches is None:
            return None
        with self._report.paused():
            alone = self.processes.count == 1
            # Several processes stop together: between two steps, or here at the end of the evaluation.
            result = self._evaluate(lambda: alone and self._stop.requested)
            self._stopping = self.processes.sum(float(self._stop.requested))[0] > 0
        # A stopped evaluation saw only a part of the texts, so it is not logged; the caller then stops the run.
        if not (alone and self._stopping):
            self._report.log_evaluation(result)
        return result

    def _save(self) -> Path:
        self.progress.seconds = self._report.seconds
        random_state = self.processes.gather(self._random)
        path = checkpoint_path(self.output_dir, self.progress.step)
        # One that exists already is kept as it is.
        if not self.processes.by_first(path.exists):
            self._write(lambda writes: self._write_checkpoint(random_state, writes))
        return path

    def _write(self, write: Callable[[bool], None]) -> None:
        """Have the first process write; of a sharded model all take part, and the others are told False."""
        if self._sharded:
            with self.processes.meeting():
                write(self.processes.first)
        self.processes.by_first(lambda: None if self._sharded else write(True))

    def _write_checkpoint(self, random_state: dict[str, torch.Tensor], writes: bool) -> None:
        state = (self.model, self.optimizer, self.schedule, self.progress, random_state, self._identity)
        save_checkpoint(self.output_dir, *state, writes=writes)
        if writes:
            prune_checkpoints(self.output_dir, self.config.keep_last)

    def _save_and_stop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        path = self._save()
        name = "a signal to another process" if self._stop.received is None else self._stop.received.name
        message = f"stopped by {name} after step {self.progress.step} of {self.total_steps}"
        raise TrainingInterrupted(f"{message}; saved {path}, go on with --resume", path, self.progress.step)

    def _finish(self, start: EvalResult | None, end: EvalResult | None) -> TrainResult:
        log_path, adapter_dir = self._report.log_path, self.output_dir / "adapter"
        end = end or logged_evaluation(read_log(log_path), self.progress.step) or self._evaluate_and_log()
        seconds = self._report.seconds
        self._write(lambda writes: self._write_adapter(adapter_dir, writes))
        name = self.config.push_to_hub
        if name is not None:
            self.processes.by_first(lambda: push(adapter_dir, name))
        rows = read_log(log_path)
        plot_path = self.output_dir / "loss_curve.png" if self.config.plot else None
        losses = [row["loss"] for row in rows if "loss" in row]
        return TrainResult(
            steps=self.progress.step,
            loss=losses[-1] if losses else math.nan,
            eval_start=start or logged_evaluation(rows, 0),
            eval_end=end,
            adapter_dir=adapter_dir,
            log_path=log_path,
            plot_path=plot_path,
            seconds=seconds,
            tokens=self.progress.tokens,
            peak_memory=peak_memory_bytes(self.device),
        )

    def _write_adapter(self, folder: Path, writes: bool) -> None:
        with atomic_directory(folder) if writes else contextlib.nullcontext(folder) as temporary:
            self.model.save_pretrained(str(temporary), is_main_process=writes)
            if writes:
                summary = summarize(self.config, self.data, self.eval_data, read_log(self._report.log_path))
                complete_card(temporary / "README.md", summary)
        if not writes:
            return
        if self.config.plot:
            plot_loss_curve(summary.log, self.output_dir / "loss_curve.png")
        if self.config.page:
            result = [("steps", f"{self.progress.step:,}"), ("tokens trained on", f"{self.progress.tokens:,}")]
            result += [*summary.last("loss"), *summary.last("eval_loss"), ("seconds", f"{self._report.seconds:.0f}")]
            write_page(self.output_dir / "report.html", self.output_dir.resolve().name, summary, result)

    def _check_extras(self) -> None:
        if self.config.plot:
            check_matplotlib()
        check_trackers(self.config.trackers())
        name = self.config.push_to_hub
        if name is not None:
            self.processes.by_first(lambda: check_login(name))
        if self.config.packing:
            check_isolation(self.model)

    def _reporter(self) -> Reporter:
        trackers = Trackers(self.output_dir)
        settings = {name: value for name, value in self.config.to_dict().items() if value is not None}
        settings |= {"training_records": len(self.data), "training_tokens": self.data.tokens}
        self.processes.by_first(lambda: trackers.start(self.config.trackers(), settings))
        log = RunLog(self.output_dir / "log.jsonl", trackers, writes=self.processes.first)
        # A run that starts over at step 0 does its first evaluation again, so its row is dropped too.
        log.rewind(self.progress.step or -1)
        return Reporter(
            log,
            self.progress,
            self.device,
            total_steps=self.total_steps,
            batches_per_epoch=len(self.batches),
            progress_bar=self._progress_bar,
            on_log=self._on_log,
        )


def total_steps(batches: int, config: TrainConfig, processes: int = 1) -> int:
    """Optimizer steps of a run over `batches` micro-batches an epoch."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * math.ceil(batches / (config.gradient_accumulation * processes))))
