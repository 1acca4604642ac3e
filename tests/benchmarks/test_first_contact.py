"""The run that is prepared for a GPU at hand for minutes, pretended on the CPU: its stages, rows, limits and report."""

import json
import os
import subprocess
import sys

from benchmarks.environment import ROOT
from benchmarks.first_contact import report
from benchmarks.first_contact.__main__ import BOXES, PHASES, main
from benchmarks.first_contact.record import append, read_rows


def run(folder, *words):
    command = [sys.executable, "-m", "benchmarks.first_contact", *words, "--pretend", "--output", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_what_is_right_is_checked_in_the_emulator_before_anything_is_timed(tmp_path):
    done = run(tmp_path, "smoke", "--only", "machine", "--only", "checks")
    rows = read_rows(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows[0]["what"] == "versions" and rows[0]["gpu"] == "none: pretended"
    checks = [r for r in rows if "right" in r]
    assert len(checks) == 7 and all(r["right"] for r in checks)
    assert [r["stage"] for r in rows if "ended" in r] == ["machine", "checks"]


def test_every_stage_runs_without_a_gpu(tmp_path):
    stages = ["products", "host", "step", "optimizers"]
    done = run(tmp_path, "main", *(word for stage in stages for word in ("--only", stage)))
    rows = read_rows(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {r["stage"] for r in rows if "us" in r} == set(stages)
    for stage in stages:
        assert f"{stage}: " in done.stdout or stage == "products"


def test_a_stage_that_dies_or_outstays_its_box_is_a_row_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BOXES, "dies", 20)
    monkeypatch.setitem(BOXES, "stays", 1)
    monkeypatch.setitem(BOXES, "late", 20)
    monkeypatch.setitem(PHASES, "smoke", ("dies", "stays", "late"))
    program = "import sys, time\nif 'dies' in sys.argv: raise SystemError('illegal access')\ntime.sleep(60)"
    popen = subprocess.Popen

    def stage(words, **options):
        return popen([sys.executable, "-c", program, *words], **options)

    monkeypatch.setattr("benchmarks.first_contact.__main__.subprocess.Popen", stage)
    assert main(["smoke", "--output", str(tmp_path), "--deadline", "16"]) == 1
    dies, stays, late = read_rows(tmp_path)
    assert dies["ended"] == 1 and "illegal access" in dies["errors"]
    assert stays["ended"] == "killed after its 1 s" and stays["seconds"] < 10
    assert late["ended"] == "not begun: no time left" or "killed" in late["ended"]
    assert "wrong or failed: 3" in capsys.readouterr().out


def test_the_report_shows_what_was_predicted_beside_what_was_measured(tmp_path, capsys):
    for who, us in (("minipeft", 10.24), ("bitsandbytes", 10.7)):
        append(
            tmp_path, {"stage": "products", "what": "forward", "shape": [4096, 4096], "rows": 1, "who": who, "us": us}
        )
    assert report.main([str(tmp_path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "4096x4096" in line and "stage" not in line]
    assert line.split() == ["forward", "4096x4096", "M=1", "10.24", "|", "10.70", "|", "-", "|", "-", "8", "8", "13"]
    append(tmp_path, {"stage": "checks", "what": "same bits", "right": False})
    assert report.main([str(tmp_path)]) == 1


def test_results_can_be_shown_and_drawn_again(tmp_path, capsys):
    file = ROOT / "benchmarks" / "results" / "first_contact" / "nvidia-h200-4.jsonl"
    report.main([str(file), "--plot", str(tmp_path / "ratios.png")])
    shown = capsys.readouterr().out
    assert shown.count(" M=") == 33 and (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_every_row_that_a_gpu_gave_names_it():
    """Nothing in the results is a time of a pretended run."""
    files = sorted((ROOT / "benchmarks" / "results" / "first_contact").glob("nvidia-h200-?.jsonl"))
    assert len(files) >= 3
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert not any("pretended" in str(row.get("gpu")) for row in rows)
