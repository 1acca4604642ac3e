"""Attacks on running processes: killed at any moment, no disk, no handles, two at once, threads, forks, bad numbers.

Each attack is a function of (random numbers, an empty folder) and raises AssertionError where a promise is broken:
what is on disk is whole or not there, a killed run resumed has the numbers of one that was not, an error is one
sentence with exit code 2, and nothing is changed in silence. `ROUND` lists them; `python -m tests.faults attack
--minutes N` goes through them again and again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import some_ids, tiny_llama
from tiny_folder import save_model, write_jsonl
from tiny_runs import make_config, make_data, make_model

from minipeft import LoraConfig, PeftModel, get_peft_model
from minipeft.nf4 import quantize_model
from minipeft.optim import PagedAdamW
from minipeft.optim.tiers import PagingError
from minipeft.train import NonFiniteError, Trainer, list_checkpoints, read_log
from minipeft.train.checkpoint import check_whole

RECORDS = [{"prompt": "q" * (i % 7 + 1), "completion": "abc" * (i % 5 + 1)} for i in range(24)]
# Seconds after which a process that should have ended has hung.
LIMIT = 240


def inputs(folder: Path) -> list[str]:
    """A tiny model and records in `folder`, as flags."""
    return ["--model", str(save_model(folder / "m")), "--data", str(write_jsonl(folder / "d.jsonl", RECORDS))]


def start(*argv: str, setup: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """One minipeft command in a process of its own; `setup` runs in it first."""
    command = [sys.executable, "-W", "ignore", "-m", "minipeft", *argv]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, preexec_fn=setup, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and standard error of a process, which is killed if it hangs."""
    try:
        _, said = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"hung: {process.args}") from None
    return process.returncode, said


def must(*argv: str) -> None:
    """A command that must succeed."""
    code, said = finish(start(*argv))
    assert code == 0, said


def refused(code: int, said: str) -> str:
    """The sentence of a command that was refused; the log lines of libraries before it do not count."""
    assert code == 2 and "Traceback" not in said, (code, said)
    last = said.strip().splitlines()[-1]
    assert last.startswith("minipeft: error: "), said
    return last


# Killed, with nothing to be done about it.


def killed_training_goes_on_to_the_same_numbers(draw: random.Random, folder: Path) -> None:
    """SIGKILL at random moments, resumed until it ends: the log rows and adapter bytes of an undisturbed run."""
    flags = [*inputs(folder), "--max-steps", "30", "--batch-size", "2", "--save-every", str(draw.randint(1, 4))]
    flags += ["--log-every", "1", "--lr", "0.01", "--method-args", "{r: 4, lora_dropout: 0.1}"]
    must("train", *flags, "--output", str(folder / "whole"))
    kills, run = 0, folder / "killed"
    while not (run / "adapter").exists():
        resume = ["--resume"] if (run / "run.json").exists() else []
        process = start("train", *flags, "--output", str(run), *resume)
        if kills < 4:
            _wait_for(process, run, draw)
            process.kill()
            kills += 1
            finish(process)
            for path in list_checkpoints(run) if run.exists() else ():
                check_whole(path)
        else:
            code, said = finish(process)
            assert code == 0, said
    rows = [[(row["step"], row.get("loss")) for row in read_log(p / "log.jsonl")] for p in (folder / "whole", run)]
    assert rows[0] == rows[1], rows
    names = [p / "adapter" / "adapter_model.safetensors" for p in (folder / "whole", run)]
    assert names[0].read_bytes() == names[1].read_bytes()


def _wait_for(process: subprocess.Popen[str], run: Path, draw: random.Random) -> None:
    """Wait until the run has written something more, and a random moment longer."""
    seen, deadline = _files(run), time.monotonic() + LIMIT
    while process.poll() is None and _files(run) == seen and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(draw.random() * 0.5)


def _files(folder: Path) -> list[tuple[str, int]]:
    found = []
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        try:
            found.append((str(path), path.stat().st_size))
        except OSError:  # it was there a moment ago
            continue
    return found


