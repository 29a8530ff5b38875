"""All that is wrong with a suite, line by line, and what would mislead though it is not wrong."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from mixturelens.files import json_objects, yaml_lines
from mixturelens.records import problems_of
from mixturelens.shown import Rule, wordings
from mixturelens.suite import PromptRow, Suite, suite_mapping
from mixturelens.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW = 8
"""Questions under which no verdict is given."""
SAMPLES = 16
"""Completions a prompt that tell small changes, where what is measured is sampled."""
FAR_FEWER = 4
"""Times fewer questions under a cue than under another, from which its name may be a slip."""
NAMED = 3
"""Questions that one kind of note names, at most; the others are counted."""
NEEDED = ("policies", "behaviours", "chat", "strip")
"""Keys without which others would be wrong that are right."""


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
        known, wrong = [*Suite.model_fields], [*problems_of(error)]
        for where, said in wrong:
            found.append(Problem(path, _line(lines, where), said + _meant(where, said, known)))
        suite = _without({**data, "prompts": rows}, wrong, context)
        if suite is None:
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
    if not rules and suite.table is None and not suite.literal:
        yield _sampled(suite)
    for name in rules:
        shown = suite.policies[name]
        if isinstance(shown, Rule) and shown.force is None:
            yield f"policies.{name}: without `force` it cannot be put in place, and its specialist is not measured"
    if not suite.literal and suite.samples < SAMPLES:
        yield f"samples: {suite.samples} completions a prompt tell large changes alone; {SAMPLES} or more, small ones"
    longest = max((len(row.answer) for row in suite.prompts), default=0)
    if suite.max_new_tokens < longest / 8:
        yield f"max_new_tokens: {suite.max_new_tokens} may cut off an answer of {longest} characters"


def uneven(path: Path) -> Iterator[Problem]:
    """Questions that lack a prompt which most have, and cues that few questions have: what may be a slip, by line.

    `path` is that of a suite without problems, as `check_suite_file` takes it.
    """
    path = path / "suite.yaml" if path.is_dir() else path
    prompts = path.parent / suite_mapping(path)["prompts"]
    rows, at, _ = _rows(prompts)
    asked: dict[str, dict[str, int]] = {}
    for row, line in zip(rows, at, strict=True):
        if row.hint is None:
            asked.setdefault(row.id, {})[row.cue] = line
    numbers = Counter(cue for cues in asked.values() for cue in cues)
    most, many = numbers.most_common(1)[0]
    rare = [cue for cue, number in numbers.items() if number * FAR_FEWER < many]
    for cue in rare:
        near = difflib.get_close_matches(cue, [other for other in numbers if other not in rare], n=1)
        line = min(cues[cue] for cues in asked.values() if cue in cues)
        said = f"cue {cue!r} has {_counted(numbers[cue])}, where {most!r} has {many}"
        yield Problem(prompts, line, said + (f"; did you mean {near[0]!r}?" if near else ""))
    usual, _ = max(Counter(map(frozenset, asked.values())).items(), key=lambda item: (item[1], len(item[0])))
    lacking = [
        Problem(prompts, min(cues.values()), f"question {name!r} has no prompt under {', '.join(map(repr, lost))}")
        for name, cues in asked.items()
        if len(usual) > 1 and (lost := sorted(usual - cues.keys())) and not cues.keys() & {*rare}
    ]
    for problem in lacking[:NAMED]:
        yield problem._replace(said=f"{problem.said}, as most have: contrasts of cues leave it out")
    if len(lacking) > NAMED:
        yield Problem(prompts, None, f"and {len(lacking) - NAMED} more that lack a prompt")


def pitfalls_of_tokens(suite: Suite, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What patch, circuit and repair will not measure of this suite as the tokenizer spells it; a sentence each.

    Which cue was harmed, and which policy is put in place, only a measurement says: each that may be is looked at.
    """
    from mixturelens.contrasts import check_cue_span, check_even, cue_contrasts, policy_tokens

    placed = [name for name, shown in suite.policies.items() if wordings(shown)]
    clean = suite.trained_cue or suite.cues[0]
    asked = {cue: {row.id for row in suite.neutral if row.cue == cue} for cue in suite.cues}
    found: dict[str, dict[str, str]] = {}  # what will not be measured -> cue -> why
    for cue, policy in itertools.product(suite.cues, placed):
        if cue == clean or not asked[cue] & asked[clean]:
            continue
        try:
            contrasts = cue_contrasts(suite, tokenizer, policy, (clean, cue))
        except InputError as error:
            found.setdefault("no patch, circuit or repair", {}).setdefault(cue, f"with {policy!r} in place: {error}")
            continue
        for line in contrasts.left_out:
            found.setdefault("fewer questions in patch and circuit", {}).setdefault(cue, line)
        try:
            check_even(row.shift for row in contrasts.rows)
        except InputError as error:
            row = next(row for row in contrasts.rows if row.shift)
            (last,) = row.spans["last"]
            lengths = f"question {row.question!r} has {last + 1} tokens and {last + 1 + row.shift}"
            found.setdefault("no circuit", {}).setdefault(cue, f"{error}; {lengths}")
        try:
            check_cue_span(suite, contrasts)
        except InputError as error:
            found.setdefault("no weight edit in repair", {}).setdefault(cue, str(error))
    for what, cues in found.items():
        cue, *others = cues
        also = f" (so with {', '.join(map(repr, others))})" if others else ""
        yield f"{what} between cues {clean!r} and {cue!r}{also}: {cues[cue]}"
    same: dict[str, None] = {}
    for cue, (one, other) in itertools.product(suite.cues, itertools.combinations(placed, 2)):
        try:
            policy_tokens(suite, tokenizer, cue, one, other)
        except InputError as error:
            same[f"no S patched into R, and no reroute in repair: {error}"] = None
    yield from same


def _sampled(suite: Suite) -> str:
    """Why a suite whose policies are literal texts is sampled all the same, and what would make it exact."""
    rules = [f"behaviours.{name}" for name, shown in (suite.behaviours or {}).items() if isinstance(shown, Rule)]
    why = {
        f"`answer_match: {suite.answer_match}`": "`answer_match: exact` (and whole answers)",
        "`strip`": "no `strip`",
        f"the rule of {', '.join(rules)}": "literal texts as behaviours",
    }
    there = (suite.answer_match != "exact", suite.strip is not None, bool(rules))
    reasons = [reason for reason, holds in zip(why, there, strict=True) if holds]
    return (
        f"sampled, not exact: policies are literal texts, but because of {' and '.join(reasons)} all is measured from "
        f"`samples: {suite.samples}` completions a prompt; exact with {' and '.join(why[each] for each in reasons)}"
    )


def _counted(number: int) -> str:
    return f"{number} question{'' if number == 1 else 's'}"


def _without(data: Mapping[str, Any], wrong: list[tuple[str, str]], context: list[str]) -> Suite | None:
    """The suite without its wrong keys, or with those that they are slips of, so that the rest is looked at, too.

    What is wrong with that is added to `context`. None where too much hangs on a key that is wrong.
    """
    known, kept = [*Suite.model_fields], dict(data)
    for where, _ in wrong:
        key = where.partition(".")[0]
        near = [] if key in known else difflib.get_close_matches(key, known, n=1)
        if key in NEEDED or key not in kept:
            return None
        value = kept.pop(key)
        if near and near[0] not in kept:
            kept[near[0]] = value
    try:
        return Suite.model_validate(kept, context=context)
    except ValidationError:
        return None


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
