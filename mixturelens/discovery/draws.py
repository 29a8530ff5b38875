"""Completions of both checkpoints, drawn once and stored: their texts, and how the two part along them.

They lie in Parquet files, one for each part of the prompts, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.logits import BATCH_BYTES
from mixturelens.behaviour.plan import DISTINCT
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.behaviour.sampled import spelled
from mixturelens.discovery.asked import Asked
from mixturelens.discovery.heads import Completion
from mixturelens.files import read_json
from mixturelens.models import Pair
from mixturelens.models.cost import Estimate, Work, announced, estimate
from mixturelens.records import write_bytes, write_text
from mixturelens.spelling import encode_prompts
from mixturelens.types import InputError, loading

PART = 16
"""Prompts whose completions are stored together."""
Say = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Called as progress(prompts done, prompts)."""


@dataclass(frozen=True)
class Draws:
    """What was drawn: `texts[i]` is a completion, and `tokens[i]` are its pieces with what lies before each.

    `along[i]` has shape (3, tokens), in bits: KL(R || S) of the next token, entropy of S, entropy of R.
    """

    drawn: tuple[Completion, ...]
    tokens: tuple[tuple[str, ...], ...]
    along: tuple[np.ndarray, ...]


def draw(pair: Pair, asked: Asked, seed: int, say: Say, progress: Progress | None = None) -> Draws:
    """Draw completions of S and R at every prompt, or read those that are stored about the same pair and prompts.

    They are stored in `completions/` in the pair's folder.

    Raises InputError where completions of something else are stored.
    """
    folder = pair.out / "completions"
    given = pair.completions
    if given is not None and len(pair.suite.prompts) < len(asked.rows):
        first = next(row for row in asked.rows if row not in pair.suite.prompts)
        raise InputError(f"--completions: prompt {first.id!r} has none of one side; give some of both at every prompt")
    said = str(pair.provenance(seed, asked.suite.model_dump_json() + (given.digest if given is not None else "")))
    key = hashlib.sha256(said.encode()).hexdigest()[:16]
    numbers = range(0, len(asked.rows), PART)
    files = [folder / f"{start // PART:04d}-{key}.parquet" for start in numbers]
    if {file.name for file in folder.glob("*.parquet")} - {file.name for file in files}:
        raise InputError(f"{folder}: completions of other checkpoints, prompts or settings; give another --out")
    write_text(folder / "asked.json", asked.to_json())
    todo = [(start, file) for start, file in zip(numbers, files, strict=True) if not file.is_file()]
    if todo:
        contexts = encode_prompts(asked.suite, asked.rows, pair.tokenizer)
        share = len(todo) / len(files)
        say(announced("completions", _takes(pair, contexts, share), ", if none ends before --max-new-tokens"))
        models = pair.models()
        scorer = Scorer(pair.ends, pair.vocabulary, pair.device)
        for number, (start, file) in enumerate(todo):
            part = prepare(pair.suite, asked.rows[start : start + PART], pair.tokenizer)
            rows = _drawn(pair, models, scorer, part, seed + 2 * start)
            _write(file, [{**row, "prompt": start + row["prompt"]} for row in rows])
            if progress is not None:
                progress(min(len(asked.rows), (number + 1) * PART), min(len(asked.rows), len(todo) * PART))
    return _read(files)


def _takes(pair: Pair, contexts: list[list[int]], share: float) -> Estimate:
    """Each prompt goes through both checkpoints, and so does each distinct completion; it is drawn by one of them."""
    sides, suite = len(pair.sides), pair.suite
    completions = sides * suite.samples * len(contexts) * suite.max_new_tokens
    along = sides * DISTINCT * completions
    tokens = share * (sides * sum(map(len, contexts)) + completions + along)
    return estimate(pair, Work(tokens=tokens, read=share * (completions + along), held=BATCH_BYTES))


def stored(out: Path) -> tuple[Asked, Draws]:
    """Read back what was asked and drawn, from the folder `out`. Raises InputError where there is nothing."""
    files = sorted((out / "completions").glob("*.parquet"))
    asked = out / "completions" / "asked.json"
    if not files or not asked.is_file():
        raise InputError(
            f"{out}: holds no completions; run `mixturelens discover --before S --after R` with --out {out}"
        )
    with loading(asked, "not what was asked; run `mixturelens discover` again"):
        given = Asked.from_data(read_json(asked, "is gone"))
    return given, _read(files)


def _drawn(pair: Pair, models: tuple[Any, ...], scorer: Scorer, prompts: Prompts, seed: int) -> list[dict[str, Any]]:
    """A row for each completion of each side: its text and tokens, and how the two sides part along it."""
    contexts, given, sides = prompts.contexts, pair.completions, tuple(pair.sides)
    limits = [pair.suite.max_new_tokens] * len(contexts)
    rows: list[dict[str, Any]] = []
    with scorer.once():
        for after, model in enumerate(models):
            if given is None:
                found = scorer.sample(model, contexts, pair.suite.samples, limits, seed + after)
            else:
                found = spelled(scorer, prompts, given, sides[after])
            owners = [contexts[int(i)] for i in found.context]
            along = scorer.steps(models[0], models[1], owners, found.tokens)
            for i, tokens, numbers in zip(found.context, found.tokens, along, strict=True):
                ended = bool(tokens) and tokens[-1] in scorer.ends
                written = tokens[:-1] if ended else tokens
                rows.append(
                    {
                        "prompt": int(i),
                        "after": bool(after),
                        "ended": ended,
                        "text": pair.tokenizer.decode(written, skip_special_tokens=True),
                        "tokens": pieces(pair.tokenizer, written),
                        "kl": numbers[0].tolist(),
                        "entropy_before": numbers[1].tolist(),
                        "entropy_after": numbers[2].tolist(),
                    }
                )
    return rows


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    import pandas

    write_bytes(file, pandas.DataFrame(rows).to_parquet(None, index=False))


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """What each token adds to the text; a character that takes several tokens comes with the last of them.

    Each token is decoded behind the few tokens before it that have text, since its own text depends on them.
    """
    found: list[str] = []
    begin = read = 0
    for end in range(1, len(tokens) + 1):
        before = tokenizer.decode(tokens[begin:read], skip_special_tokens=True)
        now = tokenizer.decode(tokens[begin:end], skip_special_tokens=True)
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            found.append("")
            continue
        found.append(now[len(before) :])
        begin, read = (read if found[-1] else begin), end
    return found


def _read(files: list[Path]) -> Draws:
    import pandas

    drawn, tokens, along = [], [], []
    for file in files:
        with loading(file, "cannot be read; delete it, and run again"):
            for row in _rows(pandas.read_parquet(file)):
                ended = bool(row["ended"])
                drawn.append(Completion(int(row["prompt"]), bool(row["after"]), row["text"].strip(), ended))
                tokens.append(tuple(row["tokens"]))
                along.append(np.array([row["kl"], row["entropy_before"], row["entropy_after"]]))
    return Draws(tuple(drawn), tuple(tokens), tuple(along))


def _rows(frame: Any) -> Iterator[dict[str, Any]]:
    return iter(frame.to_dict("records"))
