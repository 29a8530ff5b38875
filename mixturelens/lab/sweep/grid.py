"""A grid file, and the cells that it asks for."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from mixturelens.files import read_yaml
from mixturelens.lab.organism import Spec, load_spec, recipes, with_settings
from mixturelens.lab.sweep.numbers import INSTRUMENTS, TAKEN, Scalar
from mixturelens.records import first_problem
from mixturelens.types import Frozen, InputError

CELLS = 10_000
"""Of a grid, at most."""
NAME = 200
"""Characters of a cell's name, which its folder has."""


class SweepGrid(Frozen):
    """Which runs: recipes x settings x seeds."""

    recipe: Annotated[tuple[str, ...], Field(min_length=1)] = ("default",)
    """Names of recipes, or spec files relative to the grid's own file."""
    set: dict[str, tuple[Scalar, ...] | dict[str, dict[str, Any]]] = {}
    """Either a key of the spec and the values that it takes, `rl.learning_rate: [0.001, 0.002]`; or a name and, under
    labels, several keys that go together, `mixture: {rare: {policies.a.weight: 0.05, policies.b.weight: 0.95}}`."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] = (0,)
    """A number n means 0 to n - 1."""
    then: Annotated[tuple[str, ...], Field(min_length=1)] = ("verdict",)
    """Instruments to run on every pair of a cell."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _one_recipe(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @field_validator("seeds", mode="before")
    @classmethod
    def _number_of_seeds(cls, given: Any) -> Any:
        if not isinstance(given, int) or isinstance(given, bool):
            return given
        if given > CELLS:
            raise ValueError(f"{given} seeds; a grid has {CELLS} cells at most")
        return range(given)

    @field_validator("set", mode="before")
    @classmethod
    def _settings(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for key, values in given.items():
            if not isinstance(values, list | dict) or not values:
                raise ValueError(f"{key}: give a list of values, or labels with the keys that each sets")
            if isinstance(values, list) and any(isinstance(value, list | dict) for value in values):
                raise ValueError(f"{key}: a value that is no number or word needs a label: {{label: {{{key}: ...}}}}")
            if isinstance(values, dict) and not all(isinstance(keys, dict) for keys in values.values()):
                raise ValueError(f"{key}: each label needs the keys that it sets: {{label: {{rl.steps: 40}}}}")
            if key in TAKEN or (isinstance(values, dict) and "." in str(key)):
                raise ValueError(f"{key}: a column of the table may be called so; take another name")
        return {key: [*map(_number, v)] if isinstance(v, list) else v for key, v in given.items()}

    @field_validator("then")
    @classmethod
    def _known(cls, then: tuple[str, ...]) -> tuple[str, ...]:
        for name in then:
            if name not in INSTRUMENTS:
                raise ValueError(f"no instrument {name!r} (those of {', '.join(INSTRUMENTS)})")
        return tuple(name for name in INSTRUMENTS if name in then)


def _number(value: Any) -> Any:
    """For YAML, 1e-3 is a text: it wants 1.0e-3."""
    given = isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d{1,2}", value.lower())
    return float(value) if given else value


def load_grid(file: Path) -> SweepGrid:
    """Read a grid file. Raises InputError that names the file and the first offending key."""
    data = read_yaml(file, "no such grid file")
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError(f"{file}: a grid is a mapping of keys, not a {type(data).__name__}")
    try:
        return SweepGrid.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{file}: {first_problem(error)}") from None


@dataclass(frozen=True)
class GridCell:
    """One run of a grid; without a spec, and with the reason, where its settings make none."""

    name: str
    recipe: str
    at: dict[str, Scalar]
    """Key of the grid -> value or label."""
    seed: int
    spec: Spec | None
    error: str = ""


def cells_of(grid: SweepGrid, file: Path) -> list[GridCell]:
    """Every cell, the seeds of one setting next to each other. Raises InputError if two would be the same."""
    axes = [
        [(key, label, keys) for label, keys in values.items()]
        if isinstance(values, dict)
        else [(key, value, {key: value}) for value in values]
        for key, values in grid.set.items()
    ]
    number = math.prod(map(len, (grid.recipe, grid.seeds, *axes)))
    if number > CELLS:
        raise InputError(f"{file}: asks for {number} cells, and {CELLS} are the most; split it")
    bases = {recipe: _base(file.parent, recipe) for recipe in grid.recipe}
    cells = [
        _cell(bases[recipe], recipe, settings, seed)
        for recipe in grid.recipe
        for settings in itertools.product(*axes)
        for seed in grid.seeds
    ]
    for name in (cell.name for cell in cells if len(cell.name) > NAME):
        raise InputError(f"{file}: a cell would be called {name}, which is too long for a folder; give shorter labels")
    for name, same in itertools.groupby(sorted(cell.name for cell in cells)):
        if len(list(same)) > 1:
            raise InputError(f"{file}: two cells would be called {name}; give each value once, and labels that differ")
    return cells


def _base(folder: Path, recipe: str) -> Spec | InputError:
    """The spec of a recipe, or why there is none, which each of its cells says."""
    try:
        return load_spec(recipe if recipe in recipes() else folder / recipe)
    except InputError as error:
        return error


def _cell(
    base: Spec | InputError, recipe: str, settings: Sequence[tuple[str, Scalar, dict[str, Any]]], seed: int
) -> GridCell:
    at = {key: value for key, value, _ in settings}
    spec, error = None, ""
    try:
        if isinstance(base, InputError):
            raise base
        given = itertools.chain.from_iterable(keys.items() for _, _, keys in settings)
        spec = with_settings(base, {"seed": seed, **dict(given)}, f"recipe {Path(recipe).stem} with these settings")
    except InputError as found:
        error = str(found)
    parts = (Path(recipe).stem, *(f"{key}={text(value)}" for key, value in at.items()), f"seed={seed}")
    name = re.sub(r"[^A-Za-z0-9._=+-]", "_", "--".join(parts))
    return GridCell(name, Path(recipe).stem, at, seed, spec, error)


def text(value: Any) -> str:
    """A setting's value as text for tables: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
