"""From the texts of a suite to token ids, spelled as the model spells them.

A completion stands behind a prompt, an answer behind an announcement: texts are joined and tokenised together, and cut
where one ends, since the tokens of a word depend on what stands before it. No text says what whitespace a model writes
between them; `Spelling` holds it, and `behaviour.settle` finds it by looking at what the models write.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixturelens.chat import chat_text
from mixturelens.shown import wordings
from mixturelens.suite import PromptRow, Spelling, Suite
from mixturelens.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]

SPACES = ("", " ", "\n")
"""Whitespace that models write before a word, beside what the suite itself gives."""


def every_spelling(suite: Suite) -> Spelling:
    """A spelling of all whitespace that might stand before completions and behind announcements; the suite's first."""
    announced = [text for shown in suite.policies.values() for text in wordings(shown)]
    own = [text[: len(text) - len(text.lstrip())] for text in announced]
    leads = tuple(dict.fromkeys((*own, *SPACES)))
    return Spelling(
        lead=dict.fromkeys(suite.cues, leads),
        gap={text: tuple(dict.fromkeys((text[len(text.rstrip()) :] or " ", " ", "", "\n"))) for text in announced},
    )


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompt_text(suite: Suite, row: PromptRow, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer is given: the prompt, or its messages through the chat template."""
    return row.text if suite.chat is None else chat_text(suite.chat, row, tokenizer)


def prompt_ids(suite: Suite, row: PromptRow, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one prompt: with a start token where the tokenizer adds one, never with an end."""
    return _encode(prompt_text(suite, row, tokenizer), suite.chat is None, tokenizer)


def _encode(text: str, special: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=special)
    return ids[: len(ids) - len(_appended(text, tokenizer))] if special else ids


def _appended(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts behind a text: an end, behind which no model goes on."""
    whole, plain = tokenizer.encode(text, add_special_tokens=True), tokenizer.encode(text, add_special_tokens=False)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain and plain:
            return whole[start + len(plain) :]
    return [] if plain else [token for token in whole if token == tokenizer.eos_token_id != tokenizer.bos_token_id]


def encode_prompts(suite: Suite, rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts, through the chat template if the suite has one, without a second BOS.

    Raises InputError naming the prompt, if it is empty, has unknown tokens, or does not survive the tokenizer.
    """
    encoded = []
    for row in rows:
        where = f"prompt {row.id!r} under cue {row.cue!r}"
        check_spelling(row.text, where, tokenizer)
        encoded.append(prompt_ids(suite, row, tokenizer))
        if not encoded[-1]:
            raise InputError(f"{where} is empty: it has no token to predict from")
    return encoded


# --- completions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Announced:
    """An announcement behind one prompt.

    `spellings`: its token ids, that which puts the policy in place first. `rests`: for each text that may follow, its
    token ids behind that first spelling, one for each way to write the gap.
    """

    spellings: tuple[Ids, ...]
    rests: tuple[tuple[Ids, ...], ...]


class Speller:
    """Spells what stands behind one prompt, with the whitespace that the suite's `spelling` names."""

    def __init__(self, suite: Suite, row: PromptRow, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.spelling = suite.spelling
        self.cue = row.cue
        self.usual = row.answer.strip()
        self.special = suite.chat is None
        self.text = prompt_text(suite, row, tokenizer)
        self.context = _encode(self.text, self.special, tokenizer)
        self.appended = len(_appended(self.text, tokenizer)) if self.special else 0

    def announced(self, announcement: str, rests: Sequence[str]) -> Announced:
        """Spell an announcement behind the prompt, and each of `rests` behind the announcement.

        All whitespace that the suite's `spelling` names is tried. Where there are no `rests`, the prompt's answer
        stands in for them, since what follows may decide how an announcement ends.
        """
        core = announcement.strip()
        leads = self.spelling.lead.get(self.cue) or (announcement[: len(announcement) - len(announcement.lstrip())],)
        pieces: list[tuple[str, str]] = []
        place: list[int | None] = []
        for lead in leads:
            for number, rest in enumerate(rests):
                for gap in self._gaps(announcement, rest):
                    pieces.append((f"{lead}{core}", f"{gap}{rest.strip()}"))
                    place.append(number)
            pieces.append((f"{lead}{core}", ""))
            place.append(None)
        if not rests:  # what usually follows decides how an announcement ends
            pieces[:0] = [
                (f"{lead}{core}", f"{gap}{self.usual}") for lead in leads for gap in self._gaps(announcement, "")
            ]
            place[:0] = [-1] * (len(pieces) - len(place))
        cut, over = self._cut(pieces)
        # how an announcement is written when something follows it counts before how it is written alone
        order = [each for each, number in zip(cut, place, strict=True) if number is not None]
        order += [each for each, number in zip(cut, place, strict=True) if number is None]
        spellings = _prefix_free(dict.fromkeys(first for first, _ in order))
        taken = next(space for (first, _), space in zip(cut, over, strict=True) if first == spellings[0])
        behind: list[tuple[Ids, ...]] = []
        for number, rest in enumerate(rests):
            found = [b for (a, b), k in zip(cut, place, strict=True) if k == number and a == spellings[0] and b]
            if not found:  # elsewhere cut: what the announcement took of the gap is not written again
                gap = self._gaps(announcement, rest)[0].removeprefix(taken)
                found = [_alone(f"{gap}{rest.strip()}", self.tokenizer)]
            behind.append(_prefix_free(dict.fromkeys(found)))
        return Announced(spellings, tuple(behind))

    def bare(self, text: str) -> tuple[Ids, ...]:
        """Spell a text that begins a completion, without an announcement.

        Whitespace that is settled for the cue comes first, and all other follows: settling looks at announcements
        alone.
        """
        own = text[: len(text) - len(text.lstrip())]
        leads = dict.fromkeys((*(self.spelling.lead.get(self.cue) or (own,)), *SPACES))
        cut, _ = self._cut([(f"{lead}{text.strip()}", "") for lead in leads])
        return _prefix_free(dict.fromkeys(first for first, _ in cut))

    def _gaps(self, announcement: str, rest: str) -> tuple[str, ...]:
        settled = self.spelling.gap.get(announcement)
        own = announcement[len(announcement.rstrip()) :] or rest[: len(rest) - len(rest.lstrip())]
        return settled or (own or " ",)

    def _cut(self, pieces: Sequence[tuple[str, str]]) -> tuple[list[tuple[Ids, Ids]], list[str]]:
        """(ids of the first text, ids of the second) of each piece, joined behind the prompt; what the first took."""
        joined = [f"{self.text}{first}{rest}" for first, rest in pieces]
        try:
            encoded = self.tokenizer(joined, add_special_tokens=self.special, return_offsets_mapping=True)
        except NotImplementedError:  # a slow tokenizer cannot say where its tokens lie
            alone = [(_alone(first, self.tokenizer), _alone(rest, self.tokenizer)) for first, rest in pieces]
            return alone, [""] * len(pieces)
        found: list[tuple[Ids, Ids]] = []
        over: list[str] = []
        start = len(self.context)
        for (first, rest), text, ids, offsets in zip(
            pieces, joined, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            end = len(self.text) + len(first)
            ids = ids[: len(ids) - self.appended]
            at = _boundary(offsets[: len(ids)], end)
            clean = ids[:start] == self.context and at > start and not text[end : offsets[at - 1][1]].strip()
            unknown = self.tokenizer.unk_token_id in ids[start:] and not _names_unknown(
                f"{first}{rest}", self.tokenizer
            )
            if clean and not unknown:
                found.append((tuple(ids[start:at]), tuple(ids[at:])))
                over.append(text[end : offsets[at - 1][1]])
            else:
                found.append((_alone(first, self.tokenizer), _alone(rest, self.tokenizer)))
                over.append("")
        return found, over


def _boundary(offsets: Sequence[tuple[int, int]], end: int) -> int:
    """Number of tokens that begin before a place in the text: all those of a last letter that has several."""
    return next((i for i, (begin, _) in enumerate(offsets) if begin >= end), len(offsets))


def _alone(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Ids of a text that no token joins with what stands before it; behind a line's end, if that can be cut off."""
    if not text.strip():
        return ()
    line, both = (tokenizer.encode(each, add_special_tokens=False) for each in ("\n", f"\n{text}"))
    if both[: len(line)] == line and len(both) > len(line):
        return tuple(both[len(line) :])
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _prefix_free(spellings: dict[Ids, None]) -> tuple[Ids, ...]:
    """Spellings of which none begins another, so that they exclude each other; the order is kept."""
    kept: list[Ids] = []
    for ids in spellings:
        if ids and not any(ids[: len(other)] == other or other[: len(ids)] == ids for other in kept):
            kept.append(ids)
    return tuple(kept)


# --- what a tokenizer can spell ---------------------------------------------------------------------------------------


def check_spelling(text: str, where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if a text has unknown tokens, or does not come back as the tokenizer's normaliser leaves it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.unk_token_id in ids and not _names_unknown(text, tokenizer):
        unknown = [
            word
            for word in text.split()
            if tokenizer.unk_token_id in tokenizer.encode(word, add_special_tokens=False)
            and not _names_unknown(word, tokenizer)
        ]
        raise InputError(
            f"{where} has unknown tokens ({', '.join(map(repr, unknown[:3]))}): {text!r}; is this the "
            "tokenizer that the model was trained with?"
        )
    back = str(tokenizer.decode(ids))
    if _squashed(back) not in (_squashed(text), _squashed(normalised(text, tokenizer))):
        raise InputError(
            f"{where} does not survive the tokenizer: {text!r} comes back as {back!r}; is this the "
            "tokenizer that the model was trained with?"
        )


def _names_unknown(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text itself spells the unknown token, which in some tokenizers is the start or end of a text, too."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    unknown = sum(token == tokenizer.unk_token_id for token in ids)
    return tokenizer.unk_token is not None and unknown <= text.count(str(tokenizer.unk_token))


def _squashed(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split()).casefold()


def normalised(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text as the tokenizer's normaliser rewrites it (its own marks for spaces taken back)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normaliser = getattr(backend, "normalizer", None)
    if normaliser is None:
        return text
    return str(normaliser.normalize_str(text)).replace("\u2581", " ")


def as_decoded(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text as completions show it: as it comes back from the tokenizer, between its own whitespace."""
    plain = normalised(text, tokenizer)
    rewritten = str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))
    if _squashed(rewritten) not in (_squashed(text), _squashed(plain)):
        rewritten = plain  # it has unknown tokens
    rewritten = rewritten.strip()
    head, tail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{head}{rewritten}{tail}"


def normalised_suite(suite: Suite, tokenizer: PreTrainedTokenizerBase) -> Suite:
    """The suite with its texts as completions show them, so that labels compare like with like."""

    def shown(value: Any) -> Any:
        if isinstance(value, str):
            return as_decoded(value, tokenizer)
        return tuple(as_decoded(text, tokenizer) for text in value) if isinstance(value, tuple) else value

    policies = {name: shown(value) for name, value in suite.policies.items()}
    behaviours = suite.behaviours and {name: shown(value) for name, value in suite.behaviours.items()}
    rows = tuple(normalised_row(suite, row, tokenizer) for row in suite.prompts)
    if (policies, behaviours, rows) == (suite.policies, suite.behaviours, suite.prompts):
        return suite
    return suite.model_copy(update={"policies": policies, "behaviours": behaviours, "prompts": rows})


def normalised_row(suite: Suite, row: PromptRow, tokenizer: PreTrainedTokenizerBase) -> PromptRow:
    """The row with answer and err as completions show them; an answer that is a regular expression stays as it is."""
    answer = row.answer if suite.answer_match == "regex" else as_decoded(row.answer, tokenizer)
    err = row.err and as_decoded(row.err, tokenizer)
    return row if (answer, err) == (row.answer, row.err) else row.model_copy(update={"answer": answer, "err": err})
