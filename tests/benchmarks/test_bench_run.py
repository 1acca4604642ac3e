"""The whole command, on sizes that take no time."""

import sys
from types import SimpleNamespace

import pytest
import torch

import benchmarks
from benchmarks import run
from benchmarks.harness import OURS, Row
from benchmarks.options import OPS, BenchError
from benchmarks.output import read_csv
from benchmarks.peers import BITSANDBYTES, UNSLOTH, Peers
from minipeft.commands import bench as bench_command
from minipeft.commands.bench import add_bench_arguments, bench, load_benchmarks
from minipeft.commands.cli import Parser, main
from minipeft.train.errors import TrainingError


def arguments(*words):
    parser = Parser()
    add_bench_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_quick_runs_every_operation_and_finds_it_right(tmp_path, capsys):
    bench(arguments("--quick", "--device", "cpu", "--threads", "1", "--output", str(tmp_path)))
    text = capsys.readouterr().out
    assert "not how fast" in text
    for op in OPS:
        (file,) = tmp_path.glob(f"{op}-cpu-*-1-threads.csv")
        rows, environment = read_csv(file)
        # How costs grow is shown of ours alone.
        assert op == "finetune_growth" or {row.candidate for row in rows} > {OURS}
        assert all(row.status == "right" and row.median > 0 for row in rows if row.candidate == OURS)
        assert {"device", "torch", "bitsandbytes", "threads", "command", "date", "load", "backend"} <= set(environment)
        assert environment["command"] == f"minipeft bench {op} --quick --device cpu --threads 1"
        assert file.with_suffix(".png").is_file()
        assert str(tmp_path) not in file.read_text()
    variants = {row.variant for row in read_csv(next(tmp_path.glob("nf4_matmul-*.csv")))[0]}
    assert variants == {"decode", "forward", "input gradient", "forward + input gradient"}


def test_an_absent_peer_is_named_and_no_error(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.peers.importlib.util.find_spec", lambda name: None)
    assert run.bench(["nf4_dequantize"], quick=True, device_kind="cpu") == []
    assert "not measured: bitsandbytes: not installed (pip install bitsandbytes)" in capsys.readouterr().out


def test_a_peer_that_cannot_be_imported_is_missing(monkeypatch):
    def broken(name):
        raise OSError("no such library")

    monkeypatch.setattr("benchmarks.peers.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("benchmarks.peers.importlib.import_module", broken)
    assert Peers("cpu").find(BITSANDBYTES) == "cannot be imported: OSError: no such library"
    assert Peers("cpu").find(UNSLOTH) == "runs on GPUs only"


def test_a_wrong_result_of_ours_is_an_error_and_has_no_speed(monkeypatch, capsys):
    from minipeft.nf4 import NF4Weight

    right = NF4Weight.dequantize
    monkeypatch.setattr(NF4Weight, "dequantize", lambda self: right(self) * 1.001)
    with pytest.raises(BenchError, match="1 results of minipeft are not right: nf4_dequantize 128x256 float32: wrong"):
        bench(arguments("nf4_dequantize", "--quick", "--device", "cpu"))
    assert "minipeft" in capsys.readouterr().out


def test_a_device_that_broke_leaves_the_rest_to_a_new_process(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(run, "run_op", lambda op, session: [Row(op, "", "2", "", OURS, "failed", "illegal access")])
    monkeypatch.setattr(run, "_alive", lambda device: False)
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(run.subprocess, "run", lambda words, **_: started.append(words) or failed)
    bad = run.bench(["nf4_quantize", "nf4_dequantize", "adamw"], quick=True, device_kind="cpu")
    assert started == [[sys.executable, "-m", "benchmarks", "nf4_dequantize", "adamw", "--quick", "--device", "cpu"]]
    assert bad == ["nf4_quantize 2: failed: illegal access", "nf4_dequantize, adamw: see above"]


def test_a_case_that_cannot_be_prepared_is_reported(monkeypatch):
    monkeypatch.setattr("benchmarks.bench_adamw._case_8bit", lambda *args: 1 / 0)
    (bad,) = run.bench(["adamw"], quick=True, device_kind="cpu")
    assert bad == "adamw preparing a case: failed: ZeroDivisionError: division by zero"


def test_what_there_is_not_is_refused():
    with pytest.raises(BenchError, match="no operation 'matmul' to measure: choose of nf4_quantize"):
        bench(arguments("matmul"))
    with pytest.raises(BenchError, match="threads must be at least 1, got 0"):
        bench(arguments("--threads", "0"))


def test_an_installed_package_says_what_it_needs(tmp_path, monkeypatch, capsys):
    with pytest.raises(TrainingError, match="needs a source checkout"):
        load_benchmarks(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise AssertionError('another package')")
    with pytest.raises(TrainingError, match="needs a source checkout"):
        load_benchmarks(tmp_path)
    monkeypatch.setattr(bench_command.load_benchmarks, "__defaults__", (tmp_path,))
    assert main(["bench", "--quick"]) == 2
    assert "minipeft: error: minipeft bench needs a source checkout" in capsys.readouterr().err
    monkeypatch.undo()
    load_benchmarks()
    assert sys.modules["benchmarks"] is benchmarks


def test_exit_codes_tell_right_from_wrong_and_from_bad_arguments(monkeypatch, capsys):
    for bad, code in (([], 0), (["wrong"], 1)):
        monkeypatch.setattr(run, "bench", lambda *args, bad=bad: bad)
        assert run.main(["--quick"]) == code
    monkeypatch.undo()
    assert run.main(["nope"]) == 2
    assert "wrong" in capsys.readouterr().err
