"""`minipeft compare`, from its data to its files, on a tiny random model."""

import csv
import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_compare import OTHER, forbidden, letters, quiet
from tiny_folder import byte_tokenizer, save_model, write_jsonl
from transformers import AutoModelForCausalLM

from minipeft import PeftModel
from minipeft.commands.cli import main
from minipeft.compare import compare as comparing
from minipeft.compare import run as compare_run
from minipeft.compare.compare import compare, in_own_process
from minipeft.compare.plan import CompareConfig, Run, Shared, plan_runs
from minipeft.compare.run import RunOrder, attempt
from minipeft.train import processes
from minipeft.train.errors import CheckpointError, OutputDirError, TrainingError, TrainingInterrupted
from minipeft.train.records import read_jsonl

METHODS = {
    "lora": {"method": "lora", "lr": 0.02, "method_args": {"r": 4}},
    "qlora": {"method": "qlora", "lr": 0.02, "method_args": {"r": 4}},
    "bottleneck": {"method": "bottleneck", "lr": 0.02, "method_args": {"bottleneck_size": 8}},
    "prefix": {"method": "prefix", "lr": 0.05, "method_args": {"num_virtual_tokens": 4}},
    "prompt": {"method": "prompt", "lr": 0.05, "method_args": {"num_virtual_tokens": 4}},
    "still": {"method": "lora", "lr": 0.0},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return letters(tmp_path_factory.mktemp("data"))


def config_of(output, base, files, runs, **changes):
    planned = [Run(name, settings | {"scheduler": "constant"}) for name, settings in runs.items()]
    planned = [Run(r.name, {**r.settings, **({"quantize": "nf4"} if r.name == "qlora" else {})}) for r in planned]
    return CompareConfig(
        output, planned, **{"model": str(base), "steps": 5, "batch_size": 4, "dtype": "float32", **files, **changes}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base, files):
    """A comparison of all methods, and for each run the ids of every batch that the loop trained on."""
    output = tmp_path_factory.mktemp("compare") / "out"
    seen = {}

    def execute(order):
        took = seen.setdefault(order.run.name, [])
        original = processes.training_loss_sum
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                processes, "training_loss_sum", lambda m, b: (took.append(b.inputs["input_ids"]), original(m, b))[1]
            )
            assert attempt(order)

    table = compare(config_of(output, base, files, METHODS), quiet, execute)
    return output, table, {row.name: row for row in table.rows}, seen


def test_all_methods_see_the_same_batches_in_the_same_order(finished):
    _, _, _, seen = finished
    assert set(seen) == {"base", "base (nf4)", *METHODS}
    first = seen["lora"]
    assert len(first) == 5 and not seen["base"]
    for name in METHODS:
        assert all(torch.equal(a, b) for a, b in zip(first, seen[name], strict=True)), name
    # 32 texts in batches of 4: no text comes twice.
    texts = [tuple(row.tolist()) for batch in first for row in batch]
    assert len(set(texts)) == len(texts) == 20


def test_another_order_is_noticed(finished):
    output, _, _, _ = finished
    outcomes = [
        comparing.Outcome(
            Run(name, METHODS[name]), 0, json.loads((output / f"runs/{name}-seed0/result.json").read_text())
        )
        for name in ("lora", "prompt")
    ]
    comparing._check_batches(outcomes)
    outcomes[1].result["batches"] = "0"
    with pytest.raises(AssertionError, match="different batches"):
        comparing._check_batches(outcomes)


def adapted(base, output, name):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    return PeftModel.from_pretrained(model, output / "runs" / f"{name}-seed0" / "adapter") if name else model


def by_hand(model, records):
    """Loss and accuracy text by text, from the model's logits alone."""
    tokenizer = byte_tokenizer()
    sums, tokens, right = [], [], []
    for record in records:
        scores = {}
        for label in (" a", " b"):
            prompt, answer = tokenizer(record.prompt)["input_ids"], tokenizer(label)["input_ids"]
            ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            token_scores = log_p.gather(1, ids[0, len(prompt) :, None])[:, 0]
            scores[label] = token_scores[:-1].sum().item()
            if label == record.completion:
                sums.append(-token_scores.sum().item())
                tokens.append(len(answer) + 1)
        right.append(max(scores, key=scores.get) == record.completion)
    return sums, tokens, right


