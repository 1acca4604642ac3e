"""What `minipeft compare` refuses, before any model is loaded: in one sentence that says what to do."""

import re

import pytest
from tiny_compare import forbidden, letters, quiet
from tiny_folder import save_model, write_jsonl

from minipeft.commands.cli import main
from minipeft.compare import compare as comparing
from minipeft.compare.compare import compare
from minipeft.compare.plan import FLAGS, OWN_SETTINGS, CompareConfig, plan_runs, read_entries
from minipeft.compare.run import attempt
from minipeft.compare.task import load_task
from minipeft.train.config import setting_names
from minipeft.train.errors import ConfigError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return letters(tmp_path_factory.mktemp("data"))


@pytest.fixture
def refuses(base, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparing, "in_own_process", forbidden)

    def refused(*flags, **changes):
        own = {"model": base, **files, "output": tmp_path / "out", **changes}
        given = [part for name, value in own.items() for part in (f"--{name.replace('_', '-')}", str(value)) if value]
        assert main(["compare", *given, *flags]) == 2
        err = capsys.readouterr().err
        assert err.startswith("minipeft: error: ") and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()
        return err

    return refused


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--methods", "lora,ia3"], "--methods: run 'ia3': unknown method 'ia3': known methods are lora, qlora"),
        (["--methods", "lora,lora"], "--methods: run 'lora': there is another run of this name"),
        (["--methods", "lorra"], "did you mean lora?"),
        (["--methods", ","], "name at least one method"),
        (["--seeds", "none"], "seeds must be a count or a list"),
        (["--seeds", "0,0"], "seeds must differ"),
        (["--seeds", "0"], "1 to 1000"),
        (["--steps", "0"], "argument --steps"),
        (["--max-length", "257"], "max_length (257) exceeds the model's max_position_embeddings (256)"),
        (["--max-length", "240"], "run 'prompt': max_length (240) exceeds"),
        (["--max-length", "240"], "less 20 virtual tokens: set max_length to 236 or less"),
        (["--device", "gpu"], "device must be auto"),
    ],
)
def test_bad_flags_are_one_sentence(flags, expected, refuses):
    assert expected in refuses(*flags)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("method: lora, rate: 1", ": unknown setting 'rate'"),
        ("method: lora, learning_rte: 1", ": unknown setting 'learning_rte'"),
        ("method: lora, learning_rate: 1", ": unknown setting 'learning_rate'; did you mean lr?"),
        ("method: lora, 3: 1", ": unknown setting 3; known settings: method, "),
        ("method: lora, batch_size: many", ": 'batch_size' is the same for all runs of a comparison: leave it out"),
        ("method: lora, r: 4", ": 'r' is an argument of the method: write method_args: {r: 4}"),
        ("method: lora, lr: fast", ": setting 'lr' must be a number, got 'fast'"),
        ("method: lora, lr: -1", ": setting 'lr' must be 0 or greater, got -1.0"),
        ("method: lora, lr: ", ": setting 'lr' must be a number, got None"),
        ("method: lora, warmup_steps: true", ": setting 'warmup_steps' must be a whole number or null, got True"),
        ("method: lora, quantize: true", ": setting 'quantize' must be a string or null, got True"),
        ("method: lora, dtype: [float32]", ": setting 'dtype' must be a string, got ['float32']"),
        ("method: qlora, quantize: null", ": method qlora has quantize nf4, got None: leave it out"),
        ("method: lora, lr: 1, lr: 2", ", line 1, column 26: not valid YAML: 'lr' is given twice"),
        ("method: lora, method_args: [r, 4]", ": setting 'method_args' must be a mapping, got ['r', 4]"),
        ("method: lora, method_args: {rank: 3}", ": method_args: LoraConfig has no argument 'rank'; did you mean "),
        ("method: lora, method_args: {3: 4}", ": method_args: LoraConfig has no argument 3; it has r, "),
        ("method: lora, method_args: {lr: 3}", ": method_args: 'lr' is a setting of the run: write it beside"),
        ("method: lora, method_args: {r: true}", ": method_args: r must be a positive integer, got True"),
        ("method: lora, method_args: {inference_mode: true}", ": method_args: an adapter in inference_mode is not"),
        (
            "method: lora, method_args: {target_modules: !!set {q_proj}}",
            ": setting 'method_args' must hold text, numbers, lists and mappings alone: Object of type set",
        ),
        ("method: lora, optimizer_args: {x: 1}", ": optimizer adamw takes no optimizer_args"),
        ("method: prompt, loraplus_lr_ratio: 4", ": loraplus_lr_ratio is for LoRA"),
        ("method: prompt, method_args: {num_virtual_tokens: 300}", ": 300 virtual tokens leave no room for a text"),
        ("method: [lora]", ": unknown method ['lora']: known methods are lora, "),
        ("method: lorra", "did you mean lora?"),
        ("lr: 1", " has no method: add `method:` and one of lora, qlora"),
        ("b: {method: lora}", ": unknown setting 'b': runs stand side by side at the top of the file"),
    ],
)
def test_what_a_run_cannot_have_is_named_with_its_file(settings, expected, refuses, tmp_path):
    (tmp_path / "runs.yaml").write_text(f"a: {{{settings}}}")
    err = refuses(runs=tmp_path / "runs.yaml")
    assert f"runs file {tmp_path / 'runs.yaml'}" in err and expected in err
    assert "run 'a'" in err or "line 1" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "names no run: write one, such as `small: {method: lora"),
        ("null", "names no run"),
        ("[lora, prompt]", "must hold a mapping of runs by their names, such as `small: {method: lora"),
        ("lora", "must hold a mapping of runs by their names"),
        ("method: lora\nlr: 0.1", "holds settings (method, lr) and no run's name: write `small: {"),
        ("4: {method: lora}", "a run's name must be text, got 4 (YAML reads numbers"),
        ("yes: {method: lora}", "a run's name must be text, got True (YAML reads numbers, dates, yes, no and null"),
        ("a: lora", "run 'a' must be a mapping of settings, such as {method: lora}, got 'lora'"),
        ("lora:", "run 'lora' must be a mapping of settings, such as {method: lora}, got nothing"),
        ("base: {method: lora}", "run 'base': this is what the row without an adapter is called"),
        ("a: {method: lora}\na: {method: prompt}\n", "line 2, column 1: not valid YAML: 'a' is given twice"),
        ('"": {method: lora}', "run '': a run needs a name"),
    ],
)
def test_a_file_of_no_runs_is_told_what_one_looks_like(text, expected, refuses, tmp_path):
    (tmp_path / "runs.yaml").write_text(text)
    err = refuses(runs=tmp_path / "runs.yaml")
    assert f"runs file {tmp_path / 'runs.yaml'}" in err and expected in err


