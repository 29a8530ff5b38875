"""Shapes are checked in every room that has them; what costs more than it says is left alone."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest
from checker import names_a_shape
from jaxtyping import TypeCheckError

import mixturelens
from mixturelens.stats import half_of, interval

ROOT = Path(mixturelens.__file__).parent
ELSEWHERE = ("lab",)
"""Rooms of which only some modules compute: `theory` and `regimes`."""


def with_shapes() -> list[str]:
    """Modules that have a function at their top whose annotations name a shape, and the first such function."""
    found = []
    for module in pkgutil.walk_packages([str(ROOT)], "mixturelens."):
        file = ROOT.parent.joinpath(*module.name.split(".")).with_suffix(".py")
        if file.is_file() and module.name.split(".")[1] not in ELSEWHERE:
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and names_a_shape([node.args, *filter(None, [node.returns])]):
                    found.append(f"{module.name}:{node.name}")
                    break
    return found


@pytest.mark.parametrize(
    "function", [*with_shapes(), "mixturelens.lab.theory:velocity", "mixturelens.lab.regimes:paid"]
)
def test_shapes_are_checked_wherever_they_are_named(function: str) -> None:
    module, name = function.split(":")
    there = importlib.import_module(module)
    assert hasattr(getattr(there, name), "__wrapped__")


def test_a_wrong_shape_is_refused_and_other_functions_are_themselves() -> None:
    with pytest.raises(TypeCheckError, match="interval"):
        interval(np.zeros((2, 3)))
    assert not hasattr(half_of, "__wrapped__")