@pytest.mark.parametrize("name", ["", "lora", "bottleneck", "prefix", "prompt"])
def test_the_table_says_what_an_evaluation_by_hand_says(name, finished, base):
    output, _, rows, _ = finished
    row = rows[name or "base"]
    with torch.no_grad():
        model = adapted(base, output, name)
        sums, tokens, right = by_hand(model, read_jsonl(output / "held_out.jsonl"))
        ids = byte_tokenizer()(OTHER)["input_ids"]
        pieces = [torch.tensor([ids[at : at + 128]]) for at in range(0, len(ids), 128)]
        other = sum((len(p[0]) - 1) * model(input_ids=p, labels=p).loss.item() for p in pieces)
    assert row.loss == pytest.approx(sum(sums) / sum(tokens), rel=1e-5)
    assert row.accuracy == sum(right) / len(right)
    assert row.accuracy_error == pytest.approx(math.sqrt(row.accuracy * (1 - row.accuracy) / len(right)))
    # Every answer has as many tokens as the next, so the error is that of a plain mean.
    assert row.loss_error == pytest.approx(statistics.stdev(sums) / tokens[0] / math.sqrt(len(sums)), rel=1e-4)
    assert row.other_after == pytest.approx(other / (len(ids) - len(pieces)), rel=1e-5)
    if name:
        assert row.other_change == pytest.approx(row.other_after - rows["base"].other_after, rel=1e-6)


def test_training_helps_and_a_four_bit_run_is_held_against_the_four_bit_base(finished):
    _, table, rows, _ = finished
    for name in set(METHODS) - {"still"}:
        base = rows["base (nf4)" if name == "qlora" else "base"]
        assert rows[name].loss < base.loss - 0.05, name
        assert rows[name].other_before == base.other_after
    assert rows["base"].other_after != rows["base (nf4)"].other_after
    assert (table.labels, table.majority) == (2, pytest.approx(0.5, abs=0.2))


def test_what_was_not_changed_has_forgotten_exactly_nothing(finished):
    _, _, rows, _ = finished
    for name in ("base", "base (nf4)", "still"):
        assert (rows[name].other_change, rows[name].other_change_error) == (0.0, 0.0)
    assert rows["still"].loss == rows["base"].loss
    assert rows["lora"].other_change != 0


def test_sizes_and_times_are_those_of_the_files(finished):
    output, _, rows, _ = finished
    for name in METHODS:
        folder = output / "runs" / f"{name}-seed0"
        values = sum(t.numel() for t in load_file(folder / "adapter" / "adapter_model.safetensors").values())
        assert rows[name].trainable == values
        assert rows[name].adapter_bytes == sum(file.stat().st_size for file in (folder / "adapter").iterdir())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        steps = np.diff([entry["seconds"] for entry in log])
        low, middle, high = np.quantile(steps, [0.1, 0.5, 0.9])
        row = rows[name]
        assert (row.step_low, row.step_median, row.step_high) == pytest.approx((low, middle, high), abs=1e-5)
        assert row.peak_memory > 0 and row.steps == 5
        assert not list(folder.glob("checkpoint-*"))


def test_everything_is_on_disk_and_says_the_same(finished):
    output, table, rows, _ = finished
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((output / "results.json").read_text())
    assert [row["name"] for row in content["rows"]] == list(rows)
    assert content["rows"][2]["accuracy"] == rows["lora"].accuracy
    with open(output / "results.csv", newline="") as handle:
        lines = {line["name"]: line for line in csv.DictReader(handle)}
    assert float(lines["prompt"]["held_out_perplexity"]) == pytest.approx(math.exp(rows["prompt"].loss))
    assert float(lines["prompt"]["other_before_perplexity"]) == pytest.approx(math.exp(rows["base"].other_after))
    head, rule, *body = [line for line in (output / "table.md").read_text().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in (head, rule, *body)} == {11} and len(body) == 8
    lora = next(line for line in body if line.startswith("| lora |"))
    assert f"{100 * rows['lora'].accuracy:.1f} % ± {100 * rows['lora'].accuracy_error:.1f}" in lora
    assert f"{rows['lora'].trainable:,}" in lora
    assert any("seed 0" in note for note in table.notes)


