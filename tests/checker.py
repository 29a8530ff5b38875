"""What checks shapes of arguments and results in tests, as pyproject.toml asks jaxtyping to.

Three things differ from jaxtyping's own hook with `beartype.beartype`. Only functions whose annotations name a shape
are wrapped: pyright checks the other types, once. Functions inside functions, such as hooks, are left alone: each time
the outer one runs they are made anew, and to wrap one takes longer than most of them run (tests/grafting/test_path.py
took 140 s with them, and 15 s without any checks). And an int is a float, as it is to Python's typing.
"""

from __future__ import annotations

import ast

from beartype import BeartypeConf, beartype
from jaxtyping._import_hook import JaxtypingTransformer

shapes = beartype(conf=BeartypeConf(is_pep484_tower=True))

KINDS = frozenset(["Bool", "Float", "Int", "Num", "Shaped", "UInt"])


def names_a_shape(annotations: list[ast.AST]) -> bool:
    """Whether `Float[Tensor, "row d"]`, or the like, is in one of them."""
    inner = (node for each in annotations for node in ast.walk(each))
    return any(isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name) and n.value.id in KINDS for n in inner)


def _visit_function(self: JaxtypingTransformer, node: ast.FunctionDef) -> ast.AST:
    if names_a_shape([node.args, *filter(None, [node.returns])]):
        body, node.body = node.body, []  # it does not look at what it does not see
        _plain_visit(self, node)
        node.body = body
    return node


def _visit_class(self: JaxtypingTransformer, node: ast.ClassDef) -> ast.AST:
    fields = [each.annotation for each in node.body if isinstance(each, ast.AnnAssign)]
    if names_a_shape(list(fields)):
        return _plain_class(self, node)
    self.generic_visit(node)
    return node


_plain_visit, _plain_class = JaxtypingTransformer.visit_FunctionDef, JaxtypingTransformer.visit_ClassDef
JaxtypingTransformer.visit_FunctionDef, JaxtypingTransformer.visit_ClassDef = _visit_function, _visit_class
