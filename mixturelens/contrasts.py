"""Contrasts: two prompts that differ only in the cue, or only in the hint, token by token and span by span."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mixturelens.shown import Rule, wordings
from mixturelens.spelling import Ids, Speller, check_spelling, encode_prompts, prompt_text
from mixturelens.stats import half_of
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import ERR, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["cue", "hint", "checkpoint"]

SYNTAX = '"spans": {"cue": "## Question"}'
"""How a line of the prompts names the words that are its cue."""


@dataclass(frozen=True)
class Contrast:
    """One question under two conditions; the metric is read at the last token.

    `spans` names token positions of the clean prompt that mean the same in the corrupt one, `shift` further on there:
    prompts of different lengths are aligned at the end. `target` and `foil` are the next tokens that tell the two
    conditions apart: those of the clean prompt's completion and those of the corrupt one's (none: anything else).
    A cue that wraps the question has two spans, `cue` and `cue end`.
    """

    question: str
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    spans: dict[str, tuple[int, ...]]
    target: tuple[int, ...]
    foil: tuple[int, ...]

    @property
    def shift(self) -> int:
        """How many tokens longer the corrupt prompt is than the clean one; below 0 where it is shorter."""
        return len(self.corrupt) - len(self.clean)


@dataclass(frozen=True)
class Contrasts:
    """All contrasts of one kind, and what differs between their two sides."""

    kind: Kind
    clean: str
    """The cue (or hint, or checkpoint) of the clean prompts, which the source activations come from."""
    corrupt: str
    policy: str | None
    """The policy put in place, where one is."""
    rows: tuple[Contrast, ...]
    alike: int = 0
    """Questions that have no contrast here, since answers begin with the same token as what stands against them."""

    def half(self, which: Literal[0, 1]) -> Contrasts:
        """Half of the questions, drawn once and for all: choose on one half, judge on the other.

        Drawn, because suites tend to list questions in turn by kind.
        """
        return self.part(self.rows_of(which))

    def part(self, rows: Sequence[int]) -> Contrasts:
        """Some of the questions, by number."""
        return replace(self, rows=tuple(self.rows[i] for i in rows))

    def rows_of(self, which: Literal[0, 1]) -> list[int]:
        """Numbers of the questions in one half, as `half` has them."""
        return half_of(len(self.rows), which)

    def first(self, number: int) -> Contrasts:
        """The first so many questions."""
        return replace(self, rows=self.rows[:number])

    @property
    def left_out(self) -> tuple[str, ...]:
        """What is to be said of questions that have no contrast; nothing where all have one."""
        if not self.alike:
            return ()
        all_of_them = self.alike + len(self.rows)
        return (
            f"without {self.alike} of {all_of_them} questions: under {self.clean!r} their answers begin with the same "
            f"token as what policy {self.policy!r} says under {self.corrupt!r}, so that it does not tell the two apart",
        )


def cue_contrasts(
    suite: Suite, tokenizer: PreTrainedTokenizerBase, policy: str, cues: tuple[str, str], shows: str | None = None
) -> Contrasts:
    """Both cues with `policy` put in place: answering (under the clean cue) against what it does under the other.

    `cues` are the clean one and the corrupt one. `shows` is the behaviour that the policy shows under the corrupt cue,
    as measured (`behaviour.harmed.find_harm`); without it, any literal behaviour of the suite. Where it has no literal
    text, the contrast is with anything else. Raises InputError if the policy cannot be put in place or no contrast is
    left.
    """
    clean_cue, corrupt_cue = cues
    if policy not in suite.policies:
        raise InputError(f"there is no policy {policy!r}; policies are {', '.join(suite.policies)}")
    placed = wordings(suite.policies[policy])
    if not placed:
        raise InputError(f"policy {policy!r} is a rule without `force`: it cannot be put in place for a contrast")
    check_spelling(placed[0], f"policy {policy!r}", tokenizer)
    texts = [
        text
        for name, shown in (suite.behaviours or {}).items()
        if shows in (None, name) and not isinstance(shown, Rule)
        for text in wordings(shown)
    ]
    rows: list[Contrast] = []
    pairs = _pairs(suite.neutral, clean_cue, corrupt_cue)
    for clean, corrupt in pairs:
        # where task families are the cue the two answers differ, and either is an answer
        wrong = [corrupt.err] if corrupt.err and shows in (None, ERR) else []
        rests = [clean.answer, corrupt.answer, *texts, *wrong]
        sides = [Speller(suite, row, tokenizer).announced(placed[0], rests) for row in (clean, corrupt)]
        first = [[{ids[0] for ids in spellings} for spellings in side.rests] for side in sides]
        target = tuple(sorted(set().union(*(tokens for side in first for tokens in side[:2]))))
        foils = tuple(sorted(set().union(*(tokens for side in first for tokens in side[2:]))))
        if set(target) & set(foils):
            continue  # the first token cannot tell the two apart
        announced = sides[0].spellings[0], sides[1].spellings[0]
        rows.append(_contrast(suite, tokenizer, (clean, corrupt), announced, target, foils))
    if not rows:
        raise InputError(
            f"no contrast between cues {clean_cue!r} and {corrupt_cue!r}: give prompts with the same `id` under both, "
            "whose answers do not begin like another behaviour"
        )
    return Contrasts("cue", clean_cue, corrupt_cue, policy, tuple(rows), alike=len(pairs) - len(rows))


def hint_contrasts(
    suite: Suite, tokenizer: PreTrainedTokenizerBase, cue: str, clean_hint: str, corrupt_hint: str
) -> Contrasts:
    """The same prompt with two hints: the announcement of the clean hint's policy against that of the corrupt one's.

    Raises InputError where no question has both hints under the cue, or their announcements cannot be told apart.
    """
    clean_rows, corrupt_rows = (
        [r for r in suite.hinted if r.cue == cue and r.hint == h] for h in (clean_hint, corrupt_hint)
    )
    by_id = {row.id: row for row in corrupt_rows}
    both = [(row, by_id[row.id]) for row in clean_rows if row.id in by_id]
    if not both:
        raise InputError(f"no contrast between hints {clean_hint!r} and {corrupt_hint!r} under cue {cue!r}")
    target, foil = policy_tokens(suite, tokenizer, cue, clean_hint, corrupt_hint)
    rows = [_contrast(suite, tokenizer, pair, ((), ()), target, foil) for pair in both]
    return Contrasts("hint", clean_hint, corrupt_hint, None, tuple(rows))


def checkpoint_contrasts(
    suite: Suite, tokenizer: PreTrainedTokenizerBase, cue: str, policy: str, other: str
) -> Contrasts:
    """The same neutral prompt for S (clean) and R (corrupt): the announcement of `policy` against that of `other`.

    Raises InputError where the two announcements cannot be told apart.
    """
    target, foil = policy_tokens(suite, tokenizer, cue, policy, other)
    same = [row for row in suite.neutral if row.cue == cue]
    rows = tuple(_contrast(suite, tokenizer, (row, row), ((), ()), target, foil) for row in same)
    return Contrasts("checkpoint", "before", "after", None, rows)


def policy_tokens(
    suite: Suite, tokenizer: PreTrainedTokenizerBase, cue: str, policy: str, other: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First tokens of two policies' announcements behind prompts of a cue, less those that they share.

    Raises InputError for a policy without an announcement, or if one of them has no first token of its own.
    """
    sides = []
    speller = Speller(suite, next(row for row in suite.prompts if row.cue == cue), tokenizer)
    for name in (policy, other):
        texts = wordings(suite.policies[name]) if name in suite.policies else ()
        if not texts:
            raise InputError(f"policy {name!r} has no announcement to tell it by (a rule without `force`)")
        sides.append({ids[0] for text in texts for ids in speller.announced(text, ()).spellings})
    target, foil = sides[0] - sides[1], sides[1] - sides[0]
    if not target or not foil:
        raise InputError(
            f"the announcements of {policy!r} and {other!r} begin with the same tokens, which do not tell them apart: "
            "let them begin differently, or let prompts end in a turn of the assistant with what they share"
        )
    return tuple(sorted(target)), tuple(sorted(foil))


