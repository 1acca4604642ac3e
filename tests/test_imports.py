"""Who may import whom: the layers of the package, held by reading its imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

KERNELS_MAY_IMPORT = {"torch", "triton", "numpy", *sys.stdlib_module_names}


def sources() -> dict[str, Path]:
    """Every module of the package with its file."""
    found = {}
    folders = {
        "minipeft": "minipeft",
        "kernels/minipeft_kernels": "minipeft_kernels",
    }
    for folder, package in ((ROOT / f, p) for f, p in folders.items()):
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imported_by(module: str, file: Path) -> set[str]:
    """Full names of the modules that `file` imports, relative imports resolved, type-checking ones left out."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in _running_nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], source]).rstrip(".")
            known = sources()
            inner = {f"{source}.{alias.name}" for alias in node.names if f"{source}.{alias.name}" in known}
            names |= inner or {source}
    return names


def _running_nodes(tree: ast.AST) -> list[ast.AST]:
    nodes = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        nodes += [child, *_running_nodes(child)]
    return nodes


def test_the_reader_of_imports_sees_them() -> None:
    assert "minipeft.state" in imported_by("minipeft.model", sources()["minipeft.model"])
    assert "minipeft.nf4.linear" in imported_by("minipeft.nf4", sources()["minipeft.nf4"])
    assert "torch" in imported_by("minipeft_kernels.linear.op", sources()["minipeft_kernels.linear.op"])


def test_kernels_stand_on_torch_alone() -> None:
    for module, file in sources().items():
        if module.startswith("minipeft_kernels"):
            outside = {n.split(".")[0] for n in imported_by(module, file)} - {"minipeft_kernels"}
            assert outside <= KERNELS_MAY_IMPORT, module


def test_peers_are_never_imported() -> None:
    for module, file in sources().items():
        assert not {n.split(".")[0] for n in imported_by(module, file)} & {"peft", "bitsandbytes"}, module


@pytest.mark.parametrize("module", ["minipeft", "minipeft.commands.cli"])
def test_importing_is_light(module: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)"
    code = f"import sys, {module}; assert not ({heavy}), {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_all_there() -> None:
    import minipeft

    assert all(getattr(minipeft, name) is not None for name in minipeft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = minipeft.nope
