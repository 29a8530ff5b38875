"""Behaviour suites: prompts, answers, and the rules by which completions show policy and behaviour.

The file format is the contract of the project (docs/suites.md). A suite knows nothing of models and
tokenizers: `spelling` makes token ids of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mixturelens.files import dump_yaml, json_lines, read_yaml
from mixturelens.records import first_problem, write_text
from mixturelens.rules import compiled, search, without
from mixturelens.shown import Policy, Regex, Row, Rule, Shown, find_in, overlaps, stands_in, wordings
from mixturelens.types import ANSWER, ERR, OTHER, Frozen, InputError, PolicyTable


class PromptRow(Frozen):
    """One line of prompts.jsonl. Rows with the same id are the same question under another cue or hint."""

    id: str
    cue: str
    hint: str | None = None
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    answer: str
    err: str | None = None
    spans: dict[str, str] = {}

    @model_validator(mode="after")
    def _checked(self) -> PromptRow:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        for number, message in enumerate(self.messages or ()):
            for key in ("role", "content"):
                if key not in message:
                    known = ", ".join(map(repr, message)) or "nothing"
                    raise ValueError(f"messages.{number}: has {known} and no {key!r}; give `role` and `content`")
            if not message["role"].strip():
                raise ValueError(f"messages.{number}.role: is empty; say who speaks (user, assistant, system)")
        if self.messages is not None and not self.messages:
            raise ValueError("messages: empty; give at least one message")
        text = self.text
        for name, piece in self.spans.items():
            if piece not in text:
                raise ValueError(f"spans.{name}: {piece!r} does not occur in the prompt")
        return self

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """(role, text) of each turn; a prompt without messages is one turn of the user."""
        said = self.messages or ({"role": "user", "content": self.text},)
        return tuple((turn["role"], turn["content"]) for turn in said)

    @property
    def text(self) -> str:
        """The words of the prompt, without any chat template."""
        if self.prompt is not None:
            return self.prompt
        return "\n".join(message.get("content", "") for message in self.messages or ())


CUES = 1000
"""Cues of a suite, at most."""


class Spelling(Frozen):
    """Whitespace as the models write it, most usual first: before a completion, and behind each announcement.

    What it does not name is spelled as the suite writes it: an announcement as it stands, and what follows it behind a
    space, unless either brings its own.
    """

    lead: dict[str, tuple[str, ...]] = {}
    """Cue -> what stands before the first word of a completion."""
    gap: dict[str, tuple[str, ...]] = {}
    """Announcement -> what stands between it and the rest."""


_OURS = ("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "chat_template")
"""Arguments of a chat template that are not the suite's to give."""


