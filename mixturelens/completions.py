"""Completions that were sampled elsewhere: by a server, say, or in an Inspect evaluation. They take the place of draws.

A file is JSON lines, {"id": "q1", "cue": "A", "side": "before", "text": "..."}, or an evaluation log of Inspect.
`prompt` names a prompt as well as `cue` does; `"ended": false` says that the text was cut off. A folder is one that
`discover` left, whose completions of the suite's prompts are taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mixturelens.files import MADE, json_lines, json_of, problem_of, read_bytes, read_json
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import InputError, Side, loading

SIDES: tuple[Side, Side] = ("before", "after")
LEAST = 2
"""Completions of each side at each prompt, at least: what few samples add to bits is corrected from two on."""


class GivenText(NamedTuple):
    """A completion, and whether it came to its end."""

    text: str
    ended: bool


@dataclass(frozen=True)
class GivenCompletions:
    """Completions of both sides at every prompt of a suite, equally many at each, by (id, cue)."""

    texts: Mapping[Side, Mapping[tuple[str, str], tuple[GivenText, ...]]]
    notes: tuple[str, ...]
    """What was left out, in words."""

    @property
    def digest(self) -> str:
        """A hash of all texts, for what is made from them."""
        said = [[side, *key, *map(list, texts)] for side, of in self.texts.items() for key, texts in of.items()]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def with_completions(suite: Suite, files: Sequence[str]) -> tuple[Suite, GivenCompletions | None]:
    """The suite as far as files of completions cover it, and the completions of its prompts.

    A file is FILE, `before=FILE` or `after=FILE`, which says whose completions they are where the file does not. The
    suite keeps the questions of which every prompt has completions of both sides, and asks for as many `samples` as the
    prompt with the fewest has. Raises InputError naming file and line for what cannot be read or is no prompt of the
    suite, and for a suite of literal texts, where nothing is sampled: a folder is then None.
    """
    named = f"--completions {', '.join(files)}"
    if suite.literal:
        if all(Path(given).is_dir() for given in files):
            return suite, None  # what `discover` left is given with whatever suite it proposed
        raise InputError(
            f"{named}: the suite's policies, behaviours and answers are literal texts, whose probabilities are "
            "computed exactly; completions take the place of samples, which rules need"
        )
    found: dict[Side, dict[tuple[str, str], list[GivenText]]] = {side: {} for side in SIDES}
    finder = _Finder(suite)
    for given in files:
        before, equals, rest = given.partition("=")
        side: Side | None = next((each for each in SIDES if equals and each == before), None)
        path = Path(rest if side else given)
        if path.is_dir():
            for row, of, text in _stored(path, suite):
                if side in (None, of):
                    found[of].setdefault((row.id, row.cue), []).append(text)
            continue
        for line in _lines(path, side):
            row = finder.row(line)
            found[line.side].setdefault((row.id, row.cue), []).append(GivenText(line.text, line.ended))
    for side in SIDES:
        if not found[side]:
            raise InputError(f"{named}: none of them is of the checkpoint {side}; give both sides")
    lacking = [row for row in suite.neutral if any((row.id, row.cue) not in found[side] for side in SIDES)]
    out = {row.id for row in lacking}
    kept = [row for row in suite.neutral if row.id not in out]
    if not kept:
        raise InputError(
            f"{named}: no question has completions of both sides at all its prompts; first lacking: prompt "
            f"{lacking[0].id!r} under cue {lacking[0].cue!r}"
        )
    least = min(kept, key=lambda row: min(len(found[side][row.id, row.cue]) for side in SIDES))
    number = min(len(found[side][least.id, least.cue]) for side in SIDES)
    if number < LEAST:
        raise InputError(
            f"{named}: prompt {least.id!r} under cue {least.cue!r} has {number} of one side, and {LEAST} are "
            "needed of each"
        )
    notes = [f"completions were given, {number} of each side at each prompt; what is put in place is sampled here"]
    unused = sum(len(each) - number for of in found.values() for key, each in of.items() if key[0] not in out)
    if unused:
        notes.append(f"{unused} given completions are not used: prompt {least.id!r} under {least.cue!r} has {number}")
    if out:
        notes.append(f"{len(out)} questions are left out: some of their prompts have no completions ({min(out)}, ...)")
    rows = tuple(row for row in suite.prompts if row.id not in out)
    texts: dict[Side, dict[tuple[str, str], tuple[GivenText, ...]]] = {
        side: {(row.id, row.cue): tuple(of[row.id, row.cue][:number]) for row in kept} for side, of in found.items()
    }
    return suite.model_copy(update={"prompts": rows, "samples": number}), GivenCompletions(texts, tuple(notes))


class _Line(NamedTuple):
    """One completion as a file says it, and where that stands."""

    where: str
    id: str
    cue: str | None
    prompt: str | None
    side: Side
    text: str
    ended: bool


class _Finder:
    """Finds the prompt of the suite that a completion belongs to."""

    def __init__(self, suite: Suite) -> None:
        self.rows: dict[str, list[PromptRow]] = {}
        for row in suite.neutral:
            self.rows.setdefault(row.id, []).append(row)

    def row(self, line: _Line) -> PromptRow:
        rows = self.rows.get(line.id)
        if rows is None:
            raise InputError(f"{line.where}: the suite has no prompt {line.id!r} (without a hint)")
        for name, wanted in (("cue", line.cue), ("prompt", line.prompt)):
            if wanted is not None:
                some = [row for row in rows if wanted == (row.cue if name == "cue" else row.text)]
                if not some:
                    shown = wanted if len(wanted) < 60 else f"{wanted[:57]}..."
                    raise InputError(f"{line.where}: question {line.id!r} has no {name} {shown!r} in the suite")
                rows = some
        if len(rows) > 1:
            raise InputError(
                f"{line.where}: question {line.id!r} has {len(rows)} prompts; say which by `cue` or `prompt`"
            )
        return rows[0]


def _lines(path: Path, side: Side | None) -> Iterator[_Line]:
    log = _inspect_log(path)
    if log is not None:
        yield from _samples(path, log, side)
        return
    for where, data in json_lines(path, "no such file of completions"):
        if not isinstance(data, dict):
            raise InputError(f"{where}: a completion is an object with `id`, `cue` or `prompt`, `side` and `text`")
        yield _line(where, data, side)


def _stored(folder: Path, suite: Suite) -> list[tuple[PromptRow, Side, GivenText]]:
    """Completions that `discover` stored in a folder, at prompts that the suite has as well, as it asks them."""
    import pandas

    folder = folder / "completions" if (folder / "completions").is_dir() else folder
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise InputError(f"--completions {folder}: no folder that `discover` left; give that folder, or a file")
    rows = {row.turns: row for row in suite.neutral}
    with loading(f"--completions {folder}", "not as `discover` leaves it; run that again"):
        asked = read_json(folder / "asked.json", "is gone; run `discover` again")["suite"]["prompts"]
        at = [rows.get(PromptRow.model_validate(each).turns) for each in asked]
        frames = [pandas.read_parquet(file, columns=["prompt", "after", "text", "ended"]) for file in files]
        return [
            (row, SIDES[bool(after)], GivenText(str(text), bool(ended)))
            for prompt, after, text, ended in pandas.concat(frames).itertuples(index=False)
            if (row := at[prompt]) is not None
        ]


def _line(where: str, data: Mapping[str, Any], side: Side | None) -> _Line:
    texts: dict[str, str | None] = {}
    for name in ("id", "cue", "prompt", "text"):
        value = data.get(name)
        if name == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) and (value is not None or name in ("id", "text")):
            raise InputError(f"{where}: key {name!r} is missing, or no text")
        texts[name] = value
    own = data.get("side", side)
    if own not in SIDES:
        said = "key 'side' is missing" if own is None else f"side is {own!r}"
        raise InputError(f"{where}: {said}; give before or after, there or as --completions before=FILE")
    if side is not None and own != side:
        raise InputError(f"{where}: side is {own!r}, in a file given as {side}=")
    ended = data.get("ended", True)
    if not isinstance(ended, bool):
        raise InputError(f"{where}: ended is {ended!r}, where true or false is needed")
    return _Line(where, str(texts["id"]), texts["cue"], texts["prompt"], own, str(texts["text"]), ended)


# --- logs of Inspect --------------------------------------------------------------------------------------------------


def _inspect_log(path: Path) -> dict[str, Any] | None:
    """The log of an Inspect evaluation, where a file is one."""
    content = read_bytes(path, "no such file of completions", MADE)
    if content.startswith(b"PK\x03\x04"):
        raise InputError(f"{path}: an .eval file; write it as JSON first: inspect log convert --to json")
    try:
        data = json_of(content.decode("utf-8-sig"), foreign=True)
    except ValueError:
        return None  # JSON lines; whatever is wrong with them is said line by line
    if not isinstance(data, dict) or "eval" not in data:
        return None
    if not isinstance(data.get("samples"), list):
        raise InputError(f"{path}: an evaluation log of Inspect without samples (status {data.get('status')!r})")
    return data


def _samples(path: Path, log: Mapping[str, Any], side: Side | None) -> Iterator[_Line]:
    """Completions of a log; samples that failed have none."""
    for number, sample in enumerate(log["samples"], start=1):
        where = f"{path}: sample {number}"
        try:
            metadata = sample.get("metadata") or {}
            own = {name: metadata[name] for name in ("cue", "side") if name in metadata}
            sample_id = metadata.get("id", sample.get("id"))
            choices = (sample.get("output") or {}).get("choices") or ()
            if sample.get("error") is not None or not choices:
                continue
            text, asked = _text(choices[0]["message"]["content"]), sample.get("input")
            if not isinstance(asked, str):
                asked = "\n".join(_text(each["content"]) for each in asked)
            ended = choices[0].get("stop_reason") not in ("max_tokens", "model_length")
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{where}: not as Inspect writes it ({type(error).__name__}: {error})") from None
        half = problem_of(text, "output")
        if half is not None:
            raise InputError(f"{where}: {half}")
        data = {"id": sample_id, "text": text, "ended": ended, **own}
        yield _line(where, data if "cue" in own else {**data, "prompt": asked}, side)


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The words of a message, whose content is a text or parts of several kinds."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
