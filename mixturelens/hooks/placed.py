"""Prompts as interventions need to know them: their named positions, and the same questions under other cues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixturelens.contrasts import span_positions
from mixturelens.hooks.edits import Rewrite
from mixturelens.spelling import encode_prompts
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import InputError, Intervention

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt as the interventions need to know it: its named positions, and itself under every cue."""

    ids: tuple[int, ...]
    spans: Mapping[str, tuple[int, ...]]
    under: Mapping[str, tuple[int, ...]]


def known_prompts(
    suite: Suite, rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[int, ...], PlacedPrompt]:
    """The prompts that an intervened model can be asked about, by token ids, each with its twins under other cues."""
    encoded = [tuple(ids) for ids in encode_prompts(suite, rows, tokenizer)]
    questions: dict[tuple[str, str | None], dict[str, tuple[int, ...]]] = {}
    for row, ids in zip(rows, encoded, strict=True):
        questions.setdefault((row.id, row.hint), {})[row.cue] = ids
    return {
        ids: PlacedPrompt(ids, span_positions(suite, row, tokenizer), questions[row.id, row.hint])
        for row, ids in zip(rows, encoded, strict=True)
    }


def check_position(
    each: Intervention | Rewrite, read: Sequence[str], prompts: Mapping[tuple[int, ...], PlacedPrompt]
) -> None:
    """Refuse a position that some prompt lacks, or that does not mean the same under the cues where it is read.

    Raises InputError, which names the intervention.
    """
    position = each.site.position
    for prompt in prompts.values():
        if isinstance(position, int) and not 0 <= position < len(prompt.ids):
            raise InputError(f"{each.site}: position {position} is outside the {len(prompt.ids)} tokens of a prompt")
        for cue in read:
            if cue not in prompt.under:
                raise InputError(
                    f"{each}: a question asked under {', '.join(prompt.under)} has no prompt under cue {cue!r} to "
                    "read from; give it one with the same `id`, or leave the question out"
                )
            _check_aligned(each, prompt, cue, prompts.get(prompt.under[cue]))


def _check_aligned(each: Intervention | Rewrite, prompt: PlacedPrompt, cue: str, other: PlacedPrompt | None) -> None:
    position = each.site.position
    if position in ("last", "completion"):
        return
    longer = len(prompt.under[cue]) - len(prompt.ids)
    if position is None:
        at: tuple[int, ...] = (0,)
    else:
        at = (position,) if isinstance(position, int) else prompt.spans.get(position, ())
    moved = tuple(i + longer for i in at)
    elsewhere = isinstance(position, str) and other is not None and moved != other.spans.get(position, moved)
    if min(moved, default=0) < 0 or elsewhere:
        raise InputError(
            f"{each}: the prompts of a question have {len(prompt.ids)} tokens, and {len(prompt.under[cue])} under "
            f"cue {cue!r}; they are aligned at the end, where {position or 'the first token'!r} lies elsewhere: "
            "choose `last` or `completion`, or spell both with equally many tokens"
        )