class Chat(Frozen):
    """How prompts go through the tokenizer's chat template; a suite without it gives them to the tokenizer as they are.

    A last message of the assistant is continued. `template_of`: whose template is used, where those of S and R differ.
    """

    template_kwargs: dict[str, Any] = {}
    system: str | None = None
    template_of: Literal["before", "after"] = "before"

    @field_validator("template_kwargs")
    @classmethod
    def _free(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in _OURS or not name.isidentifier():
                raise ValueError(f"{name!r} is not for the suite to give ({', '.join(_OURS)} are set by mixturelens)")
        return value


class Strip(Frozen):
    """What is cut out of a completion before it is judged: the thought of a thinking model, say."""

    regex: Regex


@dataclass(frozen=True)
class Label:
    """What a completion did: its policy, the number of its wording within that, its behaviour, and the rest of the
    text.

    `behaviour` is None where a suite names none. `policy` is None where policies announce nothing: it is then no
    function of the completion.
    """

    policy: str | None
    wording: int
    behaviour: str | None
    rest: str


class Suite(Frozen):
    """Prompts and the rules that label completions; see docs/suites.md for the file.

    >>> row = PromptRow(id="q", cue="A", prompt="2 + 2 =", answer="4")
    >>> suite = Suite(prompts=(row,), policies={"a": "[a]", "b": "[b]"}, behaviours={"refuse": "sorry"})
    >>> suite.label("[a] sorry sorry", row)
    Label(policy='a', wording=0, behaviour='refuse', rest='sorry sorry')
    """

    prompts: tuple[PromptRow, ...] = Field(min_length=1)
    policies: dict[str, Policy] = Field(min_length=1)
    behaviours: dict[str, Shown] | None = None
    trained_cue: str | None = None
    answer_match: Literal["exact", "contains", "regex"] = "exact"
    """`contains`: as words of their own, so that `4` is not in `14`."""
    max_new_tokens: int = Field(default=16, ge=1, le=100_000, strict=True)
    samples: int = Field(default=8, ge=1, le=10_000, strict=True)
    chat: Chat | None = None
    strip: Strip | None = None
    ends: Literal["either", "before", "after"] | tuple[str, ...] = "either"
    """What ends a completion, where S and R name different tokens: those of either, of one side, or these texts."""
    spelling: Spelling = Spelling()
    """Which whitespace the models write; found by looking at them where it is not given."""
    origin: Literal["discovered"] | None = None
    """Who says what the policies are: `mixturelens discover`, or (absent) a person."""

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Suite:
        found = self._problems()
        if isinstance(info.context, list):  # whoever gives a list wants all of them
            info.context.extend(found)
        else:
            for problem in found:
                raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        """What is wrong with fields that are each right alone: where, and what to do."""
        if OTHER in self.policies:
            yield f"policies: {OTHER!r} is kept for completions of no known policy; rename it"
        if self.behaviours and ANSWER in self.behaviours:
            yield f"behaviours: {ANSWER!r} is what matches no other behaviour; leave it out"
        yield from overlaps("policies", {name: s for name, s in self.policies.items() if not isinstance(s, Row)})
        yield from overlaps("behaviours", self.behaviours or {})
        if self.trained_cue is not None and self.trained_cue not in self.cues:
            yield f"trained_cue: no prompt has cue {self.trained_cue!r}"
        if len(self.cues) > CUES:
            yield f"prompts: {len(self.cues)} cues; a cue is what many prompts share, and {CUES} are read at most"
        if not self.neutral:
            yield "prompts: every prompt has a hint; behaviour is measured on prompts without one"
            return
        yield from self._problems_of_rows()
        for name, shown in self.policies.items():
            if isinstance(shown, Rule) and shown.force is not None:
                try:
                    found = self.label(shown.force, self.neutral[0]).policy
                except InputError as error:
                    yield f"policies.{name}.force: {error}"
                    continue
                if found != name:
                    yield f"policies.{name}.force: {shown.force!r} shows policy {found!r}, not {name!r}"
        yield from self._problems_of_prompts()

    def _problems_of_prompts(self) -> Iterator[str]:
        for row in self.prompts:
            if row.err is not None and ERR not in (self.behaviours or {}):
                for name, shown in (self.behaviours or {}).items():
                    for text in () if isinstance(shown, Rule) else wordings(shown):
                        if row.err.startswith(text.strip()) or text.strip().startswith(row.err):
                            yield f"prompts: the `err` of {row.id!r} overlaps with behaviour {name!r}"
            if not row.answer.strip():
                yield f"prompts: the answer of {row.id!r} is empty"
        without = [row.id for row in self.prompts if row.err is None]
        if 0 < len(without) < len(self.prompts):
            yield f"prompts: {without[0]!r} has no `err`, but others have; give it to all or to none"
        seen: set[tuple[str, str, str | None]] = set()
        for row in self.prompts:
            key = (row.id, row.cue, row.hint)
            if key in seen:
                yield f"prompts: question {row.id!r} occurs twice under cue {row.cue!r}, hint {row.hint!r}"
            seen.add(key)
            if row.messages is not None and self.chat is None:
                yield f"prompts: {row.id!r} has messages, but the suite has no `chat:`; add `chat: {{}}`"
            if self.answer_match == "regex":
                try:
                    compiled(row.answer)
                except ValueError as error:
                    yield f"answer of {row.id!r}: {error}"

    def _problems_of_rows(self) -> Iterator[str]:
        rows = {name: shown.table for name, shown in self.policies.items() if isinstance(shown, Row)}
        if not rows:
            return
        for name in self.policies:
            if name not in rows:
                yield (
                    f"policies: {name!r} announces itself, and {next(iter(rows))!r} has only its `table`; give all "
                    "policies by their rows of the policy table, or none"
                )
        if len(self.behaviour_names) < 2:
            yield "behaviours: policies given by their `table` show in behaviours alone; name them"
        for name, table in rows.items():
            for cue in self.cues:
                if cue not in table:
                    yield f"policies.{name}.table: cue {cue!r} is missing"
            for cue, behaviour in table.items():
                if cue not in self.cues:
                    yield f"policies.{name}.table: no prompt has cue {cue!r}"
                if behaviour not in self.behaviour_names:
                    known = ", ".join(self.behaviour_names)
                    yield f"policies.{name}.table.{cue}: {behaviour!r} is no behaviour of the suite ({known})"

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced, as in pydantic, without what had been derived from the old ones."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("cues", "neutral", "hinted", "behaviour_names"):  # what was derived from the old fields
            vars(copy).pop(name, None)
        return copy

    @cached_property
    def cues(self) -> tuple[str, ...]:
        """The cues, in the order in which the prompts name them first."""
        return tuple(dict.fromkeys(row.cue for row in self.prompts))

    @cached_property
    def neutral(self) -> tuple[PromptRow, ...]:
        """Prompts without a hint: all that behaviour is measured on."""
        return tuple(row for row in self.prompts if row.hint is None)

    @cached_property
    def hinted(self) -> tuple[PromptRow, ...]:
        """Prompts with a hint."""
        return tuple(row for row in self.prompts if row.hint is not None)

    @cached_property
    def behaviour_names(self) -> tuple[str, ...]:
        """Behaviours in the order of the arrays; `answer` is the last. Empty where the suite names none."""
        if self.behaviours is None:
            return ()
        err = (ERR,) if ERR not in self.behaviours and any(row.err is not None for row in self.prompts) else ()
        return (*self.behaviours, *err, ANSWER)

    @property
    def table(self) -> PolicyTable | None:
        """The policy table, where policies are given by their rows of it; None where they announce themselves."""
        rows = {name: shown.table for name, shown in self.policies.items() if isinstance(shown, Row)}
        return rows or None

    @property
    def literal(self) -> bool:
        """True if policy, behaviour and correctness are all literal texts, so that probabilities are exact."""
        shown = [*self.policies.values(), *(self.behaviours or {}).values()]
        return self.answer_match == "exact" and self.strip is None and not any(isinstance(s, Rule) for s in shown)

    def label(self, completion: str, row: PromptRow) -> Label:
        """Policy and behaviour of a decoded completion; the first policy that matches wins, else `other`.

        Where policies announce nothing, all of the completion is judged.
        """
        text = (completion if self.strip is None else without(self.strip.regex, completion)).strip()
        for policy, shown in self.policies.items():
            if isinstance(shown, Row):
                return Label(None, 0, self._behaviour(text, row), text)
            found = find_in(shown, text)
            if found is not None:
                wording, rest = found
                return Label(policy, wording, self._behaviour(rest, row), rest)
        return Label(OTHER, 0, None, text)

    def _behaviour(self, rest: str, row: PromptRow) -> str | None:
        if self.behaviours is None:
            return None
        for behaviour, shown in self.behaviours.items():
            if find_in(shown, rest) is not None:
                return behaviour
        if ERR in self.behaviour_names and row.err is not None and rest == row.err.strip():
            return ERR
        return ANSWER

    def correct(self, rest: str, row: PromptRow) -> bool:
        """Whether what follows the announcement is the answer."""
        if self.answer_match == "exact":
            return rest.strip() == row.answer.strip()
        if self.answer_match == "contains":
            return stands_in(row.answer.strip(), rest)
        return search(row.answer, rest) is not None

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: Path, prompts_name: str = "prompts.jsonl") -> None:
        """Write suite.yaml and its prompts beside it."""
        for file, text in self.files(path, prompts_name).items():
            write_text(file, text)

    def files(self, path: Path, prompts_name: str = "prompts.jsonl") -> dict[Path, str]:
        """What `save` writes, by file, the prompts first."""
        lines = [
            json.dumps(row.model_dump(exclude_none=True, exclude_defaults=True), ensure_ascii=False)
            for row in self.prompts
        ]
        rest = self.model_dump(mode="json", exclude={"prompts"}, exclude_none=True)
        rest = {key: value for key, value in rest.items() if key not in _DERIVED or value != _default(key)}
        text = dump_yaml({"prompts": prompts_name, **rest})
        return {path.parent / prompts_name: "\n".join(lines) + "\n", path: text}