def test_a_name_of_both_is_refused(refuses, tmp_path):
    (tmp_path / "runs.yaml").write_text("lora: {lr: 0.1}")
    assert "run 'lora': there is another run of this name" in refuses("--methods", "lora", runs=tmp_path / "runs.yaml")


def test_an_example_in_an_error_is_a_file_that_does(tmp_path):
    with pytest.raises(ConfigError) as refused:
        read_entries(write(tmp_path, ""))
    example = re.search("`(.*)`", str(refused.value))[1]
    assert [run.name for run in plan_runs(None, write(tmp_path, example))] == ["small"]


def write(folder, text):
    (folder / "runs.yaml").write_text(text)
    return folder / "runs.yaml"


def test_every_other_setting_of_a_training_says_where_it_belongs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    flags = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    assert set(FLAGS.values()) <= set(flags)
    for name in set(setting_names()) - set(OWN_SETTINGS):
        with pytest.raises(ConfigError) as refused:
            plan_runs(None, write(tmp_path, f"a: {{method: lora, {name}: 1}}"))
        assert f"give {FLAGS.get(name)}" in str(refused.value) or f"a comparison has no {name!r}" in str(refused.value)


def test_settings_are_kept_as_they_are_understood(tmp_path):
    text = "a: {method: lora, lr: 2e-3, quantize: null}\nb: {method: qlora, quantize: nf4, scheduler: linear}"
    first, second = plan_runs(None, write(tmp_path, text))
    assert first.settings["lr"] == 0.002 and first.form == (None, None)
    assert second.form == ("nf4", None) and "warmup_ratio" not in second.settings


