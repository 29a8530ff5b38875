"""What a user asks with: prompts with an id and a text or messages; answers and other fields where there are any."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mixturelens.discovery.cues import Prompt
from mixturelens.files import json_lines
from mixturelens.records import first_problem
from mixturelens.shown import Rule
from mixturelens.suite import Chat, PromptRow, Suite
from mixturelens.types import InputError

ANY = r"\S"
"""The answer where a user gives none, as a regular expression: whatever is said counts as right."""
KNOWN = ("id", "prompt", "messages", "answer")


@dataclass(frozen=True)
class Asked:
    """Prompts as a user gives them, in their order, as rows of a suite that does not know any policy yet."""

    suite: Suite
    fields: tuple[tuple[tuple[str, str], ...], ...]
    """Of each prompt, whatever else its line says: names and values."""
    answered: bool

    def to_json(self) -> str:
        """All of it as one JSON object, which `from_data` reads back."""
        data = {"suite": self.suite.model_dump(mode="json"), "fields": self.fields, "answered": self.answered}
        return json.dumps(data, ensure_ascii=False)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Asked:
        """What `to_json` wrote, as data."""
        fields = tuple(tuple((name, value) for name, value in each) for each in data["fields"])
        return cls(Suite.model_validate(data["suite"]), fields, data["answered"])

    @property
    def rows(self) -> tuple[PromptRow, ...]:
        """The prompts as rows of a suite, in the order of the file."""
        return self.suite.prompts

    @property
    def answers(self) -> list[str | None]:
        """The answer to each prompt; None for all of them where the user gave none."""
        return [row.answer if self.answered else None for row in self.rows]

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts as cues see them: the words of the user's turns, the system's line, and the user's fields."""
        found = []
        for row, fields in zip(self.rows, self.fields, strict=True):
            system = "\n".join(text for role, text in row.turns if role == "system")
            text = "\n".join(text for role, text in row.turns if role != "system")
            found.append(Prompt(row.id, text, system, fields))
        return found


def read_prompts(path: Path, *, chat: bool = False, max_new_tokens: int = 64, samples: int = 8) -> Asked:
    """Read a file of prompts, one JSON object a line. Raises InputError naming file, line and key.

    `chat`: they go through the chat template, as `messages` always do. `samples`: completions of each side at each
    prompt, of at most `max_new_tokens` tokens.
    """
    times: Counter[str] = Counter()
    rows, fields, answered = [], [], []
    for where, data in json_lines(path, "no such file of prompts"):
        if not isinstance(data, dict):
            raise InputError(f"{where}: a prompt is an object with `id`, and `prompt` or `messages`")
        rows.append(_row(data, times, where))
        fields.append(
            tuple(
                (name, str(value))
                for name, value in data.items()
                if name not in KNOWN and isinstance(value, (str, int, float, bool))
            )
        )
        answered.append((where, "answer" in data))
    if not rows:
        raise InputError(f"{path}: holds no prompts")
    without = [where for where, has in answered if not has]
    if 0 < len(without) < len(answered):
        raise InputError(f"{without[0]} has no `answer`, but others have; give all or none")
    through = chat or any(row.messages is not None for row in rows)
    try:
        suite = Suite(
            prompts=tuple(rows),
            policies={"any": Rule(regex="")},
            answer_match="regex" if without else "contains",
            max_new_tokens=max_new_tokens,
            samples=samples,
            chat=Chat() if through else None,
        )
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from None
    return Asked(suite, tuple(fields), not without)


def _row(data: Mapping[str, Any], times: Counter[str], where: str) -> PromptRow:
    """One prompt; the same id again is the same question, asked in another way."""
    name = data.get("id")
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise InputError(f"{where}: key 'id' is missing, or no text")
    times[str(name)] += 1
    kept = {key: data[key] for key in ("prompt", "messages") if key in data}
    try:
        return PromptRow(id=str(name), cue=str(times[str(name)]), answer=data.get("answer", ANY), **kept)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error)}") from None
