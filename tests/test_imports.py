"""Who may import whom: the layers of the package, held by reading its imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Module (or package) -> what of minipeft it may import. A package's own modules are always allowed.
ALLOWED = {
    "minipeft.kernels": [],
    "minipeft.files": [],
    "minipeft.configs": ["minipeft.files"],
    "minipeft.quantization": ["minipeft.kernels"],
    "minipeft.optim": ["minipeft.kernels", "minipeft.files"],
    "minipeft.methods": ["minipeft.quantization", "minipeft.kernels", "minipeft.configs"],
    "minipeft.patching": ["minipeft.methods", "minipeft.quantization", "minipeft.configs"],
    "minipeft.state_dict": ["minipeft.patching", "minipeft.methods", "minipeft.configs"],
    "minipeft.checkpoint": ["minipeft.configs", "minipeft.files"],
    "minipeft.unloading": ["minipeft.patching", "minipeft.methods", "minipeft.quantization"],
    "minipeft.adapter_files": [
        *("minipeft.methods.base", "minipeft.methods.lora_init"),
        *("minipeft.checkpoint", "minipeft.state_dict", "minipeft.patching", "minipeft.configs", "minipeft.files"),
    ],
    "minipeft.lora_model": ["minipeft.patching", "minipeft.methods"],
    "minipeft.merged_model": [
        *("minipeft.unloading", "minipeft.patching", "minipeft.methods", "minipeft.quantization"),
    ],
    "minipeft.model": [
        *("minipeft.adapter_files", "minipeft.lora_model", "minipeft.merged_model", "minipeft.status"),
        *("minipeft.state_dict", "minipeft.patching"),
        *("minipeft.methods", "minipeft.quantization", "minipeft.configs"),
    ],
    "minipeft.loftq_replace": ["minipeft.methods", "minipeft.patching", "minipeft.state_dict"],
    "minipeft.hotswap": [
        *("minipeft.checkpoint", "minipeft.state_dict", "minipeft.patching", "minipeft.methods", "minipeft.configs"),
    ],
    "minipeft.auto": ["minipeft.model", "minipeft.configs"],
    "minipeft.preparing": ["minipeft.patching"],
    "minipeft.status": ["minipeft.patching", "minipeft.quantization"],
    "minipeft.training": ["minipeft"],
    "minipeft.cli": ["minipeft"],
    "minipeft.commands": ["minipeft"],
    "minipeft.__main__": ["minipeft.cli"],
    "minipeft.bench_command": ["minipeft"],
}
TOP = ("minipeft.training", "minipeft.cli", "minipeft.commands", "minipeft.__main__", "minipeft.bench_command")
BELOW_TRAINING = [name for name in ALLOWED if name not in TOP]
MAY_IMPORT_TRANSFORMERS = (
    *("minipeft.quantization.hf", "minipeft.model", "minipeft.state_dict", "minipeft.auto", "minipeft.methods.prompt"),
)
KERNELS_MAY_IMPORT = {"torch", "triton", "numpy", *sys.stdlib_module_names}


def sources() -> dict[str, Path]:
    """Every module of the package with its file."""
    found = {}
    folders = {
        "minipeft": "minipeft",
        "kernels/ops": "minipeft.kernels",
        "kernels/emulator": "minipeft.kernels.emulator",
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


def owner_of(module: str) -> str:
    return max((name for name in ALLOWED if module == name or module.startswith(name + ".")), key=len)


def test_the_reader_of_imports_sees_them() -> None:
    assert "minipeft.state_dict" in imported_by("minipeft.model", sources()["minipeft.model"])
    assert "minipeft.quantization.linear" in imported_by("minipeft.quantization", sources()["minipeft.quantization"])
    assert "torch" in imported_by("minipeft.kernels.lora_matmul", sources()["minipeft.kernels.lora_matmul"])


def test_nothing_imports_upward() -> None:
    wrong = []
    for module, file in sources().items():
        if module == "minipeft":
            continue
        owner = owner_of(module)
        for name in imported_by(module, file):
            if name.split(".")[0] != "minipeft" or (owner_of(name) if name != "minipeft" else "minipeft") == owner:
                continue
            if not any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED[owner]):
                wrong.append(f"{module} imports {name}")
            if owner in BELOW_TRAINING and owner_of(name) not in BELOW_TRAINING:
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_transformers_is_imported_only_where_models_are_loaded() -> None:
    wrong = [
        module
        for module, file in sources().items()
        if any(name.split(".")[0] == "transformers" for name in imported_by(module, file))
        and owner_of(module) not in TOP
        and not module.startswith(MAY_IMPORT_TRANSFORMERS)
    ]
    assert not wrong


def test_kernels_stand_on_torch_alone() -> None:
    for module, file in sources().items():
        if module.startswith("minipeft.kernels"):
            outside = {n.split(".")[0] for n in imported_by(module, file)} - {"minipeft"}
            assert outside <= KERNELS_MAY_IMPORT, module


def test_peers_are_never_imported() -> None:
    for module, file in sources().items():
        assert not {n.split(".")[0] for n in imported_by(module, file)} & {"peft", "bitsandbytes"}, module


@pytest.mark.parametrize("module", ["minipeft", "minipeft.cli"])
def test_importing_is_light(module: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)"
    code = f"import sys, {module}; assert not ({heavy}), {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_all_there() -> None:
    import minipeft

    assert all(getattr(minipeft, name) is not None for name in minipeft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = minipeft.nope
