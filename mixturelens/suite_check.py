"""All that is wrong with a suite, line by line, and what would mislead though it is not wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from mixturelens.files import json_objects, yaml_lines
from mixturelens.records import problems_of
from mixturelens.shown import Rule
from mixturelens.suite import PromptRow, Suite, suite_mapping
from mixturelens.types import InputError

FEW = 8
"""Questions under which no verdict is given."""
SAMPLES = 16
"""Completions a prompt from which rules tell small changes."""


class Problem(NamedTuple):
    """Something that is wrong: in which file, in which line where that is known, and what to do."""

    file: Path
    line: int | None
    said: str

    def __str__(self) -> str:
        return f"{self.file}: {'' if self.line is None else f'line {self.line}: '}{self.said}"


def check_suite_file(path: Path) -> tuple[Suite | None, list[Problem]]:
    """A suite as far as it can be read, and all of its problems; without problems it is the whole suite.

    `path` is the YAML file, or the folder that holds a `suite.yaml`. Nothing is raised for what is wrong with a file.
    """
    path = path / "suite.yaml" if path.is_dir() else path
    try:
        data = suite_mapping(path)
    except InputError as error:
        line = re.search(r"line (\d+)", str(error))
        return None, [Problem(path, int(line[1]) if line else None, str(error).removeprefix(f"{path}: "))]
    lines = yaml_lines(path)
    prompts = path.parent / data["prompts"]
    rows, at, found = _rows(prompts)
    context: list[str] = []
    if not rows:  # so that what is wrong with the rest is found, too
        rows = [PromptRow(id="0", cue="", prompt="", answer="0")]
    try:
        suite = Suite.model_validate({**data, "prompts": rows}, context=context)
    except ValidationError as error:
        known = [*Suite.model_fields]
        for where, said in problems_of(error):
            found.append(Problem(path, _line(lines, where), said + _meant(where, said, known)))
        return None, found
    if not at:
        return None, [*found, *(Problem(path, _line(lines, _key(said)), said) for said in context if "cue" not in said)]
    for said in context:
        row = _row_named(said, suite)
        if row is None:
            found.append(Problem(path, _line(lines, _key(said)), said))
        else:
            found.append(Problem(prompts, at[row], said.removeprefix("prompts: ")))
    return (None if found else suite), found


def pitfalls(suite: Suite) -> Iterator[str]:
    """What is allowed and will mislead, or leave something unmeasured; a sentence each."""
    questions = {row.id for row in suite.neutral}
    if len(questions) < FEW:
        yield f"{len(questions)} questions are too few: the verdict needs {FEW}, and intervals want 50 or more"
    if len(suite.cues) < 2:
        yield "all prompts have one cue: nothing can be said of how a cue is read; ask the same questions under another"
    for cue in suite.cues:
        alone = {row.id for row in suite.neutral if row.cue == cue}
        shared = {row.id for row in suite.neutral if row.cue != cue} & alone
        if len(suite.cues) > 1 and not shared:
            yield f"cue {cue!r}: no question (`id`) is asked under another cue, too: patch and repair have no contrast"
    if suite.trained_cue is None:
        yield "no `trained_cue`: patch, graft and repair ask for it (or give --trained-cue)"
    if suite.behaviours is None and suite.table is None:
        yield "no `behaviours`: what policies do under a cue (conditioning) is not measured; name a refusal, say"
    rules = [name for name, shown in suite.policies.items() if isinstance(shown, Rule)]
    for name in rules:
        shown = suite.policies[name]
        if isinstance(shown, Rule) and shown.force is None:
            yield f"policies.{name}: without `force` it cannot be put in place, and its specialist is not measured"
    if rules and suite.samples < SAMPLES:
        yield f"samples: {suite.samples} completions a prompt tell large changes alone; {SAMPLES} or more, small ones"
    longest = max((len(row.answer) for row in suite.prompts), default=0)
    if suite.max_new_tokens < longest / 8:
        yield f"max_new_tokens: {suite.max_new_tokens} may cut off an answer of {longest} characters"


def _rows(path: Path) -> tuple[list[PromptRow], list[int], list[Problem]]:
    """Prompts that can be read, the lines that they stand in, and what is wrong with the others."""
    rows, at, found = [], [], []
    try:
        for number, data in json_objects(path, "no such prompts file; `prompts:` is relative to the suite"):
            if isinstance(data, InputError):
                found.append(Problem(path, number, str(data)))
                continue
            try:
                rows.append(PromptRow.model_validate(data))
                at.append(number)
            except ValidationError as error:
                known = [*PromptRow.model_fields]
                found += [
                    Problem(path, number, said + _meant(where, said, known)) for where, said in problems_of(error)
                ]
    except InputError as error:
        found.append(Problem(path, None, str(error).removeprefix(f"{path}: ")))
    if not rows and not found:
        found.append(Problem(path, None, "holds no prompts"))
    return rows, at, found


def _line(lines: Mapping[tuple[str, ...], int], where: str) -> int | None:
    """The line of a key, or of the nearest one that leads to it. A name may itself hold dots."""
    best = max((at for at in lines if f"{where}.".startswith(".".join(at) + ".")), key=len, default=None)
    return None if best is None else lines[best]


def _key(said: str) -> str:
    """The key that a message begins with; for one about two names, the first of them."""
    where, _, rest = said.partition(": ")
    name = re.match(r"'([^']*)'", rest)
    return f"{where}.{name[1]}" if name else where


def _row_named(said: str, suite: Suite) -> int | None:
    """Which prompt a message is about: the last one of that question that it can mean."""
    if not said.startswith(("prompts: ", "answer of ")):
        return None
    named = [i for i, row in enumerate(suite.prompts) if repr(row.id) in said]
    if "occurs twice" in said:
        named = [i for i in named if f"cue {suite.prompts[i].cue!r}, hint {suite.prompts[i].hint!r}" in said]
        return named[-1] if named else None
    return named[0] if named else None


def _meant(where: str, said: str, known: list[str]) -> str:
    """A key that an unknown one may be a slip of."""
    if not said.startswith("unknown key"):
        return ""
    near = difflib.get_close_matches(where.rpartition(".")[2], known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
