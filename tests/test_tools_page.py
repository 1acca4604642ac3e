"""docs/tools.md: every row names a test, and there is such a test."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = [line for line in (ROOT / "docs/tools.md").read_text().splitlines() if line.startswith("| ")][1:]


def test_each_row_is_held_by_a_test_that_there_is() -> None:
    assert len(ROWS) > 5
    for row in ROWS:
        found = re.search(r"\| `(tests/[\w/]+\.py)::(\w+)` \|$", row)
        assert found, row
        tree = ast.parse((ROOT / found[1]).read_text())
        assert found[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row