# Going on


def test_a_comparison_goes_on_with_the_threads_that_it_began_with(base, files, tmp_path, monkeypatch):
    config = config_of(tmp_path / "out", base, files, {"lora": METHODS["lora"]})
    used = []

    def stopped(order):
        used.append(order.threads)
        raise KeyboardInterrupt

    for threads in (1, 2):
        # As if others left the machine in the meantime.
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # noqa: B023
        with pytest.raises(KeyboardInterrupt):
            compare(config, quiet, stopped)
    assert used == [1, 1]


def test_finished_runs_are_kept_and_others_made(finished, base, files, tmp_path):
    output = tmp_path / "out"
    runs = {name: METHODS[name] for name in ("lora", "prompt")}

    def broken(order):
        if order.run.name == "prompt":
            # What a run that was killed may leave.
            (Path(order.folder) / "log.jsonl").write_text("{}")
            raise KeyboardInterrupt
        assert attempt(order)

    with pytest.raises(KeyboardInterrupt):
        compare(config_of(output, base, files, runs), quiet, broken)
    assert not (output / "table.md").exists()
    made = []
    table = compare(config_of(output, base, files, runs), quiet, lambda o: (made.append(o.run.name), attempt(o)))
    assert made == ["prompt"]
    again = compare(config_of(output, base, files, runs), quiet, forbidden)
    assert again.rows == table.rows
    # The same as without an interruption, but for what time and memory it took.
    same = [f.name for f in dataclasses.fields(table.rows[0]) if not f.name.startswith(("step_", "peak", "train_sec"))]
    for row in table.rows:
        whole = finished[2][row.name]
        assert all(getattr(row, name) == getattr(whole, name) for name in same)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 6}, "steps was 5, is now 6"),
        ({"batch_size": 2}, "batch_size was 4, is now 2"),
        ({"lr": 0.03}, "setting 'lr' was 0.02, is now 0.03"),
        ({"other": "Something else altogether, and it is long enough."}, "sha256 of other.txt"),
        ({"records": 39}, "sha256 of train.jsonl"),
    ],
)
def test_a_comparison_of_other_settings_is_refused(changes, expected, finished, base, files, tmp_path):
    output = finished[0]
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    runs, files = {"lora": METHODS["lora"]}, dict(files)
    if "lr" in changes:
        runs = {"lora": METHODS["lora"] | {"lr": changes.pop("lr")}}
    if "other" in changes:
        (tmp_path / "other.txt").write_text(changes.pop("other"))
        files["other_text"] = str(tmp_path / "other.txt")
    if "records" in changes:
        lines = Path(files["data"]).read_text().splitlines()[: changes.pop("records")]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        files["data"] = str(tmp_path / "data.jsonl")
    with pytest.raises(CheckpointError, match="belongs to a different run") as caught:
        compare(config_of(output, base, files, runs, **changes), quiet, forbidden)
    assert expected in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_the_same_model_by_another_path_is_the_same(finished, base, files, monkeypatch):
    monkeypatch.chdir(Path(base).parent)
    config = config_of(finished[0], base, files, {"lora": METHODS["lora"]})
    compare(dataclasses.replace(config, model="base"), quiet, forbidden)


