"""Imports between the five files go one way, so that each file can be read without the later ones.

    model <- data <- {train, probe} <- recipe

    python -m pytest -q tests/test_shape.py
"""
from __future__ import annotations

import ast
import sys

import pytest
from helpers import ROOT

MAY_IMPORT = {                                                  # the files that each file may import
    "model": set(),
    "data": {"model"},
    "train": {"model", "data"},
    "probe": {"model", "data"},
    "recipe": {"model", "data", "train", "probe"},
}
REQUIRED = {"torch", "numpy", "tiktoken"}                       # in requirements.txt
OPTIONAL = {"matplotlib", "transformers", "accelerate", "lm_eval", "datasets", "huggingface_hub", "pyarrow", "wandb"}


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text("utf-8"))


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names. Empty for any other node."""
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + (node.module or "")]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def imports(name: str) -> set[str]:
    """The top-level packages that a file imports anywhere."""
    return {module.split(".")[0] for node in ast.walk(parse(name)) for module in imported(node)}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_among_our_files_go_one_way(name):
    assert imports(name) & MAY_IMPORT.keys() <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_file_imports_only_pythons_own_required_and_optional_packages(name):
    assert imports(name) <= sys.stdlib_module_names | MAY_IMPORT.keys() | REQUIRED | OPTIONAL


def test_the_requirements_are_those_of_requirements_txt():
    lines = [line.split("#")[0] for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()]
    packages = {line.split(">")[0].split("=")[0].strip() for line in lines if line.strip()}
    assert packages == REQUIRED | {"pytest"}


def test_model_py_imports_none_of_our_files_and_has_no_command_line():
    tree = parse("model")
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not imports("model") & (MAY_IMPORT.keys() | {"argparse", "sys", "os", "json", "pathlib"})
    assert "main" not in functions and "__main__" not in (ROOT / "model.py").read_text("utf-8")


@pytest.mark.parametrize("name", [name for name in MAY_IMPORT if name != "model"])
def test_every_other_file_is_a_script_that_ends_with_main(name):
    tree = parse(name)
    main, guard = tree.body[-2:]
    assert isinstance(main, ast.FunctionDef) and main.name == "main"
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    run(main)"
