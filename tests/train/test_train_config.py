import argparse

import pytest
import torch
from transformers import SchedulerType

from minipeft.train.config import SCHEDULER_CHOICES, TrainConfig, add_config_arguments, config_values
from minipeft.train.errors import ConfigError
from minipeft.train.schedule import make_optimizer, make_schedule

NEEDED = {"model": "m", "data": "d", "output_dir": "o"}


def parse(*flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    add_config_arguments(parser)
    return parser.parse_args(flags)


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\noutput_dir: o\nlr: 1e-4\nbatch_size: 3\npacking: true\n")
    args = parse("--config", str(path), "--batch-size", "5", "--no-packing", "--method-args", "{r: 4}")
    config = TrainConfig.from_sources(args.config, config_values(args))
    assert (config.batch_size, config.packing, config.method_args) == (5, False, {"r": 4})
    assert config.lr == 1e-4  # YAML 1.1 reads 1e-4 as a string


def test_every_setting_has_a_flag_and_a_help_text():
    args = vars(parse())
    assert set(args) - {"config"} == set(TrainConfig.__dataclass_fields__)
    assert all(f.metadata["help"] for f in TrainConfig.__dataclass_fields__.values())


def test_null_reaches_optional_settings():
    assert TrainConfig.from_sources(None, NEEDED | {"max_grad_norm": "none"}).max_grad_norm is None
    assert TrainConfig(**NEEDED, keep_last=None).keep_last is None


def test_unknown_setting_is_named_with_its_neighbours(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("batchsize: 3\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown setting 'batchsize'; did you mean batch_size"):
        TrainConfig.from_sources(path, NEEDED)


def test_missing_settings_are_listed():
    with pytest.raises(ConfigError, match=r"missing setting.*: data, output_dir"):
        TrainConfig.from_sources(None, {"model": "m"})


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", "fast", "'lr' must be a number, got 'fast'"),
        ("lr", True, "'lr' must be a number, got True"),
        ("lr", float("nan"), "'lr' must be finite and 0 or greater, got nan"),
        ("lr", float("inf"), "'lr' must be finite and 0 or greater, got inf"),
        ("lr", 10**400, "'lr' must be a number, got one that is too large"),
        ("seed", 2**63, "'seed' must be 0 or greater and below"),
        ("data", "", "'data' must not be empty"),
        ("method_args", "[" * 10_000, "'method_args' must be a mapping"),
        ("method_args", "{r: " + "9" * 5000 + "}", "'method_args' must be a mapping"),
        ("batch_size", 2.5, "'batch_size' must be a whole number, got 2.5"),
        ("batch_size", 0, "'batch_size' must be greater than 0, got 0"),
        ("batch_size", None, "'batch_size' must be a whole number, got None"),
        ("packing", "maybe", "'packing' must be true or false, got 'maybe'"),
        ("packing", 1, "'packing' must be true or false, got 1"),
        ("method_args", "r", "'method_args' must be a mapping, got 'r'"),
        ("model", 3, "'model' must be a string, got 3"),
        ("max_steps", "many", "'max_steps' must be a whole number or null, got 'many'"),
        ("too_long", "cut", "'too_long' must be one of error, drop, truncate, got 'cut'"),
        ("method_args", {"target_modules": {"q_proj"}}, "must hold text, numbers, lists and mappings alone: .* set "),
        ("scheduler", "cosin", "'scheduler' must be one of linear, cosine"),
        ("beta2", 1.0, r"'beta2' must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_value_is_an_error_that_names_the_setting(setting, value, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**(NEEDED | {setting: value}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_data": "e", "eval_fraction": 0.1}, "exclude each other"),
        ({"scheduler": "constant", "warmup_steps": 3}, "constant has no warm-up"),
        ({"fsdp": True, "optimizer": "paged_adamw_8bit"}, "set optimizer to paged_adamw or adamw"),
        ({"scheduler": "constant_with_warmup", "scheduler_args": {"a": 1}}, "takes no scheduler_args"),
    ],
)
def test_contradictions_are_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**NEEDED, **settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "must hold a mapping"),
        (b"a: [\n", "not valid YAML"),
        (b"\xff\xfe\n", "not UTF-8"),
        (b"1: 2\n", "must hold a mapping"),
        (b"seed: " + b"9" * 5000, "a value that cannot be read"),
        (b"method_args: " + b"[" * 10_000, "nested too deep"),
        (b"r: 4", r"unknown setting 'r'; did you mean lr\? \(what a method takes stands in method_args\)"),
        (b"learning_rate: 1", "unknown setting 'learning_rate'; did you mean lr?"),
    ],
)
def test_unreadable_config_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        TrainConfig.from_sources(path)
    assert "\n" not in str(raised.value)


def test_missing_config_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.yaml: No such file"):
        TrainConfig.from_sources(tmp_path / "nope.yaml")


def test_schedules_are_those_of_transformers():
    stepless = {"reduce_lr_on_plateau", "greedy"}
    assert set(SCHEDULER_CHOICES) == {s.value for s in SchedulerType} - stepless


@pytest.mark.parametrize(("total", "rates"), [(1, [1.0]), (2, [0.0, 1.0]), (4, [0.0, 1.0, 0.75, 0.25])])
def test_a_share_of_warm_up_leaves_a_step_to_learn_in(total, rates):
    # Cosine, from 1 to 0 over the steps after the warm-up of one.
    config = TrainConfig(**NEEDED, lr=1.0, scheduler="cosine", warmup_ratio=0.06)
    optimizer = make_optimizer(torch.nn.Linear(1, 1), config)
    schedule = make_schedule(optimizer, config, total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(rates)