def killed_merging_leaves_a_whole_folder_or_none(draw: random.Random, folder: Path) -> None:
    """SIGKILL while a merged model is written."""
    flags = inputs(folder)
    must("train", *flags, "--max-steps", "2", "--output", str(folder / "run"))
    merged = folder / "merged"
    for _ in range(3):
        process = start("merge", *flags[:2], "--adapter", str(folder / "run" / "adapter"), "--output", str(merged))
        deadline = time.monotonic() + LIMIT
        while process.poll() is None and not list(folder.glob(".incomplete-*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        process.kill()
        finish(process)
        if merged.exists():
            assert load_file(merged / "model.safetensors") and (merged / "tokenizer.json").exists()
            return
    must("merge", *flags[:2], "--adapter", str(folder / "run" / "adapter"), "--output", str(merged))


SAVING = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny_runs import make_model
model = make_model()
print("ready", flush=True)
while True:
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    model.save_pretrained(sys.argv[1])
"""


def killed_saving_leaves_a_whole_adapter(draw: random.Random, folder: Path) -> None:
    """SIGKILL while `save_pretrained` writes over an adapter, again and again."""
    target = folder / "adapter"
    tests = str(Path(__file__).parents[1])
    make_model().save_pretrained(target)
    for _ in range(3):
        command = [sys.executable, "-W", "ignore", "-c", SAVING, str(target), tests]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            ready = process.stdout.readline()
            time.sleep(draw.random() * 0.3)
            process.kill()
        assert ready == "ready\n", ready
        json.loads((target / "adapter_config.json").read_text())
        PeftModel.from_pretrained(make_model(adapter=False), target)


# The system does not give what is asked for.


def _at_most(kind: int, number: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(kind, (number, number))

    return limit


def a_full_disk_is_one_sentence_and_costs_no_checkpoint(draw: random.Random, folder: Path) -> None:
    """No file may grow past a limit: what was saved before stays whole, and the run goes on when there is room."""
    flags = [*inputs(folder), "--batch-size", "2", "--save-every", "2", "--output", str(folder / "run")]
    must("train", *flags, "--max-steps", "4")
    room = draw.choice([200, 2_000, 20_000])
    process = start("train", *flags, "--max-steps", "8", "--resume", setup=_at_most(resource.RLIMIT_FSIZE, room))
    refused(*finish(process))
    kept = list_checkpoints(folder / "run")
    assert kept, "no checkpoint is left"
    for path in kept:
        check_whole(path)
    assert not list((folder / "run").glob(".incomplete-*"))
    must("train", *flags, "--max-steps", "8", "--resume")


def no_handles_is_one_sentence(draw: random.Random, folder: Path) -> None:
    """So few open files that some step of a run gets none: a sentence, or success."""
    flags = [*inputs(folder), "--max-steps", "2", "--batch-size", "2", "--save-every", "1", "--output"]
    process = start("train", *flags, str(folder / "run"), setup=_at_most(resource.RLIMIT_NOFILE, draw.randint(24, 40)))
    code, said = finish(process)
    # Before minipeft's own code runs, Python or torch itself may find no handle.
    if "Traceback" in said and "Too many open files" in said and not (folder / "run").exists():
        return
    if code != 0:
        refused(code, said)
    for path in list_checkpoints(folder / "run") if (folder / "run").exists() else ():
        check_whole(path)


def an_output_that_cannot_be_is_one_sentence(draw: random.Random, folder: Path) -> None:
    """A file where a folder must be, a folder that is not there, a device."""
    (folder / "file").write_text("x")
    place = draw.choice([folder / "file", folder / "file" / "below", folder / "nowhere" / "run", Path("/dev/null/run")])
    refused(*finish(start("train", *inputs(folder), "--max-steps", "1", "--output", str(place))))
    assert (folder / "file").read_text() == "x"


def a_vanished_spill_file_is_an_error_and_no_wrong_number(draw: random.Random, folder: Path) -> None:
    """The file in which pages lie is cut short under a running optimizer."""
    torch.manual_seed(draw.randrange(1 << 30))
    weights = [torch.nn.Parameter(torch.randn(4096)) for _ in range(8)]
    memory: dict[str, Any] = {"page_bytes": 4096, "device_budget": 8192, "host_budget": 8192}
    optimizer = PagedAdamW(weights, lr=0.1, spill_dir=str(folder), **memory)

    def step() -> None:
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()

    step()
    handles = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    spills = [h for h in handles if h.exists() is not None and str(folder) in os.path.realpath(h)]
    assert spills, "the optimizer keeps no file there: the attack does not reach it"
    os.truncate(spills[0], draw.choice([0, 100, 5000]))
    try:
        step()
    except (PagingError, OSError) as error:
        assert str(error)
    else:
        raise AssertionError("a step went on over pages that are gone")
    finally:
        with contextlib.suppress(PagingError):
            optimizer.close()


def a_clock_that_jumps_changes_no_number(draw: random.Random, folder: Path) -> None:
    """The time of day goes back and forth while a run trains: only its own times may differ."""
    plain, real = _train(folder / "plain"), time.time
    try:
        time.time = lambda: real() + draw.choice([-1e9, 0.0, 1e9])
        jumping = _train(folder / "jumping")
    finally:
        time.time = real
    assert plain == jumping


def _train(folder: Path, **settings: Any) -> list[float]:
    trainer = Trainer(make_model(), make_data(), make_config(folder, log_every=1, **settings), progress_bar=False)
    return [row["loss"] for row in read_log(trainer.train().log_path)]


# Several at once.


def two_runs_on_one_output_are_told_apart(draw: random.Random, folder: Path) -> None:
    """Of two processes that train into one folder one is refused, and the other's files are its own."""
    flags = [*inputs(folder), "--max-steps", "40", "--batch-size", "2", "--save-every", "5"]
    first = start("train", *flags, "--output", str(folder / "run"))
    time.sleep(draw.random())
    second = start("train", *flags, "--output", str(folder / "run"))
    ends = [finish(first), finish(second)]
    assert sorted(code for code, _ in ends) == [0, 2], ends
    refused(*next(end for end in ends if end[0] == 2))
    for path in list_checkpoints(folder / "run"):
        check_whole(path)


@torch.no_grad()
def threads_through_one_model_do_not_meet(draw: random.Random, folder: Path) -> None:
    """Eight threads call one adapted model in 4 bits: each gets what it gets alone."""
    model = get_peft_model(quantize_model(tiny_llama(0)), LoraConfig(r=4, target_modules="all-linear")).eval()
    batches = [some_ids(seed=seed) for seed in range(8)]
    alone = [model(ids).logits for ids in batches]
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(10):
            if not torch.equal(model(batches[number]).logits, alone[number]):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def forked_workers_see_the_model_as_it_was(draw: random.Random, folder: Path) -> None:
    """DataLoader's workers are forks of a process that trains: they hold copies, and change nothing."""
    weights = [torch.nn.Parameter(torch.randn(512)) for _ in range(4)]
    optimizer = PagedAdamW(weights, lr=0.1, page_bytes=4096, device_budget=8192)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = [weight.detach().clone() for weight in weights]
    rows = list(torch.utils.data.DataLoader(range(12), batch_size=3, num_workers=2))
    assert torch.cat(rows).tolist() == list(range(12))
    assert all(map(torch.equal, before, weights))
    optimizer.step()
    optimizer.close()


# Numbers that are none.


def bad_numbers_stop_a_run_and_change_nothing(draw: random.Random, folder: Path) -> None:
    """NaN or infinity in a base weight, or in the adapter: the step is not taken, and its number is said."""
    value = draw.choice([float("nan"), float("inf"), -float("inf")])
    model = make_model()
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    bad = model.get_parameter(draw.choice(names))
    with torch.no_grad():
        bad[draw.randrange(bad.shape[0]), draw.randrange(bad.shape[1])] = value
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, make_data(), make_config(folder / "run"), progress_bar=False)
    try:
        trainer.train()
    except NonFiniteError as error:
        assert error.step == 1, error
    else:
        raise AssertionError(f"trained on over {value} in {names}")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


# For long.


def many_small_steps_hold_nothing(draw: random.Random, folder: Path, steps: int = 400) -> str:
    """Training, evaluating, saving and switching: memory, open files and threads do not grow with the steps."""
    model, data = make_model(), make_data(8)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    settings = {"max_steps": steps // 4, "save_every": 20, "eval_every": 20, "keep_last": 2, "log_every": 20}
    held = []
    for number in range(4):
        model.set_adapter("default")
        config = make_config(folder / str(number), **settings)
        Trainer(model, data, config, eval_data=make_data(2), progress_bar=False).train()
        for name in ("other", "default"):
            model.set_adapter(name)
            model.save_pretrained(folder / "saved")
        with model.disable_adapter(), torch.no_grad():
            model.eval()(some_ids())
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()))
    # The first quarter fills caches and pools.
    (memory, files, threads), last = held[1], held[-1]
    grown = last[0] - memory
    assert last[1] <= files and last[2] <= threads, held
    assert grown < 4e6 + 200 * steps, held
    return f"{steps:,} steps: memory {grown / 1e6:+.1f} MB from the second quarter to the last, {last[1]} open files"


IN_PROCESS: Sequence[Callable[[random.Random, Path], Any]] = (
    a_vanished_spill_file_is_an_error_and_no_wrong_number,
    a_clock_that_jumps_changes_no_number,
    threads_through_one_model_do_not_meet,
    forked_workers_see_the_model_as_it_was,
    bad_numbers_stop_a_run_and_change_nothing,
    many_small_steps_hold_nothing,
)
PROCESSES: Sequence[Callable[[random.Random, Path], Any]] = (
    killed_training_goes_on_to_the_same_numbers,
    killed_merging_leaves_a_whole_folder_or_none,
    killed_saving_leaves_a_whole_adapter,
    a_full_disk_is_one_sentence_and_costs_no_checkpoint,
    no_handles_is_one_sentence,
    an_output_that_cannot_be_is_one_sentence,
    two_runs_on_one_output_are_told_apart,
)
ROUND = (*IN_PROCESS, *PROCESSES)
