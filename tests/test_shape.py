"""The shape of the code: which file may know which, so that each can be read without those after it.

    model <- data <- {train, probe} <- recipe

    python -m pytest -q tests/test_shape.py
"""
from __future__ import annotations

import ast
import sys

import pytest
from helpers import ROOT

MAY_IMPORT = {                                                  # of ours
    "model": set(),
    "data": {"model"},
    "train": {"model", "data"},
    "probe": {"model", "data"},
    "recipe": {"model", "data", "train", "probe"},
}
REQUIRED = {"torch", "numpy", "tiktoken"}                       # requirements.txt; all else is optional
OPTIONAL = {"matplotlib", "safetensors", "tokenizers", "huggingface_hub", "datasets", "pyarrow", "wandb"}


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text())


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names, dotted; none of any other node."""
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + (node.module or "")]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def imports(name: str) -> set[str]:
    """The top-level names of all that a file imports, wherever in it."""
    return {module.split(".")[0] for node in ast.walk(parse(name)) for module in imported(node)}


def imports_in_functions(tree: ast.Module) -> list[tuple[str, bool]]:
    """Modules that are imported inside of functions, and whether an `except ImportError` catches their absence."""
    found = []

    def visit(node: ast.AST, inside: bool, caught: bool) -> None:
        found.extend((module, caught) for module in imported(node) if inside)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, inside, caught or (field == "body" and catches_import_error(node)))
    visit(tree, False, False)
    return found


def catches_import_error(node: ast.AST) -> bool:
    return isinstance(node, ast.Try) and any(
        isinstance(handler.type, ast.Name) and handler.type.id in ("ImportError", "ModuleNotFoundError")
        for handler in node.handlers)


def needed(tree: ast.Module) -> list[str]:
    """The packages that are got by need("package", ...); "?" where the name is worked out."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name) and node.func.id == "need"]
    return [call.args[0].value if isinstance(call.args[0], ast.Constant) else "?" for call in calls]


def private_to_torch(module: str) -> bool:
    return module.startswith("torch.") and any(part.startswith("_") for part in module.split("."))


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_among_our_files_go_one_way(name):
    assert imports(name) & MAY_IMPORT.keys() <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_what_is_imported_is_python_a_requirement_or_an_optional_package(name):
    assert imports(name) <= sys.stdlib_module_names | MAY_IMPORT.keys() | REQUIRED | OPTIONAL


def test_the_requirements_are_those_of_requirements_txt():
    lines = [line.split("#")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    packages = {line.split(">")[0].split("=")[0].strip() for line in lines if line.strip()}
    assert packages == REQUIRED | {"pytest"}


def test_the_network_is_alone_and_has_no_command_line():
    tree = parse("model")
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not imports("model") & (MAY_IMPORT.keys() | {"argparse", "sys", "os", "json", "pathlib"})
    assert "main" not in functions and "__main__" not in (ROOT / "model.py").read_text()


@pytest.mark.parametrize("name", [name for name in MAY_IMPORT if name != "model"])
def test_every_other_file_is_a_script_whose_main_is_last(name):
    tree = parse(name)
    main, guard = tree.body[-2:]
    assert isinstance(main, ast.FunctionDef) and main.name == "main"
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    run(main)"


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_inside_of_functions_are_of_optional_packages_or_private_to_torch(name):
    """Of an optional package, the file has to catch that it is not there: where it is first imported, or by `need`."""
    inside = imports_in_functions(parse(name))
    guarded = {module.split(".")[0] for module, caught in inside if caught} & OPTIONAL
    for module, _ in inside:
        assert private_to_torch(module) or module.split(".")[0] in guarded, f"{name}.py imports {module} in a function"
    assert {package.split(".")[0] for package in needed(parse(name))} <= OPTIONAL


def test_these_tests_see_an_import_in_a_function():
    tree = ast.parse("""
import os
def f():
    from data import need
    try:
        import wandb
        from torch._dynamo import config
    except ImportError:
        import numpy
    need("safetensors.torch", "x"), need(name, "y")
""")
    assert imports_in_functions(tree) == [("data", False), ("wandb", True), ("torch._dynamo", True), ("numpy", False)]
    assert private_to_torch("torch._dynamo") and not private_to_torch("torch.nn")
    assert needed(tree) == ["safetensors.torch", "?"]