_DERIVED = ("ends", "spelling", "origin")
"""Keys that a file holds only where they say something."""


def _default(key: str) -> object:
    default = Suite.model_fields[key].default
    return default.model_dump(mode="json") if isinstance(default, Frozen) else default


def load_suite(path: Path) -> Suite:
    """Read a suite and its prompts. Raises InputError that names the file, the line or key, and what to do."""
    path = path / "suite.yaml" if path.is_dir() else path
    data = suite_mapping(path)
    rows = _load_prompts(path.parent / data["prompts"])
    try:
        return Suite.model_validate({**data, "prompts": rows})
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from None


def suite_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a suite's file is. Raises InputError that names the file and what is wrong with it."""
    data = read_yaml(path, "no such suite file")
    if not isinstance(data, dict) or not isinstance(data.get("prompts"), str):
        raise InputError(f"{path}: a suite is a mapping with `prompts: FILE.jsonl` and `policies:`")
    return data


def _load_prompts(path: Path) -> tuple[PromptRow, ...]:
    rows = []
    for where, data in json_lines(path, "no such prompts file; `prompts:` is relative to the suite"):
        try:
            rows.append(PromptRow.model_validate(data))
        except ValidationError as error:
            raise InputError(f"{where}: {first_problem(error)}") from None
    if not rows:
        raise InputError(f"{path}: holds no prompts")
    return tuple(rows)


def literal_texts(suite: Suite) -> tuple[str, ...]:
    """Every literal of a suite, once: announcements, behaviours, answers."""
    shown = [*suite.policies.values(), *(suite.behaviours or {}).values()]
    texts = [text for each in shown for text in wordings(each)]
    texts += [text for row in suite.prompts for text in (row.answer, row.err) if text]
    return tuple(dict.fromkeys(texts))