def _pairs(rows: Sequence[PromptRow], clean: str, corrupt: str) -> list[tuple[PromptRow, PromptRow]]:
    by_id = {row.id: row for row in rows if row.cue == corrupt}
    return [(row, by_id[row.id]) for row in rows if row.cue == clean and row.id in by_id]


def _contrast(
    suite: Suite,
    tokenizer: PreTrainedTokenizerBase,
    pair: tuple[PromptRow, PromptRow],
    announced: tuple[Ids, Ids],
    target: tuple[int, ...],
    foil: tuple[int, ...],
) -> Contrast:
    sides = encode_prompts(suite, pair, tokenizer)
    found = [span_positions(suite, row, tokenizer) for row in pair]
    where = f"question {pair[0].id!r}"
    shift = len(sides[1]) - len(sides[0])
    spans = {name: at for name, at in found[0].items() if tuple(i + shift for i in at) == found[1].get(name) and at}
    if not shift:  # with a shift, a cue may wrap the question, and only that both have one id says what they share
        differing = {i for i, (x, y) in enumerate(zip(*sides, strict=True)) if x != y}
        moved = next((name for name in found[0].keys() & found[1].keys() if name not in spans), None)
        if moved is not None:
            raise InputError(
                f"{where}: span {moved!r} is at tokens {found[0][moved]} and {found[1][moved]}: not aligned"
            )
        wrapped = {i for name in ("cue", "cue end") for i in spans.get(name, ())}
        if differing and not any(differing <= set(at) for at in (*spans.values(), wrapped)):
            raise InputError(
                f"{where}: its two prompts differ at tokens {sorted(differing)[:5]}, outside any one span; a contrast "
                f"differs in the cue alone, or in the hint alone (name them in each prompt's line: {SYNTAX})"
            )
    end = len(sides[0])
    spans["last"] = (end - 1,)
    if len(announced[0]) != len(announced[1]):
        raise InputError(f"{where}: the announcement has other tokens under the other cue, and cannot be aligned")
    if announced[0]:
        spans["policy"] = tuple(range(end, end + len(announced[0])))
    clean, corrupt = ((*side, *ids) for side, ids in zip(sides, announced, strict=True))
    return Contrast(pair[0].id, clean, corrupt, spans, target, foil)


