"""The products' machine code by other releases of Triton than the installed one, each alone in a folder of its own.

Each release lies in build/tritons/<version> (or in $MINIPEFT_TRITONS/<version>); where it does not, its test is skipped
and says how to get it. kernels/products.md has the counts.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from processes import run_process

ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("MINIPEFT_TRITONS", ROOT / "build" / "tritons"))

# Instructions a weight, as counted, by release and target: x W^T, then dy W, from the fewest rows to the most.
COUNTED = {
    ("3.6.0", "sm_80"): ((3.57, 4.14, 5.24, 11.25), (5.28, 6.33, 8.31, 12.45)),
    ("3.6.0", "sm_90"): ((3.91, 4.59, 5.27, 7.81, 8.47), (5.33, 6.84, 7.03, 7.31, 8.44)),
    ("3.8.0", "sm_80"): ((3.55, 4.15, 5.24, 6.19), (4.62, 4.91, 5.59, 6.84)),
    ("3.8.0", "sm_90"): ((3.95, 4.57, 5.35, 7.88, 9.38), (4.59, 6.97, 7.31, 7.66, 8.62)),
    ("3.9.0", "sm_80"): ((3.55, 4.15, 5.24, 6.19), (4.62, 4.91, 5.59, 6.84)),
    ("3.9.0", "sm_90"): ((3.92, 4.59, 5.35, 7.88, 8.38), (4.59, 6.84, 7.09, 7.53, 8.38)),
}


@pytest.mark.parametrize(("version", "target"), COUNTED)
def test_products_stay_within_their_instructions_under_each_triton(version: str, target: str, tmp_path: Path) -> None:
    folder = FOLDER / version
    if not (folder / "triton").is_dir():
        pytest.skip(f"pip install --no-deps --target {folder} triton=={version}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    # Compiled anew: releases share a cache, and a kept kernel would be the last release's.
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    file = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "minipeft", "kernels", "--target", target, "--json", str(file)]
    run_process(command, env=environment, check=True)
    report = json.loads(file.read_text())
    assert report["triton"] == version
    products = [k for k in report["kernels"] if k["rows"]]
    for grad, counted in zip((False, True), COUNTED[version, target], strict=True):
        found = [k["per_element"] for k in products if k["grad"] == grad]
        assert found == pytest.approx(counted, rel=0.1)
    assert {k["name"] for k in products if k["spilled_bytes"] or not k["tensor_instructions"]} == set()


def test_each_release_has_a_row_in_the_page() -> None:
    page = (ROOT / "kernels" / "products.md").read_text()
    for (version, target), (forward, gradient) in COUNTED.items():
        numbers = [", ".join(f"{count:.2f}" for count in counts) for counts in (forward, gradient)]
        assert f"| {version} | {target} | {numbers[0]} | {numbers[1]} |" in page