PAIR = {"prompt": "c ->", "completion": " a"}


@pytest.mark.parametrize(
    ("name", "records", "expected"),
    [
        ("data", [PAIR], "too few to hold a fifth out"),
        ("data", [], "data set is empty"),
        ("eval_data", [], "data set is empty"),
        ("eval_data", [PAIR], "at least two held-out records"),
        ("eval_data", [PAIR, {"text": "free"}], "eval_data.jsonl:2: expected a record of the training data's kind"),
        (
            "eval_data",
            [PAIR, PAIR | {"completion": " c"}],
            "completion ' c' is none of the training data's: ' a', ' b'",
        ),
        ("eval_data", [{"prompt": f"a{i}x ->", "completion": " a"} for i in range(2)], "nothing is held out"),
    ],
)
def test_data_that_does_not_do(name, records, expected, refuses, tmp_path):
    path = write_jsonl(tmp_path / f"{name}.jsonl", records)
    assert expected in refuses(**{name: path})


def test_other_texts_and_places_that_do_not_do(refuses, tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "short").write_text("abc")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "the other text is empty" in refuses(other_text=tmp_path / "empty")
    assert "has 3 tokens, at least 4 are needed" in refuses(other_text=tmp_path / "short")
    assert "is not UTF-8" in refuses(other_text=tmp_path / "bytes")
    assert "No such file" in refuses(other_text=tmp_path / "none")
    assert "--eval-data goes with --data" in refuses("--eval-data", str(tmp_path / "short"), data=None)
    assert "No such file" in refuses(eval_data=tmp_path / "none")
    assert "no model" in refuses(model=tmp_path / "none")
    assert "parent directory" in refuses(output=tmp_path / "no" / "such")


def test_without_another_text_the_one_of_the_package_is_taken(files):
    task = load_task(files["data"], None, None, quiet)
    assert task.other.startswith("We the People of the United States") and "Constitution" in task.about


def test_the_advice_on_texts_that_are_too_long_can_be_followed(refuses, base, files, tmp_path):
    err = refuses("--methods", "lora", "--max-length", "5")
    assert "tokens, more than max_length (5): raise --max-length, or" in err
    flags = re.search(r"by (--too-long \w+)", err)[1].split()
    err = refuses("--methods", "lora", "--max-length", "5", *flags)
    assert "of the 32 texts to learn from 0 have at most max_length (5) tokens, and 1 must" in err
    least = int(re.search(r"raise --max-length, to (\d+) at least", err)[1])
    settings = {"model": str(base), "steps": 1, "max_length": least, "too_long": "drop", **files}
    compare(CompareConfig(tmp_path / "out", plan_runs(["lora"], None), **settings), quiet, attempt)


def test_two_texts_at_least_are_measured_on(refuses, tmp_path):
    records = [{"prompt": f"{c} ->", "completion": " a"} for c in ("c", "d" * 9, "e" * 7)]
    path = write_jsonl(tmp_path / "held_out.jsonl", records)
    err = refuses("--eval-data", str(path), "--max-length", "9", "--too-long", "drop")
    assert "of the 3 texts held out 1 have at most max_length (9) tokens, and 2 must" in err
    assert "raise --max-length, to 13 at least" in err
