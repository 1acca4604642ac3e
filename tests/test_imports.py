"""The imports that each part of the code may make, held by reading the source: layers, rooms and circles."""

import ast
import functools
import sys
from pathlib import Path

import pytest
from processes import run_process

import minipeft

ROOT = Path(__file__).parent.parent
FOLDERS = {"minipeft": "minipeft", "kernels/minipeft_kernels": "minipeft_kernels", "benchmarks": "benchmarks"}
OUTSIDE_OF_KERNELS = {"torch", "triton", "numpy", *sys.stdlib_module_names}

# The files right in minipeft/: what an adapter is, and a model with adapters.
CORE = {
    *(
        "config",
        "methods",
        "adapter",
        "experts",
        "targets",
        "unused_names",
        "packed",
        "attach",
        "biases",
        "later_biases",
        "stored",
        "copies",
        "model",
        "merge",
        "state",
        "saving",
        "directory",
        "files",
    ),
    *(
        "asked",
        "embeddings",
        "status",
        "preparing",
        "auto",
        "paths",
        "base_state",
        "layer_calls",
        "switch",
        "rows",
        "hub",
    ),
    *("renaming", "card", *("mixins", "disabling"), "fused"),
    # PEFT's names and small functions, for the scripts that import them.
    *(
        "public",
        "beside_peft",
        "errors",
        "mappings",
        "wrappers",
        "utilities",
        "signatures",
        "names",
        "shorter",
        "meta",
        "shards",
        "gathered",
    ),
    "tying",
    *("compat", "machine"),
    # What accelerate did to a model.
    "dispatched",
}

# Room -> the other rooms that its modules import. "core" is CORE, "kernels" the package minipeft_kernels without its
# emulator, which knows nothing else, and its lab, which knows both: those are rooms of their own.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "tokens": {"core"},
    "lora": {"core", "tokens", "nf4", "kernels"},
    "bottleneck": {"core"},
    "virtual": {"core"},
    "nf4": {"core", "kernels"},
    "optim": {"core", "kernels"},
    "train": {"core", "nf4", "optim", "kernels"},
    "export": {"core", "train"},
    "show": {"core", "nf4", "train"},
    "demo": {"core", "lora", "train", "kernels"},
    "compare": {"core", "train", "demo", "kernels"},
    "commands": {"core", "nf4", "train", "export", "show", "demo", "compare", "kernels", "lab", "emulator"},
    "__main__": {"commands"},
    "kernels": set(),
    "lab": {"kernels", "emulator"},
    "emulator": set(),
}

# The modules that import transformers, all but the first line's for one task of theirs.
IMPORT_TRANSFORMERS = {
    *(
        "nf4.hf",
        "nf4.hf.config",
        "nf4.hf.load",
        "nf4.hf.merging",
        "nf4.hf.model",
        "nf4.hf.modules",
        "nf4.hf.mxfp4",
        "nf4.hf.one_by_one",
        "nf4.hf.quantizer",
    ),  # a quantizer of transformers'
    "auto",  # loads base models
    "renaming",  # asks for the names that modules of old had
    "nf4.linear",  # gives back the Conv1D that a layer was made of
    "virtual.prompt",  # reads the text that a prompt starts from
    "demo.assets",  # makes a small model
    *("train.models", "train.schedule", "train.generation", "show.memory"),  # loads base models; schedules; stops
    "train.chats",  # renders chat templates with their marks
}


@functools.cache
def sources() -> dict[str, Path]:
    """Every module of the packages with its file."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


@functools.cache
def imported_by(module: str) -> frozenset[str]:
    """Full names of the modules that `module` imports, also inside functions; type-checking imports are left out.

    Relative imports are resolved, and public names of minipeft to the module that has them.
    """
    file = sources()[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in _running_nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], source]).rstrip(".")
            names |= {_home(source, alias.name) for alias in node.names}
    return frozenset(names)


def _home(source: str, name: str) -> str:
    """The module that `from source import name` gets `name` from."""
    if f"{source}.{name}" in sources():
        return f"{source}.{name}"
    return minipeft.public.HOMES.get(name, source).partition(":")[0] if source == "minipeft" else source


def _running_nodes(tree: ast.AST) -> list[ast.AST]:
    nodes = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        nodes += [child, *_running_nodes(child)]
    return nodes


def room_of(module: str) -> str:
    """The room that a module belongs to; a package is in its own room, and minipeft itself in none."""
    package, *parts = module.split(".")
    if package == "minipeft_kernels":
        return parts[0] if parts[:1] in (["emulator"], ["lab"]) else "kernels"
    if package == "minipeft" and parts[:1] == ["kernels"]:
        # Importing the emulator from there lets it run the operations.
        return "lab" if parts[1:] == ["emulator"] else "kernels"
    if package != "minipeft" or not parts:
        return ""
    return "core" if parts[0] in CORE else parts[0]


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or not (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1 or module in imports[module]:
                found.append(sorted(group))

    for module in imports:
        if module not in number:
            visit(module)
    return found


def test_the_reader_of_imports_sees_them() -> None:
    assert "minipeft.saving" in imported_by("minipeft.model")
    assert "minipeft.nf4.linear" in imported_by("minipeft.nf4")
    assert "minipeft_kernels.emulator" in imported_by("minipeft.kernels.emulator")
    assert {"torch", "minipeft.model"} <= imported_by("minipeft.train.methods")


def test_the_finder_of_circles_finds_them() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"f"}, "g": {"d", "e"}}
    assert circles(imports) == [["a", "b", "c"], ["f"]]


def test_no_modules_import_each_other() -> None:
    known = sources()
    assert circles({module: set(imported_by(module)) & known.keys() for module in known}) == []


def test_the_core_is_all_that_lies_beside_the_rooms() -> None:
    files = {file.stem for file in (ROOT / "minipeft").glob("*.py")}
    assert files == CORE | {"__init__", "__main__"}


def test_rooms_import_those_that_they_may() -> None:
    found: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}
    for module in sources():
        room = room_of(module)
        others = {room_of(other) for other in imported_by(module) if other in sources()} - {room, ""}
        assert not room or others <= MAY_IMPORT[room], (module, others - MAY_IMPORT.get(room, set()))
        found.setdefault(room, set()).update(others)
    unused = {room: MAY_IMPORT[room] - found[room] for room in MAY_IMPORT if MAY_IMPORT[room] - found[room]}
    assert not unused, "the table says more than the code does"


def test_transformers_is_imported_in_few_places() -> None:
    importing = {m for m in sources() if "transformers" in {n.split(".")[0] for n in imported_by(m)}}
    assert {m.removeprefix("minipeft.") for m in importing if m.startswith("minipeft")} == IMPORT_TRANSFORMERS


def test_kernels_stand_on_torch_alone() -> None:
    for module in sources():
        if module.startswith("minipeft_kernels"):
            outside = {n.split(".")[0] for n in imported_by(module)} - {"minipeft_kernels"}
            assert outside <= OUTSIDE_OF_KERNELS, module


def test_peers_are_never_imported() -> None:
    for module in sources():
        if not module.startswith("benchmarks"):
            assert not {n.split(".")[0] for n in imported_by(module)} & {"peft", "bitsandbytes"}, module


@pytest.mark.parametrize("module", ["minipeft", "minipeft.methods", "minipeft.commands.cli"])
def test_importing_is_light(module: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)"
    code = f"import sys, {module}; assert not ({heavy}), {heavy}"
    run_process([sys.executable, "-c", code], check=True)


def test_public_names_are_all_there() -> None:
    assert all(getattr(minipeft, name) is not None for name in minipeft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = minipeft.nope
