"""Reads the meaning of settings: the docstring below each field of a dataclass."""

import ast
import inspect
import textwrap
from functools import cache


@cache
def read_docstrings(schema: type) -> dict[str, str]:
    """Field -> its docstring, including the fields that a dataclass inherits."""
    docs = {}
    for owner in reversed(schema.__mro__[:-1]):  # without `object`
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                docs[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return docs
