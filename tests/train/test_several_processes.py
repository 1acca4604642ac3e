"""Several processes train one model: the numbers of one process, each text once, one voice, one set of files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run_process
from several import free_port, in_processes
from several_cases import page_replicas, train, who_is_there
from tiny_folder import save_model, write_jsonl

LORA = {"method": "LoraConfig"}


def same_numbers(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    for other in several:
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-5)
        np.testing.assert_allclose(other["norms"], one["norms"], rtol=1e-4)
        np.testing.assert_allclose([loss for loss, _ in other["evals"]], [loss for loss, _ in one["evals"]], rtol=1e-5)
        assert [tokens for _, tokens in other["evals"]] == [tokens for _, tokens in one["evals"]]
        assert other["tokens"] == one["tokens"]
        for name, values in one["trained"].items():
            np.testing.assert_array_equal(other["trained"][name], several[0]["trained"][name])
            np.testing.assert_allclose(other["trained"][name], values, rtol=1e-3, atol=2e-5)


def files_of(folder: Path) -> dict[str, Any]:
    """The names of a run's files; of the settings that are stored with an adapter their text."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.name == "adapter_config.json" else path.suffix
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (LORA, {}),
        (
            {**LORA, "packed": True},
            {"optimizer": "paged_adamw", "optimizer_args": {"device_budget": 8192, "page_bytes": 4096}},
        ),
        ({**LORA, "mixture": True}, {}),
        ({**LORA, "mixture": True, "packed": True}, {}),
        ({"method": "BottleneckConfig"}, {"packing": True}),
        ({"method": "PrefixTuningConfig"}, {}),
        ({"method": "PromptTuningConfig"}, {"precision": "bf16", "gradient_checkpointing": True}),
    ],
    ids=["lora", "qlora, paged", "mixture", "mixture in 4 bits", "bottleneck", "prefix", "prompt"],
)
def test_two_processes_have_the_numbers_of_one(model: Any, settings: Any, tmp_path: Path) -> None:
    # 23 rows, 2 a micro-batch, 4 micro-batches a step: the last step of each pass has fewer than there are processes.
    (one,) = in_processes(1, train, str(tmp_path / "one"), model, **settings)
    for name, sharded in (("two", False), ("shards", True)):
        two = in_processes(2, train, str(tmp_path / name), model, sharded=sharded, **settings)
        same_numbers(one, two)
        # Some tensors have an odd number of rows.
        assert all(process["held"] == pytest.approx(0.5 if sharded else 1, abs=0.02) for process in two)
        assert files_of(tmp_path / name) == files_of(tmp_path / "one")


def test_four_processes_with_dropout_of_their_own_resume_exactly(tmp_path: Path) -> None:
    model = {**LORA, "dropout": 0.3}
    whole = in_processes(4, train, str(tmp_path / "whole"), model)
    assert len({tuple(result["drawn"]) for result in whole}) == 4
    again = in_processes(4, train, str(tmp_path / "whole"), model, resume=str(tmp_path / "whole" / "checkpoint-3"))
    for first, second in zip(whole, again, strict=True):
        assert first["losses"] == second["losses"] and first["drawn"] == second["drawn"]
        assert all(np.array_equal(first["trained"][name], values) for name, values in second["trained"].items())


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        *(((1, False), (2, False), "adamw"), ((4, False), (1, False), "adamw")),
        *(((1, False), (2, True), "adamw"), ((4, True), (1, False), "adamw"), ((2, True), (4, True), "paged_adamw")),
    ],
    ids=str,
)
def test_a_run_goes_on_in_another_number_of_processes(
    before: tuple[int, bool], after: tuple[int, bool], optimizer: str, tmp_path: Path
) -> None:
    (one,) = in_processes(1, train, str(tmp_path / "one"), LORA, optimizer=optimizer)
    folder, checkpoint = str(tmp_path / "moved"), str(tmp_path / "moved" / "checkpoint-3")
    in_processes(before[0], train, folder, LORA, sharded=before[1], optimizer=optimizer)
    moved = in_processes(after[0], train, folder, LORA, checkpoint, sharded=after[1], optimizer=optimizer)
    same_numbers(one, moved)


def test_paged_steps_of_replicas_are_those_of_one_process_on_their_gradients() -> None:
    first, second = in_processes(2, page_replicas)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_who_does_not_come_is_named() -> None:
    first, second, _ = in_processes(3, who_is_there, 1.5)
    for rank, said in enumerate((first, second)):
        assert f"process {rank} of 3 has waited 1.5 s for 2, which did not come" in said


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    data = [{"prompt": "q" * (i % 7 + 1), "completion": "abc" * (i % 5 + 1)} for i in range(40)]
    files = save_model(tmp_path / "m"), write_jsonl(tmp_path / "d.jsonl", data)
    return ["--model", str(files[0]), "--data", str(files[1]), "--output", str(tmp_path / "out"), "--batch-size", "1"]


def launched(*flags: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return [sys.executable, *launcher, "-m", "minipeft", "train", *flags]


def test_torchrun_writes_once_and_speaks_once(flags: list[str], tmp_path: Path) -> None:
    done = run_process(launched(*flags, "--max-steps", "3"), check=True)
    assert done.stdout.count("trained 3 steps") == 1 and done.stdout.count("adapter saved in") == 1
    refused = run_process(launched(*flags, "--max-steps", "3"))
    assert refused.returncode != 0
    assert (refused.stdout + refused.stderr).count("already holds a run: resume it (--resume)") == 1


@pytest.mark.parametrize(
    ("how", "more"),
    [
        *((how, []) for how in (signal.SIGINT, signal.SIGKILL)),
        *((how, ["--fsdp", "--quantize", "nf4"]) for how in (signal.SIGTERM, signal.SIGKILL)),
    ],
    ids=str,
)
def test_a_stopped_or_killed_process_ends_all_with_a_whole_checkpoint(
    how: signal.Signals, more: list[str], flags: list[str], tmp_path: Path
) -> None:
    flags += more
    command = launched(*flags, "--max-steps", "100000", "--save-every", "2", "--log-every", "1")
    log, out = tmp_path / "out" / "log.jsonl", tmp_path / "said"
    with out.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            assert time.monotonic() < deadline and process.poll() is None, out.read_text()
            time.sleep(0.1)
        if how is signal.SIGKILL:
            (last,) = [pid for pid, rank in workers_of(process.pid) if rank == "1"]
            os.kill(last, how)
        else:
            os.killpg(process.pid, how)  # as Ctrl-C in a terminal: the launcher and all it has started
        process.wait(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = out.read_text()
    words = "lost another one" if how is signal.SIGKILL else f"minipeft: stopped by {how.name} after step"
    assert text.count(words) == 1, text
    resumed = run_process(
        [
            sys.executable,
            "-m",
            "minipeft",
            "train",
            *flags,
            "--max-steps",
            "100001",
            "--gradient-accumulation",
            "3",
            "--resume",
        ]
    )
    assert "gradient_accumulation times the number of processes" in resumed.stderr
    (newest,) = [
        json.loads((p / "training_state.json").read_text())
        for p in [sorted((tmp_path / "out").glob("checkpoint-*"))[-1]]
    ]
    assert newest["progress"]["step"] >= 2


def workers_of(launcher: int) -> list[tuple[int, str]]:
    """(process id, rank) of the processes that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = []
    for pid in map(int, children):
        environment = dict(
            entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry
        )
        found.append((pid, environment["RANK"]))
    return found