def test_another_folder_and_a_damaged_result_are_refused(base, files, tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(OutputDirError, match="holds no comparison"):
        compare(config_of(tmp_path, base, files, {"lora": METHODS["lora"]}), quiet, forbidden)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
    output = tmp_path / "out"
    config = config_of(output, base, files, {"lora": METHODS["lora"]})
    compare(config, quiet, attempt)
    (output / "runs" / "base" / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"result\.json is not valid JSON.*remove it"):
        compare(config, quiet, forbidden)


# Seeds, failures, names


def test_seeds_are_taken_together_and_their_spread_is_shown(base, files, tmp_path):
    runs = {"lora": METHODS["lora"], "prompt": METHODS["prompt"]}
    table = compare(config_of(tmp_path / "out", base, files, runs, seeds=[0, 3]), quiet, attempt)
    rows = {row.name: row for row in table.rows}
    results = [json.loads((tmp_path / f"out/runs/lora-seed{seed}/result.json").read_text()) for seed in (0, 3)]
    losses = [sum(result["held_out"]["sums"]) / sum(result["held_out"]["tokens"]) for result in results]
    shares = [statistics.mean(result["right"]) for result in results]
    assert losses[0] != losses[1] and results[0]["batches"] != results[1]["batches"]
    row = rows["lora"]
    assert row.loss == pytest.approx(statistics.mean(losses)) and row.accuracy == pytest.approx(statistics.mean(shares))
    assert row.loss_deviation == pytest.approx(statistics.stdev(losses))
    assert row.accuracy_deviation == pytest.approx(statistics.stdev(shares))
    assert rows["base"].loss_deviation is None and rows["base"].seeds == (0,)
    assert (tmp_path / "out" / "table.md").read_text().count("(seeds ±") == 6


def test_a_run_that_fails_is_reported_and_the_others_go_on(base, files, tmp_path):
    runs = {
        "too fast": METHODS["lora"] | {"lr": 1e30},
        "elsewhere": METHODS["lora"] | {"method_args": {"target_modules": ["q_prj"]}},
        "lora": METHODS["lora"],
    }
    table = compare(config_of(tmp_path / "out", base, files, runs), quiet, attempt)
    rows = {row.name: row for row in table.rows}
    assert "learning rate" in rows["too fast"].reason or "not finite" in rows["too fast"].reason
    assert "q_proj" in rows["elsewhere"].reason
    assert rows["lora"].loss < rows["base"].loss and rows["lora"].reason is None
    assert [line.split(" failed")[0] for line in table.failures] == ["too fast", "elsewhere"]
    for name in ("table.md", "comparison.html"):
        assert "failed: " in (tmp_path / "out" / name).read_text()
    # What failed is tried again, what did not is kept.
    made = []
    compare(config_of(tmp_path / "out", base, files, runs), quiet, lambda o: (made.append(o.run.name), attempt(o)))
    assert made == ["too fast", "elsewhere"]


def test_names_are_escaped_in_every_output(base, files, tmp_path):
    name = '<script>alert(1)</script> & "a|b" $x_1$ ../up'
    table = compare(config_of(tmp_path / "out", base, files, {name: METHODS["lora"]}), quiet, attempt)
    assert table.rows[1].loss is not None
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;a|b&quot; $x_1$" in page
    # Self-contained: nothing is fetched.
    assert "<svg" in page and not any(mark in page for mark in ('src="', 'href="http', "@import", "<link"))
    lines = [line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {11} and "\\<script" in lines[3]
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2 and not (tmp_path / "out" / "up").exists()


def test_free_text_is_measured_by_perplexity(base, tmp_path, files):
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": f"{i} is a number"} for i in range(20)])
    own = {"data": str(data), "other_text": files["other_text"]}
    table = compare(config_of(tmp_path / "out", base, own, {"lora": METHODS["lora"]}), quiet, attempt)
    assert table.labels == 0 and table.rows[1].accuracy is None
    assert table.rows[1].loss < table.rows[0].loss
    assert "accuracy" not in (tmp_path / "out" / "table.md").read_text()


def test_too_long_texts_are_left_out_for_all(base, tmp_path, files):
    records = [{"text": f"{i} is a number"} for i in range(20)] + [{"text": "x" * 300}]
    own = {"data": str(write_jsonl(tmp_path / "d.jsonl", records)), "other_text": files["other_text"]}
    config = config_of(tmp_path / "out", base, own, {"prompt": METHODS["prompt"]})
    with pytest.raises(TrainingError, match="301 tokens, more than max_length \\(252\\)"):
        compare(config, quiet, forbidden)
    compare(dataclasses.replace(config, too_long="drop"), quiet, attempt)
    assert sum(len(read_jsonl(tmp_path / "out" / f"{name}.jsonl")) for name in ("train", "held_out")) == 20


# Processes


def order_in(folder):
    return RunOrder(
        str(folder), str(folder), Run("lora", {}), Shared("m", 8, 8, False, 1, 1, 1.0, "auto", "auto"), 0, ("a",)
    )


def test_an_order_survives_the_way_to_its_process(tmp_path):
    order = dataclasses.replace(order_in(tmp_path), identity={"seed": 0}, run=Run("ü\n", {"lr": 1e-3}))
    assert RunOrder.from_json(order.to_json()) == order and "\n" not in order.to_json()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -9 $$", "its process was ended by SIGKILL, perhaps for lack of memory"),
        ("kill -SEGV $$", "its process was ended by SIGSEGV"),
        ("exit 3", "its process ended with code 3"),
    ],
)
def test_a_process_that_dies_leaves_a_reason(script, reason, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    in_own_process(order_in(tmp_path))
    assert json.loads((tmp_path / "failed.json").read_text())["reason"] == reason


def test_an_interrupt_ends_the_run_with_the_comparison(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec cat > /dev/null\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    def interrupt():
        for _ in range(2000):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        in_own_process(order_in(tmp_path))
    assert gone(int((tmp_path / "pid").read_text()))


def gone(pid):
    for _ in range(2000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_run_ends_when_the_comparison_is_gone(monkeypatch):
    ours, theirs = os.pipe()
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "stdin", os.fdopen(ours))
    waiting = threading.Thread(target=compare_run._end_with_the_comparison, daemon=True)
    waiting.start()
    waiting.join(timeout=0.1)
    assert waiting.is_alive() and not codes
    os.close(theirs)
    waiting.join(timeout=60)
    sys.stdin.close()
    assert codes == [130]


def test_the_command_in_processes_of_its_own(base, files, tmp_path, capsys):
    runs = tmp_path / "runs.yaml"
    runs.write_text("good: {method: lora, method_args: {r: 2}, lr: 0.02}\nbad: {method: lora, lr: 1e30}\n")
    where = ["--model", str(base), "--data", files["data"], "--other-text", files["other_text"]]
    arguments = ["compare", *where, "--output", str(tmp_path / "out"), "--steps", "3"]
    assert main([*arguments, "--runs", str(runs)]) == 1
    said = capsys.readouterr().out
    assert "bad failed: " in said and "accuracy" in said and str(tmp_path / "out" / "table.md") in said
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["loss"] is None for row in rows] == [False, False, True]
    # Each peak is its own: the process that failed and the one before it do not add up.
    assert max(row["peak_memory"] for row in rows[:2]) < 1.5 * min(row["peak_memory"] for row in rows[:2])


def test_the_default_runs_are_all_methods_with_settings_of_their_own():
    runs = plan_runs(None, None)
    assert [run.name for run in runs] == ["lora", "qlora", "bottleneck", "prefix", "prompt"]
    assert runs[1].settings["quantize"] == "nf4" and all(run.settings["lr"] > 0 for run in runs)


def test_the_folder_is_held_by_one_comparison(base, files, tmp_path):
    config = config_of(tmp_path / "out", base, files, {"lora": METHODS["lora"]})

    def meanwhile(order):
        with pytest.raises(OutputDirError, match="another process"):
            compare(config, quiet, forbidden)
        assert attempt(order)

    compare(config, quiet, meanwhile)


def test_a_run_that_was_told_to_stop_advises_what_a_comparison_can_do(tmp_path, monkeypatch):
    def stopped(order):
        raise TrainingInterrupted("stopped by SIGTERM after step 3 of 6; go on with --resume", tmp_path, 3)

    monkeypatch.setattr(compare_run, "perform", stopped)
    assert not attempt(order_in(tmp_path))
    reason = json.loads((tmp_path / "failed.json").read_text())["reason"]
    assert reason == "its process was told to stop: the same command does it again"


def test_failures_of_ours_keep_their_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_run, "perform", lambda order: 1 / 0)
    assert not attempt(order_in(tmp_path))
    assert "Traceback" in capsys.readouterr().err
    assert json.loads((tmp_path / "failed.json").read_text())["reason"] == "ZeroDivisionError: division by zero"
