"""PEFT's own tests, run on minipeft: `python tests/peft_suite/run.py` from the root of a checkout.

    python tests/peft_suite/run.py --every 10                       # every tenth, about a minute
    python tests/peft_suite/run.py --tests test_config.py -k dict   # one file, with pytest's -k
    python tests/peft_suite/run.py --real                           # the installed PEFT in minipeft's place

The tests are those of PEFT's source distribution, which pip downloads once. They load models from Hugging Face's hub:
in their place stand tiny random ones of the same ids (`hub.py`). `shim/` is what they import as `peft`, and `plugin.py`
leaves out tests of methods that minipeft does not have (`names.py`).

`differences.txt` lists the tests that do not pass, each under its reason: those that the real PEFT fails, too, with
these models, and those that minipeft fails on purpose, which docs/differences.md explains. The command prints the tests
whose outcome is another one than the list says, and ends with exit code 1 if there are any. Nothing is written into the
checkout: sources, models and results lie in `$XDG_CACHE_HOME/minipeft-peft-suite`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEFT = "0.21.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "minipeft-peft-suite").expanduser()
FILES = (
    *("mapping", "config", "auto", "low_level_api", "other", "helpers", "loraplus", "lora_variants", "tuners_utils"),
    *("trainable_tokens", "initialization", "token_classification_qa", "vision_models", "mixed", "seq_classifier"),
    *("feature_extraction_models", "target_parameters", "encoder_decoder_models", "decoder_models", "custom_models"),
)
# The packages that the tests import and minipeft's do not -> their modules.
PACKAGES = {"parameterized": "parameterized", "scipy": "scipy", "attrs": "attr"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run one test of N (default: all)")
    parser.add_argument("--tests", nargs="+", metavar="FILE", default=[f"test_{name}.py" for name in FILES])
    parser.add_argument("-k", metavar="EXPR", help="pytest's -k")
    parser.add_argument("--real", action="store_true", help="run the installed PEFT in the place of minipeft")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    args = parser.parse_args()
    outcomes = run(args.tests, every=args.every, expression=args.k, real=args.real, jobs=args.jobs, limit=None)
    counts = {kind: sum(o["outcome"] == kind for o in outcomes.values()) for kind in ("passed", "failed", "skipped")}
    print(", ".join(f"{number} {kind}" for kind, number in counts.items()))
    wrong = unexpected(outcomes)
    print("\n".join(wrong))
    return 1 if wrong else 0


def run(
    files: list[str],
    every: int = 1,
    expression: str | None = None,
    real: bool = False,
    jobs: int = 1,
    limit: float | None = 280,
) -> dict[str, dict[str, str]]:
    """Run PEFT's test files: test id -> its "outcome" (passed, failed or skipped) and, if it failed, "error".

    Args:
        limit: seconds for each process; None for no limit.

    Raises subprocess.CalledProcessError when the sources or packages cannot be downloaded, and TimeoutExpired.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    source = _unpacked()
    environment = _environment(source, real)
    results = CACHE / ("real" if real else "minipeft")
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    running = []
    for number in range(min(jobs, len(files))):
        # Importing takes longer than many a file does: each process runs several.
        paths = [str(source / "tests" / name) for name in files[number::jobs]]
        command = [sys.executable, "-m", "pytest", "-q", "--tb=native", "-p", "plugin", "-p", "no:xdist"]
        command += ["-p", "no:cacheprovider", "-c", str(HERE / "pytest.ini"), f"--rootdir={source}"]
        command += ["--continue-on-collection-errors", f"--basetemp={results}/scratch-{number}", *paths]
        command += ["-k", expression] if expression else []
        own = {"SUITE_RESULTS": str(results / f"tests-{number}.jsonl"), "SUITE_EVERY": str(every)}
        with (results / f"tests-{number}.log").open("w") as log:
            running.append(subprocess.Popen(command, env={**environment, **own}, cwd=results, stdout=log, stderr=log))
    try:
        for process in running:
            process.wait(timeout=limit)
    finally:
        for process in running:
            process.kill()
    return {
        line.pop("id"): line
        for file in sorted(results.glob("tests-*.jsonl"))
        for line in map(json.loads, file.read_text().splitlines())
    }


def unexpected(outcomes: dict[str, dict[str, str]]) -> list[str]:
    """Sentences on the tests whose outcome is another one than `differences.txt` says."""
    known = differences()
    said = []
    for test, result in sorted(outcomes.items()):
        if result["outcome"] == "failed" and test not in known:
            said.append(f"{test}: {result['error']}")
        elif result["outcome"] == "passed" and test in known:
            said.append(f"{test} passes: take it out of differences.txt ({known[test]})")
    return said


def differences() -> dict[str, str]:
    """The tests that do not pass -> the reason: a heading of `differences.txt`."""
    found, reason = {}, ""
    for line in (HERE / "differences.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            reason = line[2:]
        elif line:
            found[line] = reason
    return found


def _unpacked() -> Path:
    """The folder of PEFT's sources."""
    folder = CACHE / f"peft-{PEFT}"
    if not folder.is_dir():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            subprocess.run([*download, f"peft=={PEFT}", "-d", scratch], check=True)
            with tarfile.open(Path(scratch, f"peft-{PEFT}.tar.gz")) as archive:
                archive.extractall(scratch, filter="data")
            Path(scratch, folder.name, "tests", "__init__.py").touch()
            os.rename(Path(scratch, folder.name), folder)
    return folder


def _environment(source: Path, real: bool) -> dict[str, str]:
    packages = CACHE / "packages"
    if not packages.is_dir():
        wanted = [package for package, module in PACKAGES.items() if importlib.util.find_spec(module) is None]
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        if wanted:
            subprocess.run([*install, *wanted], check=True)
        packages.mkdir(exist_ok=True)
    paths = [HERE, *([] if real else [HERE / "shim", ROOT]), source, packages]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(CACHE / "hub"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PEFT_SOURCE": str(source / "src" / "peft"),
        "SUITE_REAL": str(int(real)),
    }
    made_by, now = CACHE / "hub" / "made-by", (HERE / "hub.py").read_text()
    if not made_by.is_file() or made_by.read_text() != now:
        shutil.rmtree(CACHE / "hub", ignore_errors=True)
        subprocess.run([sys.executable, str(HERE / "hub.py"), str(CACHE / "hub")], env=environment, check=True)
        made_by.write_text(now)
    return environment


if __name__ == "__main__":
    sys.exit(main())
