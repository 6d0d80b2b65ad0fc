"""The public names are the same for Python, which imports them late, and for editors."""

import ast
import tomllib
from pathlib import Path

import pytest

import sae_lightning

PACKAGE = Path(sae_lightning.__file__).parent
TREE = ast.parse((PACKAGE / "__init__.py").read_text("utf8"))


def read_typed_imports() -> dict[str, str]:
    """Name -> `module:name` of the imports that only type checkers read."""
    (block,) = (
        node
        for node in TREE.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        for alias in node.names
    }


def test_editors_find_each_name_where_python_finds_it():
    defined_in = sae_lightning.DEFINED_IN.items()
    assert read_typed_imports() == {n: f"sae_lightning.{module}:{n}" for n, module in defined_in}


def test_all_is_a_literal_list_of_what_can_be_imported():
    (assignment,) = (
        node
        for node in TREE.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    names = ast.literal_eval(assignment.value)
    assert names == sorted(["UserError", *sae_lightning.DEFINED_IN])


def test_a_name_is_completed_before_it_is_used():
    assert set(sae_lightning.__all__) <= set(dir(sae_lightning))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'lense'"):
        sae_lightning.lense  # noqa: B018


def test_the_wheel_says_that_the_package_is_typed():
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf8"))
    shipped = settings["tool"]["setuptools"]["package-data"]["sae_lightning"]
    assert "py.typed" in shipped
    assert (PACKAGE / "py.typed").is_file()
