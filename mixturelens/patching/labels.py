"""Words for the positions of contrasts, for people to read."""

from __future__ import annotations

from mixturelens.contrasts import Contrasts


def aligned(contrasts: Contrasts) -> bool:
    """Whether a position means the same in every question."""
    first = contrasts.rows[0]
    return all(
        len(row.clean) == len(first.clean) and row.spans == first.spans and not row.shift for row in contrasts.rows
    )


def position_labels(contrasts: Contrasts, tokenizer: object) -> tuple[str, ...]:
    """A word for each position: the token where all questions share it, both where the sides differ, else its span."""
    if not aligned(contrasts):
        return ()
    names = {at: name for name, place in contrasts.rows[0].spans.items() for at in place}
    labels = []
    for at in range(len(contrasts.rows[0].clean)):
        found = [dict.fromkeys(side[at] for side in pair) for pair in zip(*_ids(contrasts), strict=True)]
        shared = dict.fromkeys(token for tokens in found for token in tokens)
        if len(shared) <= 2 and all(list(tokens) == list(shared) for tokens in found):
            words = tokenizer.convert_ids_to_tokens(list(shared))  # type: ignore[attr-defined]
            labels.append(" / ".join(word.replace("Ġ", " ").replace("▁", " ").strip() or word for word in words))
        else:
            place = contrasts.rows[0].spans.get(names.get(at, ""), ())
            name = names.get(at, "token")
            labels.append(f"{name} {place.index(at) + 1}" if len(place) > 1 else name)
    return tuple(labels)


def _ids(contrasts: Contrasts) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [row.clean for row in contrasts.rows], [row.corrupt for row in contrasts.rows]
