"""What checks arguments and results against their annotations in tests, as pyproject.toml asks jaxtyping to.

Two things differ from `beartype.beartype`. An int is a float, as it is to Python's typing. And functions inside
functions, such as hooks, are left alone: each time the outer one runs they are made anew, and to wrap one takes longer
than most of them run (tests/grafting/test_path.py took 140 s with them, and 15 s without any checks).
"""

from __future__ import annotations

import ast

from beartype import BeartypeConf, beartype
from jaxtyping._import_hook import JaxtypingTransformer

outermost = beartype(conf=BeartypeConf(is_pep484_tower=True))

_visit = JaxtypingTransformer.visit_FunctionDef


def _visit_outermost(self: JaxtypingTransformer, node: ast.FunctionDef) -> ast.AST:
    body, node.body = node.body, []  # it does not look at what it does not see
    try:
        return _visit(self, node)
    finally:
        node.body = body


JaxtypingTransformer.visit_FunctionDef = _visit_outermost
