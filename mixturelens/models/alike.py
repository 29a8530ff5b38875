"""What two checkpoints must have in common to be a pair, and what sets them apart, from their configs and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.models.load import load_config, skeleton
from mixturelens.models.source import Source, content_of, weight_files
from mixturelens.shown import wordings
from mixturelens.spelling import Speller
from mixturelens.suite import Suite
from mixturelens.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SURPLUS = 1e-3
"""Probability on tokens that only one side has, from which its surplus rows are no padding."""
GUARDED = 8
"""Prompts on which that is looked at."""

_NO_MATTER = {
    "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "vocab_size", "architectures", "attn_implementation", "initializer_range", "tie_word_embeddings",
    "max_position_embeddings", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "return_dict",
    "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "model_type", "task_specific_params",
}  # fmt: skip
"""Settings of a config that change nothing in what a model computes, or that are compared in another way."""


class Shapes(NamedTuple):
    """What the weights of a checkpoint look like."""

    weights: dict[str, tuple[object, ...]]
    """Name -> shape, rows of the vocabulary left open."""
    rows: int
    """Of the vocabulary."""


def shapes_of(source: Source) -> Shapes:
    """Shapes of a checkpoint's weights, from its config alone."""
    model: Any = skeleton(source)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    words = {id(embedding), *(() if head is None else map(id, head.parameters()))}
    weights: dict[str, tuple[object, ...]] = {
        name: tuple(size if k or id(tensor) not in words else "rows" for k, size in enumerate(tensor.shape))
        for name, tensor in model.named_parameters(remove_duplicate=False)
    }
    return Shapes(weights, int(embedding.shape[0]))


def positions_of(source: Source) -> int | None:
    """Tokens that fit into a model's context; None where its config names no bound."""
    config = load_config(source).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if not isinstance(most, int):
        return None
    return int(max(most, original * factor)) if original and factor else most


def config_differences(before: Source, after: Source) -> tuple[str, ...]:
    """Settings of the two configs that change what the same weights compute, one phrase each."""
    left, right = (load_config(source).to_dict() for source in (before, after))
    return tuple(
        f"{key} ({_short(left.get(key))} before, {_short(right.get(key))} after)"
        for key in sorted(left.keys() | right.keys())
        if key.strip("_") not in _NO_MATTER and "drop" not in key and left.get(key) != right.get(key)
    )


def same_weights(before: Source, after: Source) -> bool:
    """Whether the files of the weights hold the same, byte by byte."""
    left, right = ([content_of(file) for file in weight_files(source.weights)] for source in (before, after))
    return left == right


def check_shapes(before: Source, after: Source, left: Shapes, right: Shapes) -> None:
    """Raise InputError for two checkpoints of another kind, or with weights of another shape."""
    where = f"{before} and {after} are not a pair"
    kinds = [load_config(source).model_type for source in (before, after)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{where}: {kinds[0]} before, and {kinds[1]} after")
    for name in sorted(left.weights.keys() | right.weights.keys()):
        shapes = left.weights.get(name), right.weights.get(name)
        if shapes[0] != shapes[1]:
            raise InputError(f"{where}: {name} has shape {_shape(shapes[0])} before and {_shape(shapes[1])} after")


def check_surplus(model: Any, source: Source, suite: Suite, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise InputError where a model writes tokens beyond `rows`, which the other side lacks."""
    import torch

    announced = [text for shown in suite.policies.values() for text in wordings(shown)]
    for row in suite.neutral[:GUARDED]:
        speller = Speller(suite, row, tokenizer)
        placed = [speller.announced(text, [row.answer]) for text in announced]
        for tokens in [(*each.spellings[0], *each.rests[0][0]) for each in placed] or [()]:
            ids = torch.tensor([[*speller.context, *tokens]], device=model.device)
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, len(speller.context) - 1 :].double()
            surplus = logits.softmax(-1)[:, rows:]
            if float(surplus.sum(-1).max()) > SURPLUS:
                token = int(surplus.max(0).values.argmax()) + rows
                raise InputError(
                    f"{source}: writes token {token}, which the other checkpoint does not have "
                    f"(probability {float(surplus.sum(-1).max()):.2g} in completions of prompt {row.id!r}): the "
                    "vocabularies differ by more than padding"
                )


def _shape(shape: Sequence[object] | None) -> str:
    return "(absent)" if shape is None else f"[{', '.join(map(str, shape))}]"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
