"""Grafts of one kind of token: R's weights at some positions of every sequence, S's weights at all others.

After "position-specific" grafts (arXiv 2506.20746). Whatever owns parameters works token by token (projections, norms,
embeddings), so that its output at a token can be that of R's module on the same input. Attention mixes tokens but owns
nothing: it passes on what both kinds of token give it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from mixturelens.grafting.cells import Batch, Cells
from mixturelens.grafting.readings import Readings, read
from mixturelens.types import InputError, RunError

PROMPT, POLICY, ANSWER, LAST, REST = "prompt", "policy", "answer", "last", "rest"
"""The whole prompt; the announcement; the usual completion; the prompt's last token; what no span has, without it."""
RESERVED = (PROMPT, POLICY, ANSWER, LAST, REST)
"""Spans of these names are not taken: they mean something else here."""


def placed(before_model: nn.Module, after_model: nn.Module, cells: Cells) -> dict[tuple[str, ...], Readings]:
    """What S does with R's weights at tokens of the given positions alone.

    Positions are every span of the prompts (`cue`, `hint`, `question`, ...), REST, LAST, POLICY and ANSWER, one by one;
    then every span with LAST (which reads what R writes there), all of the prompt, all behind it, and everything
    (which is R). Positions that no sequence has are left out. The routing is read off the prompt's last token and the
    announcement (but for its last token), and what a policy does off the announcement's last token and what follows.
    Both models are plain Hugging Face models, left as they
    are. Raises InputError for a pair of different parameters, or if a changed parameter belongs to no leaf module.

    Example: `placed(s, r, cells)[("last",)].log_c`.
    """
    found = masks(cells)
    sets = [(name,) for name in found if name != PROMPT]
    sets += [(name, LAST) for name in found if name not in RESERVED]
    sets += [(PROMPT,), (POLICY, ANSWER), (PROMPT, POLICY, ANSWER)]
    return {
        names: read_placed(before_model, after_model, cells, np.any([found[name] for name in names], axis=0))
        for names in sets
        if all(name in found for name in names)
    }


def masks(cells: Cells) -> dict[str, Bool[np.ndarray, "row pos"]]:
    """Position -> which tokens of each row of the cells are there, in the order of the sequence; none is empty."""
    at = np.arange(cells.ids.shape[1])
    prompt = at < cells.announced[:, None]
    policy = ~prompt & (at < cells.placed[:, None])
    last = at == cells.announced[:, None] - 1
    names = dict.fromkeys(name for spans in cells.spans for name in spans)
    spans = {name: np.zeros_like(prompt) for name in names if name not in RESERVED}
    for row, owner in enumerate(cells.prompt):
        for name, mask in spans.items():
            mask[row, list(cells.spans[owner].get(name, ()))] = True
    found = {
        **spans,
        REST: prompt & ~last & ~np.any([*spans.values(), np.zeros_like(prompt)], axis=0),
        LAST: last,
        PROMPT: prompt,
        POLICY: policy,
        ANSWER: (at >= cells.placed[:, None]) & (at < cells.lengths[:, None]),
    }
    return {name: mask for name, mask in found.items() if mask.any()}


def read_placed(
    before_model: nn.Module, after_model: nn.Module, cells: Cells, chosen: Bool[np.ndarray, "row pos"]
) -> Readings:
    """The readings of S with R's weights at the chosen tokens of each row: everywhere is R, nowhere is S, exactly."""
    tokens = torch.as_tensor(chosen, device=cells.device)
    told: list[tuple[Bool[Tensor, "sequence pos"], Tensor | None]] = []

    def tell(batch: Batch) -> None:
        told.append((tokens[batch.row, batch.place], batch.also.get("logits_to_keep")))

    with torch.no_grad(), _replaced(before_model, _changed(before_model, after_model), lambda: told[-1]):
        return read(before_model, cells, told=tell)


def _changed(before_model: nn.Module, after_model: nn.Module) -> dict[str, nn.Module]:
    """Leaf module of S by name -> its counterpart in R, where their weights differ."""
    # with duplicates: a tied parameter works in several modules
    before, after = (dict(model.named_parameters(remove_duplicate=False)) for model in (before_model, after_model))
    if {name: value.shape for name, value in before.items()} != {name: value.shape for name, value in after.items()}:
        raise InputError("the two models are not a pair: their parameters have other names or shapes")
    found = {}
    for name, value in before.items():
        if torch.equal(value, after[name]):
            continue
        where = name.rpartition(".")[0]
        if any(before_model.get_submodule(where).children()):
            raise InputError(
                f"parameter {name!r} belongs to no leaf module, so its weights cannot be R's at some tokens only"
            )
        found[where] = after_model.get_submodule(where)
    return found


@contextlib.contextmanager
def _replaced(
    model: nn.Module,
    others: Mapping[str, nn.Module],
    chosen: Callable[[], tuple[Bool[Tensor, "sequence pos"], Tensor | None]],
) -> Iterator[None]:
    """For the length of a block, modules give at the chosen tokens what the others give. Each of them must be used.

    Beside the tokens `chosen` says which of them the unembedding sees, where that is not all.
    """
    fired = dict.fromkeys(others, 0)

    def hook_of(where: str, other: nn.Module) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
            tokens, kept = chosen()
            if kept is not None and isinstance(output, Tensor) and output.ndim > 2 and output.shape[1] == len(kept):
                tokens = tokens[:, kept]
            # embeddings of positions are one row for all sequences
            fits = isinstance(output, Tensor) and output.ndim > 2 and output.shape[1] == tokens.shape[1]
            if not fits or output.shape[0] not in (1, len(tokens)):
                raise InputError(f"module {where!r} does not work token by token, so it cannot be R's at some tokens")
            fired[where] += 1
            if kwargs or len(args) != 1 or args[0].shape[:2] != tokens.shape:
                there = tokens.view(*tokens.shape, *[1] * (output.ndim - 2))
                return torch.where(there, other(*args, **kwargs), output)
            output = output.clone()
            output[tokens] = other(args[0][tokens])  # nothing but the chosen tokens goes through R's module
            return output

        return hook

    with contextlib.ExitStack() as stack:
        for where, other in others.items():
            handle = model.get_submodule(where).register_forward_hook(hook_of(where, other), with_kwargs=True)
            stack.callback(handle.remove)
        yield
    for where, times in fired.items():
        if not times:
            raise RunError(f"module {where!r} was never called, so R's weights in it were not used")
