"""Tables, CSV files and pictures say what was measured, and what was not."""

from benchmarks.harness import OURS, Row
from benchmarks.output import duration, plot, read_csv, table, write_csv

RIGHT = Row(
    *("nf4_matmul", "forward", "64x128 M=4", "bfloat16", OURS, "right"),
    **{"error": 0.00123, "tolerance": 0.06, "rounds": 20, "median": 1234.5, "q20": 1200.0, "q80": 1300.0},
    **{"gb_per_s": 3.25, "gflop_per_s": 12.5, "floor": 617.25, "share": 0.5},
)
PEER = Row(
    *("nf4_matmul", "forward", "64x128 M=4", "bfloat16", "peer", "right", "a note, with a comma"),
    **{"error": 0.0, "tolerance": 0.06, "rounds": 20, "median": 2469.0, "q20": 2400.0, "q80": 2500.0},
    **{"ratio": 0.5, "ratio_q20": 0.48, "ratio_q80": 0.53},
)
WRONG = Row("nf4_matmul", "forward", "64x128 M=4", "bfloat16", "other", "wrong", "error 3: not timed", error=3.0)
MISSING = Row("nf4_matmul", "decode", "64x128 M=1", "bfloat16", "absent", "missing", "not installed")
ROWS = [RIGHT, PEER, WRONG, MISSING]


def test_csv_reads_back_as_it_was_written(tmp_path):
    environment = {"device": "cpu: some CPU", "command": "minipeft bench --quick", "load": "1.0 before: 2.0 after"}
    write_csv(tmp_path / "a.csv", ROWS, environment)
    assert read_csv(tmp_path / "a.csv") == (ROWS, environment)


def test_a_table_shows_speeds_of_right_results_only():
    lines = table(ROWS).splitlines()
    ours, peer, wrong = (next(s for s in lines if s.startswith(f"  {name}")) for name in (OURS, "peer", "other"))
    for cell in ("1.23 ms", "1.2 ms..1.3 ms", "3.2", "12.5", "50%", "1.2e-03"):
        assert cell in ours
    assert "0.50 (0.48..0.53)" in peer
    assert wrong == "  other     wrong: error 3: not timed"
    assert "not measured: absent: not installed" in lines
    assert lines.count("nf4_matmul forward 64x128 M=4 bfloat16") == 1


def test_a_quick_table_compares_no_speeds():
    text = table(ROWS, quick=True)
    assert "1.23 ms" in text and "0.50" not in text and "50%" not in text and "GB/s" not in text


def test_durations_have_three_digits_and_a_unit():
    assert [duration(t) for t in (0.5, 12.34, 1234.0, 2.5e6)] == ["0.5 us", "12.3 us", "1.23 ms", "2.5 s"]


def test_a_picture_is_drawn_with_and_without_speeds(tmp_path):
    for rows in (ROWS, [WRONG]):
        plot(tmp_path / "a.png", rows, "title")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