def span_positions(suite: Suite, row: PromptRow, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    """Token positions of the row's spans in the encoded prompt (through the chat template, if there is one).

    Raises InputError if the tokenizer cannot say where its tokens lie in the text.
    """
    text = prompt_text(suite, row, tokenizer)
    try:
        encoded = tokenizer(text, add_special_tokens=suite.chat is None, return_offsets_mapping=True)
    except NotImplementedError:
        raise InputError("spans need a fast tokenizer (tokenizer.json): this one gives no offsets") from None
    offsets = encoded["offset_mapping"]
    positions = {}
    for name, piece in row.spans.items():
        start = _find(piece, row, text)
        if start is None:
            raise InputError(f"prompt {row.id!r}: the chat template changes span {name!r} ({piece!r})")
        end = start + len(piece)
        positions[name] = tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a)
    return positions


def _find(piece: str, row: PromptRow, text: str) -> int | None:
    """Where a piece of the prompt begins in its text, among a system prompt and names of roles."""
    after = 0
    for written in [row.text] if row.messages is None else [m.get("content", "") for m in row.messages]:
        content = written if written in text else written.strip()  # some templates trim what they are given
        start = text.find(content, after)
        if start < 0:
            return None
        if piece in content:
            return start + content.find(piece)
        after = start + len(content)
    return None


# --- what some instruments need ---------------------------------------------------------------------------------------


def check_even(shifts: Iterable[int]) -> None:
    """Raise InputError where the two prompts of a contrast differ in length: edges lie at positions of both."""
    if any(shifts):
        raise InputError(
            "the two prompts of a contrast differ in length, so that edges cannot be aligned: give both cues equally "
            "many tokens (`patch` needs no such thing)"
        )


def check_cue_span(suite: Suite, contrasts: Contrasts) -> None:
    """Raise InputError unless the cue is known to be the same tokens on both sides, equally many in all questions."""
    lengths = {len(row.spans.get("cue", ())) for row in contrasts.rows}
    if 0 not in lengths:
        if len(lengths) > 1:
            raise InputError(
                f"the cue has {min(lengths)} tokens in one question and {max(lengths)} in another: spell it with "
                "equally many in all"
            )
        return
    named = all("cue" in row.spans for row in suite.neutral)
    if named or any(row.shift for row in contrasts.rows):
        raise InputError(
            f"the cue lies at other tokens under {contrasts.clean!r} than under {contrasts.corrupt!r}: what reads it "
            "cannot be taught to read the one as the other; spell both with equally many tokens"
            f"{'' if named else f', and name it in each line of the prompts: {SYNTAX}'}"
        )
    raise InputError(
        f"an edit of the cue reader needs to know where the cue is: name it in each line of the prompts, as in {SYNTAX}"
    )


# --- words for positions ----------------------------------------------------------------------------------------------


def aligned(contrasts: Contrasts) -> bool:
    """Whether all questions have prompts of one length with the same spans: a position then means the same in each."""
    first = contrasts.rows[0]
    return all(
        len(row.clean) == len(first.clean) and row.spans == first.spans and not row.shift for row in contrasts.rows
    )


def position_labels(contrasts: Contrasts, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """A word for each position of aligned contrasts; nothing where they are not aligned.

    It is the token where all questions share one, both tokens where only the two sides differ, else the name of the
    span.
    """
    if not aligned(contrasts):
        return ()
    names = {at: name for name, place in contrasts.rows[0].spans.items() for at in place}
    labels = []
    for at in range(len(contrasts.rows[0].clean)):
        found = [dict.fromkeys(side[at] for side in pair) for pair in zip(*_ids(contrasts), strict=True)]
        shared = dict.fromkeys(token for tokens in found for token in tokens)
        if len(shared) <= 2 and all(list(tokens) == list(shared) for tokens in found):
            words = tokenizer.convert_ids_to_tokens(list(shared))
            labels.append(" / ".join(word.replace("Ġ", " ").replace("▁", " ").strip() or word for word in words))
        else:
            place = contrasts.rows[0].spans.get(names.get(at, ""), ())
            name = names.get(at, "token")
            labels.append(f"{name} {place.index(at) + 1}" if len(place) > 1 else name)
    return tuple(labels)


def _ids(contrasts: Contrasts) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [row.clean for row in contrasts.rows], [row.corrupt for row in contrasts.rows]
